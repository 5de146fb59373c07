"""Ridge regression against scikit-learn; the exact gradient against autodiff and differences."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.kernel_ridge import KernelRidge

from advkip import attacks, data, kernels, krr, losses, residuals
from tests import stax_networks

DIAG_REG = 1e-3


def problem(rng, dtype="float64", S=24, T=10, C=3, shape=(4, 4, 1)):
    x_s, x_t = (jnp.asarray(rng.uniform(0, 1, (n, *shape)), dtype) for n in (S, T))
    y_s = jnp.asarray(rng.normal(size=(S, C)), dtype)
    y_t = jax.nn.one_hot(rng.integers(0, C, T), C, dtype=dtype)
    return x_s, y_s, x_t, y_t


def autodiff_gradient(kernel_fn, x_s, y_s, x_t, y_t, diag_reg=DIAG_REG):
    """What the engine avoids: autodiff through the kernel matrices and through the solve."""

    def loss(x_s, y_s):
        k_ss = kernel_fn(x_s, x_s, "ntk")
        ridge = diag_reg * jnp.trace(k_ss) / len(x_s)
        alpha = jnp.linalg.solve(k_ss + ridge * jnp.eye(len(x_s), dtype=x_s.dtype), y_s)
        return losses.cross_entropy(kernel_fn(x_t, x_s, "ntk") @ alpha, y_t).mean()

    return jax.grad(loss, (0, 1))(x_s, y_s)


def our_gradient(kernel, x_s, y_s, x_t, y_t, diag_reg=DIAG_REG, block_size=0):
    fitted = krr.fit(kernel, x_s, y_s, diag_reg=diag_reg, block_size=block_size)
    found = krr.support_gradient(fitted, x_t, y_t, loss=losses.cross_entropy)
    logits = fitted.machine(x_t)
    np.testing.assert_allclose(found.loss, losses.cross_entropy(logits, y_t).mean(), rtol=2e-5)
    return found


def relative(a, b):
    a, b = np.asarray(a, "float64"), np.asarray(b)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def test_fit_equals_scikit_learn(rng):
    x_s, y_s, x_t, _ = problem(rng)
    kernel = kernels.by_name("fc3")
    fitted = krr.fit(kernel, x_s, y_s, diag_reg=DIAG_REG)
    reference = KernelRidge(alpha=float(fitted.system.ridge), kernel="precomputed")
    reference.fit(kernel(x_s, x_s), y_s)
    np.testing.assert_allclose(
        fitted.machine(x_t), reference.predict(kernel(x_t, x_s)), rtol=1e-6, atol=1e-7
    )
    np.testing.assert_allclose(
        fitted.system.ridge, DIAG_REG * kernel.diagonal(x_s).mean(), rtol=1e-12
    )


@pytest.mark.parametrize("name", ["fc3", "conv1", "fc3-mirror", "fc3-pieces3"])
def test_gradient_equals_autodiff_through_the_solve(rng, name):
    given = problem(rng, S=12 if name == "conv1" else 24)
    theirs = {"fc3": stax_networks.fully_connected(3), "conv1": stax_networks.convolutional(1)}
    theirs["fc3-mirror"] = stax_networks.mirrored(theirs["fc3"])
    theirs["fc3-pieces3"] = stax_networks.in_pieces(theirs["fc3"], 3)
    ours = our_gradient(kernels.by_name(name), *given)
    expected = jax.jit(partial(autodiff_gradient, theirs[name]))(*given)
    assert relative(ours.x_support, expected[0]) < 1e-6
    assert relative(ours.y_support, expected[1]) < 1e-6


def test_float32_gradient_is_as_good_as_float32_autodiff():
    digits = data.load("digits")
    x, y = data.to_float(digits.x_train[:90]), data.one_hot(digits.y_train[:90], 10)
    single = x[:60], y[:60] - np.float32(0.1), x[60:], y[60:]
    plain = partial(autodiff_gradient, stax_networks.fully_connected(3))
    exact = jax.jit(plain)(*(jnp.asarray(a, "float64") for a in single))
    # In double-precision mode neural_tangents would compute in float64 whatever it is given; and
    # compiled as one program its float32 is a hundred times worse.
    with jax.enable_x64(False):
        ours = our_gradient(kernels.by_name("fc3"), *map(jnp.asarray, single))
        autodiff = plain(*map(jnp.asarray, single))
    assert ours.x_support.dtype == autodiff[0].dtype == "float32"
    for slot in (0, 1):
        error, limit = (relative(v, exact[slot]) for v in (ours[slot + 1], autodiff[slot]))
        assert error <= 1.25 * limit < 1e-5  # both are rounding errors of the same sums


def test_gradient_equals_finite_differences(rng):
    x_s, y_s, x_t, y_t = problem(rng)
    kernel = kernels.by_name("fc2")
    dx, dy = rng.normal(size=x_s.shape), rng.normal(size=y_s.shape)

    def loss(h):
        machine = krr.fit(kernel, x_s + h * dx, y_s + h * dy, diag_reg=DIAG_REG).machine
        return float(losses.cross_entropy(machine(x_t), y_t).mean())

    ours = our_gradient(kernel, x_s, y_s, x_t, y_t)
    slope = float((ours.x_support * dx).sum() + (ours.y_support * dy).sum())
    assert slope == pytest.approx((loss(1e-5) - loss(-1e-5)) / 2e-5, rel=1e-5)


@pytest.mark.parametrize("block_size", [1, 7, 24, 100])
def test_block_size_never_changes_the_result(rng, block_size):
    given = problem(rng)
    kernel = kernels.by_name("fc3")
    whole, blocks = (
        our_gradient(kernel, *given),
        our_gradient(kernel, *given, block_size=block_size),
    )
    np.testing.assert_allclose(blocks.x_support, whole.x_support, rtol=1e-8, atol=1e-12)
    np.testing.assert_allclose(blocks.y_support, whole.y_support, rtol=1e-8, atol=1e-12)


def test_machine_is_differentiable(rng):
    x_s, y_s, x_t, _ = problem(rng)
    kernel = kernels.by_name("fc3")
    machine = krr.fit(kernel, x_s, y_s).machine
    w = jnp.asarray(rng.normal(size=(len(x_t), y_s.shape[1])))
    reference = stax_networks.fully_connected(3)

    def logits(x, s, alpha):
        return (reference(x, s, "ntk") @ alpha * w).sum()

    expected = jax.jit(jax.grad(logits, (0, 1, 2)))(x_t, x_s, machine.alpha)
    ours = jax.grad(lambda x, m: (m(x) * w).sum(), (0, 1))(x_t, machine)
    assert relative(ours[0], expected[0]) < 1e-6
    assert relative(ours[1].x_support, expected[1]) < 1e-6
    assert relative(ours[1].alpha, expected[2]) < 1e-10


def test_near_singular_support_is_refused_with_a_way_out(rng):
    x_s, y_s, *_ = problem(rng, "float32", S=60, shape=(2, 2, 1))
    x_s = jnp.concatenate([x_s, x_s])
    y_s = jnp.concatenate([y_s, y_s])
    kernel = kernels.by_name("fc1")
    with pytest.raises(FloatingPointError, match="larger diag_reg"):
        krr.fit(kernel, x_s, y_s, diag_reg=0.0)
    assert jnp.isfinite(krr.fit(kernel, x_s, y_s, diag_reg=1e-2).machine(x_s)).all()


def test_bad_input(rng):
    x_s, y_s, *_ = problem(rng)
    kernel = kernels.by_name("fc1")
    with pytest.raises(ValueError, match=r"expected x_support \(S, ...\) and y_support \(S, C\)"):
        krr.fit(kernel, x_s, y_s[:-1])
    with pytest.raises(ValueError, match="expected diag_reg >= 0"):
        krr.fit(kernel, x_s, y_s, diag_reg=-1.0)
    with pytest.raises(ValueError, match="expected finite x_support"):
        krr.fit(kernel, x_s.at[0].set(jnp.nan), y_s)


@pytest.mark.parametrize(
    ("name", "n", "noise", "refused"),
    [("fc3", 30, 0.0, True), ("fc1", 10, 1e-4, False), ("fc3", 10, 1e-3, False),
     ("fc7", 10, 1e-4, False), ("conv2", 10, 1e-4, False), ("fc3", 1, 0.0, True)],
)  # fmt: skip
def test_near_identical_images_with_other_labels(name, n, noise, refused):
    """In float32 the kernel of such a pair is off by more than the ridge."""
    d = data.load("digits")
    x, y = d.x_train[:200], d.y_train[:200]
    moved = x[:n] + noise * np.random.default_rng(0).standard_normal(x[:n].shape).astype("float32")
    x, y = np.concatenate([x, moved]), np.concatenate([y, (y[:n] + 1) % 10])
    labels, kernel = data.one_hot(y, 10, center=True), kernels.by_name(name)
    if refused:
        with pytest.raises(FloatingPointError, match="diag_reg|near-identical"):
            krr.fit(kernel, x, labels)
        assert krr.fit(kernel, x, labels, diag_reg=1e-2).machine.alpha.dtype == "float32"
        return
    single = krr.fit(kernel, x, labels)
    double = krr.fit(kernel, x.astype("float64"), labels.astype("float64")).machine
    expected = double(d.x_test[:100].astype("float64"))
    assert (single.machine.alpha.dtype, single.system.packed.dtype) == ("float32", "float32")
    np.testing.assert_allclose(single.machine(d.x_test[:100]), expected, atol=0.03)


def test_a_solution_of_other_equations_is_seen(monkeypatch):
    """As where float32 takes two near-identical images for others: its own residual is small."""
    d = data.load("digits")
    x, labels = d.x_train[:100], data.one_hot(d.y_train[:100], 10, center=True)
    fitted = krr.fit(kernels.by_name("fc3"), x, labels)
    ridge = fitted.system.ridge
    assert residuals.residual(fitted.machine, ridge, labels) <= 1e-3
    alpha = np.array(fitted.machine.alpha)
    alpha[3] += 5 * np.abs(alpha).max()
    wrong = dataclasses.replace(fitted.machine, alpha=alpha)
    monkeypatch.setattr(residuals, "STEEP", 0)
    assert residuals.residual(fitted.machine, ridge, labels) <= 1e-3
    assert residuals.residual(wrong, ridge, labels) > 1
    monkeypatch.setattr(residuals, "residual", lambda machine, ridge, y: 0.5)
    with pytest.raises(FloatingPointError, match="got a residual of 0.5 with diag_reg"):
        krr.fit(kernels.by_name("fc3"), x, labels)


def test_a_kernel_that_overflows_is_refused():
    d = data.load("digits")
    labels = data.one_hot(d.y_train[:20], 10)
    with pytest.raises(FloatingPointError, match="expected a finite kernel"):
        krr.fit(kernels.by_name("fc3", W_std=1e12), d.x_train[:20], labels)


def test_single_and_double_precision_side_by_side(rng):
    """The higher of both is taken, and attacked images keep their own."""
    x_s, y_s, x_t, *_ = problem(rng)
    assert x_s.dtype == "float64"
    kernel, expected = kernels.by_name("fc1"), krr.fit(kernels.by_name("fc1"), x_s, y_s).machine
    single = x_s.astype("float32"), y_s.astype("float32")
    for x, y in ((x_s, single[1]), (single[0], y_s)):
        machine = krr.fit(kernel, x, y).machine
        assert machine.alpha.dtype == machine.x_support.dtype == "float64"
        np.testing.assert_allclose(machine(x_t), expected(x_t), atol=1e-4)
    threat = attacks.Threat("linf", 0.1)
    images = jnp.clip(x_t, 0, 1).astype("float32")
    attacked = attacks.pgd(
        expected, images, jnp.zeros(len(images), int), threat=threat, n_steps=3, step_size=0.05
    )
    assert attacked.dtype == "float32"
    assert float(jnp.abs(attacked - images).max()) == pytest.approx(0.1, abs=1e-6)


@pytest.mark.parametrize("dtype", ["uint8", "int64", "bool", "float16"])
def test_other_dtypes_are_refused(dtype):
    d = data.load("digits")
    labels = data.one_hot(d.y_train[:20], 10)
    with pytest.raises(ValueError, match=f"expected x_support of float32 or float64, got {dtype}"):
        krr.fit(kernels.by_name("fc1"), d.x_train[:20].astype(dtype), labels)
    with pytest.raises(ValueError, match=f"expected y_support of float32 or float64, got {dtype}"):
        krr.fit(kernels.by_name("fc1"), d.x_train[:20], labels.astype(dtype))


def test_a_black_image_without_biases_has_a_kernel_of_0():
    """It says nothing of how large the others' coefficients are."""
    d = data.load("digits")
    x, labels = d.x_train[:40].copy(), data.one_hot(d.y_train[:40], 10, center=True)
    x[0] = 0
    machine = krr.fit(kernels.by_name("fc2", b_std=0.0), x, labels).machine
    assert np.isfinite(machine(d.x_test[:10])).all()
