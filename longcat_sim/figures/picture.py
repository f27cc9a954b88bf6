"""A plotly figure as a file: HTML by itself, PNG by a headless Chromium."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from longcat_sim.errors import UserError

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def check_picture(path: Path) -> None:
    """Raise UserError for an ending that no picture has."""
    if path.suffix not in (".html", ".png"):
        raise UserError(f"picture: expected a path that ends in .html or .png; got {str(path)!r}; rename it")


def write_picture(figure: Any, path: Path, *, width: int = 920, height: int = 520, scale: float = 1.5) -> None:
    """Write a figure to ``path``: a self-contained page (.html), or what a browser makes of it (.png).

    Raises:
        UserError: another ending, or a PNG without Playwright or a Chromium.
    """
    check_picture(path)
    import plotly.graph_objects
    import plotly.io

    sized = plotly.graph_objects.Figure(figure).update_layout(width=width, height=height)
    page = plotly.io.to_html(
        sized, include_plotlyjs=True, full_html=True,
        config={"displayModeBar": path.suffix == ".html", "displaylogo": False},
    )  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".html":
        path.write_text(page, encoding="utf-8")
        return
    try:
        from playwright.sync_api import Error, sync_playwright
    except ImportError:
        raise UserError(
            "picture: expected Playwright for a PNG; it is not installed; run: pip install 'longcat-sim[test]', or "
            "write .html"
        ) from None
    # a Chromium of the system, else the one that Playwright brings
    browser = os.environ.get("BROWSER_PATH") or next((b for name in BROWSERS if (b := shutil.which(name))), None)
    try:
        with sync_playwright() as playwright:
            chromium = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox", "--disable-gpu"])
            view = chromium.new_page(
                viewport={"width": width + 16, "height": height + 16}, device_scale_factor=scale
            )  # fmt: skip
            view.set_content(page)
            view.wait_for_selector(".js-plotly-plot .main-svg")
            view.wait_for_timeout(500)
            view.locator(".js-plotly-plot").screenshot(path=path)
            chromium.close()
    except Error as error:
        raise UserError(
            f"picture: expected a Chromium for a PNG; got {str(error).splitlines()[0]!r}; install the package "
            "chromium, name one with BROWSER_PATH, run `playwright install chromium`, or write .html"
        ) from None
