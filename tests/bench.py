"""`make bench`: one outer step of Algorithm 1, ours against the plain way, within one run.

The reference is what the public notebooks do: neural_tangents kernels, the linear system solved
and differentiated at every inner step, autodiff through kernels and solve outside. Both sides run
in float32 on the same images (mnist from ADVKIP_DATA if there, else noise of the same shape). The
floor is the step's unavoidable multiplications at the rate of a large matrix product.

Writes reports/benchmarks/bench.json, a list of {"work", "reference_s", "ours_s", "ratio",
"floor_fraction", "peak_gb", "agreement"}; `agreement` holds the relative errors of both support
gradients against float64.
"""

import json
import os
import resource
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from advkip import attacks, data, kernels, krr

S, T, PGD_STEPS, EPSILON, STEP_SIZE, DIAG_REG = 2000, 400, 10, 0.3, 0.1, 1e-6
DEPTH = 3


def images():
    """X_S, Y_S, X_T, Y_T in float32."""
    rng = np.random.default_rng(0)
    if (Path(os.environ.get("ADVKIP_DATA", ".")) / "mnist.npz").exists():
        mnist = data.load("mnist")
        x, y = data.to_float(mnist.x_train[: S + T]), mnist.y_train[: S + T]
    else:
        x = rng.uniform(0, 1, (S + T, 28, 28, 1)).astype("float32")
        y = rng.integers(0, 10, S + T)
    labels = data.one_hot(y, 10)
    return x[:S], labels[:S] - np.float32(0.1), x[S:], labels[S:]


def reference_functions():
    stax = kernels.stax_module()
    dense = [stax.Dense(1, W_std=2**0.5, b_std=0.1), stax.Relu()] * DEPTH
    net = stax.serial(stax.Flatten(), *dense, stax.Dense(1, W_std=2**0.5, b_std=0.1))[2]

    def loss(x_t, y_t, x_s, y_s):
        k_ss = net(x_s, x_s, "ntk")
        ridge = DIAG_REG * jnp.trace(k_ss) / len(x_s)
        alpha = jax.scipy.linalg.solve(
            k_ss + ridge * jnp.eye(len(x_s), dtype=x_s.dtype), y_s, assume_a="pos"
        )
        return attacks.cross_entropy(net(x_t, x_s, "ntk") @ alpha, y_t).mean()

    inner = jax.jit(jax.grad(loss))
    outer = jax.jit(jax.grad(loss, (2, 3)))
    threat = attacks.Threat("linf", EPSILON)

    def step(x_s, y_s, x_t, y_t):
        x = x_t
        for _ in range(PGD_STEPS):
            g = inner(x, y_t, x_s, y_s)
            x = attacks.project(x + STEP_SIZE * jnp.sign(g), x_t, threat)
        return outer(x, y_t, x_s, y_s)

    return step, outer


def our_functions():
    kernel = kernels.by_name(f"fc{DEPTH}")
    threat = attacks.Threat("linf", EPSILON)
    slope = jax.jit(jax.grad(lambda f, y: attacks.cross_entropy(f, y).mean()))
    rows = krr.rows_of_tile(kernel, S)

    def outer(fitted, x, y_t):
        g = slope(attacks.predict(fitted.machine, x, batch_size=rows), y_t)
        return tuple(krr.support_gradient(fitted, x, g, diag_reg=DIAG_REG))

    def step(x_s, y_s, x_t, y_t):
        fitted = krr.fit(kernel, x_s, y_s, diag_reg=DIAG_REG)
        attack = partial(
            attacks.pgd, fitted.machine, threat=threat, n_steps=PGD_STEPS, step_size=STEP_SIZE
        )
        return outer(fitted, attacks.in_batches(attack, x_t, y_t, batch_size=rows), y_t)

    def gradient(x_t, y_t, x_s, y_s):
        return outer(krr.fit(kernel, x_s, y_s, diag_reg=DIAG_REG), x_t, y_t)

    return step, gradient


def seconds(function, *arguments, repeat=3):
    """Median time of a call after a first one that compiles."""
    jax.block_until_ready(function(*arguments))
    times = []
    for _ in range(repeat):
        began = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        times.append(time.perf_counter() - began)
    return sorted(times)[repeat // 2]


def floor_seconds(pixels):
    """Time of the step's multiplications at the rate of a 4096^3 product."""
    a = jnp.ones((4096, 4096), "float32")
    rate = 2 * 4096**3 / seconds(jax.jit(jnp.matmul), a, a)
    gram, inner = S * S * pixels, PGD_STEPS * 4 * T * S * pixels
    outer = 6 * T * S * pixels + 4 * S * S * pixels
    return (gram + S**3 / 3 + inner + outer) / rate


def relative_errors():
    """Errors of dL/dX_S at 400 support images against float64: ours, the reference's."""
    x_s, y_s, x_t, y_t = images()
    arguments = x_t[:100], y_t[:100], x_s[:400], y_s[:400]
    with jax.enable_x64(True):
        exact = reference_functions()[1](*(jnp.asarray(a, "float64") for a in arguments))[0]
        exact = np.asarray(exact)
    errors = {}
    for name, gradient in (("ours", our_functions()[1]), ("reference", reference_functions()[1])):
        found = np.asarray(gradient(*map(jnp.asarray, arguments))[0], "float64")
        errors[name] = float(np.linalg.norm(found - exact) / np.linalg.norm(exact))
    return errors


def main():
    arguments = [jnp.asarray(a) for a in images()]
    floor = floor_seconds(arguments[0][0].size)
    ours = seconds(our_functions()[0], *arguments)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    reference = seconds(reference_functions()[0], *arguments, repeat=1)
    result = {
        "work": f"one outer step, fc{DEPTH}, 28x28, S {S}, T {T}, {PGD_STEPS} inner steps, float32",
        "reference_s": round(reference, 3),
        "ours_s": round(ours, 3),
        "ratio": round(reference / ours, 2),
        "floor_fraction": round(floor / ours, 3),
        "peak_gb": round(peak, 2),
        "agreement": relative_errors(),
    }
    for key, value in result.items():
        print(f"{key:15} {value}")
    folder = Path("reports/benchmarks")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "bench.json").write_text(json.dumps([result], indent=1) + "\n")


if __name__ == "__main__":
    main()
