"""Systems (K_SS + r I) X = B, in one array of S x S: by a factor of their own, or an earlier one.

A support moves little between two outer steps, so the Cholesky factor L of an earlier K_SS + r I is
a good preconditioner for the present one: conjugate gradients (`krylov`), all columns of B at once,
reach in a few iterations the accuracy that a factorisation has in this precision. An iteration
takes O(S^2 C) operations, a factorisation S^3 / 3. K_SS is symmetric and L triangular, so one array
holds K_SS above its diagonal and L below, with the diagonal of K_SS + r I apart.

What "the same accuracy" is, is measured: the backward error of the factor's own solution when it is
made. Which step factorises depends on numbers of iterations alone, never on a clock, so that a run
has the same bits each time.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from advkip import krylov
from advkip.devices import (
    cholesky_in_place,
    cholesky_solve,
    everywhere,
    half_solve,
    zeros_everywhere,
)
from advkip.gram import fill_gram, ridged_diagonal, set_diagonal, symmetric_product
from advkip.kernel import Kernel

KEPT = 12_000
"""Supports of fewer images are factorised at each step, which takes no longer than iterations do.
At 5,000 a step is a quarter slower with an old factor (`make bench`), at 30,000 half as long; where
the two meet was not measured."""

ROWS_PER_ITERATION = 500
"""S over this is how many iterations cost a factorisation: S^3 / 3 operations at the rate of large
products, against reading half of S^2 numbers three times (two cores, S 30,000: 72 s and 1.25 s)."""

ACCURACY = 4.0
"""Backward error of conjugate gradients over that of the direct solution, at most."""

PROBES = 8
"""Columns of random signs whose direct solution is looked at."""

ADVICE = (
    "pass a larger diag_reg (10 times, say), dtype 'float64', or a support without near-identical "
    "images"
)


class System(NamedTuple):
    """K_SS + r I of a support, ready to be solved."""

    kernel: Kernel
    x: jax.Array  # the support, (S, ...)
    diag_reg: float
    block_size: int  # of a tile; 0 chooses
    ridge: jax.Array  # r
    packed: jax.Array  # (S, S): L, and above it K_SS if `diagonal` is not None
    diagonal: jax.Array | None = None  # of K_SS + r I, (S,)
    tolerance: float = 0.0  # backward error that a solution may have
    age: int = (
        0  # supports since the one whose L is; 0: this one's own; -1: of float64, serves no other
    )
    spent: int = 0  # iterations for the supports before this one since then
    last: int = 0  # iterations for this one
    directions: krylov.Directions | None = None  # of solves with this factor


def factorise(kernel, x, *, diag_reg, block_size=0, keep=False, memory=None) -> System:
    """The system of a support with a factor of its own.

    Args:
      kernel: see `kernel.Kernel`.
      x: the support, shape (S, ...).
      diag_reg: ridge relative to the mean diagonal of K_SS.
      block_size: rows and columns of a tile; 0 chooses.
      keep: keeps K_SS above the factor, for `moved`.
      memory: an array (S, S) that is donated, or None.

    Raises:
      FloatingPointError: K_SS + r I is not positive definite in this precision, or not finite.
    """
    k_ss = zeros_everywhere((len(x), len(x)), x.dtype) if memory is None else memory
    k_ss = fill_gram(kernel, k_ss, x, triangle="both" if keep else "lower", block_size=block_size)
    diagonal, ridge = _diagonal(kernel, x, diag_reg)
    factor, success = cholesky_in_place(set_diagonal(k_ss, diagonal))
    if not success:
        raise _not_positive_definite(diag_reg, x.dtype)
    system = System(kernel, x, diag_reg, block_size, ridge, factor)
    if not keep:
        return system
    signs = np.random.default_rng(0).choice([-1, 1], (len(x), PROBES)).astype(x.dtype)
    system = system._replace(diagonal=diagonal)
    probes = everywhere(signs)
    solution = _solve_factor(factor, probes)
    error = _errors(system, probes - _product(system, solution), solution)
    return system._replace(
        tolerance=ACCURACY * float(error.max()), directions=krylov.no_directions(len(x), x.dtype)
    )


def _diagonal(kernel, x, diag_reg):
    """The diagonal of K_SS + r I, and r."""
    diagonal, ridge = ridged_diagonal(kernel, x, diag_reg)
    if not jnp.isfinite(ridge):
        raise FloatingPointError(
            f"expected a finite kernel, got a mean diagonal that is not in {x.dtype}; pass a "
            "smaller W_std, fewer layers, dtype 'float64', or images in [0, 1]"
        )
    return diagonal, ridge


def _not_positive_definite(diag_reg, dtype) -> FloatingPointError:
    """The error that says what to change."""
    return FloatingPointError(
        f"expected K_SS + ridge to be positive definite, got a failed Cholesky factorisation "
        f"with diag_reg {diag_reg} in {dtype}; {ADVICE}"
    )


def moved(system, x) -> System:
    """The system of a support that has moved, whose memory and factor are an earlier one's.

    Args:
      system: of the earlier support; its array is donated, so it cannot be used any more.
      x: the support, shape (S, ...).

    Raises:
      FloatingPointError: as `factorise`, when a new factor is due.
    """
    kernel, diag_reg, block_size = system.kernel, system.diag_reg, system.block_size
    if _is_worn(system):
        return renewed(system._replace(x=x))
    packed = fill_gram(kernel, system.packed, x, triangle="upper", block_size=block_size)
    diagonal, ridge = _diagonal(kernel, x, diag_reg)
    system = system._replace(
        x=x, ridge=ridge, packed=packed, diagonal=diagonal,
        age=system.age + 1, spent=system.spent + system.last, last=0,
    )  # fmt: skip
    if system.age == 1:  # no directions are known yet
        return system
    return system._replace(directions=krylov.carried_over(system.directions.p, _operator(system)))


def renewed(system) -> System:
    """The same system with a factor of its own, in the memory of the old one."""
    return factorise(
        system.kernel, system.x, diag_reg=system.diag_reg, block_size=system.block_size,
        keep=system.diagonal is not None, memory=system.packed,
    )  # fmt: skip


def _is_worn(system):
    """Whether a new factor costs less than to go on with an old one.

    Once the iterations of a support exceed the mean cost of those since the factor was made, the
    factor's own cost included, that mean can only rise.
    """
    if system.diagonal is None or system.age < 0:
        return True
    spent = _price(system) + system.spent + system.last
    return system.last * (system.age + 1) > spent


def _price(system):
    """How many iterations cost a factorisation."""
    return max(1, len(system.x) // ROWS_PER_ITERATION)


def solve(system, b, start=None) -> tuple[jax.Array, System]:
    """X of (K_SS + r I) X = B, and the system: with a new factor, if the old one did not serve.

    Args:
      system: its array is donated if it has to be factorised.
      b: shape (S, C).
      start: a solution to start from, such as an earlier support's, shape (S, C); None is 0.

    Raises:
      FloatingPointError: as `factorise`; the solution is not finite.
    """
    if system.age > 0:
        found, system = _conjugate_gradients(system, b, start, _price(system))
        if found is not None:
            return found, system
        system = renewed(system)
    found = _solve_factor(system.packed, b)
    if not jnp.isfinite(found).all():
        raise _not_positive_definite(system.diag_reg, system.x.dtype)
    return found, system


def _conjugate_gradients(system, b, start, limit):
    """X with the backward error `tolerance` in every column, or None, and the system."""
    found, iterations, directions = krylov.solve(
        _operator(system),
        b,
        start,
        tolerance=system.tolerance,
        limit=limit,
        directions=system.directions,
    )
    return found, system._replace(last=system.last + iterations, directions=directions)


def _operator(system):
    return krylov.Operator(
        partial(_product, system), partial(_solve_half, system.packed),
        partial(_solve_other_half, system.packed), partial(_errors, system),
    )  # fmt: skip


def _product(system, v):
    """(K_SS + r I) v."""
    return symmetric_product(system.packed, system.diagonal, v)


_solve_factor = jax.jit(cholesky_solve)
_solve_half = jax.jit(half_solve)
_solve_other_half = jax.jit(partial(half_solve, transposed=True))


def _ratio(a, b):
    """a / b, and 0 for a column that is solved exactly."""
    return jnp.where(b == 0, 0, a / jnp.where(b == 0, 1, b))


def _errors(system, r, x):
    """Backward error of each column: |residual| / (trace(K_SS + r I) |x|)."""
    return _ratio(jnp.linalg.norm(r, axis=0), system.diagonal.sum() * jnp.linalg.norm(x, axis=0))
