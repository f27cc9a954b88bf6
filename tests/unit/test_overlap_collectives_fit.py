"""Collectives: the packaged H800 fit gives its tables back, and behaves between and beyond them."""

import numpy as np
import pytest

from longcat_sim.calibration import OpTimes
from longcat_sim.calibration.collective_curves import Curve
from longcat_sim.calibration.collective_file import read_collectives
from longcat_sim.ops.op import OpArrays, op
from longcat_sim.specs.hardware import load_hardware


@pytest.fixture(scope="module")
def times():
    hardware = load_hardware("h800-sxm")
    return read_collectives(hardware)


def exchange(kind, tokens, ranks, row):
    return op(kind, variant="low_latency", message_bytes=tokens * 8 * row, ranks=ranks)


@pytest.mark.parametrize(
    ("ranks", "dispatch_us", "combine_us"),
    [(8, 77, 114), (16, 118, 195), (64, 173, 314), (128, 192, 369), (256, 194, 360)],
)
def test_the_published_low_latency_table_comes_back(times, ranks, dispatch_us, combine_us):
    # DeepEP V1 README, H800, 128 tokens per rank, hidden 7168, top-8
    assert times.seconds(exchange("dispatch", 128, ranks, 7392)) == pytest.approx(dispatch_us * 1e-6, rel=1e-3)
    assert times.seconds(exchange("combine", 128, ranks, 14336)) == pytest.approx(combine_us * 1e-6, rel=1e-3)


def test_between_the_tables(times):
    sizes = [times.seconds(exchange("combine", tokens, 128, 14336)) for tokens in (1, 8, 32, 128, 300)]
    assert sizes == sorted(sizes)
    assert 20e-6 < sizes[0] < 60e-6  # an exchange of next to nothing costs a few tens of microseconds
    inner = times.seconds(exchange("dispatch", 128, 90, 7392))
    assert 173e-6 < inner < 192e-6
    assert times.tag(exchange("dispatch", 128, 128, 7392)) == "measured"
    assert times.tag(exchange("dispatch", 64, 128, 7392)) == "interpolated"
    assert times.tag(exchange("dispatch", 128, 1024, 7392)) == "extrapolated"


def test_the_normal_mode_gives_the_published_rates(times):
    for ranks, rate in ((32, 58e9), (64, 51e9)):
        size = 4096 * 4 * 7392
        asked = op("dispatch", variant="normal", message_bytes=size, ranks=ranks)
        assert size / times.seconds(asked) == pytest.approx(rate, rel=1e-3)
        assert times.demand(asked).sm == pytest.approx(24 / 132)


def test_a_faster_link_helps_what_it_carries(times):
    hardware = times.hardware
    faster = hardware.model_copy(
        update={"scale_out": hardware.scale_out.model_copy(update={"bandwidth": 2 * hardware.scale_out.bandwidth})}
    )
    changed = read_collectives(faster)
    wide, inside = exchange("combine", 128, 128, 14336), op("all_gather", message_bytes=1e7, ranks=4)
    assert 0.45 < changed.seconds(wide) / times.seconds(wide) < 0.75
    assert changed.seconds(inside) == times.seconds(inside)


@pytest.mark.parametrize("name", ["h200-sxm", "h800-sxm", "b200-sxm", "gb200-nvl72", "mi300x", "mi325x"])
@pytest.mark.parametrize("link", ["scale_up", "scale_out"])
def test_links_of_any_speed_make_no_message_faster_than_a_smaller_one(name, link):
    """With NVLink twenty times as fast an all-reduce of 1 GiB took less than one of 256 MiB, and less than its wire."""
    hardware = load_hardware(name)
    sizes = np.array([0, 1e3, 1e5, 1e6, 4e6, 16e6, 64e6, 2.56e8, 1e9, 1e11])
    before = {}
    for factor in (0.1, 0.5, 1.0, 2.0, 10.0, 20.0):
        part = getattr(hardware, link)
        changed = hardware.model_copy(update={link: part.model_copy(update={"bandwidth": part.bandwidth * factor})})
        links = OpTimes.from_hardware(changed).links
        for kind, variant, ranks in (
            ("all_reduce", "", 8), ("all_gather", "", 8), ("dispatch", "low_latency", 64),
            ("combine", "low_latency", 16), ("dispatch", "normal", 32), ("combine", "normal", 8),
        ):  # fmt: skip
            dims = {"message_bytes": sizes, "ranks": np.full(len(sizes), ranks)}
            seconds = links.seconds_many(OpArrays(kind, dims, "bf16", variant))
            assert (np.diff(seconds) >= 0).all(), (kind, variant, ranks, factor)
            assert seconds[-1] > 50 * seconds[-2], (kind, variant, ranks, factor)
            slower = before.get((kind, variant, ranks))
            assert slower is None or (seconds <= slower * (1 + 1e-12)).all(), (kind, variant, ranks, factor)
            before[kind, variant, ranks] = seconds


def test_a_larger_domain_takes_an_exchange_off_the_nics():
    """72 B200 on one NVLink exchange about as fast as a GB200's; a GB200 in eights waits for its NICs."""

    def seconds(name, domain):
        hardware = load_hardware(name)
        changed = hardware.model_copy(update={"scale_up": hardware.scale_up.model_copy(update={"domain_size": domain})})
        times = OpTimes.from_hardware(changed)
        return times.seconds(exchange("combine", 192, 64, 12288))

    wide, eights = seconds("b200-sxm", 72), seconds("b200-sxm", 8)
    assert wide < 0.4 * eights
    assert 1 < wide / seconds("gb200-nvl72", 72) < 3
    assert seconds("gb200-nvl72", 8) > 2 * seconds("gb200-nvl72", 72)
    assert seconds("h800-sxm", 64) < seconds("h800-sxm", 32) <= seconds("h800-sxm", 8)


def test_a_collective_holds_a_link_as_long_as_its_bytes_take(times):
    """A low-latency exchange inside a node waits mostly for kernels; another collective may use NVLink meanwhile."""
    inside, across = exchange("dispatch", 128, 8, 7392), exchange("combine", 128, 64, 14336)
    wire_s = 7 / 8 * 128 * 8 * 7392 / 200e9
    assert times.demand(inside).scale_up == pytest.approx(wire_s / times.seconds(inside))
    assert times.demand(inside).scale_out == 0
    assert times.demand(across).scale_out > 0.7 > 0.1 > times.demand(across).scale_up > 0


def test_draws_are_repeatable_and_spread(times):
    wide = exchange("dispatch", 128, 128, 7392)
    drawn = [times.draw(i).seconds(wide) / times.seconds(wide) for i in range(64)]
    assert times.draw(7).seconds(wide) == times.draw(7).seconds(wide)
    assert 0.05 < max(drawn) - 1 < 0.5
    assert times.draw(3).kernel_gap_s != times.kernel_gap_s


def test_a_curve_extends_by_its_last_slope():
    curve = Curve("dispatch", "", 8, (0.0, 1e6, 2e6), (1e-5, 2e-5, 4e-5))
    import numpy as np

    assert curve.at(np.array([5e5, 3e6])) == pytest.approx([1.5e-5, 6e-5])
