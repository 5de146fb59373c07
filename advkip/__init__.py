"""advkip: can a model be robust because of its training data alone?

The package behind the notebooks. Read it in this order: `settings`, `config` (an experiment),
`data`, `kernel`, `kernels` and `krr` (kernel regression with infinite-width kernels), `attacks`,
`distill` (Algorithm 1), `sets`, `evaluate`, `diagnose`, `records`, `run` (params files to
reports).
"""

import ctypes
import os

# Read when PyTorch is loaded. Its OpenMP threads otherwise spin while they wait for each other, and
# beside any other busy process everything takes many times as long (README, "Speed").
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Read when JAX first uses a GPU, of which it otherwise takes three quarters; PyTorch needs some.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

# Read when JAX first uses a GPU. XLA otherwise times many programs for each product of matrices
# and takes the fastest: compiling takes longer, and which one wins, and with it the last bits of a
# result, may differ from run to run.
_STEADY = {"--xla_gpu_autotune_level": "0", "--xla_gpu_enable_triton_gemm": "false"}
_given = os.environ.get("XLA_FLAGS", "")
os.environ["XLA_FLAGS"] = " ".join(
    [*(f"{flag}={value}" for flag, value in _STEADY.items() if flag not in _given), _given]
).strip()


def _keep_memory():
    """Has glibc keep what arrays of up to 32 MiB leave free for the next ones, up to 2 GiB.

    It otherwise gives them back to the system, which clears each page anew, at
    every training step of a convolutional network. Larger arrays still go back.
    """
    if {"GLIBC_TUNABLES", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"} & set(os.environ):
        return  # the user's choice
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library
        return
    trim_threshold, mmap_threshold = -1, -3  # of malloc.h
    mallopt(mmap_threshold, 2**25)
    mallopt(trim_threshold, 2**31 - 1)


_keep_memory()

__version__ = "0.1.0"
