"""Markers from folders, hypothesis profiles, and the paths that several tests need."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

TESTS = Path(__file__).parent
KINDS = ("unit", "theory", "oracle", "property", "distributed", "notebooks", "browser", "gpu", "bench")

settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test with the name of its folder under tests/."""
    for item in items:
        folder = item.path.relative_to(TESTS).parts[0]
        if folder in KINDS:
            item.add_marker(getattr(pytest.mark, folder))


@pytest.fixture(scope="session")
def shared() -> Path:
    """Return the folder of real inputs beside the repository; skip without it."""
    folder = Path(os.environ.get("LONGCAT_SIM_SHARED", TESTS.parents[1] / "shared"))
    if not (folder / "reference").is_dir():
        pytest.skip("no ../shared folder: set LONGCAT_SIM_SHARED to the folder with reference/ and data/")
    return folder
