"""Collectives that nobody measured are as uncertain as measured ones show such predictions to be, and say so."""

from collections.abc import Iterator

import numpy as np
import pytest

from longcat_sim.calibration.collective_curves import Curve
from longcat_sim.calibration.collective_file import read_collectives
from longcat_sim.calibration.collectives import (
    BORROWED_SPREAD,
    CARRIED_SPREAD,
    EXTRAPOLATED_SPREAD,
    NCCL_KINDS,
    NCCL_SHEET_SPREAD,
    SHEET_SPREAD,
    SPREAD,
    CollectiveTimes,
)
from longcat_sim.calibration.op_times import OpTimes
from longcat_sim.calibration.roofline import Roofline
from longcat_sim.ops.op import FloatArray, OpArrays, op
from longcat_sim.specs.hardware import HardwareSpec, hardware_names, load_hardware
from longcat_sim.specs.scenario import scenario
from longcat_sim.studies.simulate import simulate

Table = tuple[Curve, OpArrays, FloatArray]


def packaged() -> Iterator[tuple[HardwareSpec, CollectiveTimes, dict[tuple[str, str], list[Table]]]]:
    """Yield each device's own tables, by kind and variant: what was measured there, no lent point."""
    for name in hardware_names():
        hardware = load_hardware(name)
        times = read_collectives(hardware)
        found: dict[tuple[str, str], list[Table]] = {}
        for curve in times.curves_ if times is not None else ():
            if curve.borrowed and curve.bytes[0] > 0:  # wholly another device's
                continue
            size, seconds = np.array([pair for pair in zip(curve.bytes, curve.seconds, strict=True) if pair[0]]).T
            dims = {"message_bytes": size, "ranks": np.full(len(size), float(curve.ranks))}
            table = curve, OpArrays(curve.kind, dims, "bf16", curve.variant), seconds
            found.setdefault((curve.kind, curve.variant), []).append(table)
        if times is not None:
            yield hardware, times, found


def alike(errors: list[FloatArray]) -> float:
    """Return the root mean square, each table weighted alike."""
    return float(np.sqrt(np.mean([np.mean(each**2) for each in errors])))


def test_the_error_of_a_data_sheets_collectives_is_that_of_the_measured_ones() -> None:
    errors: dict[bool, list[FloatArray]] = {True: [], False: []}
    for hardware, _, found in packaged():
        sheet = Roofline(hardware)
        for (kind, _variant), tables in found.items():
            logs = [np.log(seconds / sheet.seconds_many(asked)) for _, asked, seconds in tables]
            errors[kind in NCCL_KINDS].append(np.concatenate(logs))
    assert [(len(each), sum(map(len, each))) for each in errors.values()] == [(28, 380), (22, 280)]
    assert alike(errors[False]) == pytest.approx(SHEET_SPREAD, abs=0.005)
    assert alike(errors[True]) == pytest.approx(NCCL_SHEET_SPREAD, abs=0.005)
    medians = [float(np.exp(np.median([np.median(each) for each in errors[key]]))) for key in (False, True)]
    assert medians == pytest.approx([1.15, 1.29], abs=0.005)  # as the notes say


def test_the_error_beyond_the_measured_ranks_is_that_of_tables_left_out() -> None:
    errors = []
    for hardware, times, found in packaged():
        for (kind, _variant), tables in found.items():
            for kept in range(1, len(tables)):
                if kind in NCCL_KINDS or tables[kept - 1][0].ranks < 16:
                    continue
                fewer = CollectiveTimes(hardware, [curve for curve, _, _ in tables[:kept]], times.reference)
                errors += [np.log(seconds / fewer.seconds_many(asked)) for _, asked, seconds in tables[kept:]]
    assert len(errors) == 56
    assert alike(errors) == pytest.approx(EXTRAPOLATED_SPREAD, abs=0.005)


def test_the_error_of_carried_tables_is_that_of_devices_that_have_their_own() -> None:
    errors: dict[str, list[FloatArray]] = {}
    devices = list(packaged())
    for giver, times, given in devices:
        for taker, _, found in devices:
            domains = [each.scale_up and each.scale_up.domain_size for each in (giver, taker)]
            if giver is taker or giver.maker != taker.maker or domains[0] != domains[1]:
                continue
            carried = times.carried_to(taker)
            for key in given.keys() & found.keys():
                ranks = [curve.ranks for curve, _, _ in given[key]]
                errors.setdefault(key[1], []).extend(
                    np.log(seconds / carried.seconds_many(asked))
                    for curve, asked, seconds in found[key]
                    if min(ranks) <= curve.ranks <= max(ranks)
                )
    assert {variant: len(each) for variant, each in errors.items()} == {"low_latency": 60, "normal": 24, "": 256}
    assert {variant: alike(each) for variant, each in errors.items()} == pytest.approx(CARRIED_SPREAD, abs=0.005)


def test_a_table_that_is_another_devices_is_as_uncertain_as_carrying_is() -> None:
    times = read_collectives(load_hardware("h800-sxm"))
    assert times is not None
    assert times.spread("all_gather", "") == CARRIED_SPREAD[""]
    assert times.spread("dispatch", "low_latency") < CARRIED_SPREAD["low_latency"]
    carried = times.carried_to(load_hardware("h200-sxm"))
    assert carried.spread("dispatch", "normal") == CARRIED_SPREAD["normal"]


def spread_of(hardware: str, ranks: int, changes: dict[str, str] | None = None) -> float:
    """Return the standard deviation of log(draw / fit) of a decode step's dispatch."""
    times = OpTimes.from_hardware(
        scenario("longcat-flash-h800-decode", {"hardware": hardware, **(changes or {})}).hardware
    )
    asked = op("dispatch", variant="low_latency", message_bytes=96 * 8 * 7392, ranks=ranks)
    return float(np.std([np.log(times.draw(i).seconds(asked) / times.seconds(asked)) for i in range(200)]))


def test_an_exchange_that_was_not_measured_has_a_wider_interval() -> None:
    measured, beyond = spread_of("h800-sxm", 128), spread_of("mi355x", 128)
    assert measured < 0.12
    assert beyond == pytest.approx(EXTRAPOLATED_SPREAD, rel=0.2)
    assert spread_of("mi355x", 32) < 0.12
    for sheet in ("rtx-pro-6000", "tpu-v7"):  # no device is near
        assert spread_of(sheet, 128) == pytest.approx(SHEET_SPREAD, rel=0.15)
    # a link that is an octave faster than the measured one counts as beyond, a tenth faster a seventh of that
    assert spread_of("h800-sxm", 128, {"hardware.scale_out.bandwidth": "100 GB/s"}) > 0.25
    assert spread_of("h800-sxm", 128, {"hardware.scale_out.bandwidth": "55 GB/s"}) < 0.14


@pytest.mark.parametrize(
    ("hardware", "kind", "variant", "spread"),
    [
        ("h800-sxm", "dispatch", "low_latency", BORROWED_SPREAD),  # an H200's empty message
        ("h200-sxm", "all_reduce", "", SPREAD),
        ("h800-sxm", "all_reduce", "", CARRIED_SPREAD[""]),  # an H100's
        ("tpu-v7", "dispatch", "low_latency", SHEET_SPREAD),
        ("tpu-v7", "all_reduce", "", NCCL_SHEET_SPREAD),
    ],
)
def test_the_interval_of_a_collective_is_that_of_its_draws(
    hardware: str, kind: str, variant: str, spread: float
) -> None:
    """It has no law, and asking for one was a KeyError."""
    times = OpTimes.from_hardware(load_hardware(hardware))
    asked = op(kind, variant=variant, message_bytes=2.0**22, ranks=8)
    low, high = times.interval(asked)
    assert low < times.seconds(asked) < high
    assert np.log(high / low) / 2 == pytest.approx(1.645 * spread, rel=0.2)  # of 100 draws: 7 % is their own deviation
    assert times.interval(op(kind, variant=variant, message_bytes=2.0**22, ranks=1)) == (0.0, 0.0)


def test_dispatch_and_combine_of_a_data_sheet_miss_together() -> None:
    times = OpTimes.from_hardware(load_hardware("tpu-v7"))
    asked = [op(kind, variant="low_latency", message_bytes=1e7, ranks=128) for kind in ("dispatch", "combine")]
    ratios = [[times.draw(i).seconds(each) / times.seconds(each) for each in asked] for i in range(8)]
    assert all(first == pytest.approx(second) for first, second in ratios)


@pytest.mark.parametrize(
    ("hardware", "says"),
    [("tpu-v7", "data sheet"), ("b200-sxm", "the tables of h100-sxm"), ("mi355x", "beyond the ranks")],
)
def test_the_notes_name_the_exchange_that_was_not_measured(hardware: str, says: str) -> None:
    found = simulate(scenario("longcat-flash-h800-decode", {"hardware": hardware, "draws": 1}))
    exchange = next(note for note in found.notes if note.startswith("combine low_latency, dispatch low_latency"))
    assert says in exchange


def test_what_a_device_has_no_table_of_is_lent_by_the_nearest_one_and_scaled_to_its_links() -> None:
    lent, own = (OpTimes.from_hardware(load_hardware(name)) for name in ("b200-sxm", "h100-sxm"))
    asked = op("combine", variant="low_latency", message_bytes=2e6, ranks=32)
    assert lent.seconds(asked) == pytest.approx(own.seconds(asked), rel=1e-9)  # the same network cards
    assert lent.tag(asked) == "extrapolated"
    assert spread_of("b200-sxm", 32) == pytest.approx(CARRIED_SPREAD["low_latency"], rel=0.15)
    inside = op("all_gather", message_bytes=1e6, ranks=8)
    assert lent.tag(inside) == "interpolated"  # its own table
    # a table that an H100 has from an H200 is lent by the H200 itself
    chain = OpTimes.from_hardware(load_hardware("h20")).links
    assert chain._lender("dispatch", "low_latency").carried_from == "h100-sxm"
    assert chain._lender("dispatch", "normal").carried_from == "h200-sxm"
    assert set(chain.overlap_rates("normal")) == {"dispatch", "combine"}


def test_a_lent_table_is_scaled_smoothly_and_never_slower_on_a_faster_link() -> None:
    base = scenario("longcat-flash-h800-decode", {"hardware": "h20"})
    for link, ranks in (("scale_up", 8), ("scale_out", 8), ("scale_out", 32)):
        asked = op("all_gather", message_bytes=1e6, ranks=ranks)
        if ranks == 32:
            asked = op("combine", variant="low_latency", message_bytes=2e6, ranks=ranks)
        times = []
        for bandwidth in np.geomspace(12, 1600, 60):
            changed = base.what_if({f"hardware.{link}.bandwidth": f"{bandwidth} GB/s"})
            times.append(OpTimes.from_hardware(changed.hardware).seconds(asked))
        assert (np.diff(times) <= 1e-12).all(), (link, ranks)
        # (1 / bandwidth grows by a quarter at most from one to the next)
        assert (np.divide(times[:-1], times[1:]) < 1.13).all(), (link, ranks)


def test_a_link_that_waits_longer_delays_every_collective_over_it() -> None:
    base = scenario("longcat-flash-h800-decode")
    far = op("combine", variant="low_latency", message_bytes=2e6, ranks=128)
    near = op("all_gather", message_bytes=1e6, ranks=8)

    def seconds(**latency: str) -> list[float]:
        changed = base.what_if({f"hardware.{link}.latency": value for link, value in latency.items()})
        times = OpTimes.from_hardware(changed.hardware)
        return [times.seconds(far), times.seconds(near)]

    before = seconds()
    out, up = base.hardware.scale_out, base.hardware.scale_up
    assert out is not None
    assert up is not None
    later = seconds(scale_out=f"{out.latency * 1e6 + 50} us", scale_up=f"{up.latency * 1e6 + 20} us")
    assert np.subtract(later, before) == pytest.approx([50e-6, 20e-6], rel=1e-6)
    # at none of it, what the wire takes is left
    assert all(0 < now < then for now, then in zip(seconds(scale_out="1 ns", scale_up="1 ns"), before, strict=True))


def test_links_that_differ_widen_what_is_lent() -> None:
    faster = spread_of("b200-sxm", 32, {"hardware.scale_out.bandwidth": "90 GB/s"})
    assert faster == pytest.approx(
        np.hypot(CARRIED_SPREAD["low_latency"], EXTRAPOLATED_SPREAD * np.log2(1.8)), rel=0.15
    )
    assert spread_of("b300-sxm", 32) == pytest.approx(
        np.hypot(CARRIED_SPREAD["low_latency"], EXTRAPOLATED_SPREAD), rel=0.15
    )


def test_errors_that_have_one_cause_are_drawn_together_and_others_apart() -> None:
    kinds = [("all_gather", ""), ("reduce_scatter", ""), ("dispatch", "low_latency"), ("combine", "normal")]
    asked = [op(kind, variant=variant, message_bytes=1e6, ranks=8) for kind, variant in kinds]

    def correlations(name: str) -> FloatArray:
        times = OpTimes.from_hardware(load_hardware(name))
        draws = [times.draw(i) for i in range(1, 200)]
        return np.corrcoef([[np.log(draw.seconds(each)) for draw in draws] for each in asked])

    for name in ("h20", "h800-sxm"):  # an H100's tables of NCCL, lent and fitted
        assert correlations(name)[0, 1] > 0.99
    for name in ("h20", "b200-sxm"):
        assert np.abs(correlations(name)[2:, :2]).max() < 0.25
        assert abs(correlations(name)[2, 3]) < 0.25
