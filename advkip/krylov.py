"""Block conjugate gradients that leave out the directions of earlier, similar systems.

Systems A X = B with several right-hand sides, a positive definite A, and a preconditioner M = L L^T
near it. What slows conjugate gradients down are the few directions in which A and M differ most,
and from one support to the next they hardly change. So each solve keeps its directions, and the
next one starts from the solution in their span and stays A-orthogonal to them (deflation; Saad et
al. 2000): half the iterations remain.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from advkip.devices import everywhere, product

RECYCLED = 80
"""Directions that are kept. Another (S, C) of them cost a tenth of an iteration in the next system
and save less, from here on."""


DRIFT = 2e-4
"""Reduction of the residual from which on it may be rounding alone."""


class Operator(NamedTuple):
    """A and its preconditioner, as functions of (S, C)."""

    multiply: Callable  # A v
    half: Callable  # L^-1 v
    other_half: Callable  # L^-T v
    error: Callable  # of a residual and a solution, one number a column


class Directions(NamedTuple):
    """Directions U of earlier solves, with columns of zeros where there are fewer."""

    u: jax.Array  # (S, m)
    p: jax.Array  # L^T U, (S, m)
    a_u: jax.Array  # A U, (S, m)
    inverse: jax.Array  # pseudo-inverse of U^T A U, (m, m)


def no_directions(n, dtype) -> Directions:
    """For the first solve of a system of n rows."""
    zeros = everywhere(np.zeros((n, RECYCLED), dtype))
    return Directions(zeros, zeros, zeros, everywhere(np.zeros((RECYCLED, RECYCLED), dtype)))


def of_system(u, p, multiply) -> Directions:
    """Directions of an earlier system, for the present one."""
    a_u = multiply(u)
    inverse = np.linalg.pinv(np.asarray(_inner(u, a_u), "float64"), rcond=1e-6, hermitian=True)
    return Directions(u, p, a_u, everywhere(inverse.astype(u.dtype)))


def solve(
    operator, b, start, *, tolerance, limit, directions
) -> tuple[jax.Array | None, int, Directions]:
    """X, the iterations, and the directions for the next solve.

    The residual R = Q C of L^-1 A L^-T is carried by its QR decomposition (Dubrulle 2001), so that
    columns of B may depend on each other. In float32 what is carried along loses touch with the
    true residual after some four digits, so the true one decides, and the iteration starts again
    from it.

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
    iterations, taken = 0, []
    while iterations < limit:
        x, r = _project(x, r, directions)
        q, c = _orthogonal(operator.half(r))
        u, p = _deflated(operator.other_half(q), q, directions)
        first = error = float(operator.error(r, x).max())
        while iterations < limit:
            a_u = operator.multiply(u)
            taken.append((u, p, a_u))
            x, r, inner = _step(x, r, c, u, a_u)
            iterations += 1
            before, error = error, float(operator.error(r, x).max())
            lost = error < DRIFT * first and error > before / 2
            if lost or not error > tolerance:
                break
            q, c, new = _next_residual(q, c, operator.half(a_u), inner)
            u, p = _next_direction(operator.other_half(q), q, u, p, new, directions)
        r = b - operator.multiply(x)
        error = float(operator.error(r, x).max())
        if error <= tolerance:
            return x, iterations, _chosen(directions, taken)
        if not np.isfinite(error):
            break
    return None, iterations, directions


def _inner(a, b):
    return product(a.T, b)


_orthogonal = jax.jit(jnp.linalg.qr)


@jax.jit
def _project(x, r, directions):
    """X and its residual with the error's part in the span of the directions taken out."""
    u, _, a_u, inverse = directions
    length = product(inverse, _inner(u, r))
    return x + product(u, length), r - product(a_u, length)


@jax.jit
def _deflated(u, p, directions):
    """A-orthogonal to the directions: U, and P = L^T U."""
    length = product(directions.inverse, _inner(directions.a_u, u))
    return u - product(directions.u, length), p - product(directions.p, length)


@jax.jit
def _step(x, r, c, u, a_u):
    inner = _inner(u, a_u)
    length = jnp.linalg.solve(inner, c)
    return x + product(u, length), r - product(a_u, length), inner


@jax.jit
def _next_residual(q, c, t, inner):
    q, new = jnp.linalg.qr(q - product(t, jnp.linalg.inv(inner)))
    return q, product(new, c), new


@jax.jit
def _next_direction(u_q, q, u, p, new, directions):
    u_q, p_q = _deflated(u_q, q, directions)
    return u_q + product(u, new.T), p_q + product(p, new.T)


def _chosen(directions, taken):
    """The RECYCLED Ritz vectors of M^-1 A, of old and new directions, farthest from 1."""
    blocks = [directions[:3], *taken]
    u, p, a_u = (jnp.concatenate(parts, 1) for parts in zip(*blocks, strict=True))
    of_a, of_m = (np.asarray(_inner(*pair), "float64") for pair in ((u, a_u), (p, p)))
    weights, basis = np.linalg.eigh(of_m)
    kept = weights > 1e-4 * weights.max()  # float32 knows no others
    basis = basis[:, kept] / np.sqrt(weights[kept])
    ritz, vectors = np.linalg.eigh(basis.T @ of_a @ basis)
    order = np.argsort(-np.abs(np.log(np.maximum(ritz, 1e-12))), kind="stable")[:RECYCLED]
    mix = np.zeros((len(of_a), RECYCLED))
    mix[:, : len(order)] = basis @ vectors[:, order]
    mix = everywhere(mix.astype(u.dtype))
    inverse = np.zeros((RECYCLED, RECYCLED))
    np.fill_diagonal(inverse[: len(order)], 1 / ritz[order])
    return Directions(
        product(u, mix), product(p, mix), product(a_u, mix), everywhere(inverse.astype(u.dtype))
    )
