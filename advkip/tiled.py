"""Kernels whose pairs of images are costly: evaluated a tile of pairs at a time.

`Convolutional` is our own, for the paper's convolutional kernels; `Stax` takes any network of
`neural_tangents.stax`. Both are differentiated
by JAX inside a tile only, which bounds the memory whatever the number of images.
"""

import abc
import dataclasses
import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from advkip.devices import product, tile_floats
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


@dataclasses.dataclass(frozen=True)
class Convolutional(Tiled):
    """NTK of an infinitely wide net of 3x3 convolutions with ReLU (Arora et al. 2019).

    `depth` convolutions with SAME zero padding, each followed by ReLU, then flatten and a linear
    layer, no pooling. Without pooling only equal positions of the two images meet, so a pair has
    one sigma and one theta for each pixel:

        sigma_0 = <x, s> / channels,  theta_0 = 0
        convolution:  sigma <- W_std^2 box(sigma) + b_std^2,  theta <- sigma + W_std^2 box(theta)
        ReLU:         sigma <- r kappa_1(c) / 2,              theta <- theta kappa_0(c) / 2
        linear:       k = W_std^2 mean(sigma + theta) + b_std^2

    with the mean over 3x3 pixels as box, and c, r, kappa_0, kappa_1 as in
    `kernels.FullyConnected`. This equals `neural_tangents.stax` with `parameterization='ntk'`.

    Args:
      depth: number of convolutions, 1 or more.
      W_std, b_std: standard deviations of weights (> 0) and biases (>= 0).
    """

    depth: int
    W_std: float = math.sqrt(2)
    b_std: float = 0.1

    def __post_init__(self):
        check_architecture(self.depth, self.W_std, self.b_std)

    def diagonal(self, x) -> jax.Array:
        """k(x_i, x_i), shape (n,): linear in the squares of x_i, exact where arccos rounds."""
        sigma = self._convolve(_pixels_first(as_floats(x) ** 2).mean(2))
        theta = sigma
        for _ in range(self.depth - 1):
            sigma, theta = self._convolve(sigma / 2), theta / 2
            theta = sigma + self.W_std**2 * _box(theta)
        return self.W_std**2 * (sigma + theta).mean((0, 1)) / 2 + self.b_std**2

    def _tile_shape(self, x):
        # 64 columns keep vector units busy; on CPUs four rows of them fit the caches.
        columns = 64
        floats_per_pair = 20 * x.shape[1] * x.shape[2]
        return max(1, min(len(x), tile_floats() // (columns * floats_per_pair))), columns

    def _convolve(self, sigma):
        return self.W_std**2 * _box(sigma) + self.b_std**2

    def _tile(self, a, b):
        """Arrays are (H, W, n, m): pixels in front, so that a loop over pairs is contiguous."""
        x, s = _pixels_first(a)[..., :, None], _pixels_first(b)[..., None, :]
        # One array after the other is finished: XLA would recompute a box for each use of it.
        done = jax.lax.optimization_barrier
        sigma = done(self._convolve(_inner_products(x, s)))
        p, q = (done(self._convolve((v**2).mean(2))) for v in (x, s))
        theta = sigma
        for layer in range(self.depth):
            if layer:
                sigma, p, q = (done(self._convolve(v)) for v in (sigma, p, q))
                theta = done(sigma + self.W_std**2 * _box(theta))
            sigma, theta = _relu(sigma, theta, p, q)
            p, q = p / 2, q / 2
        mean = done((sigma + theta).mean(1)).mean(0)  # in two stages, which rounds less
        return self.W_std**2 * mean + self.b_std**2


def _pixels_first(x):
    """(n, H, W, C) to (H, W, C, n)."""
    return jnp.moveaxis(x, 0, -1)


@jax.custom_vjp
def _box(a):
    """Mean over 3x3 pixels of (H, W, ...), zeros outside; it is its own transpose."""
    height, width = a.shape[:2]
    a = jnp.zeros((height + 2, width + 2, *a.shape[2:]), a.dtype).at[1:-1, 1:-1].set(a)
    a = a[:-2] + a[1:-1] + a[2:]
    return (a[:, :-2] + a[:, 1:-1] + a[:, 2:]) / 9


_box.defvjp(lambda a: (_box(a), None), lambda _, g: (_box(g),))


@jax.custom_vjp
def _relu(sigma, theta, p, q):
    """r kappa_1(c) / 2 and theta kappa_0(c) / 2 of sigma, theta (H, W, n, m), p (H, W, n, 1) and
    q (H, W, 1, m); the derivatives are exact and finite where c = 1 (see `kernels`)."""
    return _relu_forward(sigma, theta, p, q)[0]


def _relu_forward(sigma, theta, p, q):
    c, square = _correlation(sigma, p, q)
    sine = jnp.sqrt(square)
    k0 = jax.lax.optimization_barrier(0.5 - angle(c, sine) / (2 * math.pi))
    root_p, root_q = jax.lax.optimization_barrier((jnp.sqrt(p), jnp.sqrt(q)))
    k1 = root_p * root_q * sine / (2 * math.pi) + sigma * k0
    return (k1, theta * k0), (sigma, theta, p, q, k0)


def _relu_backward(residuals, g):
    """With s = sqrt(1 - c^2): d kappa_1 / dc = kappa_0, d kappa_0 / dc = 1 / (pi s); and
    d(r kappa_1) / dp = r s / (2 pi p), dc / dp = -c / (2 p)."""
    sigma, theta, p, q, k0 = residuals
    g_sigma, g_theta = g
    roots = jnp.sqrt(p), jnp.sqrt(q), jnp.sqrt(inverse(p)), jnp.sqrt(inverse(q))
    root_p, root_q, over_p, over_q = jax.lax.optimization_barrier(roots)
    c, square = _correlation(sigma, p, q)
    sine = jnp.sqrt(square)
    to_c = g_theta * theta * sine / (2 * math.pi * jnp.maximum(square, cusp_width(c.dtype)))
    to_log = g_sigma * sine * (root_p * root_q) / (4 * math.pi) - to_c * c / 2
    return (
        g_sigma * k0 + to_c * (over_p * over_q),
        g_theta * k0,
        _sum_pairs(to_log) * inverse(p),
        to_log.sum(2, keepdims=True) * inverse(q),
    )


_relu.defvjp(_relu_forward, _relu_backward)


def _sum_pairs(a):
    """Sum over the last axis, kept: as a product with ones, which CPUs do in vector units."""
    return product(a, jnp.ones((a.shape[-1], 1), a.dtype))


@jax.custom_vjp
def _inner_products(x, s):
    """<x, s> / channels at each pixel: (H, W, C, n, 1) and (H, W, C, 1, m) to (H, W, n, m)."""
    return (x * s).mean(2)


def _inner_products_backward(residuals, g):
    x, s = residuals
    to_x = jnp.stack([_sum_pairs(g * s[:, :, c]) for c in range(s.shape[2])], 2)
    return to_x / s.shape[2], (g[:, :, None] * x).sum(3, keepdims=True) / s.shape[2]


_inner_products.defvjp(lambda x, s: (_inner_products(x, s), (x, s)), _inner_products_backward)


def _correlation(sigma, p, q):
    """c and 1 - c^2 = (p q - sigma^2) / (p q), which loses less near c = 1 than 1 - c would.

    Where p or q is 0, so is sigma; with 1 in their place c = 0, the mean over all directions.
    """
    p, q = (jnp.where(v > 0, v, 1) for v in (p, q))
    # There are few p and q; without this, XLA would divide again for each pair.
    p, q, over_p, over_q = jax.lax.optimization_barrier((p, q, 1 / p, 1 / q))
    root_p, root_q = jax.lax.optimization_barrier((jnp.sqrt(over_p), jnp.sqrt(over_q)))
    square = jnp.clip((p * q - sigma * sigma) * (over_p * over_q), 0.0, 1.0)
    return jnp.clip(sigma * (root_p * root_q), -1.0, 1.0), square


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
