"""Describe this machine as a hardware profile: peaks and bandwidth measured, the rest read from the system."""

from __future__ import annotations

import datetime
import os
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

from longcat_sim.profiling.environment import here
from longcat_sim.profiling.timing import Clock, steady
from longcat_sim.records.files import write_text
from longcat_sim.specs.hardware import ONE_CORE
from longcat_sim.units import show

PRICE_USD_PER_HOUR = 0.05
"""One core of a rented machine (assumed)."""
CPU_SIZE, CUDA_SIZE = 1024, 8192
COPY_BYTES = {"cpu": 128 << 20, "cuda": 1 << 30}


def describe_machine(name: str, device: torch.device, dtype: str = "") -> dict[str, Any]:
    """Return the profile (schema, name, datasheet) of this machine's device; one thread on a CPU."""
    environment = here(device)
    date = datetime.date.today().isoformat()
    with steady(device):
        rates = _peaks(device)
        bandwidth = _bandwidth(device)
    sheet: dict[str, Any] = {
        "device": environment.device + (ONE_CORE if device.type == "cpu" else ""),
        "peak": {kind: show(rate, "FLOP/s") for kind, rate in rates.items()},
        "memory": f"{_memory(device)} B",
        "memory_bandwidth": show(bandwidth, "B/s"),
    }
    sources = {f"peak.{kind}": f"measured, best square product, {date}" for kind in rates}
    sources |= {"memory": "read from the system", "memory_bandwidth": f"measured, large copy, {date}"}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        sheet |= {"l2": f"{properties.L2_cache_size} B", "sm_count": properties.multi_processor_count}
        sources |= {"l2": "read from the driver", "sm_count": "read from the driver"}
    else:
        cache = _cpu_cache()
        sheet |= {"sm_count": 1, "price": f"{PRICE_USD_PER_HOUR:.2f} USD/h"}
        sheet |= {"l2": f"{cache} B"} if cache else {}
        sheet["scale_up"] = {"bandwidth": show(bandwidth / 2, "B/s"), "domain_size": os.cpu_count() or 1}
        sources |= {"sm_count": "one thread", "scale_up.bandwidth": f"half of the measured copy rate, {date}"}
        sources |= {"scale_up.domain_size": "cores of this machine"} | ({"l2": "read from the system"} if cache else {})
    sheet["sources"] = sources
    return {"schema": 1, "name": name, "datasheet": sheet}


def write_machine(path: str | Path, document: dict[str, Any]) -> None:
    """Write a described machine as a profile."""
    write_text(Path(path), yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=118))


def _peaks(device: torch.device) -> dict[str, float]:
    """Return the best FLOP rate of a large square product per dtype."""
    size = CUDA_SIZE if device.type == "cuda" else CPU_SIZE
    kinds = {"fp32": torch.float32} if device.type == "cpu" else {"bf16": torch.bfloat16, "fp32": torch.float32}
    clock, rates = Clock(device), {}
    for name, dtype in kinds.items():
        pair = torch.randn(2, size, size, device=device, dtype=dtype)
        rates[name] = 2.0 * size**3 / min(clock.sample(partial(torch.matmul, *pair), 0.5).flat)
    return rates


def _bandwidth(device: torch.device) -> float:
    """Return bytes read and written per second by a large copy."""
    source = torch.ones(COPY_BYTES[device.type] // 4, device=device)
    target = torch.empty_like(source)
    return 2.0 * source.nbytes / min(Clock(device).sample(lambda: target.copy_(source), 0.5).flat)


def _memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _cpu_cache() -> int:
    """Return the bytes of one core's L2, or 0 where the system does not tell."""
    path = Path("/sys/devices/system/cpu/cpu0/cache/index2/size")
    try:
        text = path.read_text(encoding="utf-8").strip()
        return int(text.removesuffix("K")) * 1024 if text.endswith("K") else int(text)
    except (OSError, ValueError):
        return 0
