"""APGD's rule: its checkpoints, its optimum, and the official implementation beside it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from pyautoattack.autopgd_base import APGDAttack

from advkip import ascent, attacks, kernels, krr, losses
from advkip.attacks import Threat


def test_checkpoints_are_the_papers():
    """Of 100 steps: 22, 41, 57, 70, 80, 87, 93, 99 (Croce and Hein 2020, section 4.1)."""
    since = ascent.checkpoints(100)
    assert np.flatnonzero(since).tolist() == [22, 41, 57, 70, 80, 87, 93, 99]
    assert since[since > 0].tolist() == [22, 19, 16, 13, 10, 7, 6, 6]
    assert np.flatnonzero(ascent.checkpoints(10)).tolist() == [3, 5, 6, 7, 8, 9]
    assert not ascent.checkpoints(1).any()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_reaches_the_maximum_of_a_hill_inside_the_ball(rng, norm):
    """Fixed steps of 0.1 jump to and fro across it; APGD halves its steps."""
    x = jnp.asarray(rng.uniform(0.4, 0.6, (5, 2, 3, 1)))
    top = x + jnp.asarray(rng.uniform(-0.04, 0.04, x.shape))
    threat = Threat(norm, 0.3)

    def climb(point):
        def height(point):
            heights = -((point - top) ** 2).sum((1, 2, 3))
            return heights.sum(), heights

        (_, heights), slope = jax.value_and_grad(height, has_aux=True)(point)
        return heights, slope

    found = ascent.adaptive(climb, x, x, threat=threat, since=ascent.checkpoints(100))
    fixed = ascent.fixed(climb, x, x, threat=threat, n_steps=100, step_size=0.1)
    reached = np.abs(found - top).max()
    assert reached < 0.01
    assert reached < np.abs(fixed - top).max() / 3


def machine_of(rng):
    x, y = rng.uniform(0, 1, (40, 4, 4, 1)), np.eye(3)[rng.integers(0, 3, 40)]
    fitted = krr.fit(kernels.by_name("fc2"), jnp.asarray(x), jnp.asarray(y), diag_reg=1e-2)
    return fitted.machine


def test_never_below_its_start_and_inside_the_ball(rng):
    machine, threat = machine_of(rng), Threat("linf", 0.1)
    x, y = jnp.asarray(rng.uniform(0, 1, (30, 4, 4, 1))), rng.integers(0, 3, 30)
    for n_steps in (0, 1, 7):
        found = attacks.pgd(machine, x, y, threat=threat, n_steps=n_steps, step_size=1, rule="apgd")
        assert attacks.distance(found, x, "linf").max() <= 0.1 + 1e-12
        raised = losses.cross_entropy(machine(found), jnp.eye(3)[y])
        assert (raised >= losses.cross_entropy(machine(x), jnp.eye(3)[y])).all()
        assert (found != x).any() == bool(n_steps)


def test_equals_the_official_apgd(rng):
    """From the same start, the official attack's last best loss is ours."""
    weights = rng.normal(size=(12, 8)), rng.normal(size=(8, 3))

    def logits(x, library):
        first, second = weights_of[library]
        return library.tanh(x.reshape(len(x), -1) @ first) @ second

    weights_of = {
        jnp: [jnp.asarray(w) for w in weights], torch: [torch.as_tensor(w) for w in weights]
    }  # fmt: skip
    x, y = rng.uniform(0.2, 0.8, (25, 1, 3, 4)), rng.integers(0, 3, 25)
    official = APGDAttack(
        lambda x: logits(x, torch), n_iter=30, norm="Linf", eps=0.1, loss="ce", device="cpu"
    )
    official.init_hyperparam(torch.as_tensor(x))
    tensors = torch.as_tensor(x), torch.as_tensor(y)
    _, _, most, _ = official.attack_single_run(*tensors, x_init=tensors[0])
    found = attacks.pgd(
        lambda x: logits(x, jnp), jnp.asarray(x).reshape(25, 3, 4, 1), y,
        threat=Threat("linf", 0.1), n_steps=30,
        step_size=1, rule="apgd",
    )  # fmt: skip
    ours = losses.cross_entropy(logits(found, jnp), jnp.eye(3)[y])
    np.testing.assert_allclose(ours, most.numpy(), atol=2e-3)
    assert np.median(np.abs(ours - most.numpy())) < 1e-6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "targeted"}, "expected an aim with the loss 'targeted' alone, .* aim None"),
        ({"aim": np.zeros(4, int)}, "expected an aim .* got loss 'cross-entropy', aim given"),
        ({"rule": "newton"}, "rule 'fixed' or 'apgd', .* rule 'newton'"),
        ({"loss": "hinge"}, "expected loss in .*'targeted'.*, got 'hinge'"),
    ],
)
def test_bad_input(rng, options, message):
    x, y = jnp.asarray(rng.uniform(0, 1, (4, 4, 4, 1))), np.zeros(4, int)
    with pytest.raises(ValueError, match=message):
        attacks.pgd(machine_of(rng), x, y, threat=Threat(), n_steps=1, step_size=0.1, **options)


def test_targeted_attack_reaches_its_class(rng):
    machine = machine_of(rng)
    x, y = jnp.asarray(rng.uniform(0, 1, (30, 4, 4, 1))), rng.integers(0, 3, 30)
    aim = (y + 1) % 3
    found = attacks.pgd(
        machine, x, y, threat=Threat("linf", 0.4), n_steps=20, step_size=0.1, loss="targeted",
        aim=aim,
    )  # fmt: skip
    before, after = (np.asarray(machine(part).argmax(1) == aim).mean() for part in (x, found))
    assert before < 0.6
    assert after > 0.9
