"""FGSM, PGD and APGD on any JAX logit function (paper Eq. 8).

An attack looks for x' in the ball |x' - x| <= epsilon, inside the pixel range, that makes the
loss large. epsilon and step sizes are in pixel units of [0, 1]: 8/255, not 8.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from advkip import ascent, inputs
from advkip.devices import everywhere, jit, operand, over_rows
from advkip.losses import LOSSES, cross_entropy, towards
from advkip.threat import Threat as Threat
from advkip.threat import distance as distance
from advkip.threat import l2_length, random_start
from advkip.threat import project as project


def fgsm(logits_fn, x, y, *, threat, loss="cross-entropy") -> jax.Array:
    """Fast gradient sign method: one PGD step of length epsilon (Goodfellow et al. 2015).

    Args, Returns, Raises: as `pgd`.
    """
    return pgd(logits_fn, x, y, threat=threat, n_steps=1, step_size=threat.epsilon, loss=loss)


def pgd(
    logits_fn, x, y, *, threat, n_steps, step_size, loss="cross-entropy", n_restarts=1, key=None,
    aim=None, rule="fixed",
) -> jax.Array:  # fmt: skip
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
      loss: a key of `losses.LOSSES`, what is maximised, or 'targeted' with `aim`.
      n_restarts: keeps, per image, the run with a wrong prediction, else the largest loss.
      key: JAX key for random starts; needed for more than one restart.
      aim: classes (n,) that a 'targeted' attack pushes to.
      rule: 'fixed', or 'apgd' (Croce and Hein 2020), which chooses its own steps, whatever
        step_size is, and keeps the point of largest loss (see `ascent`).

    Returns:
      Attacked images, shape of x.

    Raises:
      ValueError: bad numbers, images or labels (see `inputs`), restarts without a key, an aim
        without the targeted loss or the other way round, another rule.

    A gradient that is not finite points nowhere and is taken as 0.
    """
    check_numbers(n_steps, step_size, n_restarts, loss, (*LOSSES, "targeted"))
    if n_restarts > 1 and key is None:
        raise ValueError("expected a key for random restarts, got None; pass jax.random.key(seed)")
    if (loss == "targeted") != (aim is not None) or rule not in ("fixed", "apgd"):
        raise ValueError(
            "expected an aim with the loss 'targeted' alone, and rule 'fixed' or 'apgd', got loss "
            f"{loss!r}, aim {'None' if aim is None else 'given'}, rule {rule!r}; pass both or none"
        )
    check_images(x, threat)
    x, y = everywhere(x), everywhere(inputs.labels(y, len(x)))
    aim = everywhere(jnp.zeros(len(x), int) if aim is None else jnp.asarray(aim))
    logits_fn = _as_pytree(logits_fn)
    steps = ascent.checkpoints(n_steps) if rule == "apgd" else n_steps
    return _pgd(logits_fn, x, y, aim, key, Ball(**vars(threat)), step_size, steps, loss,
                n_restarts, rule)  # fmt: skip


def check_numbers(n_steps, step_size, n_restarts, loss, losses) -> None:
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


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["epsilon"], meta_fields=["norm", "low", "high"],
)  # fmt: skip
@dataclasses.dataclass(frozen=True)
class Ball:
    """A `Threat` for programs that serve all radii."""

    norm: str
    epsilon: float | jax.Array
    low: float
    high: float


@partial(jit, static_argnums=(8, 9, 10))
def _pgd(logits_fn, x, y, aim, key, ball, step_size, steps, loss, n_restarts, rule):
    """`pgd` as it is compiled: once for all radii, step sizes and, but for APGD, numbers of steps.

    `steps` is that number, or APGD's checkpoints.
    """

    def losses(logits_fn, x_attacked, y, aim):
        logits = logits_fn(x_attacked)
        targets = jax.nn.one_hot(y, logits.shape[1], dtype=x.dtype) if y.ndim == 1 else y
        chosen = towards(aim) if loss == "targeted" else LOSSES[loss]
        return chosen(logits, targets), (logits, targets)

    def ascend(rows, model):
        (start, x, y, aim), (logits_fn, ball, step_size, steps) = rows, model

        def total(point):
            values = losses(logits_fn, point, y, aim)[0]
            return values.sum(), values

        def climb(point):
            (_, values), g = jax.value_and_grad(total, has_aux=True)(point)
            # One that is not finite points nowhere, and must not spread to the other pixels.
            return values, jnp.where(jnp.isfinite(g), g, 0).astype(point.dtype)

        if rule == "apgd":
            return ascent.adaptive(climb, start, x, threat=ball, since=steps)
        return ascent.fixed(climb, start, x, threat=ball, n_steps=steps, step_size=step_size)

    def run(start):
        return over_rows(ascend, (start, x, y, aim), (logits_fn, ball, step_size, steps))

    if n_restarts == 1:
        return run(x if key is None else random_start(key, x, ball))

    def score(x_attacked):
        # A fooled image beats every unfooled one; among equals the larger loss wins.
        value, (logits, targets) = losses(logits_fn, x_attacked, y, aim)
        wrong = logits.argmax(1) != targets.argmax(1)
        return wrong, value

    def restart(i, best):
        x_best, wrong_best, value_best = best
        x_new = run(random_start(jax.random.fold_in(key, i), x, ball))
        wrong, value = score(x_new)
        better = (wrong & ~wrong_best) | ((wrong == wrong_best) & (value > value_best))
        mask = better.reshape(-1, *[1] * (x.ndim - 1))
        return (
            jnp.where(mask, x_new, x_best),
            jnp.where(better, wrong, wrong_best),
            jnp.where(better, value, value_best),
        )

    return jax.lax.fori_loop(0, n_restarts, restart, (x, *score(x)))[0]


def predict(logits_fn, x, *, batch_size) -> jax.Array:
    """Logits (n, C) of images x, in batches; `logits_fn` as in `pgd`. No images give (0, C)."""
    logits_fn = _as_pytree(logits_fn)
    return in_batches(partial(_predict, logits_fn), operand(x), batch_size=batch_size)


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
        return l2_length(jax.grad(lambda x: cross_entropy(logits_fn(x), y).sum())(x)).reshape(-1)

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
    if n <= batch_size:
        return function(*arrays)
    size = -(-n // -(-n // batch_size))
    starts = [min(i, n - size) for i in range(0, n, size)]
    parts = [function(*(a[i : i + size] for a in arrays)) for i in starts]
    overlap = len(starts) * size - n
    return jax.tree.map(lambda *p: jnp.concatenate([*p[:-1], p[-1][overlap:]]), *parts)
