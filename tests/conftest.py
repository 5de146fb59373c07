"""Shared test settings. Double precision is switched on once, for the whole test process:
arrays keep the precision they are made with, so float32 paths are tested with float32 inputs."""

import ctypes
import gc
import os
import sys
from pathlib import Path

# Tests compare numbers to rounding; JAX and PyTorch on the CPU give the same everywhere.
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
if "PYTEST_XDIST_WORKER" in os.environ:  # several processes, of one thread each
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import jax
import numpy as np
import psutil
import pytest

from advkip import data
from tests.sections import SMALL_SETS

LIBC = ctypes.CDLL(None)
RESIDENT = 2.6e9
"""Bytes; imports alone take 1.0e9."""

ROOT = Path(__file__).parents[1]
os.environ["PATH"] = os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"]


@pytest.fixture(scope="module")
def digits():
    return data.load("digits")


@pytest.fixture(scope="module")
def splits(digits):
    """Of the digits, as tests of training sets have them."""
    return data.split(digits, SMALL_SETS)


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


@pytest.fixture(autouse=True, scope="module")
def forget_compiled_programs():
    """JAX keeps every program it has compiled, and no other module uses those of this one."""
    yield
    give_memory_back()


@pytest.fixture(autouse=True)
def keep_small():
    """Programs of a module's earlier tests go when there are many."""
    yield
    if psutil.Process().memory_info().rss > RESIDENT:
        give_memory_back()


def give_memory_back():
    """What compiling has used and freed stays with the process until the allocator is asked."""
    jax.clear_caches()
    gc.collect()
    if hasattr(LIBC, "malloc_trim"):  # glibc
        LIBC.malloc_trim(0)


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
