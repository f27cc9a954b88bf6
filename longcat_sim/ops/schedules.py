"""Schedules as data: which segment of a layer runs on which lane, in which order.

A *segment* is a run of ops that no schedule cuts (``mla0``, ``dispatch``, ``experts``, ...). What a segment needs is a
fact of the model (``LAYER_INPUTS``) and the same under every schedule; a schedule only assigns lanes and orders. A
segment starts when its inputs are done and its lane has finished what comes before it. The simulator and the
executable expert-parallel model follow the same data.

Source: LongCat-Flash Technical Report, arXiv 2509.01322v2, sections 2.2 (data flow) and 6.1.1 (the four SBO stages).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter

from longcat_sim.errors import ScheduleError

# One LongCat-Flash layer (ScMoE). ``mla1_proj`` is the QKV projection of the second MLA; ``mla1_core`` its core
# attention and output projection; ``add`` joins the shortcut with the second dense FFN's residual.
LONGCAT_LAYER: dict[str, tuple[str, ...]] = {
    "mla0": (),
    "router": ("mla0",),
    "dispatch": ("router",),
    "ffn0": ("mla0",),
    "mla1_proj": ("ffn0",),
    "experts": ("dispatch",),
    "combine": ("experts",),
    "mla1_core": ("mla1_proj",),
    "ffn1": ("mla1_core",),
    "add": ("ffn1", "combine"),
}
# One DeepSeek-V3-style MoE layer: attention, then routed experts beside a shared expert.
MOE_LAYER: dict[str, tuple[str, ...]] = {
    "attn_proj": (),
    "attn_core": ("attn_proj",),
    "router": ("attn_core",),
    "dispatch": ("router",),
    "shared": ("attn_core",),
    "experts": ("dispatch",),
    "combine": ("experts",),
    "add": ("shared", "combine"),
}
# One dense transformer layer.
DENSE_LAYER: dict[str, tuple[str, ...]] = {
    "attn_proj": (),
    "attn_core": ("attn_proj",),
    "ffn": ("attn_core",),
}
LAYER_INPUTS: dict[str, dict[str, tuple[str, ...]]] = {
    "longcat": LONGCAT_LAYER,
    "moe": MOE_LAYER,
    "dense": DENSE_LAYER,
}
COMMUNICATION = frozenset({"dispatch", "combine"})


@dataclass(frozen=True)
class Schedule:
    """An order of segments on lanes for one kind of layer.

    ``lanes`` maps a lane's name to its segments in order. An entry is ``segment`` or ``segment@i`` for part ``i`` of a
    layer cut into ``parts`` (micro-batches of TBO, token chunks of chunked ScMoE); a bare name is part 0.
    """

    name: str
    layer: str
    lanes: Mapping[str, tuple[str, ...]] = field(hash=False)
    parts: int = 1

    def entries(self) -> list[tuple[str, str, int]]:
        """Return (lane, segment, part) of every entry, lane by lane in order."""
        return [(lane, *split(entry)) for lane, order in self.lanes.items() for entry in order]

    def dependencies(self) -> dict[tuple[str, int], set[tuple[str, int]]]:
        """Return what each (segment, part) waits for inside its layer: its inputs and its lane's predecessor."""
        inputs = LAYER_INPUTS[self.layer]
        waits: dict[tuple[str, int], set[tuple[str, int]]] = {}
        for order in self.lanes.values():
            before = None
            for entry in order:
                segment, part = split(entry)
                waits[segment, part] = {(needed, part) for needed in inputs.get(segment, ())}
                if before is not None:
                    waits[segment, part].add(before)
                before = (segment, part)
        return waits

    def launch_order(self) -> list[tuple[str, int]]:
        """Return one order in which every (segment, part) comes after all that it waits for, communication first.

        Raises:
            ScheduleError: the schedule forgets or repeats a segment, names an unknown one, or has a cycle.
        """
        self.check()
        sorter = TopologicalSorter(self.dependencies())
        sorter.prepare()
        order: list[tuple[str, int]] = []
        ready: list[tuple[str, int]] = []
        while sorter.is_active():
            ready += sorter.get_ready()
            ready.sort(key=lambda at: (at[0] not in COMMUNICATION, at[1]))
            at = ready.pop(0)
            order.append(at)
            sorter.done(at)
        return order

    def check(self) -> None:
        """Raise ScheduleError, with every fault, unless each segment stands once for each part and nothing cycles."""
        faults = []
        wanted = {(segment, part) for segment in LAYER_INPUTS[self.layer] for part in range(self.parts)}
        found = [(segment, part) for _, segment, part in self.entries()]
        for at in sorted(wanted - set(found)):
            faults.append(f"schedule {self.name}: expected every segment once per part; {_show(at)} is missing; add it")
        for at in sorted(set(found) - wanted):
            known = ", ".join(LAYER_INPUTS[self.layer])
            faults.append(f"schedule {self.name}: expected one of {known}, parts 0..{self.parts - 1}; got {_show(at)}")
        for at in sorted({at for at in found if found.count(at) > 1}):
            faults.append(f"schedule {self.name}: expected every segment once per part; {_show(at)} stands twice")
        if not faults:
            try:
                TopologicalSorter(self.dependencies()).prepare()
            except CycleError as error:
                ring = " -> ".join(_show(at) for at in error.args[1])
                faults.append(f"schedule {self.name}: expected no cycle; got {ring}; reorder one lane")
        if faults:
            raise ScheduleError(faults)


def split(entry: str) -> tuple[str, int]:
    """Return (segment, part) of ``segment`` or ``segment@part``."""
    segment, _, part = entry.partition("@")
    return segment, int(part or 0)


def _show(at: tuple[str, int]) -> str:
    return f"{at[0]}@{at[1]}" if at[1] else at[0]


SCHEDULES: dict[tuple[str, str], Schedule] = {
    (schedule.name, schedule.layer): schedule
    for schedule in [
        Schedule(
            "none",
            "longcat",
            {
                "compute": (
                    "mla0", "router", "dispatch", "experts", "combine", "ffn0", "mla1_proj", "mla1_core", "ffn1", "add",
                )
            },
        ),
        Schedule(
            "sbo",
            "longcat",
            {
                "compute": ("mla0", "router", "ffn0", "mla1_proj", "experts", "mla1_core", "ffn1", "add"),
                "communication": ("dispatch", "combine"),
            },
        ),
        Schedule(
            "none",
            "moe",
            {
                "compute": (
                    "attn_proj", "attn_core", "router", "dispatch", "experts", "combine", "shared", "add",
                )
            },
        ),
        Schedule("none", "dense", {"compute": ("attn_proj", "attn_core", "ffn")}),
    ]
}  # fmt: skip


def schedule(name: str, layer: str) -> Schedule:
    """Return the schedule ``name`` for a kind of layer (``longcat``, ``moe`` or ``dense``).

    Raises:
        ScheduleError: no such schedule for this kind of layer; lists those there are.
    """
    if (name, layer) not in SCHEDULES:
        known = ", ".join(sorted({n for n, of in SCHEDULES if of == layer})) or "none"
        raise ScheduleError(f"overlap: expected one of {known} for a {layer} layer; got {name!r}; choose one of these")
    return SCHEDULES[name, layer]
