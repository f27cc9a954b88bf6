"""The vocabulary of a step: ops, their graph, and the schedules as data."""

from longcat_sim.ops.op import KINDS, FloatArray, Op, OpArrays, OpTimesLike, ResourceShares, Tag, op, worst_tag

__all__ = ["KINDS", "FloatArray", "Op", "OpArrays", "OpTimesLike", "ResourceShares", "Tag", "op", "worst_tag"]
