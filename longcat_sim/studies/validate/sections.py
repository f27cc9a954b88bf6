"""The sections of ``validate``, in order: what each compares, and where it is computed."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence

from longcat_sim.errors import SpecError
from longcat_sim.studies.validate.section import Section

SECTIONS: dict[str, str] = {
    "longcat-report": "the LongCat-Flash report: theory table, and three measured decode rows",
    "deepseek-v3": "DeepSeek-V3 on H800: decode and prefill throughput",
    "training-overlap": "ScMoE training: share of exposed dispatch and combine",
    "h800-trace": "an H800 kernel trace: every kernel's start (needs the trace)",
    "limits": "where overlap with contention makes a step longer, by batch",
    "ops": "fitted op times against held-out measurements",
    "own-step": "steps of the executable model on this machine, predicted from its ops",
    "gpu-campaign": "one H100: steps, overlap, contention and roofs, measured and predicted from its ops",
    "transfer": "op times fitted on some systems, predicted for others",
    "ranks": "two real gloo ranks of the executable model, with and without overlap",
}
MINUTES = frozenset({"ranks"})
"""Sections that take minutes and tell how far they are."""


def run_sections(names: Sequence[str] = (), progress: Callable[[str], None] | None = None) -> list[Section]:
    """Return the named sections, all by default.

    Raises:
        SpecError: an unknown name; lists the valid ones.
    """
    unknown = [name for name in names if name not in SECTIONS]
    if unknown:
        raise SpecError(
            f"--section: expected some of {', '.join(SECTIONS)}; got {', '.join(unknown)}; choose known ones"
        )
    found = []
    for name in names or SECTIONS:
        if progress is not None:
            progress(f"{name}: {SECTIONS[name]}")
        module = importlib.import_module(f"longcat_sim.studies.validate.{name.replace('-', '_')}")
        found.append(module.run(progress=progress) if name in MINUTES else module.run())
    return found
