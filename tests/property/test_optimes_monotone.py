"""No predicted time falls when a size grows: packaged H800 fit, every kind that it holds."""

from functools import lru_cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longcat_sim.calibration import OpTimes
from longcat_sim.ops import op
from longcat_sim.specs.hardware import load_hardware

RANGES = {
    "gemm": {"m": (1, 40000), "n": (64, 40000), "k": (64, 20000)},
    "grouped_gemm": {"groups": (1, 300), "m": (300, 60000), "n": (512, 8192), "k": (512, 8192)},
    "mla_decode": {"batch": (1, 600), "queries": (1, 3), "context": (1, 200000), "heads": (1, 128),
                   "latent": (512, 512), "rope": (64, 64)},
    "topk": {"rows": (1, 5000), "n": (2048, 200000), "k": (2048, 2048)},
    "elementwise": {"rows": (1, 50000), "width": (32, 50000), "inputs": (1, 3)},
}  # fmt: skip
KEYS = [
    ("gemm", "fp8", ""), ("gemm", "bf16", ""), ("grouped_gemm", "fp8", "masked"), ("mla_decode", "bf16", ""),
    ("topk", "fp32", ""), ("elementwise", "bf16", ""),
]  # fmt: skip


@lru_cache(maxsize=2)
def times_of(name: str) -> OpTimes:
    return OpTimes.from_hardware(load_hardware(name))


def h800() -> OpTimes:
    return times_of("h800-sxm")


@pytest.mark.parametrize(("variant", "heads"), [("narrow", (1, 32)), ("", (33, 128))])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_neither_of_two_kernels_falls_as_a_size_grows(
    variant: str, heads: tuple[int, int], data: st.DataObject
) -> None:
    """A B200 has a kernel for few heads and one for all others; from one to the other times do fall."""
    ranges = RANGES["mla_decode"] | {"heads": heads}
    sizes = {name: data.draw(st.integers(*bounds)) for name, bounds in ranges.items()}
    name = data.draw(st.sampled_from(["batch", "queries", "context", "heads"]))
    grown = {**sizes, name: data.draw(st.integers(sizes[name], ranges[name][1]))}
    assert ("mla_decode", "bf16", variant) in times_of("b200-sxm").laws_
    before, after = (times_of("b200-sxm").seconds(op("mla_decode", variant=variant, **s)) for s in (sizes, grown))
    assert after >= before * (1 - 1e-9)


@pytest.mark.parametrize("key", KEYS, ids=" ".join)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_no_time_falls_as_a_size_grows(key: tuple[str, str, str], data: st.DataObject) -> None:
    kind, dtype, variant = key
    sizes = {name: data.draw(st.integers(*bounds)) for name, bounds in RANGES[kind].items()}
    name = data.draw(st.sampled_from([n for n, (low, high) in RANGES[kind].items() if low < high]))
    grown = {**sizes, name: data.draw(st.integers(sizes[name], RANGES[kind][name][1]))}
    before = h800().seconds(op(kind, dtype=dtype, variant=variant, **sizes))
    after = h800().seconds(op(kind, dtype=dtype, variant=variant, **grown))
    assert after >= before * (1 - 1e-9)
    assert before > 0
