"""Pictures as files: a page by itself, a PNG by a browser, and messages where that cannot be."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from longcat_sim.capacity.answer import Survivor
from longcat_sim.errors import UserError
from longcat_sim.figures.capacity import capacity_figure
from longcat_sim.figures.picture import BROWSERS, write_picture
from longcat_sim.specs.scenario import scenario


def result() -> SimpleNamespace:
    """Return what ``capacity_figure`` reads of a result under traffic."""
    figures = {
        "usd_per_million_output_tokens_all_in": 2.0, "usd_per_million_output_tokens_all_in_p5": 1.5,
        "usd_per_million_output_tokens_all_in_p95": 2.25, "tpot_s": 0.02, "tpot_s_p5": 0.016, "tpot_s_p95": 0.025,
        "tokens_per_s_per_user": 50.0,
    }  # fmt: skip
    winner = Survivor(0, {"deployment": "2 replicas"}, figures)
    return SimpleNamespace(
        scenario=scenario("longcat-flash-serve-capacity"), screened=None, survivors=[winner], winner=winner,
        tpot_limit_s=0.05,
    )  # fmt: skip


def test_the_winner_has_its_interval_and_the_level_its_line() -> None:
    figure = capacity_figure(result())
    star = figure.data[-1]
    assert (list(star.x), list(star.y)) == ([50.0], [2.0])
    assert (star.error_y.array[0], star.error_y.arrayminus[0]) == pytest.approx((0.25, 0.5))
    assert (star.error_x.array[0], star.error_x.arrayminus[0]) == pytest.approx((1 / 0.016 - 50, 10))
    assert list(figure.data[-2].x) == pytest.approx([20, 20])  # 1 / 50 ms
    assert "whole bill" in figure.layout.yaxis.title.text


def test_a_page_holds_all_it_needs(tmp_path: Path) -> None:
    write_picture(capacity_figure(result()), tmp_path / "deep" / "a.html")
    page = (tmp_path / "deep" / "a.html").read_text(encoding="utf-8")
    assert "2 replicas wins" in page
    assert "src=" not in page.split("<body>")[0]


def test_another_ending_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"ends in \.html or \.png; got"):
        write_picture(capacity_figure(result()), tmp_path / "a.jpg")


def test_a_png_without_a_browser_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("playwright.sync_api")
    monkeypatch.setenv("BROWSER_PATH", str(tmp_path / "none"))
    with pytest.raises(UserError, match="expected a Chromium"):
        write_picture(capacity_figure(result()), tmp_path / "a.png")


@pytest.mark.slow
def test_a_png_is_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("playwright.sync_api")
    if not any(map(shutil.which, BROWSERS)):
        pytest.skip("no Chromium")
    write_picture(capacity_figure(result()), tmp_path / "a.png", width=600, height=400, scale=1.0)
    data = (tmp_path / "a.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert (int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")) == (600, 400)
