"""One rank of ``run_ranks``: ``python -m longcat_sim.model.rank_worker JOB RANK``; not for use by hand."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import astuple
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from longcat_sim.errors import UserError
from longcat_sim.model.cache import LatentCache
from longcat_sim.model.expert_parallel import ExpertParallel, expert_range
from longcat_sim.model.heap import keep_freed_memory
from longcat_sim.model.links import PacedLink, connect
from longcat_sim.model.longcat import ABSORBED, LongcatFlash
from longcat_sim.specs.model import ModelSpec


class Worker:
    """Holds the model and one step's inputs; runs the step in any mode."""

    def __init__(self, job: dict[str, Any], rank: int, folder: Path) -> None:
        torch.set_num_threads(1)
        keep_freed_memory()
        self.job, self.rank = job, rank
        ranks = job["num_ranks"]
        spec = ModelSpec.model_validate(job["spec"])
        self.beat = connect(rank, ranks, "127.0.0.1", job["port"], timeout_s=job["timeout_s"])
        dtype = getattr(torch, job["dtype"])
        held = expert_range(spec.n_routed_experts, rank, ranks)
        self.model = LongcatFlash(spec, dtype=dtype, experts=held, seed=job["seed"])
        draw = torch.Generator().manual_seed(job["seed"] + 1 + rank)
        shape = (job["batch"], job["queries"])
        self.tokens = torch.randint(0, spec.vocab_size, shape, generator=draw)
        self.cache = None
        if job["context_tokens"]:
            size = job["context_tokens"] + job["queries"]
            self.cache = LatentCache(spec, num_sequences=job["batch"], max_tokens=size, dtype=dtype)
            self.cache.pool.normal_(0.0, 0.1, generator=draw)
            self.cache.lengths = [job["context_tokens"]] * job["batch"]
        link = None
        if job["link"]:
            link = PacedLink(job["link"]["latency_s"], job["link"]["bytes_per_s"], ranks, folder / "launches")
        self.parallel = ExpertParallel(self.model, "sbo", link=link, who_is_gone=self.beat.gone)

    def step(self, mode: str) -> tuple[float, float, torch.Tensor]:
        """Run one step by a schedule's name, or ``compute`` or ``communication`` alone; return start, end, hidden."""
        alone = mode in ("compute", "communication")
        self.parallel.mode = mode if alone else "full"  # type: ignore[assignment]
        self.parallel.follow("none" if alone else mode)
        if self.cache is not None:
            for slot in range(self.job["batch"]):
                self.cache.truncate(slot, self.job["context_tokens"])
        batch, queries = self.tokens.shape
        step = self.model.step(batch, queries, self.cache, None, ABSORBED if self.cache is not None else None)
        dist.barrier()
        self.parallel.clear()
        start_s = time.perf_counter()
        hidden = self.model.run_layers(self.tokens, step)
        return start_s, time.perf_counter(), hidden


@torch.inference_mode()
def main(job_path: str, rank_text: str) -> None:
    """Run the job and write this rank's result beside it."""
    path, rank = Path(job_path), int(rank_text)
    job = json.loads(path.read_text())
    worker = Worker(job, rank, path.parent)
    result: dict[str, Any] = {"start_s": {}, "end_s": {}, "spans": {}}
    with worker.parallel:
        first = next(mode for mode in job["modes"] if mode not in ("compute", "communication"))
        _, _, hidden = worker.step(first)  # fixes the shapes that the parts alone repeat
        result["moved_bytes"], result["off_rank_bytes"] = worker.parallel.moved, worker.parallel.off_rank
        if job["outputs"]:
            np.save(path.parent / f"logits{rank}.npy", worker.model.head(hidden).float().numpy())
            np.save(path.parent / f"tokens{rank}.npy", worker.tokens.numpy())
        for repeat in range(-job["warmup"], job["repeats"]):
            for mode in job["modes"]:
                start_s, end_s, _ = worker.step(mode)
                if repeat >= 0:
                    result["start_s"].setdefault(mode, []).append(start_s)
                    result["end_s"].setdefault(mode, []).append(end_s)
                    spans = [astuple(span) for span in worker.parallel.spans] if job["spans"] else []
                    result["spans"].setdefault(mode, []).append(spans)
    dist.barrier()
    worker.beat.stop()
    (path.parent / f"result{rank}.json").write_text(json.dumps(result))
    dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
