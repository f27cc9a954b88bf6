"""What is predicted of a recorded vLLM run, and beside what it is set."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from longcat_sim.calibration.layer_profile import LayerProfile
from longcat_sim.errors import MeasurementError
from longcat_sim.simulation.serving.published_loads import BalancerRules
from longcat_sim.studies.validate import vllm_run
from longcat_sim.studies.validate.vllm_folder import RunFolder
from longcat_sim.studies.validate.vllm_run import Recording, run
from tests.unit.test_vllm_folder import MOE, make, requests

__all__ = ["make"]


@pytest.fixture(autouse=True)
def few_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_run, "RUNS", 3)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_is_predicted_is_the_mean_over_runs_that_tables_cannot_tell_apart(make: Any) -> None:
    folder = make("x")
    recording = Recording.read(folder)
    each = []
    for scale in (0.993, 1.0, 1.007):
        records = recording.simulate(scale).records
        each.append(float((records.numpy("last") - records.numpy("arrival")).mean()) * 1e-9)
    cell = run(folder)["e2e_s"]["mean"]
    assert cell["predicted"] == pytest.approx(np.mean(each))
    assert cell["spread"] == pytest.approx(np.std(each) / np.mean(each))
    assert each[0] < each[1] < each[2]
    measured = np.mean([row["last_token_ts"] - row["queued_ts"] for row in requests(40)])
    # the quickest hand-over took no time, the others 1 and 2 ms
    assert cell["measured"] == pytest.approx(measured + 0.001, abs=1e-4)
    assert cell["error"] == pytest.approx(cell["predicted"] / cell["measured"] - 1)


def test_requests_that_do_not_fit_are_left_out_of_both_sides_and_said(make: Any) -> None:
    folder = make(
        "tight", kv_cache={"num_gpu_blocks": 21, "block_size": 16}
    )  # 320 tokens; the last one of an answer is not kept
    fitting = [row for row in requests(40) if row["input_toks"] + row["output_toks"] - 1 <= 320]
    with pytest.warns(UserWarning, match=rf"{40 - len(fitting)} of 40 requests cannot be served \(longer than the KV"):
        table = run(folder)
    truth = np.mean([row["last_token_ts"] - row["queued_ts"] for row in fitting])
    assert table["e2e_s"]["mean"]["measured"] == pytest.approx(truth, abs=0.0021)
    folder = make("none", kv_cache={"num_gpu_blocks": 4, "block_size": 16})
    with pytest.raises(MeasurementError, match=r"40 of 40 requests cannot be served .*mend its memory or KV blocks"):
        run(folder)


def test_answers_of_one_token_have_no_time_per_token(make: Any) -> None:
    rows = [row | {"output_toks": 1, "last_token_ts": row["first_token_ts"]} for row in requests(40)]
    with pytest.warns(UserWarning, match="nothing was measured of tpot_s"):
        table = run(make("one", rows=rows))
    assert set(table) == {"ttft_s", "e2e_s"}


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("0.19.0", (0, 19)), ("v0.28.1", (0, 28)), ("0.23rc1", (0, 23)), ("0.26.0+cu130", (0, 26)),
        ("0.1.dev12+g1a2b", ()), ("main", ()), (None, ()),
    ],
)  # fmt: skip
def test_versions(make: Any, given: str | None, found: tuple[int, ...]) -> None:
    folder = RunFolder.read(make("x", vllm_version=given))
    assert folder.version == found
    if found:
        assert folder.balancer() == BalancerRules.of(found)
    else:
        with pytest.warns(UserWarning, match="no vllm_version" if given is None else "no release in vllm_version"):
            assert folder.balancer() == BalancerRules()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_prediction_takes_the_experts_of_an_old_table_from_memory(make: Any) -> None:
    folder = make("old", model=MOE, is_new=False)
    path = folder / "profile" / "tp1" / "moe.csv"
    head, *rows = path.read_text().splitlines()
    cells = [row.split(",") for row in rows]
    path.write_text("\n".join([head, *(f"{t},{a},{float(us) / (2 if a == '4' else 1)}" for t, a, us in cells)]))
    raw = LayerProfile.read(folder / "profile", 1)

    def time_of_four(card: str) -> float:
        Path(folder / "profile" / "meta.yaml").write_text(f"gpu: {card}\n")
        return Recording.read(folder).times.profile.moe_us(1, 64, 4)

    # four experts of 9.4 MB fit in 128 MB of cache, sixteen do not
    assert time_of_four("NVIDIA RTX PRO 6000 Blackwell Server Edition") == pytest.approx(
        10 + 6 * 4 + 6.4 + raw.routing_us
    )
    with pytest.warns(UserWarning, match="no packaged card of that name"):
        assert time_of_four("CARD") == raw.moe_us(1, 64, 4)


def test_an_empty_table_is_named(make: Any) -> None:
    folder = make("empty", model=MOE, is_new=False)
    (folder / "profile" / "tp1" / "dense.csv").write_text("layer,tokens,time_us\n")
    with pytest.raises(MeasurementError, match="got none of qkv_proj, o_proj"):
        run(folder)
