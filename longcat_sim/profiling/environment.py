"""What was measured, and with what: the first line of a measurement file."""

from __future__ import annotations

import datetime
import platform
import subprocess
from functools import lru_cache
from pathlib import Path

import torch

from longcat_sim.records.measurement import Environment

LOAD_PRODUCTS = 2000
"""About 0.4 s of an H100."""


def here(device: torch.device) -> Environment:
    """Return the environment of this process on ``device``."""
    libraries = {"python": platform.python_version(), "torch": torch.__version__}
    clock = None
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        libraries["cuda"] = str(torch.version.cuda)
        libraries["cudnn"] = str(torch.backends.cudnn.version())
        try:
            clock = _clock_under_load(device)
        except Exception:  # needs pynvml; a machine without it still profiles
            clock = None
    else:
        name = _cpu_name()
    return Environment(
        device=name,
        kind=device.type,
        threads=torch.get_num_threads(),
        libraries=libraries,
        clock_mhz=clock,
        commit=_commit(),
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )


@lru_cache(maxsize=8)
def _clock_under_load(device: torch.device) -> float:
    """Return the SM clock [MHz] while products run; an idle GPU's says nothing. Asked once a process."""
    square = torch.randn(4096, 4096, device=device, dtype=torch.bfloat16)
    for _ in range(LOAD_PRODUCTS):
        square @ square
    clock = float(torch.cuda.clock_rate(device))
    torch.cuda.synchronize(device)
    return clock


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _commit() -> str:
    """Return the commit of the checkout that this package runs from, or nothing."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return ""
    try:
        found = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, timeout=5
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return found.stdout.strip()
