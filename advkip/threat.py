"""The threat model: a ball around each image, inside the pixel range.

Distances are in pixel units of [0, 1]: 8/255, not 8.
"""

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Threat:
    """What the attacker may do.

    Args:
      norm: 'linf' or 'l2', over all pixels of an image.
      epsilon: radius of the ball, in [0, 1] pixel units ('l2': of the whole image), >= 0.
      low, high: pixel range that attacked images keep to.
    """

    norm: str = "linf"
    epsilon: float = 0.3
    low: float = 0.0
    high: float = 1.0

    def __post_init__(self):
        if self.norm not in ("linf", "l2"):
            raise ValueError(f"expected norm 'linf' or 'l2', got {self.norm!r}; pass one of them")
        if not self.epsilon >= 0 or (self.norm == "linf" and self.epsilon > 1):
            raise ValueError(
                f"expected epsilon in pixel units of [0, 1], got {self.epsilon}; "
                "pass 8/255 for what is sometimes written 8"
            )
        if not self.low < self.high:
            raise ValueError(f"expected low < high, got {self.low}, {self.high}; pass 0 and 1")


def project(x, x_original, threat) -> jax.Array:
    """Nearest point of the ball around `x_original`, then of the pixel range.

    Both sets hold x_original, so clipping to the range never leaves the ball.

    Args:
      x, x_original: images, shape (n, ...).
      threat: a `Threat`.

    Returns:
      Images of the same shape.
    """
    delta = x - x_original
    if threat.norm == "linf":
        delta = jnp.clip(delta, -threat.epsilon, threat.epsilon)
    else:
        delta = delta * jnp.minimum(1, threat.epsilon / jnp.maximum(l2_length(delta), 1e-12))
    return jnp.clip(x_original + delta, threat.low, threat.high)


def distance(x, x_original, norm) -> jax.Array:
    """Per-image distance in the given norm, shape (n,)."""
    if norm == "l2":
        return l2_length(x - x_original).reshape(-1)
    return jnp.abs(x - x_original).reshape(len(x), -1).max(1)


def direction(gradient, norm) -> jax.Array:
    """The steepest way up of unit length: signs for 'linf', g / |g|_2 of each image for 'l2'."""
    if norm == "linf":
        return jnp.sign(gradient)
    return gradient / jnp.maximum(l2_length(gradient), jnp.finfo(gradient.dtype).tiny)


def l2_length(delta) -> jax.Array:
    """|delta_i|_2 of each image, shape (n, 1, ...)."""
    axes = tuple(range(1, delta.ndim))
    return jnp.sqrt((delta**2).sum(axes, keepdims=True))


def random_start(key, x, threat) -> jax.Array:
    """Uniform in the ball around each of the images x, then in the pixel range."""
    if threat.norm == "linf":
        noise = jax.random.uniform(key, x.shape, x.dtype, -threat.epsilon, threat.epsilon)
    else:
        direction_key, radius_key = jax.random.split(key)
        noise = jax.random.normal(direction_key, x.shape, x.dtype)
        radius = jax.random.uniform(radius_key, (len(x), *[1] * (x.ndim - 1)), x.dtype)
        radius = threat.epsilon * radius ** (1 / x[0].size)
        noise = radius * noise / l2_length(noise)
    return project(x + noise, x, threat)
