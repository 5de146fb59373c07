"""Projections, FGSM and PGD against closed forms on linear models."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from advkip import attacks, kernels, krr, losses
from advkip.attacks import Threat

SHAPE = (3, 4, 1)


def linear(rng, C=3):
    """Logits x W of images of 12 pixels."""
    weights = jnp.asarray(rng.normal(size=(12, C)))
    return weights, lambda x: x.reshape(len(x), -1) @ weights


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_projection_inside_on_and_outside(rng, norm):
    threat = Threat(norm, 0.5, low=-10, high=10)
    x = jnp.asarray(rng.normal(size=(4, *SHAPE)))
    direction = jnp.asarray(rng.normal(size=(4, *SHAPE)))
    direction /= attacks.distance(direction, 0 * direction, norm).reshape(-1, 1, 1, 1)
    for length, expected in ((0.3, 0.3), (0.5, 0.5), (2.0, 0.5)):
        projected = attacks.project(x + length * direction, x, threat)
        np.testing.assert_allclose(attacks.distance(projected, x, norm), expected, rtol=1e-12)
        if length <= 0.5:
            np.testing.assert_allclose(projected, x + length * direction, rtol=1e-12)
        twice = attacks.project(projected, x, threat)
        np.testing.assert_allclose(twice, projected, rtol=1e-12)


def test_projection_is_the_nearest_point(rng):
    x, outside = jnp.zeros((1, *SHAPE)), jnp.asarray(rng.normal(size=(1, *SHAPE))) * 3
    threat = Threat("l2", 1.0, low=-10, high=10)
    nearest = float(attacks.distance(attacks.project(outside, x, threat), outside, "l2")[0])
    for _ in range(200):
        other = jnp.asarray(rng.normal(size=(1, *SHAPE)))
        other /= attacks.distance(other, x, "l2")[0]
        assert nearest <= float(attacks.distance(other, outside, "l2")[0]) + 1e-12


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_projection_keeps_the_pixel_range(rng, norm):
    threat = Threat(norm, 0.9)
    x = jnp.asarray(rng.uniform(0, 1, (5, *SHAPE)))
    projected = attacks.project(x + jnp.asarray(rng.normal(size=x.shape)), x, threat)
    assert projected.min() >= 0
    assert projected.max() <= 1
    assert attacks.distance(projected, x, norm).max() <= 0.9 + 1e-12


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_epsilon_zero_is_the_identity(rng, norm):
    x = jnp.asarray(rng.uniform(0, 1, (5, *SHAPE)))
    _, logits = linear(rng)
    attacked = attacks.pgd(
        logits, x, np.zeros(5, int), threat=Threat(norm, 0.0), n_steps=5, step_size=0.1
    )
    np.testing.assert_array_equal(attacked, x)


def test_no_steps_is_the_identity(rng):
    x = jnp.asarray(rng.uniform(0, 1, (5, *SHAPE)))
    attacked = attacks.pgd(
        linear(rng)[1], x, np.zeros(5, int), threat=Threat(), n_steps=0, step_size=0.1
    )
    np.testing.assert_array_equal(attacked, x)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_pgd_reaches_the_optimum_of_a_linear_two_class_model(rng, norm):
    """The worst point is x + eps * sign(w) (l_inf), x + eps * w / |w| (l2), w = w_1 - w_0."""
    weights, logits = linear(rng, C=2)
    slope = (weights[:, 1] - weights[:, 0]).reshape(SHAPE)
    threat = Threat(norm, 0.2, low=-10, high=10)
    x, y = jnp.asarray(rng.uniform(0, 1, (6, *SHAPE))), np.zeros(6, int)
    best = jnp.sign(slope) if norm == "linf" else slope / jnp.sqrt((slope**2).sum())
    attacked = attacks.pgd(logits, x, y, threat=threat, n_steps=10, step_size=0.1)
    np.testing.assert_allclose(attacked, x + 0.2 * best, atol=1e-7)
    attacked = attacks.fgsm(logits, x, y, threat=threat)
    np.testing.assert_allclose(attacked, x + 0.2 * best, atol=1e-12)
    # In the pixel range, l_inf: every pixel goes to the nearer of its two borders.
    if norm == "linf":
        attacked = attacks.pgd(logits, x, y, threat=Threat(norm, 0.2), n_steps=9, step_size=0.1)
        np.testing.assert_allclose(attacked, jnp.clip(x + 0.2 * best, 0, 1), atol=1e-12)


def test_integer_labels_equal_one_hot_labels(rng):
    x, y = jnp.asarray(rng.uniform(0, 1, (6, *SHAPE))), rng.integers(0, 3, 6)
    _, logits = linear(rng)
    settings = {"threat": Threat("linf", 0.1), "n_steps": 3, "step_size": 0.05}
    a = attacks.pgd(logits, x, y, **settings)
    b = attacks.pgd(logits, x, np.eye(3)[y], **settings)
    np.testing.assert_array_equal(a, b)


def test_one_program_serves_all_radii_and_steps(rng):
    """So that a slider of radii, or a sweep over them, need not wait for the compiler."""
    compiled = []
    weights, model = linear(rng)

    def counted(x):
        compiled.append(1)
        return model(x)

    x, y = jnp.asarray(rng.random((5, *SHAPE))), jnp.arange(5) % 3
    found = []
    for radius, n_steps, size in ((0.1, 3, 0.05), (0.1, 3, 0.05), (0.3, 3, 0.05), (0.3, 20, 0.1)):
        options = {"threat": Threat("linf", radius), "n_steps": n_steps, "step_size": size}
        found.append(attacks.pgd(counted, x, y, **options))
        assert len(compiled) == 1
    attacks.fgsm(counted, x, y, threat=Threat("linf", 0.2))
    assert len(compiled) == 1
    np.testing.assert_array_equal(found[0], found[1])
    moved = [float(attacks.distance(one, x, "linf").max()) for one in found]
    np.testing.assert_allclose(moved, [0.1, 0.1, 0.15, 0.3], rtol=1e-6)
    attacks.pgd(counted, x, y, threat=Threat("l2", 0.3), n_steps=3, step_size=0.05)
    assert len(compiled) == 2  # another norm is another program


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_restarts_keep_the_worst(rng, norm):
    """With no steps, each run is a random point: the answer is the worst of those points."""
    x, y = jnp.asarray(rng.uniform(0, 1, (40, *SHAPE))), rng.integers(0, 3, 40)
    _, logits = linear(rng)
    threat, key = Threat(norm, 0.4), jax.random.key(3)

    def attack(n_restarts):
        return attacks.pgd(
            logits, x, y, threat=threat, n_steps=0, step_size=0.1, n_restarts=n_restarts, key=key
        )

    def loss_and_wrong(points):
        out = logits(points)
        return losses.cross_entropy(out, jax.nn.one_hot(y, 3)), out.argmax(1) != y

    few, many = loss_and_wrong(attack(2)), loss_and_wrong(attack(8))
    assert (many[1] | ~few[1]).all()  # what two restarts fool, eight fool
    same = np.asarray(few[1] == many[1])
    assert (many[0][same] >= few[0][same]).all()
    assert many[0].mean() > few[0].mean()
    assert attacks.distance(attack(8), x, norm).max() <= 0.4 + 1e-9


def test_a_fooled_image_beats_a_larger_loss():
    """Planted, one pixel: below 0.2 wrong at a loss of 0.80, elsewhere right at a loss of 1.08."""
    wrong, right = jnp.log(jnp.asarray([[0.45, 0.55, 1e-9], [0.34, 0.33, 0.33]]))

    def logits(x):
        return jnp.where(x.reshape(-1, 1) < 0.2, wrong, right)

    x, y = jnp.full((64, 1, 1, 1), 0.5), np.zeros(64, int)
    attacked = attacks.pgd(
        logits, x, y, threat=Threat("linf", 0.5), n_steps=0, step_size=0.1, n_restarts=40,
        key=jax.random.key(0),
    )  # fmt: skip
    assert (attacked < 0.2).all()


def test_random_start_depends_on_the_key_alone(rng):
    x, y = jnp.asarray(rng.uniform(0, 1, (4, *SHAPE))), np.zeros(4, int)
    _, logits = linear(rng)
    runs = [
        attacks.pgd(
            logits, x, y, threat=Threat(), n_steps=1, step_size=0.01, key=jax.random.key(seed)
        )
        for seed in (0, 0, 1)
    ]
    np.testing.assert_array_equal(runs[0], runs[1])
    assert not np.array_equal(runs[0], runs[2])


def written_out(name):
    """Losses of one image's logits z, class y and another class aim, from their definitions."""

    def margin(z, y):
        return jnp.delete(z, y, assume_unique_indices=True).max() - z[y]

    return {
        "cross-entropy": lambda z, y, aim: jnp.log(jnp.exp(z).sum()) - z[y],
        "mse": lambda z, y, aim: ((z - jnp.eye(4)[y]) ** 2).sum() / 2,
        "margin": lambda z, y, aim: margin(z, y),
        "dlr": lambda z, y, aim: margin(z, y) / (jnp.sort(z)[-1] - jnp.sort(z)[-3]),
        "targeted": lambda z, y, aim: z[aim] - z[y],
    }[name]


@pytest.mark.parametrize("name", ["cross-entropy", "mse", "margin", "dlr", "targeted"])
def test_attack_on_a_kernel_machine_equals_one_written_out(rng, name):
    """Steps along the sign of plain autodiff through neural_tangents' kernel, image by image."""
    x_s, y_s = jnp.asarray(rng.uniform(0, 1, (20, *SHAPE))), jnp.asarray(rng.normal(size=(20, 4)))
    machine = krr.fit(kernels.by_name("fc2"), x_s, y_s).machine
    stax = kernels.stax_module()
    dense = [stax.Dense(1, W_std=2**0.5, b_std=0.1), stax.Relu()] * 2
    net = stax.serial(stax.Flatten(), *dense, stax.Dense(1, W_std=2**0.5, b_std=0.1))
    x = jnp.asarray(rng.uniform(0, 1, (8, *SHAPE)))
    y = np.asarray(machine(x).argmax(1))
    aim = (y + rng.integers(1, 4, 8)) % 4
    radius = 0.04 if name == "dlr" else 0.2  # dlr is flat, and 1, where the right class is third
    ours = attacks.pgd(
        machine, x, jnp.eye(4)[y], threat=Threat("linf", radius), n_steps=5, step_size=radius / 4,
        loss=name, aim=aim if name == "targeted" else None,
    )  # fmt: skip

    @jax.jit
    @jax.value_and_grad
    def raised(point, y, aim):
        return written_out(name)((net[2](point[None], x_s, "ntk") @ machine.alpha)[0], y, aim)

    for i in range(len(x)):
        point, before = x[i], raised(x[i], y[i], aim[i])[0]
        for _ in range(5):
            point = point + radius / 4 * jnp.sign(raised(point, y[i], aim[i])[1])
            point = jnp.clip(point, jnp.maximum(x[i] - radius, 0), jnp.minimum(x[i] + radius, 1))
        np.testing.assert_allclose(ours[i], point, atol=1e-12)
        assert raised(point, y[i], aim[i])[0] > before


def test_losses_closed_form():
    logits = jnp.asarray([[2.0, 0.0], [0.0, 0.0]])
    targets = jnp.asarray([[1.0, 0.0], [0.25, 0.75]])
    np.testing.assert_allclose(
        losses.cross_entropy(logits, targets), [np.log(1 + np.exp(-2)), np.log(2)], rtol=1e-12
    )
    np.testing.assert_allclose(losses.mse(logits, targets), [0.5, 0.3125], rtol=1e-12)


@pytest.mark.parametrize("n", [1, 5, 7, 12])
def test_in_batches_is_the_same_in_one_piece(rng, n):
    x, y = rng.normal(size=(n, 2)), rng.normal(size=n)
    result = attacks.in_batches(lambda a, b: a * b[:, None], x, y, batch_size=5)
    np.testing.assert_array_equal(result, x * y[:, None])


def test_input_gradient_norm_of_a_linear_model(rng):
    weights, logits = linear(rng)
    x, labels = jnp.asarray(rng.uniform(0, 1, (5, *SHAPE))), np.eye(3)[rng.integers(0, 3, 5)]
    slope = (jax.nn.softmax(logits(x)) - labels) @ weights.T
    np.testing.assert_allclose(
        attacks.input_gradient_norm(logits, x, labels), jnp.linalg.norm(slope, axis=1), rtol=1e-10
    )


def test_bad_input(rng):
    x, y = jnp.zeros((2, *SHAPE)), np.zeros(2, int)
    logits = linear(rng)[1]
    good = {"threat": Threat(), "n_steps": 1, "step_size": 0.1}
    with pytest.raises(ValueError, match="expected norm 'linf' or 'l2'"):
        Threat("l1", 0.1)
    with pytest.raises(ValueError, match="pass 8/255"):
        Threat("linf", 8)
    with pytest.raises(ValueError, match="expected epsilon in pixel units"):
        Threat("l2", -0.1)
    with pytest.raises(ValueError, match="expected low < high"):
        Threat("linf", 0.1, low=1, high=0)
    with pytest.raises(ValueError, match="expected n_steps >= 0"):
        attacks.pgd(logits, x, y, **{**good, "n_steps": -1})
    for change in ({"step_size": -0.1}, {"n_restarts": 0}):
        with pytest.raises(ValueError, match="expected n_steps >= 0"):
            attacks.pgd(logits, x, y, **{**good, **change})
    for labels in (np.zeros(3, int), np.zeros((2, 1, 1)), np.zeros(2)):
        with pytest.raises(ValueError, match="expected y of 2 integers"):
            attacks.pgd(logits, x, labels, **good)
    with pytest.raises(ValueError, match="expected loss in"):
        attacks.pgd(logits, x, y, **good, loss="hinge")
    with pytest.raises(ValueError, match="expected a key for random restarts"):
        attacks.pgd(logits, x, y, **good, n_restarts=2)
    for bad in (x + 2, x - 1, x.at[0, 0, 0, 0].set(jnp.nan)):
        with pytest.raises(ValueError, match="expected pixels in"):
            attacks.pgd(logits, bad, y, **good)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_gradient_that_is_not_finite_is_none(norm, rng):
    """The square root has an infinite slope at 0: other pixels still move."""
    x = rng.uniform(0.2, 0.8, (6, 4, 4, 1))
    x[:, 0, 0] = 0
    weights = jnp.asarray(rng.standard_normal((16, 3)))
    threat = attacks.Threat(norm, 0.1)
    moved = attacks.pgd(
        lambda x: jnp.sqrt(x).reshape(len(x), -1) @ weights, x, np.zeros(6, int), threat=threat,
        n_steps=3, step_size=0.05,
    )  # fmt: skip
    assert np.isfinite(moved).all()
    assert (np.asarray(moved)[:, 0, 0] == 0).all()
    assert (attacks.distance(moved, x, norm) > 0.05).all()


def test_no_images_give_no_logits(rng):
    assert attacks.predict(lambda x: x[:, 0, 0], jnp.zeros((0, 2, 2, 3)), batch_size=4).shape == (
        0, 3,
    )  # fmt: skip
