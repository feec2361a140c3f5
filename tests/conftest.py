"""Shared fixtures: one seed, one place for the data."""

import os
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no network in tests

# A shell starts what it puts in the background deaf to Ctrl-C, and children inherit that: those
# that tests interrupt would never hear of it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def data() -> Path:
    """The evaluation sets; tests that need them say so when they are not there."""
    root = Path(__file__).parents[1]
    folder = Path(os.environ.get("NESTVEC_DATA", root / "../shared/data"))
    if not folder.is_dir():
        pytest.skip(f"no evaluation data at {folder}: set NESTVEC_DATA")
    return folder


@pytest.fixture(scope="module")
def one_blas_thread():
    """For small fits: more threads than one only wait for each other."""
    with pytest.importorskip("threadpoolctl").threadpool_limits(1):
        yield


@pytest.fixture
def mounted():
    """Mount something at a folder, like a disk that is soon full; undone after the test."""
    folders = []

    def mount(folder, *words):
        folder.mkdir(exist_ok=True)
        done = subprocess.run(["mount", *words, folder], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"mount is not allowed here: {done.stderr.strip()}")
        folders.append(folder)

    yield mount
    for folder in reversed(folders):
        subprocess.run(["umount", "-l", folder], check=True)
