"""Pixels in pieces: the kernel against neural_tangents on pieces cut by hand; what it is for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from advkip import kernels, krr, pieces
from tests import stax_networks


def cut(x, n):
    """The pieces of pixels by the definition, one at a time."""
    ends = [j / n for j in range(n + 1)]
    pieces = [np.clip(x, low, high) - low for low, high in zip(ends[:-1], ends[1:], strict=True)]
    pieces[0] += np.minimum(x, 0)
    pieces[-1] += np.maximum(x, 1) - 1
    return np.concatenate(pieces, -1)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("n", [2, 3, 9])
def test_pieces_of_a_pixel(rng, n, channels):
    x = rng.uniform(-0.5, 1.5, (5, 4, 4, channels))
    encoded = pieces.encode(x, n)
    np.testing.assert_allclose(encoded, cut(x, n), atol=1e-12)
    parts = encoded.reshape(*x.shape[:3], n, channels)
    np.testing.assert_allclose(parts.sum(3), x, atol=1e-12)


@pytest.mark.parametrize("name", ["fc2", "conv2"])
def test_the_kernel_of_pieces(rng, name):
    x, s = (rng.uniform(-0.5, 1.5, (m, 6, 6, 2)) for m in (4, 7))
    w, kernel = jnp.asarray(rng.normal(size=(4, 7))), kernels.by_name(f"{name}-pieces3")
    theirs = (stax_networks.fully_connected if name == "fc2" else stax_networks.convolutional)(2)
    whole = stax_networks.in_pieces(theirs, 3)
    ntk = jax.jit(whole, static_argnums=2)
    expected, pulled = stax_networks.with_pullback(lambda x, s: whole(x, s, "ntk"), w, x, s)
    of_cut = jax.jit(theirs, static_argnums=2)(cut(x, 3), cut(s, 3), "ntk")
    np.testing.assert_allclose(expected, of_cut, rtol=1e-10)
    k, found = stax_networks.own_pullback(kernel, w, x, s)
    np.testing.assert_allclose(k, expected, rtol=1e-6)
    np.testing.assert_allclose(kernel(x, s), expected, rtol=1e-6)
    for ours, other in zip(found, pulled, strict=True):
        np.testing.assert_allclose(ours, other, rtol=1e-5, atol=1e-8)
    np.testing.assert_allclose(kernel.diagonal(x), jnp.diag(ntk(x, x, "ntk")), rtol=1e-7)


def test_between_two_pieces_each_has_half_of_the_slope():
    x = jnp.full((1, 1, 1, 1), 0.5)
    _, pull = jax.vjp(lambda x: pieces.encode(x, 2), x)
    for weights, slope in (((1, 0), 0.5), ((0, 1), 0.5), ((1, 1), 1.0)):
        assert pull(jnp.asarray(weights, x.dtype).reshape(1, 1, 1, 2))[0].item() == slope
    with pytest.raises(ValueError, match="expected 2 pieces of a pixel or more, got 1"):
        kernels.Pieces(kernels.by_name("fc1"), 1)


def test_what_moves_within_a_piece_can_be_disregarded(rng):
    """Images that differ in the middle piece alone make a machine that heeds the others little."""
    bits = rng.integers(0, 2, (20, 4, 4, 1)).astype(float)
    labels = jnp.asarray(bits[:, 0, 0] * 2 - 1)
    changed = {}
    for name in ("fc1", "fc1-pieces3"):
        machine = krr.fit(kernels.by_name(name), (1 + bits) / 3, labels, diag_reg=1e-6).machine
        x = rng.integers(0, 2, (200, 4, 4, 1)).astype(float)
        x_moved = np.where(rng.random(x.shape) < 0.5, x, np.where(x == 1, 0.7, 0.3))
        changed[name] = float((np.sign(machine(x_moved)) != np.sign(machine(x))).mean())
    assert changed["fc1-pieces3"] < changed["fc1"] / 2
