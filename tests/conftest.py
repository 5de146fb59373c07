"""Shared test settings. Double precision is switched on once, for the whole test process:
arrays keep the precision they are made with, so float32 paths are tested with float32 inputs."""

import os
import sys
from pathlib import Path

# Tests compare numbers to rounding; JAX and PyTorch on the CPU give the same everywhere.
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
if "PYTEST_XDIST_WORKER" in os.environ:  # several processes, of one thread each
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import jax
import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
os.environ["PATH"] = os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"]


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


@pytest.fixture(autouse=True, scope="module")
def forget_compiled_programs():
    """JAX keeps every program it has compiled, and no other module uses those of this one."""
    yield
    jax.clear_caches()


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def shared_data():
    """The folder of real data sets beside the project, or a skip."""
    folder = Path(os.environ.get("ADVKIP_DATA") or ROOT.parent / "shared" / "data")
    if not (folder / "mnist.npz").exists():
        pytest.skip("needs mnist.npz in ADVKIP_DATA or in ../shared/data")
    return folder
