"""Kernel ridge regression (paper Eq. 4) and its exact gradient, in bounded memory.

    f(x) = K_xS alpha,   alpha = (K_SS + r I)^-1 Y_S,   r = diag_reg trace(K_SS) / S

The only S x S array is K_SS itself; its Cholesky factor takes its place, or the other triangle (see
`solver`). The gradient of a loss L(f(X_T)) needs no derivative of the factorisation. With
G = dL/df (T x C) and B = (K_SS + r I)^-1 K_ST G (S x C),

    dL/dY_S  = B
    dL/dK_TS = G alpha^T
    dL/dK_SS = -B alpha^T - (diag_reg / S) sum(B * alpha) I

all of rank C (plus the trace term of the relative ridge), so the kernel's pullback (see
`kernel`) carries them to the images in tiles that are formed, used and dropped. Every tile is
spread over all devices (`devices.over_rows`); K_SS and the solves are on each of them.

What S a given memory allows. One array of S x S; the support and Adam's two moments, old and new,
the gradient, a copy of the best and the factor's support, of S x D each; the target batch twice; up
to 8 kB an image for conjugate gradients; tiles and programs. In float32, in bytes,

    4 S^2 + 36 S D + 8 T D + 8,000 S + 1e9 (on accelerators tiles take 1/32 of the memory more)

which is 5.7 GB at S 30,000, D 784 and 12.2 GB at S 40,000, D 3,072; measured, with T 2,000, were
5.8 and 12.1 (reports/benchmarks, 2 % low). With T = S / 4 and a tenth of the memory to spare,

    memory        8 GB   12 GB   16 GB   24 GB   40 GB    80 GB
    D = 784     35,000  45,000  53,000  67,000  89,000  128,500
    D = 3,072   26,500  36,500  44,500  58,000  79,000  118,500

and in float64 what half the memory allows. On accelerators JAX's own Cholesky, up to
`devices.CHOLESKY_DIRECT` rows, works in two more arrays of S x S.

`kernel` below is a `kernel.Kernel`; S support, T target, C classes.
"""

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from advkip import inputs, krylov, residuals, solver
from advkip.devices import CHOLESKY_DIRECT, even_size, everywhere, jit, over_rows, product
from advkip.gram import add_rows, rows_from, rows_of_tile, square_tile


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("x_support", "alpha"),
    meta_fields=("kernel",),
)
@dataclasses.dataclass(frozen=True)
class KernelMachine:
    """A fitted kernel classifier; calling it on images x (n, ...) gives logits (n, C), Eq. 4.

    Images have the shape of the support's, floats or uint8 of 0..255. It is a JAX pytree, so it
    passes through `jax.jit` as an argument, and its derivative with respect to x uses the kernel's
    exact pullback.
    """

    kernel: object
    x_support: jax.Array
    alpha: jax.Array

    def __call__(self, x):
        if x.shape[1:] != self.x_support.shape[1:]:
            raise ValueError(
                f"expected images (n, {', '.join(map(str, self.x_support.shape[1:]))}), like the "
                f"support, got shape {tuple(x.shape)}; pass images of that shape, channels last"
            )
        if not jnp.issubdtype(x.dtype, jnp.inexact):
            if x.dtype != np.uint8:
                inputs.check_floats(x)
            x = jnp.asarray(x, self.alpha.dtype) / 255  # as in a data set, see `data.to_float`
        return _predict(self.kernel, x, self.x_support, self.alpha)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _predict(kernel, x, x_support, alpha):
    return product(kernel.value(x, x_support), alpha)


def _predict_forward(kernel, x, x_support, alpha):
    k, pullback = kernel.value_and_pullback(x, x_support)
    return product(k, alpha), (k, pullback, alpha)


def _predict_backward(kernel, residuals, g):
    k, pullback, alpha = residuals
    return *pullback(product(g, alpha.T)), product(k.T, g)


_predict.defvjp(_predict_forward, _predict_backward)


class Fit(NamedTuple):
    """A fitted machine with what its gradient needs."""

    machine: KernelMachine
    system: solver.System  # K_SS + r I


def fit(kernel, x_support, y_support, *, diag_reg=1e-6, block_size=0, keep=False) -> Fit:
    """Solves Eq. 4 for alpha by one Cholesky factorisation.

    Args:
      kernel: see `kernels`.
      x_support: support images, shape (S, ...), float32 or float64.
      y_support: support labels, shape (S, C).
      diag_reg: ridge relative to the mean diagonal of K_SS, >= 0.
      block_size: rows and columns of a tile; 0 chooses from `devices.tile_floats`.
      keep: keeps what `refit` needs, if there are so many images that it pays.

    Returns:
      A `Fit`.

    Raises:
      ValueError: shapes that do not match, a negative diag_reg, values that are not finite.
      FloatingPointError: K_SS + r I is not positive definite in this precision, or not finite, or
        the solution does not solve it (near-identical images, whose kernel float32 cannot tell
        apart; up to `devices.CHOLESKY_DIRECT` images float64 is tried first).
    """
    x_support, y_support = _checked(x_support, y_support)
    if not diag_reg >= 0:
        raise ValueError(f"expected diag_reg >= 0, got {diag_reg}; pass for example 1e-6")
    system = solver.factorise(
        kernel, x_support, diag_reg=diag_reg, block_size=block_size,
        keep=keep and len(x_support) >= solver.KEPT,
    )  # fmt: skip
    return _solved(system, y_support, None)


def refit(fitted, x_support, y_support) -> Fit:
    """`fit` of a support that has moved: in a few iterations where an old factor still serves.

    Args:
      fitted: of the earlier support, by `fit` with `keep` or by `refit`. Its memory is taken over,
        so it cannot be used any more (its machine can).
      x_support, y_support: as of `fit`, with as many images.

    Returns:
      A `Fit`, as exact as that of `fit` (see `solver`).

    Raises:
      ValueError, FloatingPointError: as `fit`.
    """
    x_support, y_support = given = _checked(x_support, y_support)
    machine, earlier = fitted.machine, (fitted.machine.x_support, fitted.machine.alpha)
    got, expected = ([(*a.shape, str(a.dtype)) for a in pair] for pair in (given, earlier))
    if got != expected:
        raise ValueError(
            f"expected a support like the earlier one, {expected}, got {got}; pass this one to fit"
        )
    return _solved(solver.moved(fitted.system, x_support), y_support, machine.alpha)


class Origin(NamedTuple):
    """What the factor behind a `Fit` is made of again, bit for bit, and what else `refit` needs."""

    x: jax.Array  # the support whose factor it is, (S, ...)
    alpha: jax.Array  # the last solution, (S, C)
    p: jax.Array  # see `krylov.Directions`
    age: int  # see `solver.System`, like the next two
    spent: int
    last: int


def no_origin(x_support, y_support) -> Origin | None:
    """Of a run that begins; None for supports that are too small to keep a factor."""
    if len(x_support) < solver.KEPT:
        return None
    p = krylov.no_directions(len(x_support), x_support.dtype).p
    return Origin(x_support, jnp.zeros_like(y_support), p, -1, 0, 0)


def origin(fitted, before) -> Origin:
    """The origin of a `Fit`, whose predecessor's was `before`."""
    system = fitted.system
    x = before.x if system.age > 0 else system.x
    use = system.age, system.spent, system.last
    return Origin(x, fitted.machine.alpha, system.directions.p, *use)


def restore(origin, kernel, *, diag_reg=1e-6, block_size=0) -> Fit:
    """A `Fit` from which `refit` goes on as from the one of this origin; raises as `fit`."""
    system = solver.factorise(
        kernel, everywhere(origin.x), diag_reg=diag_reg, block_size=block_size, keep=True
    )
    none = krylov.no_directions(len(origin.p), origin.p.dtype)
    system = system._replace(
        age=origin.age, spent=origin.spent, last=origin.last,
        directions=none._replace(p=everywhere(origin.p)),
    )  # fmt: skip
    return Fit(KernelMachine(kernel, system.x, everywhere(origin.alpha)), system)


def _checked(x_support, y_support):
    inputs.check_floats(x_support, "x_support")
    inputs.check_floats(y_support, "y_support")
    parts = everywhere(x_support), everywhere(y_support)
    x_support, y_support = (part.astype(jnp.result_type(*parts)) for part in parts)
    if y_support.ndim != 2 or len(x_support) != len(y_support) or not len(x_support):
        raise ValueError(
            "expected x_support (S, ...) and y_support (S, C), got shapes "
            f"{x_support.shape} and {y_support.shape}; pass one row of labels an image"
        )
    if not (jnp.isfinite(x_support).all() and jnp.isfinite(y_support).all()):
        raise ValueError(
            "expected finite x_support and y_support, got NaN or infinity; pass others, or lower "
            "the learning rate if they came from a run"
        )
    return x_support, y_support


def _solved(system, y_support, start):
    """The `Fit` of a system, in float64 where float32 does not solve it."""
    kernel, x_support = system.kernel, system.x
    alpha, system = solver.solve(system, y_support, start)
    machine = KernelMachine(kernel, x_support, alpha)
    residual = residuals.residual(machine, system.ridge, y_support)
    if residual > residuals.RESIDUAL and len(x_support) <= CHOLESKY_DIRECT:
        alpha, system = _solved_in_float64(system, y_support)
        machine = KernelMachine(kernel, x_support, alpha)
        residual = residuals.residual(machine, system.ridge, y_support)
    if residual > residuals.RESIDUAL:
        raise FloatingPointError(
            f"expected (K_SS + ridge) alpha = y_support to {residuals.RESIDUAL:.0%} of the labels, "
            f"got a residual of {residual:.2g} with diag_reg {system.diag_reg} in "
            f"{x_support.dtype}; {solver.ADVICE}"
        )
    return Fit(machine, system)


def _solved_in_float64(system, y_support):
    """alpha and the system by a factorisation in float64, rounded to the precision of y_support."""
    dtype = y_support.dtype
    with jax.enable_x64(True):
        x, y = (everywhere(np.asarray(a, "float64")) for a in (system.x, y_support))
        precise = solver.factorise(
            system.kernel, x, diag_reg=system.diag_reg, block_size=system.block_size
        )
        alpha, precise = solver.solve(precise, y)
        alpha, factor = (everywhere(jnp.asarray(a, dtype)) for a in (alpha, precise.packed))
    return alpha, system._replace(packed=factor, age=-1, spent=0, last=0)


class SupportGradient(NamedTuple):
    """The loss and its gradient with respect to the support."""

    loss: jax.Array  # L, a scalar
    x_support: jax.Array  # dL/dX_S, shape of the support images
    y_support: jax.Array  # dL/dY_S, shape (S, C)
    fitted: Fit  # the one given, which may have a new factor in the memory of its old one


def support_gradient(fitted, x_target, y_target, *, loss, weights=None) -> SupportGradient:
    """L(f(X_T)) and its exact gradient with respect to the support (the outer steps of Eq. 7).

    Args:
      fitted: what `fit` or `refit` returned for the support. Its memory may be taken over by a new
        factor: go on with the result's `fitted`.
      x_target: the (attacked) target images, shape (T, ...); constants of this gradient.
      y_target: their labels, shape (T, C).
      loss: loss(logits, labels) of each image, from shapes (n, C) to (n,), a hashable function;
        L is the mean, or the sum with `weights` (T,).

    Returns:
      A `SupportGradient`. Cost: 4 S T D + 3 S^2 D + O(S^2 C) operations.
    """
    kernel, x, alpha = fitted.machine.kernel, fitted.machine.x_support, fitted.machine.alpha
    diag_reg, block_size = fitted.system.diag_reg, fitted.system.block_size
    n, n_target = len(x), len(x_target)
    weights = jnp.full(n_target, 1 / n_target, x.dtype) if weights is None else weights
    target = tuple(map(everywhere, (x_target, y_target, weights)))
    size = even_size(n_target, block_size or rows_of_tile(kernel, n))
    value, gradient, k_st_g = _pull_target(kernel, loss, size, x, alpha, target)
    b, system = solver.solve(fitted.system, k_st_g)
    diagonal = -(b * alpha).sum(1) - diag_reg / n * (b * alpha).sum()
    gradient = _pull_diagonal(kernel, gradient, x, diagonal)
    size = even_size(n, block_size or square_tile(kernel))
    for row in range(-(-n // size)):
        gradient = _pull_row(kernel, size, gradient, x, alpha, b, row)
    return SupportGradient(value, gradient, b, Fit(fitted.machine, system))


@partial(jit, static_argnums=(0, 1, 2))
def _pull_target(kernel, loss, size, x, alpha, target):
    """L, the part of dL/dX_S that flows through K_TS, and K_ST G, summed over target batches.

    A batch at the end is moved back to fit; what it shares with the one before has weight 0.
    """
    n = len(target[0])

    def pull(rows, support):
        (x_target, y_target, weights), (x, alpha) = rows, support
        k, pullback = kernel.value_and_pullback(x_target, x)
        losses, pull_loss = jax.vjp(lambda logits: loss(logits, y_target), product(k, alpha))
        (g,) = pull_loss(weights)
        parts = (losses * weights).sum(), pullback(product(g, alpha.T))[1], product(k.T, g)
        return jax.tree.map(lambda part: part[None], parts)

    def add(batch, sums):
        start = jnp.minimum(batch * size, n - size)
        own = start + jnp.arange(size) >= batch * size
        *rows, weights = (rows_from(part, start, size) for part in target)
        parts = over_rows(pull, (*rows, jnp.where(own, weights, 0)), (x, alpha))
        return jax.tree.map(lambda total, part: total + part.sum(0), sums, parts)

    sums = jnp.zeros((), x.dtype), jnp.zeros_like(x), jnp.zeros_like(alpha)
    return jax.lax.fori_loop(0, -(-n // size), add, sums)


@partial(jax.jit, static_argnums=0, donate_argnums=1)
def _pull_diagonal(kernel, gradient, x, diagonal):
    """Adds what flows through the diagonal of K_SS, where k(x, x) has its own derivative."""
    return gradient + jax.vjp(kernel.diagonal, x)[1](diagonal)[0]


@partial(jit, static_argnums=(0, 1), donate_argnums=2)
def _pull_row(kernel, size, gradient, x, alpha, b, row):
    """Adds what flows through tiles 0 to `row` of a row of tiles of K_SS, and their mirror images.

    An image stands in a row and in a column of K_SS, so w = -(B alpha^T + alpha B^T), which is
    symmetric: one pullback serves a tile and its mirror. The last row of tiles is moved back to
    fit; what it shares with the one before it is left out, as is the diagonal.
    """
    i = jnp.minimum(row * size, len(x) - size)
    left, right = jnp.concatenate([b, alpha], 1), jnp.concatenate([alpha, b], 1)
    rows, left = rows_from(x, i, size), rows_from(left, i, size)

    def pull(rows, columns):
        to_rows, to_columns = kernel.value_and_pullback(rows[0], columns)[1](rows[1])
        return to_rows, to_columns[None]

    def tile(column):
        j = jnp.minimum(column * size, len(x) - size)
        index_i, index_j = i + jnp.arange(size)[:, None], j + jnp.arange(size)
        own = (index_i >= row * size) & (index_j >= column * size) & (index_i != index_j)
        w = jnp.where(own, -product(left, rows_from(right, j, size).T), 0)
        return j, *over_rows(pull, (rows, w), rows_from(x, j, size))

    def add(column, sums):
        gradient, to_rows = sums
        j, to_i, to_j = tile(column)
        return add_rows(gradient, to_j.sum(0), j), to_rows + to_i

    gradient, to_rows = jax.lax.fori_loop(0, row, add, (gradient, tile(row)[1]))
    return add_rows(gradient, to_rows, i)
