"""Closed form against neural_tangents and finite width; derivatives against autodiff."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from advkip import (
    attacks,
    compat,
    convolutional,
    data,
    distill,
    evaluate,
    kernel,
    kernels,
    krr,
    stencil,
    tiled,
)
from tests.sections import experiment
from tests.stax_networks import convolutional as stax_conv
from tests.stax_networks import fully_connected as stax_fc
from tests.stax_networks import own_pullback, with_pullback

SHAPE = (5, 5, 2)


def images(rng, n, dtype="float64", shape=SHAPE):
    return jnp.asarray(rng.uniform(0, 1, (n, *shape)), dtype)


@pytest.mark.parametrize("depth", [1, 2, 3, 5, 7])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float64", 1e-10)])
def test_closed_form_equals_neural_tangents(rng, depth, dtype, tolerance):
    x, s = images(rng, 6, dtype), images(rng, 8, dtype)
    ours = kernels.by_name(f"fc{depth}")(x, s)
    theirs = stax_fc(depth)(x, s, "ntk")
    assert ours.dtype == dtype
    np.testing.assert_allclose(ours, theirs, rtol=tolerance)


@pytest.mark.parametrize(("W_std", "b_std"), [(1.0, 0.0), (1.7, 0.5)])
def test_other_variances_equal_neural_tangents(rng, W_std, b_std):
    x, s = images(rng, 4) - 0.5, images(rng, 5) - 0.5  # inner products of both signs
    kernel = kernels.by_name("fc3", W_std=W_std, b_std=b_std)
    np.testing.assert_allclose(kernel(x, s), stax_fc(3, W_std, b_std)(x, s, "ntk"), rtol=1e-9)


@pytest.mark.parametrize(("name", "theirs"), [("fc3", stax_fc), ("conv3", stax_conv)])
def test_diagonal(rng, name, theirs):
    x = images(rng, 6)
    kernel = kernels.by_name(name)
    # neural_tangents itself is 1e-8 off on the diagonal in float64: arccos near 1.
    expected = jnp.diagonal(theirs(3)(x, x, "ntk"))
    np.testing.assert_allclose(kernel.diagonal(x), expected, rtol=5e-8)
    np.testing.assert_allclose(jnp.diagonal(kernel(x, x)), kernel.diagonal(x), rtol=5e-8)


def test_closed_form_equals_a_wide_finite_net(rng):
    """Monte Carlo: the empirical NTK of random two-layer nets of width 1024, mean of 20."""
    x = images(rng, 4, "float32")
    stax = kernels.stax_module()
    parts = [stax.Flatten()]
    for width in (1024, 1024):
        parts += [stax.Dense(width, W_std=2**0.5, b_std=0.1), stax.Relu()]
    init, apply, _ = stax.serial(*parts, stax.Dense(1, W_std=2**0.5, b_std=0.1))

    @jax.jit
    def empirical(key):
        _, params = init(key, x.shape)
        jacobian = jax.jacobian(lambda p: apply(p, x)[:, 0])(params)
        flat = [j.reshape(len(x), -1) for j in jax.tree_util.tree_leaves(jacobian)]
        return sum(j @ j.T for j in flat)

    mean = np.mean([empirical(key) for key in jax.random.split(jax.random.key(0), 20)], 0)
    # Fluctuations of one net are of order 1/sqrt(width) = 3 %, of 20 nets 0.7 %.
    np.testing.assert_allclose(mean, kernels.by_name("fc2")(x, x), rtol=0.025)


def test_symmetric_positive_definite(rng):
    k = kernels.by_name("fc3")(*[images(rng, 12)] * 2)
    np.testing.assert_allclose(k, k.T, rtol=1e-12)
    assert np.linalg.eigvalsh(k).min() > 0


@pytest.mark.parametrize("name", ["fc1", "fc3", "fc7", "conv1", "conv3"])
def test_pullback_equals_autodiff_through_neural_tangents(rng, name):
    x, s, w = images(rng, 5), images(rng, 7), jnp.asarray(rng.normal(size=(5, 7)))
    kernel = kernels.by_name(name)
    kernel_fn = stax_conv(int(name[4:])) if name[:4] == "conv" else stax_fc(int(name[2:]))
    theirs, expected = with_pullback(lambda x, s: kernel_fn(x, s, "ntk"), w, x, s)
    k, found = own_pullback(kernel, w, x, s)
    np.testing.assert_allclose(k, theirs, rtol=1e-10)
    np.testing.assert_allclose(kernel(x, s), k, rtol=1e-12)
    for ours, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, other, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", ["fc2", "conv2", "fc2-pieces2"])
def test_mirrored(rng, name):
    x, s, w = images(rng, 4), images(rng, 6), jnp.asarray(rng.normal(size=(4, 6)))
    plain, kernel = kernels.by_name(name), kernels.by_name(f"{name}-mirror")

    def mean_over_sides(x, s):
        sides = [(a, b) for a in (x, x[:, :, ::-1]) for b in (s, s[:, :, ::-1])]
        return sum(plain(a, b) for a, b in sides) / 4

    expected, pulled = with_pullback(mean_over_sides, w, x, s)
    k, found = own_pullback(kernel, w, x, s)
    np.testing.assert_allclose(k, expected, rtol=1e-12)
    np.testing.assert_allclose(jax.jit(kernel)(x[:, :, ::-1], s), k, rtol=1e-12)
    for ours, other in zip(found, pulled, strict=True):
        np.testing.assert_allclose(ours, other, rtol=1e-9, atol=1e-12)
    h, direction, v = 1e-5, jnp.asarray(rng.normal(size=x.shape)), w[:, 0]
    diagonal, (slopes,) = with_pullback(kernel.diagonal, v, x)
    np.testing.assert_allclose(diagonal, jnp.diag(jax.jit(mean_over_sides)(x, x)), rtol=1e-7)
    of_kernel = jax.jit(kernel.diagonal)
    ends = [(of_kernel(x + sign * h * direction) * v).sum() for sign in (1, -1)]
    slope = (slopes * direction).sum()
    np.testing.assert_allclose(slope, (ends[0] - ends[1]) / (2 * h), rtol=1e-6)


def test_mirrored_regression_is_that_on_the_images_and_their_mirror_images(rng):
    s, x, y = images(rng, 12), images(rng, 5), jnp.asarray(rng.normal(size=(12, 3)))
    machine = krr.fit(kernels.by_name("fc2-mirror"), s, y, diag_reg=0).machine
    both = jnp.concatenate([s, s[:, :, ::-1]]), jnp.concatenate([y, y])
    doubled = krr.fit(kernels.by_name("fc2"), *both, diag_reg=0).machine
    np.testing.assert_allclose(machine(x), doubled(x), rtol=1e-6)
    np.testing.assert_allclose(machine(x[:, :, ::-1]), machine(x), rtol=1e-9)


def test_a_mirrored_kernel_in_another_precision():
    short = kernels.rounded(kernels.by_name("fc2-mirror"), "bfloat16")
    assert short.kernel.precision == "bfloat16"
    short = kernels.rounded(kernels.by_name("fc2-pieces2-mirror"), "bfloat16")
    assert short.kernel.n == 2
    assert short.kernel.kernel.precision == "bfloat16"
    with pytest.raises(ValueError, match="expected a kernel with a precision"):
        kernels.rounded(kernels.by_name("conv2-mirror"), "bfloat16")
    with pytest.raises(ValueError, match="expected a kernel name such as"):
        kernels.by_name("fc2-mirrored")


@pytest.mark.parametrize("name", ["fc3-pieces1", "fc3-pieces10", "fc3-mirror-pieces3", "pieces3"])
def test_names_that_are_none(name):
    with pytest.raises(ValueError, match="expected a kernel name such as"):
        kernels.by_name(name)
    with pytest.raises(ValueError, match="kernel.name"):
        experiment(kernel__name=name)


@pytest.mark.parametrize(("precision", "bits"), [("tfloat32", 10), ("bfloat16", 7)])
def test_rounded_products_are_near_the_exact_ones(rng, precision, bits):
    """Each factor is half a unit in its last place off; sums of both signs make that larger."""
    x, s, w = images(rng, 20, "float32"), images(rng, 30, "float32"), rng.normal(size=(20, 30))
    kernel = kernels.by_name("fc3")
    short = kernels.rounded(kernel, precision)
    assert kernels.rounded(kernel, "full") is kernel
    found, expected = (k.value_and_pullback(x, s) for k in (short, kernel))
    w = jnp.asarray(w, "float32")
    results = zip(
        (found[0], *found[1](w)), (expected[0], *expected[1](w)), (2, 8, 8), strict=True
    )  # fmt: skip
    for a, b, factor in results:
        error = jnp.linalg.norm(a - b) / jnp.linalg.norm(b)
        assert 0 < error < factor * 2.0 ** -(bits + 1)


@pytest.mark.parametrize("name", ["fc3", "conv1"])
def test_call_is_differentiable_in_both_arguments(rng, name):
    x, s, w = images(rng, 3), images(rng, 4), jnp.asarray(rng.normal(size=(3, 4)))
    kernel = kernels.by_name(name)

    def loss(x, s):
        return (kernel(x, s) * w).sum()

    gradients = jax.grad(loss, (0, 1))(x, s)
    for slot in (0, 1):
        direction = jnp.asarray(rng.normal(size=(x, s)[slot].shape))
        step = [0 * x, 0 * s]
        step[slot] = 1e-5 * direction
        numeric = (loss(x + step[0], s + step[1]) - loss(x - step[0], s - step[1])) / 2e-5
        np.testing.assert_allclose((gradients[slot] * direction).sum(), numeric, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_finite_everywhere(rng, dtype):
    """On the cusp x = s, for nearly equal, zero, opposite and large images, without biases."""
    x = images(rng, 3, dtype)
    s = jnp.concatenate([x, x + 1e-6, 0 * x[:1], -x[:1], 1e3 * x[:1]])
    for b_std in (0.0, 0.1):
        kernel = kernels.by_name("fc3", b_std=b_std)
        k, pullback = kernel.value_and_pullback(s, s)
        assert jnp.isfinite(k).all()
        assert all(jnp.isfinite(part).all() for part in pullback(jnp.ones_like(k)))


def test_cusp_gets_the_mean_of_both_sides(rng):
    x, direction = images(rng, 1), jnp.asarray(rng.normal(size=(1, *SHAPE)))
    kernel = kernels.by_name("fc2")
    step = 1e-5 * direction
    numeric = (kernel(x + step, x) - kernel(x - step, x))[0, 0] / 2e-5
    ours = (kernel.value_and_pullback(x, x)[1](jnp.ones((1, 1)))[0] * direction).sum()
    np.testing.assert_allclose(ours, numeric, rtol=1e-4)


@pytest.mark.parametrize("tile", [1, 3, 16])
def test_stax_tiles_never_change_the_result(rng, tile):
    x, s, w = images(rng, 5), images(rng, 7), jnp.asarray(rng.normal(size=(5, 7)))
    kernel_fn = stax_conv(1)
    tiled, whole = kernels.Stax(kernel_fn, tile=tile), kernels.Stax(kernel_fn, tile=7)
    np.testing.assert_allclose(tiled(x, s), kernel_fn(x, s, "ntk"), rtol=1e-12)
    pulled, expected = (k.value_and_pullback(x, s)[1](w) for k in (tiled, whole))
    for ours, theirs in zip(pulled, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-10)


@pytest.mark.parametrize(("W_std", "b_std"), [(1.0, 0.0), (1.7, 0.5)])
def test_convolutional_on_colour_images_of_both_signs(rng, W_std, b_std):
    """Not square, three channels, more pairs than one tile has; the pixels include zeros."""
    x, s = (jnp.asarray(rng.normal(size=(n, 5, 6, 3))).at[0, :3].set(0) for n in (3, 130))
    kernel, theirs = kernels.by_name("conv2", W_std=W_std, b_std=b_std), stax_conv(2, W_std, b_std)
    w = jnp.asarray(rng.normal(size=(3, 130)))
    values, pulled = with_pullback(lambda x, s: theirs(x, s, "ntk"), w, x, s)
    np.testing.assert_allclose(jax.jit(kernel)(x, s), values, rtol=1e-9, atol=1e-12)
    # Without biases the empty 3x3 patches make neural_tangents' derivative NaN, ours is zero.
    for ours, other in zip(own_pullback(kernel, w, x, s)[1], pulled, strict=True):
        assert jnp.isfinite(ours).all()
        known = jnp.isfinite(other)
        np.testing.assert_allclose(ours[known], other[known], rtol=1e-6, atol=1e-9)


def test_convolutional_is_finite_on_the_cusp(rng):
    x = images(rng, 4)
    pulled = kernels.by_name("conv3").value_and_pullback(x, x)[1](jnp.eye(4))
    assert all(jnp.isfinite(part).all() for part in pulled)


def test_convolutional_float32_is_as_good_as_neural_tangents(rng):
    x, s, w = images(rng, 4), images(rng, 6), jnp.asarray(rng.normal(size=(4, 6)))

    def values(kernel_fn, dtype):
        k, pulled = with_pullback(kernel_fn, *(a.astype(dtype) for a in (w, x, s)))
        return k, pulled[0]

    theirs = stax_conv(3)
    exact = values(lambda x, s: theirs(x, s, "ntk"), "float64")
    with jax.enable_x64(False):
        x, s, w = (jnp.asarray(np.asarray(a), "float32") for a in (x, s, w))
        ours = values(kernels.by_name("conv3"), "float32")
        single = values(lambda x, s: theirs(x, s, "ntk"), "float32")
    for a, b, c in zip(ours, single, exact, strict=True):
        assert a.dtype == b.dtype == "float32"
        error = [np.linalg.norm(np.asarray(v, "float64") - np.asarray(c)) for v in (a, b)]
        assert error[0] <= 1.5 * error[1]  # both are the last bit: 1e-7 of the value


def plain_convolutional(x, s, depth, W_std, b_std):
    """The recursion of `Convolutional` as it stands there, for JAX to differentiate."""

    def convolve(a):
        a = jnp.pad(a, ((0, 0), (0, 0), (1, 1), (1, 1)))
        a = a[:, :, :-2] + a[:, :, 1:-1] + a[:, :, 2:]
        return W_std**2 / 9 * (a[..., :-2] + a[..., 1:-1] + a[..., 2:])

    sigma = (x[:, None] * s[None]).mean(-1)
    p, q, theta = (x**2).mean(-1)[:, None], (s**2).mean(-1)[None], 0 * sigma
    for _ in range(depth):
        sigma, p, q = (convolve(a) + b_std**2 for a in (sigma, p, q))
        theta = sigma + convolve(theta)
        r = jnp.sqrt(p * q)
        angle = jnp.arccos(sigma / r)
        sigma = (r * jnp.sin(angle) + (np.pi - angle) * sigma) / (2 * np.pi)
        theta, p, q = theta * (1 - angle / np.pi) / 2, p / 2, q / 2
    return W_std**2 * (sigma + theta).mean((2, 3)) + b_std**2


@pytest.mark.parametrize(
    ("depth", "n", "m", "shape"),
    [(1, 3, 5, (3, 7, 1)), (2, 2, 70, (6, 4, 3)), (3, 33, 2, (5, 5, 1)), (5, 2, 3, (4, 6, 2))],
)
def test_the_reverse_pass_equals_autodiff(rng, depth, n, m, shape):
    x, s = (jnp.asarray(rng.normal(size=(k, *shape))) for k in (n, m))
    w, variances = jnp.asarray(rng.normal(size=(n, m))), (1.3, 0.2)
    plain = lambda x, s: plain_convolutional(x, s, depth, *variances)  # noqa: E731
    expected, pulled = with_pullback(plain, w, x, s)
    k, found = own_pullback(convolutional.Convolutional(depth, *variances), w, x, s)
    np.testing.assert_allclose(k, expected, rtol=1e-11)
    for ours, theirs in zip(found, pulled, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-8, atol=1e-12)


@pytest.fixture
def never_read(monkeypatch):
    """What arrays of a tile hold before they are written is NaN, but for borders."""
    stores = stencil.stores

    def spoilt(*args):
        keep = ("box", "start")
        return [
            {k: a if k.startswith(keep) else jnp.full_like(a, jnp.nan) for k, a in one.items()}
            for one in stores(*args)
        ]

    monkeypatch.setattr(stencil, "stores", spoilt)


@pytest.mark.usefixtures("never_read")
@pytest.mark.parametrize(("chains", "floats"), [(1, 10**6), (2, 10**6), (2, 2000)])
def test_tiles_and_blocks_never_change_the_result(rng, monkeypatch, chains, floats):
    x, s = (jnp.asarray(rng.normal(size=(n, 4, 3, 1))) for n in (2, 150))
    w = jnp.asarray(rng.normal(size=(2, 150)))
    plain = lambda x, s: plain_convolutional(x, s, 2, 1.0, 0.1)  # noqa: E731
    expected, pulled = with_pullback(plain, w, x, s)
    monkeypatch.setattr(convolutional, "CPU_CHAINS", chains)
    monkeypatch.setattr(convolutional, "CPU_SMALL", 0)
    monkeypatch.setattr(convolutional.os, "cpu_count", lambda: 8)
    monkeypatch.setattr(convolutional, "CPU_ELEMENTS", 12 * 16 * 2)
    monkeypatch.setattr(convolutional, "tile_floats", lambda: floats)
    kernel = convolutional.Convolutional(2, 1.0, 0.1)
    k, found = own_pullback(kernel, w, x, s)
    np.testing.assert_allclose(k, expected, rtol=1e-11)
    for ours, theirs in zip(found, pulled, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-8, atol=1e-12)


@pytest.mark.usefixtures("never_read")
@pytest.mark.parametrize(("n", "floats"), [(7, 12 * 40 * 64), (5, 12 * 40 * 8)])
def test_an_accelerator_has_many_images_at_once(rng, monkeypatch, n, floats):
    x, s = (jnp.asarray(rng.normal(size=(k, 4, 3, 1))) for k in (n, 30))
    w = jnp.asarray(rng.normal(size=(n, 30)))
    plain = lambda x, s: plain_convolutional(x, s, 2, 1.0, 0.1)  # noqa: E731
    expected, pulled = with_pullback(plain, w, x, s)
    monkeypatch.setattr(convolutional, "_on_cpu", lambda: False)
    monkeypatch.setattr(convolutional, "tile_floats", lambda: floats)
    kernel = convolutional.Convolutional(2, 1.0, 0.1)
    assert convolutional._Size.of(kernel, x, s).at_once == {7: 2, 5: 1}[n]
    k, found = own_pullback(kernel, w, x, s)
    np.testing.assert_allclose(k, expected, rtol=1e-11)
    for ours, theirs in zip(found, pulled, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-8, atol=1e-12)


def test_black_patches_lose_no_digit(rng):
    """Where both images are black c = 1: p, q and sigma must be equal to the last bit."""
    x, s = (images(rng, n, "float32", (12, 12, 1)).at[:, 2:].set(0) for n in (3, 20))
    kernel = kernels.by_name("conv3")
    exact = kernel(x.astype("float64"), s.astype("float64"))
    np.testing.assert_allclose(kernel(x, s), exact, rtol=4e-7)
    kernel = kernels.by_name("conv3", b_std=0.0)
    s = jnp.concatenate([0 * x[:1], x])
    k, pullback = kernel.value_and_pullback(s, s)
    assert (k[0] == 0).all()
    assert jnp.isfinite(k).all()
    assert all(jnp.isfinite(part).all() for part in pullback(jnp.ones_like(k)))


def test_any_stax_network(rng):
    stax = kernels.stax_module()
    network = stax.serial(stax.Conv(1, (3, 3)), stax.Erf(), stax.GlobalAvgPool(), stax.Dense(1))
    x = images(rng, 3)
    kernel = kernels.Stax(network[2])
    np.testing.assert_allclose(kernel(x, x), network[2](x, x, "ntk"), rtol=1e-12)
    np.testing.assert_allclose(kernel.diagonal(x), jnp.diagonal(kernel(x, x)), rtol=1e-8)


def test_arccos_polynomial():
    c = jnp.linspace(-1, 1, 100_001, dtype="float32")
    exact = np.arccos(np.asarray(c, "float64"))
    assert np.abs(tiled.arccos(c) - exact).max() < 5e-7  # two units in the last place of pi


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_angle(dtype):
    c = np.linspace(-1, 1, 100_001).astype(dtype)
    sine = np.sqrt(1 - c.astype("float64") ** 2).astype(dtype)
    found = tiled.angle(jnp.asarray(c), jnp.asarray(sine))
    # Two units in the last place of pi; near c = 1 of the angle itself, thanks to the sine.
    eps = np.finfo(dtype).eps
    exact = np.arctan2(sine.astype("float64"), c.astype("float64"))
    np.testing.assert_allclose(found, exact, rtol=3 * eps, atol=2 * eps)


def test_bad_input():
    for name in ("fc0", "resnet", "fc", "conv-3"):
        with pytest.raises(ValueError, match="expected a kernel name such as 'fc3'"):
            kernels.by_name(name)
    with pytest.raises(ValueError, match="expected depth >= 1, W_std > 0"):
        kernels.by_name("fc3", W_std=0.0)
    with pytest.raises(ValueError, match="expected precision 'full' or one of .'tfloat32', 'bfl"):
        kernels.FullyConnected(3, precision="float16")
    for other in (kernels.by_name("conv3"), kernels.Stax(stax_fc(1)), Gaussian()):
        assert kernels.rounded(other, "full") is other
        with pytest.raises(ValueError, match=f"'bfloat16', got {type(other).__name__}; pass"):
            kernels.rounded(other, "bfloat16")
    with pytest.raises(ValueError, match="expected the kernel_fn of a stax network"):
        kernels.Stax(None)
    with pytest.raises(ValueError, match="expected dtype 'float32' or 'float64'"):
        kernels.set_precision("bfloat16")
    with pytest.raises(ImportError, match="expected JAX from 0.10.2 to 0.10.2"):
        compat.check_version((0, 11, 0))


class Gaussian(kernel.Kernel):
    """exp(-|x - s|^2), with nothing but what the interface asks for."""

    floats_per_pair = 1

    def value(self, x, s):
        x, s = (a.reshape(len(a), -1) for a in (x, s))
        return jnp.exp(-((x[:, None] - s[None]) ** 2).sum(-1))

    def diagonal(self, x):
        return 1 + 0 * x.reshape(len(x), -1).sum(1)

    def value_and_pullback(self, x, s):
        return jax.vjp(self.value, x, s)


def test_the_engine_runs_on_a_kernel_that_has_just_the_interface():
    e = experiment(
        support__n_support=20, support__n_target=20, dataset__n_validation=20, dataset__n_test=20,
        adv_kip__n_steps=3, adv_kip__pgd_steps=2, adv_kip__eval_pgd_steps=2,
        kernel__diag_reg=1e-2,
    )  # fmt: skip
    splits = data.split(data.load("digits"), e)
    found = distill.distill(e, splits, kernel=Gaussian(), progress=False)
    assert found.history[-1]["loss"] < found.history[0]["loss"]
    machine = krr.fit(Gaussian(), found.x_support, found.y_support, diag_reg=1e-2).machine
    outcomes = evaluate.evaluate(
        machine, splits.x_test, splits.y_test, threat=attacks.Threat("linf", 0.1), step_size=0.05,
        attack_names=["fgsm", "pgd2", "apgd-ce"], progress=False,
    )  # fmt: skip
    assert outcomes[0].accuracy > 0.3
    for missing in ("value", "diagonal", "value_and_pullback", "floats_per_pair"):
        partial = {k: v for k, v in vars(Gaussian).items() if k != missing}
        with pytest.raises(TypeError, match=missing):
            type("Partial", (kernel.Kernel,), partial)()
