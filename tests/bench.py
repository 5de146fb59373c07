"""`make bench` and `make bench-paper`: the engine against references, within one run.

(And `make bench-threads`: threads that sleep against threads that spin, see `tests.threads`. And
several outer steps in a row, where a factor serves more than one: `python -m tests.bench mnist_30k`
and the others of RUNS.)

References, both with neural_tangents kernels and autodiff, in float32 on the same images:

- plain: what the public notebooks do; the linear system is solved, and differentiated, at every
  inner step;
- careful: the solve is taken out of the inner loop, autodiff goes through it in the outer step.

The floor is the step's multiplications at the rate of a large matrix product in the same run.
Each measurement has a process of its own; its peak memory is what it holds at most, less what it
held with the data in place. Images are MNIST's from ADVKIP_DATA, else noise of that shape.

Writes reports/benchmarks/bench.json (or paper_scale.json), a list of {"work", "reference_s",
"ours_s", "ratio", "floor_fraction", "peak_gb", "agreement"}. `agreement` holds relative errors
against float64, of ours and of the reference, or what else shows that the results are the same.
"""

import json
import os
import resource
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from advkip import algorithm, attacks, data, distill, gram, kernels, krr, losses, solver
from advkip.config import Experiment
from tests import stax_networks, threads

DIAG_REG, DEPTH = 1e-6, 3
# S, T, inner steps, epsilon, step size, data set
MNIST = 5000, 1000, 10, 0.3, 0.1, "mnist"
PAPER = 40_000, 10_000, 6, 8 / 255, 2 / 255, "cifar10"
RUNS = {  # several outer steps in a row: what is run, how many, learning rate
    "mnist_30k": ((30_000, 2000, *MNIST[2:]), 20, 5e-3),
    "cifar10_40k": ((40_000, 2000, *PAPER[2:]), 10, 2e-3),
    "cifar10_40k_10k": (PAPER, 10, 2e-3),
}


def has_file(name):
    return (Path(os.environ.get("ADVKIP_DATA", ".")) / f"{name}.npz").exists()


def images(n_support, n_target, name):
    """X_S, Y_S, X_T, Y_T in float32."""
    n = n_support + n_target
    if has_file(name):
        dataset = data.load(name)
        x, y = data.to_float(dataset.x_train[:n]), dataset.y_train[:n]
    else:
        rng = np.random.default_rng(0)
        shape = (28, 28, 1) if name == "mnist" else (32, 32, 3)
        x, y = rng.random((n, *shape), "float32"), rng.integers(0, 10, n)
    labels = data.one_hot(y, 10)
    parts = x[:n_support], labels[:n_support] - np.float32(0.1), x[n_support:], labels[n_support:]
    return [jnp.asarray(part) for part in parts]


def noise(name):
    """A data set of noise of the shape of MNIST or CIFAR-10."""
    rng, shape = np.random.default_rng(0), (28, 28, 1) if name == "mnist" else (32, 32, 3)
    x, y = rng.random((50_000, *shape), "float32"), np.arange(50_000) % 10
    return data.Dataset(x, y, x[:1000], y[:1000], 10)


def solve(net, x_s, y_s):
    k_ss = net(x_s, x_s, "ntk")
    ridge = DIAG_REG * jnp.trace(k_ss) / len(x_s)
    k_ss = k_ss + ridge * jnp.eye(len(x_s), dtype=x_s.dtype)
    return jax.scipy.linalg.solve(k_ss, y_s, assume_a="pos")


def loss(x_t, y_t, x_s, y_s):
    net = stax_networks.fully_connected(DEPTH)
    return losses.cross_entropy(net(x_t, x_s, "ntk") @ solve(net, x_s, y_s), y_t).mean()


def loss_of_alpha(x_t, y_t, x_s, alpha):
    return losses.cross_entropy(
        stax_networks.fully_connected(DEPTH)(x_t, x_s, "ntk") @ alpha, y_t
    ).mean()


def reference_step(work, *, careful):
    """The function of one outer step: X_S, Y_S, X_T, Y_T to dL/dX_S, dL/dY_S."""
    *_, n_steps, epsilon, step_size, _ = work
    inner = jax.jit(jax.grad(loss_of_alpha if careful else loss))
    outer = jax.jit(jax.grad(loss, (2, 3)))
    fit = jax.jit(lambda x, y: solve(stax_networks.fully_connected(DEPTH), x, y))
    threat = attacks.Threat("linf", epsilon)

    def step(x_s, y_s, x_t, y_t):
        x, weights = x_t, fit(x_s, y_s) if careful else y_s
        for _ in range(n_steps):
            x = attacks.project(x + step_size * jnp.sign(inner(x, y_t, x_s, weights)), x_t, threat)
        return outer(x, y_t, x_s, y_s)

    return step


def our_step(work):
    """The same for the engine."""
    n_support, _, n_steps, epsilon, step_size, _ = work
    kernel = kernels.by_name(f"fc{DEPTH}")
    rows = gram.rows_of_tile(kernel, n_support)

    def step(x_s, y_s, x_t, y_t):
        fitted = krr.fit(kernel, x_s, y_s, diag_reg=DIAG_REG)
        attack = partial(
            attacks.pgd, fitted.machine, threat=attacks.Threat("linf", epsilon),
            n_steps=n_steps, step_size=step_size,
        )  # fmt: skip
        x = attacks.in_batches(attack, x_t, y_t, batch_size=rows) if n_steps else x_t
        gradient = krr.support_gradient(fitted, x, y_t, loss=losses.cross_entropy)
        return gradient.x_support, gradient.y_support, fitted.machine, fitted.system.ridge

    return step


def outer_steps(work, n_steps, learning_rate, keep=True):
    """Seconds of each outer step of adv-KIP in a row, iterations of each, peak GB above the data.

    With `keep`, the factor of one step serves the next ones (`solver`). The first step includes
    compilation and validation on 100 images.
    """
    n_support, n_target, pgd_steps, epsilon, step_size, name = work
    e = Experiment.from_params({
        "dataset": {"name": name, "n_validation": 100, "n_test": 100},
        "support": {"n_support": n_support, "n_target": n_target},
        "threat": {"epsilon": epsilon, "step_size": step_size},
        "kernel": {"name": f"fc{DEPTH}"}, "kip": None, "notebooks": ["01_kernels"],
        "adv_kip": {"n_steps": n_steps, "learning_rate": learning_rate, "pgd_steps": pgd_steps,
                    "label_learning_rate": learning_rate, "eval_every": n_steps},
    })  # fmt: skip
    splits = data.split(data.load(name) if has_file(name) else noise(name), e)
    solver.KEPT = 0 if keep else 10**9
    before = memory_gb()
    run = algorithm.Run(e, splits, kernels.of(e.kernel), "adv-kip")
    state, seconds_, iterations = run.start(distill.initial_support(e, splits)), [], []
    for _ in range(n_steps):
        began = time.perf_counter()
        state = run.advance(state)
        seconds_.append(round(time.perf_counter() - began, 2))
        iterations.append(state.origin.last if keep else None)
    return seconds_, iterations, peak_gb() - before


def residual(machine, ridge, y_s):
    """|(K_SS + r) alpha - Y_S| / |Y_S| on 200 rows, with K_SS computed anew."""
    rows = np.linspace(0, len(y_s) - 1, 200).astype(int)
    found = machine(machine.x_support[rows]) + ridge * machine.alpha[rows]
    return float(jnp.linalg.norm(found - y_s[rows]) / jnp.linalg.norm(y_s[rows]))


def seconds(function, *arguments, repeat=3, warm=True):
    """Median time of a call, after a first one that compiles."""
    if warm:
        jax.block_until_ready(function(*arguments))
    times = []
    for _ in range(repeat):
        began = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        times.append(time.perf_counter() - began)
    return sorted(times)[repeat // 2]


def product_rate():
    """FLOP/s of a 4096^3 product."""
    a = jnp.ones((4096, 4096), "float32")
    return 2 * 4096**3 / seconds(jax.jit(jnp.matmul), a, a)


def operations(work, pixels):
    """FLOPs of one step as the paper's loss needs them (autodiff's without its waste)."""
    s, t, n_steps, *_ = work
    k_ss, inner, outer = s * s * pixels, n_steps * 4 * t * s * pixels, 6 * t * s * pixels
    return k_ss + s**3 / 3 + inner + outer + 4 * s * s * pixels


def peak_gb():
    """Largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9  # Linux has KiB


def memory_gb():
    """Resident memory of this process now (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e9


def measure(which, work, repeat, warm):
    """(seconds, peak GB above the data, floor in seconds, residual) of 'ours', 'plain' or
    'careful'; the residual of ours alone."""
    arguments = images(work[0], work[1], work[-1])
    step = our_step(work) if which == "ours" else reference_step(work, careful=which == "careful")
    last = []

    def keep(*arguments):
        last[:] = step(*arguments)
        return last

    before = memory_gb()
    time_ = seconds(keep, *arguments, repeat=repeat, warm=warm)
    peak = peak_gb() - before
    floor = operations(work, arguments[0][0].size) / product_rate()
    return time_, peak, floor, residual(*last[2:], arguments[1]) if which == "ours" else None


def gradient_errors():
    """Errors of dL/dX_S at 400 MNIST images against float64: engine and reference in both."""
    arguments = [np.asarray(a) for a in images(400, 100, "mnist")]
    work = (400, 100, 0, 0.3, 0.1, "mnist")
    found = {}
    for dtype in ("float64", "float32"):
        with jax.enable_x64(dtype == "float64"):
            given = [jnp.asarray(a, dtype) for a in arguments]
            for name, step in (
                ("ours", our_step(work)), ("reference", reference_step(work, careful=False)),
            ):  # fmt: skip
                found[name, dtype] = np.asarray(step(*given)[0], "float64")
    exact = found["reference", "float64"]
    return {
        f"{name}_{dtype}": float(np.linalg.norm(value - exact) / np.linalg.norm(exact))
        for (name, dtype), value in found.items()
        if (name, dtype) != ("reference", "float64")
    }


def short_run():
    """Robust accuracy on 1,000 other training images after 20 outer steps, S 500, T 250."""
    work = (500, 250, 10, 0.3, 0.1, "mnist")
    x_s, y_s, x_t, y_t = images(5500, 1000, "mnist")
    pool, pool_labels, kernel = x_s[500:], y_s[500:] + 0.1, kernels.by_name(f"fc{DEPTH}")
    accuracies = {}
    for name, step in (
        ("ours", our_step(work)), ("reference", reference_step(work, careful=False)),
    ):  # fmt: skip
        x, y, optimizer = x_s[:500], y_s[:500], optax.adam(5e-3)
        state = optimizer.init((x, y))
        for i in range(20):
            batch = slice(250 * i, 250 * (i + 1))
            gradient = tuple(step(x, y, pool[batch], pool_labels[batch]))[:2]
            changes, state = optimizer.update(gradient, state)
            x, y = optax.apply_updates((x, y), changes)
        machine = krr.fit(kernel, x, y, diag_reg=DIAG_REG).machine
        attacked = attacks.pgd(
            machine, x_t, y_t, threat=attacks.Threat("linf", 0.3), n_steps=10, step_size=0.1
        )
        accuracies[name] = float((machine(attacked).argmax(1) == y_t.argmax(1)).mean())
    return {f"robust_accuracy_{name}": round(value, 4) for name, value in accuracies.items()}


def convolutional(name):
    """Microseconds a pair of value and input gradient, (ours, reference), peaks and errors."""
    x_s, _, x_t, _ = images(512, 64, name)
    both = {
        "ours": kernels.by_name("conv3"),
        "reference": kernels.Stax(stax_networks.convolutional(3), tile=16),
    }

    def value_and_gradient(kernel, x, s):
        """Of the sum of squares / 2: as in an attack, the gradient has to wait for the value."""
        k, pullback = kernel.value_and_pullback(x, s)
        return k, pullback(k)[0]

    times, found = {}, {}
    for name, kernel in both.items():
        function = jax.jit(partial(value_and_gradient, kernel))
        before = memory_gb()
        times[name] = seconds(function, x_t, x_s) / (64 * 512) * 1e6
        if name == "ours":
            peak = peak_gb() - before
        found[name] = map(np.asarray, function(x_t[:16], x_s[:16]))
    with jax.enable_x64(True):
        double = [jnp.asarray(np.asarray(a), "float64") for a in (x_t[:16], x_s[:16])]
        exact = [np.asarray(v) for v in value_and_gradient(both["reference"], *double)]
        found["ours_float64"] = map(np.asarray, value_and_gradient(both["ours"], *double))
    errors = {
        name: [float(np.linalg.norm(v - e) / np.linalg.norm(e))
               for v, e in zip(pair, exact, strict=True)]
        for name, pair in found.items()
    }  # fmt: skip
    return times, peak, errors


def alone(function, *arguments):
    """function(*arguments) in a process of its own, so that its peak memory is its own, too."""
    program = f"from tests.bench import *\nprint(json.dumps({function.__name__}{arguments!r}))"
    output = subprocess.run(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, check=True, text=True
    )
    return json.loads(output.stdout.splitlines()[-1])


def source(work):
    return work[-1] if has_file(work[-1]) else f"noise like {work[-1]}"


def row(work, ours, agreement, reference=None):
    """A line of the results; `reference` is (name, what `measure` returned)."""
    name = (
        f"fc{DEPTH}, {source(work)}, S {work[0]:,}, T {work[1]:,}, {work[2]} inner steps, float32"
    )
    return {
        "work": f"one outer step, {name}" + (f", {reference[0]} reference" if reference else ""),
        "reference_s": reference and round(reference[1][0], 2),
        "ours_s": round(ours[0], 3),
        "ratio": reference and round(reference[1][0] / ours[0], 2),
        "floor_fraction": round(ours[2] / ours[0], 3),
        "peak_gb": round(ours[1], 3),
        "agreement": agreement,
    }


def standard():
    # In turn, since a shared machine is now faster, now slower; the medians of the turns.
    turns = {"ours": [], "plain": [], "careful": []}
    for _ in range(3):
        for name, found in turns.items():
            found.append(alone(measure, name, MNIST, 5 if name == "ours" else 1, True))
    ours, plain, careful = (sorted(found)[1] for found in turns.values())
    rows = [
        row(MNIST, ours, alone(gradient_errors), ("plain", plain)),
        row(MNIST, ours, alone(short_run), ("careful", careful)),
    ]
    for n in (2500, 5000, 10_000):
        work = (n, n // 5, *MNIST[2:])
        found = ours if n == 5000 else alone(measure, "ours", work, 3, True)
        # Relative to S 5,000: measured growth over counted growth of time, and of 4 S^2 bytes.
        agreement = {
            "time_over_counted": round(
                found[0] / ours[0] * operations(MNIST, 784) / operations(work, 784), 3
            ),
            "k_ss_gb": 4 * n * n / 1e9,
            "residual": found[3],
        }
        rows.append(row(work, found, agreement))
    kept, own = (alone(outer_steps, MNIST, 20, 5e-3, keep) for keep in (True, False))
    rows.append(kept_row(MNIST, kept, 20, 5e-3, own))
    for shape, name in (("28x28", "mnist"), ("32x32x3", "cifar10")):
        times, peak, errors = sorted(
            (alone(convolutional, name) for _ in range(3)),
            key=lambda c: c[0]["reference"] / c[0]["ours"],
        )[1]
        rows.append({
            "work": f"conv3, {shape}, float32: value and input gradient, microseconds a pair of "
            "images",
            "reference_s": round(times["reference"] * 1e-6, 8),
            "ours_s": round(times["ours"] * 1e-6, 8),
            "ratio": round(times["reference"] / times["ours"], 2),
            "floor_fraction": None,
            "peak_gb": round(peak, 3),
            "agreement": errors,
        })  # fmt: skip
    return rows


def kept_row(work, found, n_steps, rate, own=None):
    """A line for several outer steps; `own` are those that each had a factor of their own."""
    times, iterations, peak = found
    return {
        "work": f"mean of {n_steps} outer steps with an old factor"
        f"{', the reference with one for each step' if own else ''}; factorisations included, "
        f"fc{DEPTH}, {source(work)}, S {work[0]:,}, T {work[1]:,}, {work[2]} inner steps, "
        f"float32, learning rate {rate:g}",
        "reference_s": own and round(float(np.mean(own[0])), 3),
        "ours_s": round(float(np.mean(times)), 3),
        "ratio": own and round(float(np.mean(own[0]) / np.mean(times)), 2),
        "floor_fraction": None,
        "peak_gb": round(peak, 3),
        "agreement": {"seconds": times, "iterations": iterations},
    }


def main(name):
    if name == "bench":
        rows = standard()
    elif name in RUNS:
        work, n_steps, rate = RUNS[name]
        rows = [kept_row(work, alone(outer_steps, work, n_steps, rate), n_steps, rate)]
    elif name == "threads":
        rows = threads.rows()
    else:
        found = alone(measure, "ours", PAPER, 1, False)
        rows = [row(PAPER, found, {"residual": found[3]})]
    for line in rows:
        print(json.dumps(line, indent=1))
    path = Path("reports/benchmarks") / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "bench")
