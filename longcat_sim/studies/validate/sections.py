"""The sections of ``validate``, in order: what each compares, and where it is computed."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Sequence

from longcat_sim.errors import SpecError
from longcat_sim.specs.hardware import hardware_names
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
PER_HARDWARE = ("ops", "transfer")
"""Sections that can be restricted to some hardware profiles."""


def run_sections(
    names: Sequence[str] = (), progress: Callable[[str], None] | None = None, hardware: Sequence[str] = ()
) -> list[Section]:
    """Return the named sections, all by default; with ``hardware`` those that are per hardware, of these profiles.

    Raises:
        SpecError: an unknown name, or ``hardware`` for a section that has none; lists the valid ones.
    """
    unknown = [name for name in names if name not in SECTIONS]
    if unknown:
        raise SpecError(
            f"--section: expected some of {', '.join(SECTIONS)}; got {', '.join(unknown)}; choose known ones"
        )
    for name in hardware:
        if name not in hardware_names():
            near = difflib.get_close_matches(name, hardware_names(), n=1)
            remedy = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(hardware_names())}"
            raise SpecError(f"--hardware: expected the name of a profile, such as h100-sxm; got {name!r}; {remedy}")
    others = [name for name in names if name not in PER_HARDWARE]
    if hardware and others:
        raise SpecError(
            f"--hardware: expected --section {' or '.join(PER_HARDWARE)}, which are per hardware; got "
            f"{', '.join(others)}; leave one of the two out"
        )
    found = []
    for name in names or (PER_HARDWARE if hardware else SECTIONS):
        if progress is not None:
            progress(f"{name}: {SECTIONS[name]}")
        module = importlib.import_module(f"longcat_sim.studies.validate.{name.replace('-', '_')}")
        kept = {"hardware": hardware} if hardware else {"progress": progress} if name in MINUTES else {}
        found.append(module.run(**kept))
    return found
