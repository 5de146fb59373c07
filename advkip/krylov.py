"""Block conjugate gradients with a preconditioner that learns from each solve.

Systems A X = B with several right-hand sides, a positive definite A, and a preconditioner M = L L^T
near it. What slows conjugate gradients down are the few directions P in which L^-1 A L^-T differs
most from 1, and from one system to the next they hardly change. Each solve finds them, as Ritz
vectors with values theta, and the next one has

    M^-1 = L^-T E E L^-1,   E = I + P (theta^-1/2 - 1) P^T,

which maps them to about 1 (a spectral preconditioner; Giraud and Gratton 2006).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from advkip.devices import agreed, everywhere, product, zeros_everywhere

RECYCLED, POOL = 80, 400
"""Directions that are kept, and those of which they are chosen, at most."""

SLOW = 6
"""Iterations in which the error must halve; where it does not, the true residual is looked at."""


class Operator(NamedTuple):
    """A and its preconditioner, as functions of (S, C)."""

    multiply: Callable  # A v
    half: Callable  # L^-1 v
    other_half: Callable  # L^-T v
    error: Callable  # of a residual and a solution, one number a column


class Directions(NamedTuple):
    """P and theta; where there are fewer, columns of zeros with ones."""

    p: jax.Array  # (S, m)
    theta: jax.Array  # (m,)
    images: jax.Array  # L^-1 A L^-T P, (S, m)


def no_directions(n, dtype) -> Directions:
    """For the first solve with a factor of n rows."""
    zeros = zeros_everywhere((n, RECYCLED), dtype)
    return Directions(zeros, everywhere(np.ones(RECYCLED, dtype)), zeros)


def carried_over(p, operator) -> Directions:
    """The directions P (S, m) of an earlier A with the same L, for the present one."""
    images = operator.half(operator.multiply(operator.other_half(p)))
    return _chosen(p, images)


def solve(
    operator, b, start, *, tolerance, limit, directions
) -> tuple[jax.Array | None, int, Directions]:
    """X, the iterations, and the directions for the next solve.

    The residual is carried as L^-1 R = Q C by its QR decomposition (Dubrulle 2001), so that columns
    of B may depend on each other. In float32 what is carried along loses touch with the true
    residual after some four digits (`_drift`), so the true one decides, and the iteration starts
    again from it, as long as that helps.

    Args:
      operator: an `Operator`.
      b: right-hand sides, shape (S, C).
      start: a solution to start from, shape (S, C); None is 0.
      tolerance: that the error of every column must have at most.
      limit: iterations at most; with more, X is None.
      directions: `Directions` of this A.
    """
    x = jnp.zeros_like(b) if start is None else start
    r = b if start is None else b - operator.multiply(x)
    iterations, taken, best, room = 0, [], np.inf, (POOL - RECYCLED) // b.shape[1]
    while iterations < limit:
        q, c = _orthogonal(_corrected(directions, operator.half(r)))
        d, errors = q, []
        while iterations < limit:
            e = _corrected(directions, d)
            u = operator.other_half(e)
            a_u = operator.multiply(u)
            x, r, inner = _step(x, r, c, u, a_u)
            iterations += 1
            errors.append(_largest(operator.error(r, x)))
            if not errors[-1] > tolerance or _stagnates(errors, _drift(b.dtype)):
                break
            t = operator.half(a_u)
            if len(taken) < room:  # the first ones know the outliers
                taken.append((e, t))
            q, c, d = _next(q, c, d, _corrected(directions, t), inner)
        r = b - operator.multiply(x)
        error = _largest(operator.error(r, x))
        if error <= tolerance:
            known = zip((directions.p, directions.images), *taken, strict=True)
            return x, iterations, _chosen(*(jnp.concatenate(parts, 1) for parts in known))
        if not error < best / 2:  # no better than from the last true residual, or not finite
            break
        best = error
    return None, iterations, directions


def _largest(errors):
    return float(agreed(errors.max()))


def _drift(dtype):
    """Reduction of the residual from which on it may be rounding alone: 2e-4 in float32."""
    return float(jnp.finfo(dtype).eps) ** 0.53


def _stagnates(errors, drift):
    """Whether what is carried along has nothing more to say, from the errors of all iterations."""
    if len(errors) < 2:
        return False
    within = errors[-1] < drift * errors[0] and errors[-1] > errors[-2] / 2
    return within or (len(errors) > SLOW and errors[-1] > errors[-1 - SLOW] / 2)


_orthogonal = jax.jit(jnp.linalg.qr)


@jax.jit
def _corrected(directions, v):
    """E v."""
    p, theta, _ = directions
    return v + product(p, (theta**-0.5 - 1)[:, None] * product(p.T, v))


@jax.jit
def _step(x, r, c, u, a_u):
    inner = product(u.T, a_u)
    length = jnp.linalg.solve(inner, c)
    return x + product(u, length), r - product(a_u, length), inner


@jax.jit
def _next(q, c, d, t, inner):
    q, new = jnp.linalg.qr(q - product(t, jnp.linalg.inv(inner)))
    return q, product(new, c), q + product(d, new.T)


def _chosen(basis, images):
    """The Ritz vectors of L^-1 A L^-T farthest from 1 in a space, with its image.

    None of them where the image is not finite, as it is if A is not.
    """
    of_one, of_a = (np.asarray(product(basis.T, v), "float64") for v in (basis, images))
    if not np.isfinite(of_a).all():
        return no_directions(len(basis), basis.dtype)
    weights, vectors = np.linalg.eigh(of_one)
    kept = weights > _drift(basis.dtype) * weights.max()  # the others are rounding
    whiten = vectors[:, kept] / np.sqrt(weights[kept])
    ritz, vectors = np.linalg.eigh(whiten.T @ ((of_a + of_a.T) / 2) @ whiten)
    far = np.abs(np.log(np.maximum(ritz, 1e-30)))
    order = np.argsort(np.where(ritz > 0, -far, np.inf), kind="stable")[:RECYCLED]
    order = order[ritz[order] > 0]
    mix, theta = np.zeros((len(of_a), RECYCLED)), np.ones(RECYCLED)
    mix[:, : len(order)], theta[: len(order)] = whiten @ vectors[:, order], ritz[order]
    mix, theta = (everywhere(agreed(a.astype(basis.dtype))) for a in (mix, theta))
    return Directions(product(basis, mix), theta, product(images, mix))
