"""Limits that hold for any durations: with the contention law off, and between the two engines."""

import itertools
from dataclasses import replace
from functools import lru_cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longcat_sim.calibration.roofline import Roofline
from longcat_sim.ops.attention import StepSize
from longcat_sim.ops.graph import LayerLoad, step_graph
from longcat_sim.ops.op import ResourceShares
from longcat_sim.ops.schedules import SCHEDULES
from longcat_sim.simulation.contention import MaxMin, NoContention
from longcat_sim.simulation.lanes import LaneEngine
from longcat_sim.simulation.program import Program, build_program
from longcat_sim.simulation.vectorised import run_arrays
from longcat_sim.specs.deployment import Deployment
from longcat_sim.specs.hardware import load_hardware
from longcat_sim.specs.model import model_spec

KINDS = [("longcat-flash", "longcat"), ("deepseek-v3", "moe")]


@lru_cache
def hardware():
    return load_hardware("h800-sxm")


def small(model: str, overlap: str, ranks: int = 2, layers: int = 2, rows: float = 32.0, link: float = 1.0) -> Program:
    """A few layers on a few ranks, loads drawn once."""
    spec = model_spec(model).replace(num_layers=layers, first_k_dense_replace=0)
    deployment = Deployment(num_gpus=16, ep_size=16, dense_tp_size=2, overlap=overlap)
    rng = np.random.default_rng(1)
    mean = rows * spec.expected_ffn_experts
    sent, received = (rng.normal(mean, 0.1 * mean, (layers, 1, ranks)).round() for _ in range(2))
    load = LayerLoad(sent, received, 8.0)
    blocks = step_graph(spec, deployment, StepSize("decode", rows, 1.0, 3000.0), load)
    out = hardware().scale_out
    device = hardware().model_copy(update={"scale_out": out.model_copy(update={"bandwidth": out.bandwidth * link})})
    return build_program(blocks, Roofline(device), ranks=ranks)


def reshuffled(program: Program, seed: int, heavy: bool) -> Program:
    """The same program with random durations and random shares."""
    rng = np.random.default_rng(seed)
    items, seconds = [], []
    for item in program.items:
        shape = (1, program.ranks) if rng.random() < 0.3 else (1, 1)
        seconds.append(rng.lognormal(0, 1, shape) * (3.0 if heavy and item.is_collective else 1.0) * 1e-5)
        items.append(replace(item, shares=ResourceShares(*rng.choice([0.0, 0.2, 0.5, 0.9, 1.0], size=5))))
    return Program(items, program.lanes, program.order, seconds, 1, program.ranks)


@pytest.mark.parametrize(("name", "layer"), sorted(SCHEDULES))
@settings(max_examples=3, deadline=None)
@given(seed=st.integers(0, 10_000), heavy=st.booleans())
def test_the_vectorised_form_equals_the_event_engine(name, layer, seed, heavy):
    model = dict((kind, of) for of, kind in KINDS).get(layer)
    if model is None or name == "tbo_prefill":
        return
    made = reshuffled(small(model, name), seed, heavy)
    for law in (NoContention(), MaxMin()):
        engine = LaneEngine(made, law).run()
        arrays = run_arrays(made, law)
        assert arrays.step_s[0] == pytest.approx(engine.step_s, rel=1e-6)


@pytest.mark.parametrize("model", [of for of, _ in KINDS])
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 10_000), heavy=st.booleans())
def test_never_faster_than_the_busiest_lane_and_sbo_never_slower_than_none(model, seed, heavy):
    serial = reshuffled(small(model, "none"), seed, heavy)
    by_name = {(i.name, i.segment, i.layer, i.part): s for i, s in zip(serial.items, serial.seconds, strict=True)}
    plan = small(model, "sbo")
    seconds = [by_name[i.name, i.segment, i.layer, i.part] for i in plan.items]
    overlapped = Program(plan.items, plan.lanes, plan.order, seconds, 1, plan.ranks)
    none_s, sbo_s = (run_arrays(p, NoContention()).step_s[0] for p in (serial, overlapped))
    assert sbo_s <= none_s * (1 + 1e-9)
    table = overlapped.table()[:, 0, :]
    busiest = max(table[order].sum(axis=0).max() for order in overlapped.order)
    assert sbo_s >= busiest * (1 - 1e-9)


@pytest.mark.parametrize("overlap", ["none", "sbo", "sbo_engine", "tbo", "chunked"])
def test_more_bandwidth_never_makes_a_step_longer_without_contention(overlap):
    times = [
        run_arrays(small("longcat-flash", overlap, link=link), NoContention()).step_s[0]
        for link in (0.25, 0.5, 1, 2, 8)
    ]
    assert all(later <= earlier * (1 + 1e-12) for earlier, later in itertools.pairwise(times))
    assert times[-1] < times[0] or overlap == "tbo"  # two micro-batches may hide the slowest link here


def test_equals_max_where_resources_do_not_clash():
    # one layer: dispatch beside ffn0 and the projections is the longer of the two, so is combine beside the rest
    made = small("longcat-flash", "sbo", ranks=1, layers=1)
    seconds = {}
    for item, value in zip(made.items, made.seconds, strict=True):
        if item.block == "longcat":
            seconds[item.segment] = seconds.get(item.segment, 0.0) + float(np.max(value))
    head = sum(float(np.max(s)) for i, s in zip(made.items, made.seconds, strict=True) if i.block != "longcat")
    second = max(seconds["dispatch"], seconds["ffn0"] + seconds["mla1_proj"])
    fourth = max(seconds["combine"], seconds["mla1_core"] + seconds["ffn1"])
    layer = seconds["mla0"] + seconds["router"] + second + seconds["experts"] + fourth + seconds["add"]
    assert run_arrays(made, NoContention()).step_s[0] == pytest.approx(layer + head, rel=1e-12)
