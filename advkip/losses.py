"""Losses of logits, one number an image: what attacks raise, and what Algorithm 1 lowers.

With logits z (n, C) and targets y (n, C) of which the largest is the right class,

    cross-entropy     -sum_c y_c log softmax(z)_c
    mse               |y - z|^2 / 2                                       (paper Eq. 6)
    margin            m = max_{c != right} z_c - z_right
    dlr               m / (z_(1) - z_(3)), z_(k) the k-th largest          (Croce and Hein 2020)
    hinge             max(0, b + m)
    squared-hinge     max(0, b + m)^2 / 2

The margin is positive where the image is fooled, does not saturate as the cross-entropy does
(Carlini and Wagner 2017), and is what the hinge losses push below -b; dlr is the same whatever
factor the logits have.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def cross_entropy(logits, targets) -> jax.Array:
    """Per-image cross-entropy, shape (n,), of logits (n, C) and targets (n, C) that sum to 1."""
    return -(targets * jax.nn.log_softmax(logits)).sum(1)


def mse(logits, targets) -> jax.Array:
    """Per-image squared error |targets - logits|^2 / 2, shape (n,) (paper Eq. 6)."""
    return ((targets - logits) ** 2).sum(1) / 2


def margin(logits, targets) -> jax.Array:
    """Largest wrong logit minus the right one, shape (n,)."""
    right = is_right(targets)
    return jnp.where(right, -jnp.inf, logits).max(1) - jnp.where(right, logits, 0).sum(1)


def dlr(logits, targets) -> jax.Array:
    """Difference of logits ratio, shape (n,); three classes or more."""
    top = jax.lax.top_k(logits, 3)[0]
    return margin(logits, targets) / jnp.maximum(
        top[:, 0] - top[:, 2], jnp.finfo(logits.dtype).tiny
    )


def towards(classes) -> Callable:
    """The loss z_t - z_right towards classes t, integers (n,): a margin with a fixed target."""

    def targeted(logits, targets):
        aim = jax.nn.one_hot(classes, logits.shape[1], dtype=logits.dtype)
        return (logits * (aim - is_right(targets))).sum(1)

    return targeted


def hinge(logits, targets, *, asked=1.0) -> jax.Array:
    """max(0, asked + margin), shape (n,)."""
    return jnp.maximum(0, asked + margin(logits, targets))


def squared_hinge(logits, targets, *, asked=1.0) -> jax.Array:
    """max(0, asked + margin)^2 / 2, shape (n,)."""
    return hinge(logits, targets, asked=asked) ** 2 / 2


def is_right(targets) -> jax.Array:
    """Which class is the right one, bool (n, C)."""
    return jax.nn.one_hot(targets.argmax(1), targets.shape[1], dtype=bool)


LOSSES = {"cross-entropy": cross_entropy, "mse": mse, "margin": margin, "dlr": dlr}
"""What an attack can raise (`attacks.pgd`); 'targeted' is `towards`."""

OUTER = {"cross-entropy": cross_entropy, "mse": mse, "hinge": hinge, "squared-hinge": squared_hinge}
"""What Algorithm 1 can lower."""
