"""Drive a notebook in a real JupyterLab with a headless Chromium: run it, move a slider, time the picture."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync")  # fmt: skip
PATIENCE_MS = 180_000
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")

# Watches the picture of the last panel. A key press starts the clock; the first change of the drawing after it stops
# it, two animation frames later, when it is on the screen. (Not the event plotly_afterplot: it is left out when the
# margins changed too.)
WATCH = """
() => {
  window.__moves = {began: null, took: null};
  const plots = document.querySelectorAll('.jupyter-widgets .js-plotly-plot');
  const plot = plots[plots.length - 1];
  if (plot.__watched) return;
  plot.__watched = true;
  new MutationObserver(() => {
    const moves = window.__moves;
    if (moves.began === null || moves.took !== null) return;
    moves.took = -1;
    requestAnimationFrame(() => requestAnimationFrame(() => { moves.took = performance.now() - moves.began; }));
  }).observe(plot, {subtree: true, childList: true, attributes: true});
  document.addEventListener('keydown', () => {
    window.__moves.began = performance.now();
    window.__moves.took = null;
  }, true);
}
"""
# What the last figure shows, as text: typed arrays are spread, or JSON would name their indices.
SHOWN = """
() => {
  const plots = document.querySelectorAll('.jupyter-widgets .js-plotly-plot');
  const plain = (v) => v === undefined || v === null ? null : Array.from(v._inputArray || v.bdata || v);
  return JSON.stringify(plots[plots.length - 1].data.map((t) => [t.name, plain(t.x), plain(t.y), plain(t.base)]));
}
"""


def chromium() -> str | None:
    """Return the browser to drive: $BROWSER_PATH, else one on the path."""
    named = os.environ.get("BROWSER_PATH")
    return named or next((found for name in NAMES if (found := shutil.which(name))), None)


@dataclass
class Lab:
    """A running JupyterLab."""

    base: str
    token: str


def free_port() -> int:
    """Return a loopback port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def jupyterlab(root: Path, scratch: Path) -> Iterator[Lab]:
    """Run JupyterLab over ``root`` on the loopback, its settings and state in ``scratch``; stop it on exit.

    Raises:
        RuntimeError: it did not answer; holds the end of its log.
    """
    lab = Lab(f"http://127.0.0.1:{free_port()}", secrets.token_hex(16))
    places = {"JUPYTER_CONFIG_DIR": "config", "JUPYTER_DATA_DIR": "data", "JUPYTER_RUNTIME_DIR": "runtime",
              "JUPYTERLAB_SETTINGS_DIR": "settings", "JUPYTERLAB_WORKSPACES_DIR": "workspaces",
              "IPYTHONDIR": "ipython"}  # fmt: skip
    env = os.environ | {name: str(scratch / place) for name, place in places.items()}
    # no dialog that asks the network for news; all cells stay in the page when scrolled away
    for extension, file, settings in (
        ("apputils-extension", "notification", {"fetchNews": "false", "checkForUpdates": False}),
        ("notebook-extension", "tracker", {"windowingMode": "none"}),
    ):
        folder = scratch / "settings" / "@jupyterlab" / extension
        folder.mkdir(parents=True)
        (folder / f"{file}.jupyterlab-settings").write_text(json.dumps(settings))
    command = [
        sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1",
        f"--port={lab.base.rpartition(':')[2]}", "--ServerApp.port_retries=0", f"--IdentityProvider.token={lab.token}",
        f"--ServerApp.root_dir={root}", "--LabApp.news_url=",
        "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
    ]  # fmt: skip
    with open(scratch / "lab.log", "w") as log:
        server = subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT)
        try:
            _wait_for(lab, server, scratch / "lab.log")
            yield lab
        finally:
            server.terminate()
            try:
                server.wait(20)
            except subprocess.TimeoutExpired:
                server.kill()


def _wait_for(lab: Lab, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + PATIENCE_MS / 1000
    while True:
        try:
            urllib.request.urlopen(f"{lab.base}/api?token={lab.token}", timeout=5).read()
            return
        except (OSError, urllib.error.URLError):
            if server.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"JupyterLab did not start:\n{log.read_text()[-3000:]}") from None
            time.sleep(0.3)


@dataclass
class Notebook:
    """A notebook open in the browser, and what the page complained of."""

    page: Any
    lab: Lab
    errors: list[str] = field(default_factory=list)
    off_host: list[str] = field(default_factory=list)
    """Requests that left this machine."""

    def open(self, path: str) -> None:
        """Open a notebook and wait until its kernel is idle."""
        local = (self.lab.base, self.lab.base.replace("http", "ws"), "data:", "blob:")
        page = self.page
        page.set_default_timeout(PATIENCE_MS)
        page.on("pageerror", lambda error: self.errors.append(str(error)[:300]))
        page.on("console", lambda line: self.errors.append(line.text[:300]) if line.type == "error" else None)
        page.on("request", lambda ask: None if ask.url.startswith(local) else self.off_host.append(ask.url))
        page.goto(f"{self.lab.base}/lab/tree/{path}?token={self.lab.token}&reset")
        page.wait_for_selector(".jp-NotebookPanel .jp-Cell")
        self.wait_idle()

    def wait_idle(self) -> None:
        """Wait for the status bar's word; the indicator's own attribute says idle before a kernel is there."""
        self.page.wait_for_selector("text=/\\| Idle/")

    def run_all(self) -> None:
        """Run all cells and wait for the panel's figure and for an idle kernel."""
        self.page.click("text=Run >> nth=0")
        self.page.click("text=Run All Cells")
        self.page.wait_for_selector(".jupyter-widgets .js-plotly-plot .main-svg")
        self.wait_idle()
        failed = self.page.locator(".jp-OutputArea-output:has-text('Traceback (most recent call last)')")
        assert failed.count() == 0, failed.first.text_content()

    def shown(self) -> str:
        """Return the data of the last panel's figure."""
        return str(self.page.evaluate(SHOWN))

    def press(self, slider: int, key: str = "ArrowRight") -> float:
        """Press a key on a slider of the panel; return milliseconds until the changed picture is on the screen.

        A page that is still busy can take the focus away: a press that changes nothing is made again, twice at most.
        """
        from playwright.sync_api import TimeoutError as TooLate

        handle = self.page.locator(".jupyter-widgets .noUi-handle").nth(slider)
        for left in (2, 1, 0):
            self.page.evaluate(WATCH)
            handle.scroll_into_view_if_needed()
            handle.focus()
            self.page.keyboard.press(key)
            try:
                self.page.wait_for_function("() => window.__moves.took > 0", timeout=20_000)
                break
            except TooLate:
                if not left:
                    raise
        took = float(self.page.evaluate("() => window.__moves.took"))
        self.page.wait_for_timeout(150)
        return took

    def show_panel(self) -> None:
        """Scroll the panel into view."""
        self.page.locator(".jupyter-widgets.widget-box").last.scroll_into_view_if_needed()
        self.page.locator(".jupyter-widgets .js-plotly-plot").last.scroll_into_view_if_needed()
        self.page.wait_for_timeout(400)
