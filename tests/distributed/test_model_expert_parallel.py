"""Expert parallelism on gloo ranks: equal to one process, bytes equal to the ops, overlap in fact, lost ranks named."""

import re
import subprocess
import sys
import textwrap
from datetime import timedelta
from itertools import pairwise

import numpy as np
import pytest

torch = pytest.importorskip("torch")
import torch.distributed as dist  # noqa: E402

from longcat_sim.errors import ModelError, ScheduleError  # noqa: E402
from longcat_sim.model import LongcatFlash  # noqa: E402
from longcat_sim.model.distributed import run_ranks  # noqa: E402
from longcat_sim.model.expert_parallel import expert_range  # noqa: E402
from longcat_sim.model.ops_of import Pass, segment_ops  # noqa: E402
from longcat_sim.records.span import busy_s  # noqa: E402
from longcat_sim.specs.model import model_spec  # noqa: E402

TINY = model_spec("longcat-tiny")


@pytest.fixture(scope="module")
def two_ranks():
    return run_ranks(TINY, ("sbo", "none"), batch=2, queries=24, repeats=2, warmup=0, outputs=True)


def test_outputs_equal_the_single_process(two_ranks):
    whole = LongcatFlash(TINY, seed=0)
    with torch.inference_mode():
        for tokens, logits in zip(two_ranks.tokens, two_ranks.logits, strict=True):
            expected = whole(torch.from_numpy(tokens)).flatten(0, 1)
            torch.testing.assert_close(torch.from_numpy(logits), expected, atol=1e-4, rtol=0)


def test_bytes_on_the_wire_are_those_of_the_ops_and_of_the_routing(two_ranks):
    whole = LongcatFlash(TINY, seed=0)
    row_bytes = TINY.hidden_size * 4
    for rank, tokens in enumerate(two_ranks.tokens):
        with torch.inference_mode(), whole.record_routing() as trace:
            whole(torch.from_numpy(tokens))
        sent = trace().ffn_experts().sum(1)  # zero-computation experts send nothing
        assert two_ranks.moved_bytes[rank]["dispatch"] == (sent * row_bytes).tolist()
        assert two_ranks.moved_bytes[rank]["combine"] == (sent * row_bytes).tolist()
        away = sent - trace().tokens_per_rank(2)[:, rank]
        assert two_ranks.off_rank_bytes[rank]["dispatch"] == (away * row_bytes).tolist()
        for layer, rows in enumerate(sent):
            step = Pass(2, 24, ep_size=2, sent_rows=float(rows))
            for name in ("dispatch", "combine"):
                of_op = segment_ops(TINY, name, step)[-1]
                assert of_op.message_bytes == two_ranks.moved_bytes[rank][name][layer]


def test_spans_follow_the_schedule(two_ranks):
    for mode in ("none", "sbo"):
        for rank in range(2):
            spans = [s for s in two_ranks.spans[mode][0] if s.rank == rank and s.layer == 0]
            at = {span.name: span for span in spans}
            assert set(at) == {
                "mla0", "router", "plan", "dispatch", "experts", "combine", "ffn0", "mla1_proj", "mla1_core", "ffn1",
                "add",
            }  # fmt: skip
            compute = sorted((s for s in spans if s.lane == "compute"), key=lambda s: s.start_s)
            for first, second in pairwise(compute):
                assert second.start_s >= first.end_s - 1e-9
            assert at["experts"].start_s >= at["dispatch"].end_s - 1e-4
            if mode == "none":
                assert at["ffn0"].start_s >= at["combine"].end_s - 1e-4
            else:
                assert at["ffn0"].start_s < at["experts"].start_s
                assert at["combine"].start_s < at["ffn1"].start_s


@pytest.mark.slow
def test_paced_link_is_hidden_by_sbo():
    # a link that waits without a processor: what SBO hides is real time
    spec = model_spec("longcat-tiny").replace(hidden_size=256, ffn_hidden_size=1024)
    probe = run_ranks(spec, ("none",), batch=4, queries=128, repeats=3, warmup=1)
    compute_s = float(np.median(probe.seconds["compute"]))
    link = {"latency_s": compute_s / (4 * spec.num_layers), "bytes_per_s": 1e12}  # exchanges take half the compute
    found = run_ranks(spec, ("none", "sbo"), batch=4, queries=128, repeats=10, warmup=1, link=link)
    ratio = float(np.median(found.seconds["sbo"] / found.seconds["none"]))
    both = []  # busy time of both lanes over the step, of each repeat and rank
    for repeat, spans in enumerate(found.spans["sbo"]):
        for rank in range(2):
            talk, work = (
                [s for s in spans if s.rank == rank and s.lane == lane] for lane in ("communication", "compute")
            )
            assert all(s.duration_s >= link["latency_s"] for s in talk)
            both.append((busy_s(talk) + busy_s(work)) / float(found.rank_seconds["sbo"][rank, repeat]))
    print({mode: round(float(np.median(s)) * 1e3, 2) for mode, s in found.seconds.items()}, "ms; sbo/none", ratio)
    assert ratio < 0.95
    assert np.median(both) > 1.0  # both lanes are busy at once


@pytest.mark.slow
def test_cached_decode_and_four_ranks():
    found = run_ranks(TINY, ("sbo",), batch=3, queries=1, context_tokens=100, repeats=1, num_ranks=4, outputs=True)
    assert len(found.logits) == 4
    assert all(np.isfinite(logits).all() and logits.shape == (3, TINY.vocab_size) for logits in found.logits)


def test_wrong_requests():
    with pytest.raises(ModelError, match="16 % 3 = 1; try one of 1, 2, 4, 8, 16"):
        expert_range(16, 0, 3)
    with pytest.raises(ModelError, match="16 % 3 = 1"):
        run_ranks(TINY, batch=1, num_ranks=3)
    with pytest.raises(ScheduleError, match="sbo"):
        run_ranks(TINY, ("faster",), batch=1)
    with pytest.raises(ModelError, match="repeats: expected at least 1"):
        run_ranks(TINY, batch=1, repeats=0)


DYING = textwrap.dedent("""
    import os, sys, time
    import torch
    from longcat_sim.model.expert_parallel import ExpertParallel, expert_range
    from longcat_sim.model.links import connect
    from longcat_sim.model.longcat import LongcatFlash
    rank, port = int(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    beat = connect(rank, 2, "127.0.0.1", port, timeout_s=20)
    model = LongcatFlash("longcat-tiny", experts=expert_range(16, rank, 2), seed=0)
    tokens = torch.zeros(1, 8, dtype=torch.long)
    with torch.inference_mode(), ExpertParallel(model, "sbo", who_is_gone=beat.gone):
        model(tokens)
        if rank == 1:
            os._exit(7)
        model(tokens)
""")


def test_a_lost_rank_is_named():
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=30))
    ranks = [
        subprocess.Popen([sys.executable, "-c", DYING, str(rank), str(store.port)], stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    _, error = ranks[0].communicate(timeout=60)
    ranks[1].communicate(timeout=60)
    assert ranks[1].returncode == 7
    assert ranks[0].returncode != 0
    # its sockets may be reset while rank 0 still combines what came before
    assert re.search(r"rank 0: (dispatch|combine)", error)
    assert "gone: rank 1" in error
