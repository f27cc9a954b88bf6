"""Search: memory first, screening by the step model, the front, the winner, what binds, and every dead end."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longcat_sim.calibration import Roofline
from longcat_sim.capacity import samples
from longcat_sim.capacity.candidates import memory_at, room_of
from longcat_sim.capacity.reasons import fleet_rate
from longcat_sim.capacity.screen import pareto, ranking, screen_steps
from longcat_sim.capacity.search import search_steps
from longcat_sim.errors import CapacityError, SpecError
from longcat_sim.simulation.step import step_memory, step_seconds_many
from longcat_sim.specs.scenario import Scenario, scenario

DOCUMENT = {
    "model": "longcat-flash", "hardware": "h800-sxm",
    "deployment": {"num_gpus": 32, "ep_size": 32, "dense_tp_size": 4, "overlap": "sbo"},
    "speculative": {"draft_tokens": 1, "acceptance": [0.8]},
    "step": {"phase": "decode", "sequences_per_gpu": 64, "context_tokens": 4000},
    "search": {
        "hardware": ["h800-sxm", "h200-sxm"], "ep_size": [16, 32, 96], "overlap": ["none", "sbo"],
        "sequences_per_gpu": [8, 200], "survivors": 6, "max_gpus": 64, "tpot": "25 ms",
    },
    "price": {"hardware_usd_per_gpu_hour": {"h800-sxm": 2.0, "h200-sxm": 3.0}}, "draws": 4,
}  # fmt: skip


@pytest.fixture(scope="module")
def base() -> Scenario:
    return scenario(DOCUMENT)


def simulate(of: Scenario) -> dict[str, float]:
    return samples.simulated_figures(of, Roofline(of.hardware), seed=1)


def assess(of: Scenario, limit_s: float | None) -> dict[str, float]:
    return samples.assess(of, Roofline(of.hardware), limit_s, draws=4)


def test_the_fullest_gpu_decides_what_fits(base: Scenario) -> None:
    """Contexts that are spread over ranks fill one of them first: the one that the others also wait for."""
    room = room_of(base, 4000)
    assert memory_at(base, int(room), 4000).fits
    assert not memory_at(base, int(room) + 1, 4000).fits
    spread = base.what_if({"step.context_spread": 1.0})
    assert 0.5 * room < room_of(spread, 4000) < 0.95 * room
    assert step_memory(spread).parts["kv_cache"] > 1.05 * step_memory(base).parts["kv_cache"]


def test_the_fewest_gpus_are_those_of_the_fleet(base: Scenario) -> None:
    """Not those of one replica, of which many would be needed."""
    asked = base.what_if({"search.output_tokens_per_s": 200_000.0, "search.objective": "num_gpus"})
    screened = screen_steps(asked, Roofline)
    best = int(np.argmin(ranking(screened, asked)))
    made = screened.columns["tokens_per_s_per_gpu"] * screened.columns["num_gpus"]
    gpus = np.ceil(200_000.0 / made) * screened.columns["num_gpus"]
    assert gpus[best] == gpus.min()
    alone = base.what_if({"search.objective": "num_gpus"})
    fewest = screened.columns["num_gpus"] == screened.columns["num_gpus"].min()
    cheapest = int(np.argmin(ranking(screened, alone)))
    usd = screened.columns["usd_per_million_output_tokens"]
    assert fewest[cheapest]
    assert usd[cheapest] == usd[fewest].min()  # of equal ones the cheapest token, not the smallest batch


def test_screening_is_the_step_model(base: Scenario) -> None:
    screened = screen_steps(base, Roofline)
    rng = np.random.default_rng(0)
    for at in rng.choice(len(screened), 5, replace=False):
        of = screened.scenario(int(at))
        exact = step_seconds_many(of, Roofline(of.hardware), of.step.sequences_per_gpu, 4000.0)  # type: ignore[union-attr]
        assert screened.columns["step_s"][at] == pytest.approx(float(exact), rel=3e-3)
    assert screened.interpolation_error < 3e-3
    assert screened.rejected.counts["max_gpus"] == 4 * 193  # EP96 is more than 64 GPUs
    assert screened.looked_at == 12 * 193
    assert len(screened) + sum(screened.rejected.counts.values()) == screened.looked_at
    row = screened.row(0)
    usd = 2.0 / 3600 / row["tokens_per_s_per_gpu"] * 1e6
    assert row["usd_per_million_output_tokens"] == pytest.approx(usd)


def test_the_winner_is_the_cheapest_that_keeps_the_level(base: Scenario) -> None:
    result = search_steps(base, Roofline, simulate, partial(assess, limit_s=0.025))
    assert result.winner.figure("tpot_s") <= 0.025
    assert result.screened is not None
    within = result.screened.columns["tpot_s"] <= 0.025
    cheapest = result.screened.columns["usd_per_million_output_tokens"][within].min()
    assert result.winner.figure("usd_per_million_output_tokens") == pytest.approx(cheapest, rel=0.06)
    assert result.binding["constraint"] in ("slo.tpot", "memory")
    shares = result.binding["step_time_shares"]
    assert (
        0.5 < shares["compute"] + shares["memory bandwidth"] + shares["scale-out link"] + shares["scale-up link"] < 1.1
    )
    assert {row["choice"] for row in result.why} == {"hardware", "num_gpus", "ep_size", "overlap"}
    assert all(row["ratio"] > 0.95 for row in result.why)
    rate = result.max_rate_at_slo
    assert rate["num_gpus"] == 64
    batch = result.winner.screened["sequences_per_gpu"]
    assert rate["output_tokens_per_s"] == pytest.approx(64 * batch / result.winner.figure("tpot_s"))
    wanted = 2.5 * rate["output_tokens_per_s"]  # how many GPUs for so many tokens/s, one replica to spare
    case = base.what_if({"search.output_tokens_per_s": wanted, "search.spare_replicas": 1})
    fleet = fleet_rate(result.winner, case, result.screened.scenario(result.winner.at))
    size = result.winner.screened["num_gpus"]
    assert fleet["num_gpus"] == (np.ceil(2.5 * 64 / size) + 1) * size
    assert fleet["output_tokens_per_s"] >= wanted
    usd = base.price.hardware_usd_per_gpu_hour[result.screened.scenario(result.winner.at).hardware.name]
    assert fleet["usd_per_month"] == pytest.approx(fleet["num_gpus"] * usd * 730.5)
    document = json.loads(json.dumps(result.to_json()))
    assert {"winner", "pareto", "binding", "rejected", "max_rate_at_slo"} <= set(document)
    assert "wins" in str(result.to_json()) or "winner" in str(result)


def test_a_higher_probability_leaves_more_room(base: Scenario) -> None:
    """With a spread of +-20 % on every time, 90 % of the draws within the level need a median well below it."""

    def spread(of: Scenario) -> dict[str, float]:
        tpot = samples.fast_figures(of, Roofline(of.hardware))["tpot_s"] * np.linspace(0.8, 1.2, 41)
        inside = float((tpot <= 0.025).mean())
        return {
            "tpot_s": float(np.median(tpot)),
            "probability": inside,
            "tpot_s_at_probability": float(np.quantile(tpot, 0.9)),
        }

    safe = search_steps(base.what_if({"search.probability": 0.9}), Roofline, simulate, spread)
    assert safe.winner.figures is not None
    assert safe.winner.figures["probability"] >= 0.9
    assert safe.winner.figure("tpot_s") == pytest.approx(0.025 / 1.16, rel=0.05)


def test_nothing_fits(base: Scenario) -> None:
    with pytest.raises(CapacityError, match=r"all were put aside.*memory.*weights and buffers leave no room"):
        screen_steps(base.what_if({"search.ep_size": [2], "search.hardware": [], "search.num_gpus": [4]}), Roofline)


def test_nothing_keeps_the_level_says_what_is_closest(base: Scenario) -> None:
    of = base.what_if({"search.tpot": "7 ms"})
    with pytest.raises(CapacityError, match=r"the closest of \d+ is .* with 8 sequences per GPU at [\d.]+ ms, \d+%"):
        search_steps(of, Roofline, simulate, partial(assess, limit_s=0.007))


def test_a_level_below_the_physical_limit_says_the_limit(base: Scenario) -> None:
    """The weights that every step reads: 28 x (2 MLA + 2 dense FFN / 4) and half the embeddings, at 4.8 TB/s."""
    of = base.what_if({"search.tpot": "1 ms"})
    with pytest.raises(CapacityError, match=r"search\.tpot: expected at least [\d.]+ ms, the time .*read the weights"):
        search_steps(of, Roofline, simulate, partial(assess, limit_s=0.001))


def test_a_scenario_without_a_search_or_with_an_unknown_device(base: Scenario) -> None:
    document = {key: value for key, value in DOCUMENT.items() if key != "search"}
    with pytest.raises(CapacityError, match="search: expected what may change"):
        screen_steps(scenario(document), Roofline)
    with pytest.raises(SpecError, match=r"search\.hardware: expected.*h900"):
        screen_steps(base.what_if({"search.hardware": ["h900"]}), Roofline)
    with pytest.raises(CapacityError, match=r"expected \[lowest, highest\]"):
        screen_steps(base.what_if({"search.sequences_per_gpu": [64, 8]}), Roofline)


points = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=40)


@settings(max_examples=150)
@given(points, st.integers(2, 3))
def test_the_front_is_what_nothing_beats(rows: list[tuple[int, int, int]], figures: int) -> None:
    table = np.array(rows, dtype=float)[:, :figures]
    columns = {f"f{i}": table[:, i] for i in range(figures)}
    senses = {"f0": 1, "f1": -1, "f2": 1}
    signed = table * np.array([senses[f"f{i}"] for i in range(figures)])
    front = pareto(columns, {name: senses[name] for name in columns})
    best = {tuple(p) for p in signed if not any(np.all(q <= p) and np.any(q < p) for q in signed)}
    assert {tuple(signed[i]) for i in front} == best
    assert len(front) == len(best)


@pytest.mark.slow
def test_screening_ranks_as_simulation_does(base: Scenario) -> None:
    """Kendall tau of 50 random candidates: screened cost against the event engine on all ranks with random loads."""
    from scipy.stats import kendalltau

    screened = screen_steps(base.what_if({"search.hardware": ["h800-sxm"], "search.ep_size": [16, 32]}), Roofline)
    chosen = np.random.default_rng(3).choice(len(screened), 50, replace=False)
    name = "usd_per_million_output_tokens"
    simulated = [simulate(screened.scenario(int(at)))[name] for at in chosen]
    assert kendalltau(screened.columns[name][chosen], simulated).statistic >= 0.9
    assert np.abs(screened.columns[name][chosen] / simulated - 1).max() < 0.05


@pytest.mark.slow
def test_the_verb_prints_one_document_and_refuses_what_it_cannot(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    import yaml

    from longcat_sim.cli import main

    small = {**DOCUMENT, "draws": 2, "search": {**DOCUMENT["search"], "survivors": 3, "hardware": ["h200-sxm"]}}  # type: ignore[dict-item]
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(small))
    with pytest.raises(SystemExit) as done:
        main(["capacity", str(path), "--json", "--processes", "1", "--set", "search.tpot=100 ms"])
    assert done.value.code in (0, None)
    document = json.loads(capsys.readouterr().out)
    assert document["winner"]["simulated"]["probability"] > 0.5
    with pytest.raises(SystemExit) as done:
        main(["capacity", str(path), "--set", "search.tpot=1 ms", "--processes", "1"])
    assert done.value.code == 2
    assert "expected at least" in capsys.readouterr().err


def test_a_rate_is_made_by_the_cheapest_whole_fleet(base: Scenario) -> None:
    """Among fleets of whole replicas, counted one by one; of equal ones, one with room to the rate and the level."""
    case = base.what_if({"search.output_tokens_per_s": 2e5})
    screened = screen_steps(case, Roofline)
    rows = [screened.row(at) for at in range(len(screened))]
    level = [at for at, row in enumerate(rows) if row["tpot_s"] <= 0.025]

    def usd(at: int) -> float:
        row = rows[at]
        replicas = int(np.ceil(2e5 / (row["tokens_per_s_per_gpu"] * row["num_gpus"])))
        return replicas * row["num_gpus"] * screened.scenario(at).usd_per_gpu_hour

    values = ranking(screened, case)
    best = min(level, key=lambda at: values[at])
    assert usd(best) == pytest.approx(min(usd(at) for at in level))
    assert values[best] == pytest.approx(usd(best) / 3600 / 2e5 * 1e6, rel=1e-5)
