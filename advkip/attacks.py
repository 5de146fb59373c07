"""Threat model, projections, losses, FGSM and PGD on any JAX logit function (paper Eq. 8).

An attack looks for x' in the ball |x' - x| <= epsilon, inside the pixel range, that makes the
loss large. epsilon and step sizes are in pixel units of [0, 1]: 8/255, not 8.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from advkip import inputs
from advkip.devices import everywhere, jit, over_rows


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
        delta = delta * jnp.minimum(1, threat.epsilon / jnp.maximum(_l2(delta), 1e-12))
    return jnp.clip(x_original + delta, threat.low, threat.high)


def distance(x, x_original, norm) -> jax.Array:
    """Per-image distance in the given norm, shape (n,)."""
    if norm == "l2":
        return _l2(x - x_original).reshape(-1)
    return jnp.abs(x - x_original).reshape(len(x), -1).max(1)


def _l2(delta):
    axes = tuple(range(1, delta.ndim))
    return jnp.sqrt((delta**2).sum(axes, keepdims=True))


def cross_entropy(logits, targets) -> jax.Array:
    """Per-image cross-entropy, shape (n,), of logits (n, C) and targets (n, C) that sum to 1."""
    return -(targets * jax.nn.log_softmax(logits)).sum(1)


def mse(logits, targets) -> jax.Array:
    """Per-image squared error |targets - logits|^2 / 2, shape (n,) (paper Eq. 6)."""
    return ((targets - logits) ** 2).sum(1) / 2


LOSSES = {"cross-entropy": cross_entropy, "mse": mse}


def fgsm(logits_fn, x, y, *, threat, loss="cross-entropy") -> jax.Array:
    """Fast gradient sign method: one PGD step of length epsilon (Goodfellow et al. 2015).

    Args, Returns, Raises: as `pgd`.
    """
    return pgd(logits_fn, x, y, threat=threat, n_steps=1, step_size=threat.epsilon, loss=loss)


def pgd(
    logits_fn, x, y, *, threat, n_steps, step_size, loss="cross-entropy", n_restarts=1, key=None
) -> jax.Array:
    """Projected gradient ascent on the loss (paper Eq. 8; Madry et al. 2018).

    x <- project(x + step_size * direction(grad_x loss)), direction = sign for 'linf' and
    g / |g|_2 for 'l2', from the image itself (no key, as in the paper) or from uniform noise.

    Args:
      logits_fn: images (n, ...) to logits (n, C), each row a function of its own image only.
        A pytree such as `krr.KernelMachine` is traced; any other function is compiled once.
      x: clean images in [threat.low, threat.high], shape (n, ...).
      y: integer labels, shape (n,), or target distributions, shape (n, C).
      threat: a `Threat`.
      n_steps: 0 (no attack) or more.
      step_size: pixel units, > 0.
      loss: 'cross-entropy' or 'mse', the loss that is maximised.
      n_restarts: keeps, per image, the run with a wrong prediction, else the largest loss.
      key: JAX key for random starts; needed for more than one restart.

    Returns:
      Attacked images, shape of x.

    Raises:
      ValueError: bad numbers, images or labels (see `inputs`), restarts without a key.

    A gradient that is not finite points nowhere and is taken as 0.
    """
    check_numbers(n_steps, step_size, n_restarts, loss)
    if n_restarts > 1 and key is None:
        raise ValueError("expected a key for random restarts, got None; pass jax.random.key(seed)")
    check_images(x, threat)
    x, y = everywhere(x), everywhere(inputs.labels(y, len(x)))
    logits_fn = _as_pytree(logits_fn)
    return _pgd(logits_fn, x, y, step_size, key, threat, n_steps, loss, n_restarts)


def check_numbers(n_steps, step_size, n_restarts, loss, losses=LOSSES) -> None:
    """Raises ValueError unless these can be arguments of `pgd`, here or in `torch_attacks`."""
    if n_steps < 0 or not step_size >= 0 or n_restarts < 1:
        raise ValueError(
            "expected n_steps >= 0, step_size >= 0 and n_restarts >= 1, got "
            f"{n_steps}, {step_size}, {n_restarts}; pass for example 10, 0.1, 1"
        )
    if loss not in losses:
        raise ValueError(f"expected loss in {sorted(losses)}, got {loss!r}; pass one of them")


def check_images(x, threat) -> None:
    """Raises ValueError unless x is of images whose pixels are in the range of `threat`."""
    inputs.images(x, low=threat.low, high=threat.high)


def _as_pytree(function):
    """`function` itself if jax.jit takes it as an argument, else wrapped so that it does."""
    return Partial(function) if jax.tree_util.all_leaves([function]) else function


@partial(jit, static_argnums=(5, 6, 7, 8))
def _pgd(logits_fn, x, y, step_size, key, threat, n_steps, loss, n_restarts):
    def losses(logits_fn, x_attacked, y):
        logits = logits_fn(x_attacked)
        targets = jax.nn.one_hot(y, logits.shape[1], dtype=x.dtype) if y.ndim == 1 else y
        return LOSSES[loss](logits, targets), (logits, targets)

    def ascend(rows, model):
        (start, x, y), (logits_fn, step_size) = rows, model
        gradient = jax.grad(lambda x_attacked: losses(logits_fn, x_attacked, y)[0].sum())

        def step(_, x_attacked):
            g = gradient(x_attacked)
            # One that is not finite points nowhere, and must not spread to the other pixels.
            g = jnp.where(jnp.isfinite(g), g, 0)
            if threat.norm == "linf":
                direction = jnp.sign(g)
            else:
                direction = g / jnp.maximum(_l2(g), jnp.finfo(g.dtype).tiny)
            return project(x_attacked + step_size * direction, x, threat)

        return jax.lax.fori_loop(0, n_steps, step, start)

    def run(start):
        return over_rows(ascend, (start, x, y), (logits_fn, step_size))

    if n_restarts == 1:
        return run(x if key is None else _random_start(key, x, threat))

    def score(x_attacked):
        # A fooled image beats every unfooled one; among equals the larger loss wins.
        value, (logits, targets) = losses(logits_fn, x_attacked, y)
        wrong = logits.argmax(1) != targets.argmax(1)
        return wrong, value

    def restart(i, best):
        x_best, wrong_best, value_best = best
        x_new = run(_random_start(jax.random.fold_in(key, i), x, threat))
        wrong, value = score(x_new)
        better = (wrong & ~wrong_best) | ((wrong == wrong_best) & (value > value_best))
        mask = better.reshape(-1, *[1] * (x.ndim - 1))
        return (
            jnp.where(mask, x_new, x_best),
            jnp.where(better, wrong, wrong_best),
            jnp.where(better, value, value_best),
        )

    return jax.lax.fori_loop(0, n_restarts, restart, (x, *score(x)))[0]


def _random_start(key, x, threat):
    if threat.norm == "linf":
        noise = jax.random.uniform(key, x.shape, x.dtype, -threat.epsilon, threat.epsilon)
    else:
        direction_key, radius_key = jax.random.split(key)
        noise = jax.random.normal(direction_key, x.shape, x.dtype)
        radius = jax.random.uniform(radius_key, (len(x), *[1] * (x.ndim - 1)), x.dtype)
        radius = threat.epsilon * radius ** (1 / x[0].size)
        noise = radius * noise / _l2(noise)
    return project(x + noise, x, threat)


def predict(logits_fn, x, *, batch_size) -> jax.Array:
    """Logits (n, C) of images x, in batches; `logits_fn` as in `pgd`. No images give (0, C)."""
    logits_fn = _as_pytree(logits_fn)
    return in_batches(partial(_predict, logits_fn), everywhere(x), batch_size=batch_size)


@jit
def _predict(logits_fn, x):
    return over_rows(lambda x, logits_fn: logits_fn(x), x, logits_fn)


def input_gradient_norm(logits_fn, x, y) -> jax.Array:
    """|grad_x cross-entropy(f(x), y)|_2 of each image, shape (n,) (paper Figures 2 and 4).

    Args:
      logits_fn: as in `pgd`.
      x: images, shape (n, ...).
      y: target distributions, shape (n, C).

    Raises:
      ValueError: labels that do not fit.
    """
    y = inputs.labels(y, len(x))
    if y.ndim == 1:
        raise ValueError(
            f"expected distributions ({len(x)}, C), got integers; pass data.one_hot(y, n_classes)"
        )
    return _gradient_norm(_as_pytree(logits_fn), everywhere(x), everywhere(y))


@jit
def _gradient_norm(logits_fn, x, y):
    def norm(rows, logits_fn):
        x, y = rows
        return _l2(jax.grad(lambda x: cross_entropy(logits_fn(x), y).sum())(x)).reshape(-1)

    return over_rows(norm, (x, y), logits_fn)


def in_batches(function, *arrays, batch_size) -> jax.Array:
    """Applies `function` to batches of rows and concatenates its results.

    The batches are of one size, so that `function` is compiled once: as few as possible of at
    most `batch_size` rows, the last one moved back to fit.
    """
    n = len(arrays[0])
    if not n:  # nothing but the shapes of what there would be
        one = function(*(jnp.zeros((1, *a.shape[1:]), a.dtype) for a in arrays))
        return jax.tree.map(lambda part: part[:0], one)
    size = -(-n // -(-n // batch_size))
    starts = [min(i, n - size) for i in range(0, n, size)]
    parts = [function(*(a[i : i + size] for a in arrays)) for i in starts]
    overlap = len(starts) * size - n
    return jax.tree.map(lambda *p: jnp.concatenate([*p[:-1], p[-1][overlap:]]), *parts)
