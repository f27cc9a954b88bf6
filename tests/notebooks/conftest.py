"""The quickstart that the first notebook reads: $LONGCAT_SIM_OUT if it holds one, else made once."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def quickstart_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a finished quickstart."""
    from longcat_sim.studies.quickstart.saved import saved_run

    folder = Path(os.environ.get("LONGCAT_SIM_OUT") or tmp_path_factory.mktemp("quickstart"))
    here = os.getcwd()
    os.chdir(tmp_path_factory.mktemp("elsewhere"))  # a test leaves ./hardware_profiles as it is
    try:
        return saved_run(folder.resolve()).out
    finally:
        os.chdir(here)
