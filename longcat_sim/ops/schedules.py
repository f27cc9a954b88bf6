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
from typing import NamedTuple

from longcat_sim.errors import ScheduleError
from longcat_sim.specs.deployment import overlap_fault

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


At = tuple[str, int]  # (segment, part)
AtLayer = tuple[int, str, int]  # (layer, segment, part)


class Launch(NamedTuple):
    """One segment as the executable model launches it."""

    segment: str
    lane: str
    waits: frozenset[str]
    """Segments that end before it starts."""


@dataclass(frozen=True)
class Schedule:
    """An order of segments on lanes for one kind of layer.

    ``lanes`` maps a lane's name to its segments in order. An entry is ``segment`` or ``segment@i`` for part ``i`` of a
    layer cut into ``parts`` (micro-batches of TBO, token chunks of chunked ScMoE); a bare name is part 0. ``+1`` behind
    an entry means that segment of the *next* layer (TBO starts a micro-batch's next layer early). Segments in ``whole``
    are not cut: they stand once, and wait for every part of what they need.
    """

    name: str
    layer: str
    lanes: Mapping[str, tuple[str, ...]] = field(hash=False)
    parts: int = 1
    whole: frozenset[str] = frozenset()
    after: Mapping[str, tuple[str, ...]] = field(default_factory=dict, hash=False)
    """Further waits that the schedule imposes beside the model's: segment -> segments, all their parts."""

    def entries(self) -> list[tuple[str, str, int]]:
        """Return (lane, segment, part) of every entry, lane by lane in order."""
        return [(lane, *split(entry)) for lane, order in self.lanes.items() for entry in order]

    def parts_of(self, segment: str) -> range:
        """Return the parts into which ``segment`` is cut."""
        return range(1 if segment in self.whole else self.parts)

    def inputs_of(self, segment: str, part: int) -> list[At]:
        """Return what (segment, part) needs inside its layer: a fact of the model."""
        needed = []
        for name in LAYER_INPUTS[self.layer][segment]:
            if segment in self.whole:
                needed += [(name, i) for i in self.parts_of(name)]
            else:
                needed.append((name, 0 if name in self.whole else part))
        for name in self.after.get(segment, ()):
            needed += [(name, i) for i in self.parts_of(name)]
        return needed

    def layer_inputs(self, part: int) -> list[At]:
        """Return what the first segments of the next layer's ``part`` wait for: this layer's last segments."""
        last = sinks(self.layer)
        return [(name, 0 if name in self.whole else part) for name in last]

    def unrolled(self, layers: int) -> dict[str, list[AtLayer]]:
        """Return each lane's order over a stack of ``layers``; ``+1`` entries of the first layer come first."""
        lanes: dict[str, list[AtLayer]] = {}
        for lane, entries in self.lanes.items():
            early = [(0, *split(entry)) for entry in entries if entry.endswith("+1")]
            steady = [
                (layer + entry.endswith("+1"), *split(entry))
                for layer in range(layers)
                for entry in entries
                if layer + entry.endswith("+1") < layers
            ]
            lanes[lane] = early + steady
        return lanes

    def waits(self, layers: int) -> dict[AtLayer, set[AtLayer]]:
        """Return what each (layer, segment, part) of a stack waits for: its inputs, its lane's predecessor, and, for
        first segments, the layer before."""
        waits: dict[AtLayer, set[AtLayer]] = {}
        for order in self.unrolled(layers).values():
            before = None
            for layer, segment, part in order:
                at = (layer, segment, part)
                needed = {(layer, *other) for other in self.inputs_of(segment, part)}
                if not LAYER_INPUTS[self.layer][segment] and layer:
                    parts = range(self.parts) if segment in self.whole else (part,)
                    needed |= {(layer - 1, *other) for i in parts for other in self.layer_inputs(i)}
                if before is not None:
                    needed.add(before)
                waits[at] = needed
                before = at
        return waits

    def dependencies(self) -> dict[At, set[At]]:
        """Return what each (segment, part) waits for inside one layer: its inputs and its lane's predecessor."""
        return {at[1:]: {other[1:] for other in needed} for at, needed in self.waits(1).items()}

    def launch_order(self) -> list[At]:
        """Return one order in which every (segment, part) comes after all that it waits for, communication first.

        Raises:
            ScheduleError: the schedule forgets or repeats a segment, names an unknown one, or has a cycle.
        """
        self.check()
        sorter = TopologicalSorter(self.dependencies())
        sorter.prepare()
        order: list[At] = []
        ready: list[At] = []
        while sorter.is_active():
            ready += sorter.get_ready()
            ready.sort(key=lambda at: (at[0] not in COMMUNICATION, at[1]))
            at = ready.pop(0)
            order.append(at)
            sorter.done(at)
        return order

    def launches(self) -> list[Launch]:
        """Return the segments of a schedule of one part in an order in which they can be launched.

        Raises:
            ScheduleError: as ``launch_order``, or a schedule that cuts a layer in parts.
        """
        if self.parts != 1:
            raise ScheduleError(f"overlap: expected a schedule of one part, such as sbo; got {self.name}")
        lane_of = {segment: lane for lane, segment, _ in self.entries()}
        waits = {at[0]: frozenset(other[0] for other in needs) for at, needs in self.dependencies().items()}
        return [Launch(segment, lane_of[segment], waits[segment]) for segment, _ in self.launch_order()]

    def check(self) -> None:
        """Raise ScheduleError, with every fault, unless each segment stands once for each part and nothing cycles."""
        faults = []
        wanted = {(segment, part) for segment in LAYER_INPUTS[self.layer] for part in self.parts_of(segment)}
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
                TopologicalSorter(self.waits(3)).prepare()
            except CycleError as error:
                ring = " -> ".join(_show(at[1:]) for at in error.args[1])
                faults.append(f"schedule {self.name}: expected no cycle; got {ring}; reorder one lane")
        if faults:
            raise ScheduleError(faults)


def sinks(layer: str) -> tuple[str, ...]:
    """Return the segments that no other segment of the layer needs."""
    inputs = LAYER_INPUTS[layer]
    needed = {name for names in inputs.values() for name in names}
    return tuple(name for name in inputs if name not in needed)


def split(entry: str) -> At:
    """Return (segment, part) of ``segment``, ``segment@part`` or ``segment@part+1``."""
    segment, _, part = entry.removesuffix("+1").partition("@")
    return segment, int(part or 0)


def _show(at: At) -> str:
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
        # meituan-longcat/SGLang-FluentLLM longcat_flash_overlap.py: the experts run on the stream of the exchange,
        # beside the second MLA's core
        Schedule(
            "sbo_engine",
            "longcat",
            {
                "compute": ("mla0", "router", "ffn0", "mla1_proj", "mla1_core", "ffn1", "add"),
                "communication": ("dispatch", "experts", "combine"),
            },
        ),
        # arXiv 2509.01322v2, section 5 (Fig. 8): the MoE branch in two token chunks that overlap the dense FFN and each
        # other; the second MLA, which has an exchange of its own under context parallelism, comes after
        Schedule(
            "chunked",
            "longcat",
            {
                "compute": (
                    "mla0", "router", "ffn0", "experts@0", "experts@1", "mla1_proj", "mla1_core", "ffn1", "add",
                ),
                "communication": ("dispatch@0", "dispatch@1", "combine@0", "combine@1"),
            },
            parts=2,
            after={"mla1_proj": ("combine",)},
            whole=frozenset({"mla0", "router", "ffn0", "mla1_proj", "mla1_core", "ffn1", "add"}),
        ),
        # two micro-batches through a ScMoE layer: one's exchange beside the other's dense part
        Schedule(
            "tbo",
            "longcat",
            {
                "compute": (
                    "mla0@0", "router@0", "mla0@1", "router@1", "ffn0@0", "mla1_proj@0", "experts@0", "ffn0@1",
                    "mla1_proj@1", "experts@1", "mla1_core@0", "ffn1@0", "add@0", "mla1_core@1", "ffn1@1", "add@1",
                ),
                "communication": ("dispatch@0", "dispatch@1", "combine@0", "combine@1"),
            },
            parts=2,
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
        # the shared expert beside the dispatch
        Schedule(
            "sbo",
            "moe",
            {
                "compute": ("attn_proj", "attn_core", "router", "shared", "experts", "add"),
                "communication": ("dispatch", "combine"),
            },
        ),
        # deepseek-ai/profile-data README: shared(mb0), attn0(mb1) || dispatch(mb0); mlp(mb0); attn1(mb1) ||
        # combine(mb0); then swapped. attn0 is everything before the core, attn1 the core and what follows.
        Schedule(
            "tbo",
            "moe",
            {
                "compute": (
                    "shared@0", "attn_proj@1", "experts@0", "attn_core@1", "router@1", "shared@1", "add@0",
                    "attn_proj@0+1", "experts@1", "attn_core@0+1", "router@0+1", "add@1",
                ),
                "communication": ("dispatch@0", "combine@0", "dispatch@1", "combine@1"),
            },
            parts=2,
        ),
        # attention and MoE of one micro-batch beside dispatch and combine of the other: DeepSeek-V3 report,
        # arXiv 2412.19437, section 3.4.1 (prefill; the order above is that of decode)
        Schedule(
            "tbo_prefill",
            "moe",
            {
                "compute": (
                    "attn_proj@1", "attn_core@1", "router@1", "shared@0", "experts@0", "shared@1", "experts@1", "add@0",
                    "attn_proj@0+1", "attn_core@0+1", "router@0+1", "add@1",
                ),
                "communication": ("dispatch@0", "dispatch@1", "combine@0", "combine@1"),
            },
            parts=2,
        ),
        Schedule("none", "dense", {"compute": ("attn_proj", "attn_core", "ffn")}),
        Schedule(
            "tbo", "dense", {"compute": ("attn_proj@0", "attn_core@0", "ffn@0", "attn_proj@1", "attn_core@1", "ffn@1")},
            parts=2,
        ),
    ]
}  # fmt: skip


def schedule(name: str, layer: str) -> Schedule:
    """Return the schedule ``name`` for a kind of layer (``longcat``, ``moe`` or ``dense``).

    A dense layer has no exchange to hide: it runs ``none`` under every name but ``tbo``, which cuts it in two.

    Raises:
        ScheduleError: no such schedule for this kind of layer; lists those there are.
    """
    fault = overlap_fault(name, layer)
    if fault:
        raise ScheduleError(f"overlap: {fault}")
    if layer == "dense":
        name = "tbo" if name.startswith("tbo") else "none"
    return SCHEDULES[name, layer]
