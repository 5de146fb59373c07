"""Any network of `neural_tangents.stax`: evaluated a tile of pairs of images at a time.

It is differentiated by JAX inside a tile only, which bounds the memory whatever the number of
images. Below are the functions that the recursions of our own kernels share.
"""

import abc
import dataclasses
import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from advkip.kernel import Kernel, as_floats


class Tiled(Kernel):
    """A `kernel.Kernel` from `_tile(a, b)`, the kernel of a few images with a few."""

    @abc.abstractmethod
    def _tile(self, a, b):
        """K of few images a, b."""

    @abc.abstractmethod
    def _tile_shape(self, x):
        """How many images of the shape of x's make a tile: (rows, columns)."""

    @property
    def floats_per_pair(self) -> int:
        """Working floats held for one pair of images outside the tiles."""
        return 2

    def value(self, x, s) -> jax.Array:
        """K like `__call__`, without a derivative rule of its own."""
        x, s = as_floats(x), as_floats(s)
        r, c = self._tile_shape(x)
        rows, columns = _split(x, r), _split(s, c)
        k = jax.lax.map(lambda a: jax.lax.map(lambda b: self._tile(a, b), columns), rows)
        return k.swapaxes(1, 2).reshape(len(rows) * r, -1)[: len(x), : len(s)]

    def value_and_pullback(self, x, s) -> tuple[jax.Array, Callable]:
        """K (n, m) and its pullback to x and s; the pullback recomputes each tile."""
        x, s = as_floats(x), as_floats(s)
        return self.value(x, s), Partial(partial(_pull_tiles, self), x, s)


def _pull_tiles(kernel, x, s, w):
    """To x, and to s by symmetry; in two loops, since XLA drops a loop that is not needed."""
    return _pull_to_rows(kernel, x, s, w), _pull_to_rows(kernel, s, x, w.T)


def _pull_to_rows(kernel, x, s, w):
    r, c = kernel._tile_shape(x)
    rows, columns = _split(x, r), _split(s, c)
    pad = ((0, len(rows) * r - len(x)), (0, len(columns) * c - len(s)))
    w = jnp.pad(w, pad).reshape(len(rows), r, len(columns), c).swapaxes(1, 2)

    def pull_row(row):
        a, w_row = row

        def add(to_a, column):
            b, w_tile = column
            return to_a + jax.vjp(lambda a: kernel._tile(a, b), a)[1](w_tile)[0], None

        return jax.lax.scan(add, jnp.zeros_like(a), (columns, w_row))[0]

    return jax.lax.map(pull_row, (rows, w)).reshape(-1, *x.shape[1:])[: len(x)]


def _split(x, size):
    """(n, ...) to (n / size, size, ...), the last tile filled up with copies of x_0."""
    fill = -len(x) % size
    x = jnp.concatenate([x, jnp.broadcast_to(x[:1], (fill, *x.shape[1:]))]) if fill else x
    return x.reshape(-1, size, *x.shape[1:])


@dataclasses.dataclass(frozen=True)
class Stax(Tiled):
    """Any `neural_tangents.stax` network's NTK as a `kernel.Kernel`.

    Args:
      kernel_fn: the third value that `stax.serial(...)` returns; it takes (x1, x2, get).
      tile: the kernel is evaluated on tile x tile pairs of images at a time. Memory is
        proportional to tile^2; the result does not depend on it.

    Use `kernels.stax_module()` to build the network, so that the import works on a current JAX.
    """

    kernel_fn: Callable
    tile: int = 16

    def __post_init__(self):
        if not callable(self.kernel_fn) or self.tile < 1:
            raise ValueError(
                "expected the kernel_fn of a stax network and tile >= 1, got "
                f"{self.kernel_fn!r}, {self.tile}; pass Stax(stax.serial(...)[2])"
            )

    def diagonal(self, x) -> jax.Array:
        """k(x_i, x_i), shape (n,)."""
        return jax.lax.map(lambda a: self._tile(a[None], a[None])[0, 0], as_floats(x))

    def _tile_shape(self, x):
        return self.tile, self.tile

    def _tile(self, a, b):
        with jax.default_matmul_precision("highest"):
            return self.kernel_fn(a, b, "ntk").astype(a.dtype)


def cusp_width(dtype) -> float:
    """1 - c^2 below this counts as the cusp c = 1, where 1 / s is replaced by 0."""
    return float(4 * jnp.finfo(dtype).eps)


def inverse(p) -> jax.Array:
    """1 / p, and 0 for p = 0: a zero image with b_std = 0 has kernel and derivatives 0."""
    return jnp.where(p > 0, 1 / jnp.where(p > 0, p, 1), 0)


def angle(c, sine) -> jax.Array:
    """arccos(c) of c in [-1, 1] with sine = sqrt(1 - c^2), which callers have and know better.

    In float32 arccos(c) = sine * poly(1 - c) for c >= 0, and pi - arccos(-c) below; the polynomial
    interpolates arccos(c) / sqrt(1 - c^2), which is smooth, in Chebyshev points (error 2e-9, one
    and a half units in the last place with rounding). XLA's own arccos and arctan2 are many times
    slower on CPUs.
    """
    if c.dtype != jnp.float32:
        return jnp.arctan2(sine, c)
    t, poly = 1 - jnp.abs(c), 0.00729042
    for coefficient in (
        -0.02499035, 0.04353618, -0.03768105, 0.02876297, 0.00298998,
        0.02730914, 0.0568967, 0.13334942, 0.33333293, 1.0,
    ):  # fmt: skip
        poly = poly * t + coefficient
    return jnp.where(c < 0, math.pi - sine * poly, sine * poly)


def arccos(c) -> jax.Array:
    """arccos; in float32 by Abramowitz and Stegun 4.4.46 (absolute error 2e-8, one sqrt).

    arccos c = sqrt(1 - c) poly(c) for c >= 0 and pi - arccos(-c) below. Where the sine is not more
    accurate than c itself this is faster than `angle`.
    """
    if c.dtype != jnp.float32:
        return jnp.arccos(c)
    a, poly = jnp.abs(c), -0.0012624911
    for coefficient in (
        0.0066700901, -0.0170881256, 0.0308918810, -0.0501743046,
        0.0889789874, -0.2145988016, 1.5707963050,
    ):  # fmt: skip
        poly = poly * a + coefficient
    positive = jnp.sqrt(1 - a) * poly
    return jnp.where(c < 0, math.pi - positive, positive)


def check_architecture(depth, W_std, b_std) -> None:
    """Raises ValueError unless depth >= 1, W_std > 0 and b_std >= 0."""
    if depth < 1 or not W_std > 0 or not b_std >= 0:
        raise ValueError(
            "expected depth >= 1, W_std > 0 and b_std >= 0, got "
            f"{depth}, {W_std}, {b_std}; pass for example depth=3"
        )
