"""Losses of logits against their formulas, and the twins in PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from advkip import losses, torch_attacks


@pytest.fixture
def logits(rng):
    return rng.normal(size=(20, 5)), rng.integers(0, 5, 20)


def margins(z, y):
    return np.array([max(np.delete(row, c)) - row[c] for row, c in zip(z, y, strict=True)])


def test_margins_of_all_kinds(logits):
    z, y = logits
    targets, m = jnp.eye(5)[y], margins(z, y)
    top = np.sort(z, 1)[:, ::-1]
    np.testing.assert_allclose(losses.margin(z, targets), m, rtol=1e-12)
    np.testing.assert_allclose(losses.dlr(z, targets), m / (top[:, 0] - top[:, 2]), rtol=1e-12)
    np.testing.assert_allclose(losses.hinge(z, targets, asked=0.3), np.maximum(0, 0.3 + m))
    found = losses.squared_hinge(z, targets, asked=0.3)
    np.testing.assert_allclose(found, np.maximum(0, 0.3 + m) ** 2 / 2, rtol=1e-12)
    assert ((m < -0.3).any(), (m > 0).any()) == (True, True)


def test_margins_have_the_gradient_of_two_logits(logits):
    z, y = logits
    slope = jax.grad(lambda z: losses.margin(z, jnp.eye(5)[y]).sum())(jnp.asarray(z))
    others = np.where(np.eye(5, dtype=bool)[y], -np.inf, z).argmax(1)
    np.testing.assert_array_equal(slope, np.eye(5)[others] - np.eye(5)[y])


def test_targets_need_not_be_one_hot(logits):
    """Centred labels of a support have the same right class."""
    z, y = logits
    np.testing.assert_array_equal(
        losses.margin(z, jnp.eye(5)[y] - 0.2), losses.margin(z, jnp.eye(5)[y])
    )


def test_targeted_and_the_twins_of_pytorch(logits, rng):
    z, y = logits
    aim = (y + rng.integers(1, 5, 20)) % 5
    rows = np.arange(20)
    expected = z[rows, aim] - z[rows, y]
    tensors = torch.as_tensor(z), torch.as_tensor(y)
    np.testing.assert_allclose(losses.towards(aim)(z, jnp.eye(5)[y]), expected, rtol=1e-12)
    np.testing.assert_allclose(torch_attacks.towards(torch.as_tensor(aim))(*tensors), expected)
    for name in ("margin", "dlr", "cross-entropy"):
        ours = losses.LOSSES[name](z, jnp.eye(5)[y])
        np.testing.assert_allclose(ours, torch_attacks.LOSSES[name](*tensors), rtol=1e-9)
