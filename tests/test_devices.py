"""The factor in place, sizes of tiles, and the same numbers on any number of devices and hosts."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from advkip import attacks, data, devices, distill, gram, kernels, krr, solver
from tests.sections import experiment


def few_steps(kernel_name, kept=10**9):
    """X_S after three steps of Algorithm 1; nothing is a multiple of the number of devices.

    Supports of `kept` images or more keep their first factor.
    """
    solver.KEPT, solver.ROWS_PER_ITERATION = kept, 1
    origins, origin = [], krr.origin
    krr.origin = lambda *arguments: origins.append(origin(*arguments)) or origins[-1]
    e = experiment(
        dataset__name="digits", kernel__name=kernel_name, kernel__dtype="float64",
        support__n_support=30, support__n_target=22, dataset__n_validation=25,
        adv_kip__pgd_steps=3, adv_kip__n_steps=3, adv_kip__eval_every=1, kernel__block_size=13,
    )  # fmt: skip
    result = distill.distill(e, data.split(data.load("digits"), e), progress=False)
    krr.origin = origin
    assert [one.age for one in origins] == ([] if kept else [0, 1, 2])
    return result.x_support, [line["loss"] for line in result.history]


RUNS = {"fc2": ("fc2",), "conv1": ("conv1",), "fc2, a kept factor": ("fc2", 0)}

PROGRAM = """
import sys
import jax, numpy as np
jax.config.update("jax_enable_x64", True)
port, hosts, host, path, *runs = sys.argv[1:]
if int(hosts) > 1:
    jax.distributed.initialize(f"localhost:{port}", int(hosts), int(host))
from tests.test_devices import RUNS, few_steps
found = {run: few_steps(*RUNS[run]) for run in runs}
x, loss = ({f"{key} {run}": found[run][i] for run in runs} for i, key in enumerate(("x", "loss")))
np.savez(path, **x, **loss, devices=jax.device_count())
"""


@pytest.fixture(scope="module")
def on_one_device():
    """(X_S, losses) of each run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(solver, "KEPT", 0)  # both are set anew, and put back in the end
        patch.setattr(solver, "ROWS_PER_ITERATION", 1)
        with jax.enable_x64(True):
            return {run: few_steps(*arguments) for run, arguments in RUNS.items()}


@pytest.mark.parametrize(("hosts", "devices_each"), [(1, 4), (2, 2)])
def test_many_devices_give_the_numbers_of_one(tmp_path, hosts, devices_each, on_one_device):
    """Host CPUs stand in for GPUs; two processes with jax.distributed stand in for two hosts."""
    runs = [run for run in RUNS if hosts == 1 or run != "conv1"]  # convolutions compile for long
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    flags = f"--xla_force_host_platform_device_count={devices_each}"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, port, str(hosts), str(i), tmp_path / f"{i}.npz", *runs],
            env=environment, cwd=Path(__file__).parents[1],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for i in range(hosts)
    ]  # fmt: skip
    for process in running:
        output = process.communicate(timeout=300)[0]
        assert process.returncode == 0, output
    for i in range(hosts):
        found = np.load(tmp_path / f"{i}.npz")
        assert found["devices"] == hosts * devices_each
        for run in runs:
            x, loss = on_one_device[run]
            np.testing.assert_allclose(found[f"x {run}"], x, rtol=1e-9, atol=1e-12)
            np.testing.assert_allclose(found[f"loss {run}"], loss, rtol=1e-9)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("block", [100, 16, 13])
def test_cholesky_in_place(rng, dtype, block, monkeypatch):
    monkeypatch.setattr(devices, "CHOLESKY_DIRECT", 39)
    monkeypatch.setattr(devices, "CHOLESKY_BLOCK", block)
    a = rng.normal(size=(40, 50))
    a = (a @ a.T).astype(dtype)
    garbage = np.where(np.tri(40, dtype=bool), a, 1e30)  # only the lower triangle is read
    given = jnp.asarray(garbage.astype(dtype))
    factor, success = devices.cholesky_in_place(given)
    assert given.is_deleted()  # the factor took its place
    np.testing.assert_array_equal(np.triu(factor, 1), np.triu(garbage, 1).astype(dtype))
    exact = np.linalg.cholesky(a.astype("float64"))
    tolerance = 100 * np.finfo(dtype).eps * np.abs(exact).max()
    np.testing.assert_allclose(np.tril(factor), exact, atol=tolerance)
    assert success
    assert factor.dtype == dtype
    for shift in (np.eye(40), np.diag(np.arange(40) == 39)):
        assert not devices.cholesky_in_place(jnp.asarray((a - 1000 * shift).astype(dtype)))[1]

    y = rng.normal(size=(40, 3)).astype(dtype)
    solved = jax.jit(devices.cholesky_solve)(factor, jnp.asarray(y))
    np.testing.assert_allclose(a @ np.asarray(solved), y, atol=1e3 * tolerance)


def test_cholesky_on_a_cpu_allocates_nothing():
    """What S = 40,000 in 16 GB rests on."""
    a = jnp.ones((500, 500), "float32")
    whole = devices._factorise_block.lower(a, 0, 500).compile().memory_analysis()
    assert whole.alias_size_in_bytes == 4 * 500**2
    assert whole.temp_size_in_bytes < 1000
    blocks = (
        devices._factorise_block.lower(a, 0, 50),
        devices._solve_block.lower(a, 50, 50, 0, 50),
        devices._update_block.lower(a, 50, 50, 50, 50, 0, 50),
    )
    for lowered in blocks:
        analysis = lowered.compile().memory_analysis()
        assert analysis.alias_size_in_bytes == 4 * 500**2
        assert analysis.temp_size_in_bytes < 4 * 4 * 50**2 + 1000


def test_cholesky_elsewhere_agrees(rng):
    a = rng.normal(size=(20, 30))
    a = jnp.asarray(a @ a.T)
    ours, theirs = devices._lapack_cholesky(a), devices._jax_cholesky(a)
    np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-10)
    np.testing.assert_array_equal(np.triu(theirs[0], 1), np.triu(a, 1))
    assert ours[1]
    assert theirs[1]


class FakeGpu:
    platform = "gpu"

    def memory_stats(self):
        return {"bytes_limit": 80 * 10**9}


def test_tiles_grow_with_the_memory_of_a_gpu(monkeypatch):
    kernel = kernels.by_name("fc3")
    small = gram.square_tile(kernel), gram.rows_of_tile(kernel, 5000)
    monkeypatch.setattr(jax, "local_devices", lambda: [FakeGpu()])
    assert devices.tile_floats() == 80 * 10**9 // 128
    assert gram.square_tile(kernel) > 10 * small[0]
    assert gram.rows_of_tile(kernel, 5000) > 100 * small[1]


def test_even_size():
    assert [devices.even_size(n, 4) for n in (1, 4, 5, 8, 9)] == [1, 4, 3, 4, 3]


def to_bits(a, bits):
    """Float32 numbers rounded to that many mantissa bits, ties to even."""
    drop, whole = 23 - bits, np.asarray(a, "float32").view("uint32")
    whole = whole + ((1 << (drop - 1)) - 1) + ((whole >> drop) & 1)
    return (whole >> drop << drop).astype("uint32").view("float32")


@pytest.mark.parametrize("precision", devices.MANTISSA_BITS)
def test_rounded_product_is_the_product_of_rounded_factors(rng, precision):
    a, b = (rng.normal(size=shape).astype("float32") for shape in ((7, 300), (300, 5)))
    bits = devices.MANTISSA_BITS[precision]
    short = [to_bits(part, bits).astype("float64") for part in (a, b)]
    if precision == "bfloat16":
        np.testing.assert_array_equal(short[0], jnp.asarray(a, "bfloat16").astype("float64"))
    found = devices.rounded_product(jnp.asarray(a), jnp.asarray(b), precision)
    assert found.dtype == "float32"
    size = np.abs(short[0]) @ np.abs(short[1])
    assert (np.abs(found - short[0] @ short[1]) < 1e-6 * size).all()  # summed in float32
    assert np.abs(found - a.astype("float64") @ b).max() > 1e-5 * size.max()
    full = devices.rounded_product(jnp.asarray(a), jnp.asarray(b), "full")
    np.testing.assert_array_equal(full, devices.product(a, b))


@pytest.mark.parametrize(
    ("precision", "asked"),
    [
        ("full", "precision = [HIGHEST, HIGHEST] : (tensor<20x64xf32>, tensor<64x30xf32>)"),
        ("tfloat32", "precision = [DEFAULT, DEFAULT] : (tensor<20x64xf32>, tensor<64x30xf32>)"),
        ("bfloat16", "precision = [DEFAULT, DEFAULT] : (tensor<20x64xbf16>, tensor<64x30xbf16>)"),
    ],
)
def test_what_a_gpu_is_asked_for(precision, asked):
    """An attack's two large products in short precision, those with alpha in full."""
    kernel = kernels.rounded(kernels.by_name("fc2"), precision)
    x, y, x_support, alpha = (
        jnp.zeros(shape, "float32") for shape in ((20, 8, 8, 1), (20, 10), (30, 8, 8, 1), (30, 10))
    )

    machine = krr.KernelMachine(kernel, x_support, alpha)
    ball, aim = attacks.Ball("linf", 0.1, 0.0, 1.0), jnp.zeros(20, int)
    traced = attacks._pgd.trace(machine, x, y, aim, None, ball, 0.05, 3, "mse", 1, "fixed")

    def products(platform):
        lines = traced.lower(lowering_platforms=(platform,)).as_text().splitlines()
        # Nobody reads the gradient of the support, so the compiler drops it: see below.
        return [line for line in lines if "dot_general" in line and "-> tensor<30x" not in line]

    assert sum(asked in line for line in products("cuda")) == 1
    for platform, expected in (("cuda", 0 if precision == "full" else 2), ("cpu", 0)):
        assert sum("DEFAULT" in line for line in products(platform)) == expected
    compiled = traced.lower().compile().as_text()
    made = re.findall(r"= f32\[(\d+),\d+\]\S* (?:dot|fusion)\(.*dot_general", compiled)
    assert set(made) == {"20"}
