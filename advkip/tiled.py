"""Kernels whose pairs of images are costly: evaluated a tile of pairs at a time.

`Convolutional` is our own, for the paper's convolutional kernels; `Stax` takes any network of
`neural_tangents.stax`. Both have the interface described in `kernels`, and both are differentiated
by JAX inside a tile only, which bounds the memory whatever the number of images.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from advkip.devices import product, tile_floats


class Tiled:
    """The interface of `kernels` from `_tile(a, b)`, the kernel of a few images with a few."""

    @property
    def floats_per_pair(self):
        """Working floats held for one pair of images outside the tiles."""
        return 2

    def __call__(self, x, s):
        """K, shape (n, m), for images x (n, H, W, C) and s (m, H, W, C); differentiable."""
        return differentiable(self, x, s)

    def value(self, x, s):
        """K like `__call__`, without a derivative rule of its own."""
        r, c = self._tile_shape(x)
        rows, columns = _split(x, r), _split(s, c)
        k = jax.lax.map(lambda a: jax.lax.map(lambda b: self._tile(a, b), columns), rows)
        return k.swapaxes(1, 2).reshape(len(rows) * r, -1)[: len(x), : len(s)]

    def value_and_pullback(self, x, s):
        """K (n, m) and its pullback to x and s; the pullback recomputes each tile."""
        return self.value(x, s), Partial(partial(_pull_tiles, self), x, s)


def _pull_tiles(kernel, x, s, w):
    r, c = kernel._tile_shape(x)
    rows, columns = _split(x, r), _split(s, c)
    pad = ((0, len(rows) * r - len(x)), (0, len(columns) * c - len(s)))
    w = jnp.pad(w, pad).reshape(len(rows), r, len(columns), c).swapaxes(1, 2)

    def pull_row(to_s, row):
        a, w_row = row

        def add(to_a, column):
            b, w_tile = column
            da, db = jax.vjp(kernel._tile, a, b)[1](w_tile)
            return to_a + da, db

        to_a, to_b = jax.lax.scan(add, jnp.zeros_like(a), (columns, w_row))
        return to_s + to_b, to_a

    to_s, to_x = jax.lax.scan(pull_row, jnp.zeros_like(columns), (rows, w))
    join = lambda tiles, like: tiles.reshape(-1, *like.shape[1:])[: len(like)]  # noqa: E731
    return join(to_x, x), join(to_s, s)


def _split(x, size):
    """(n, ...) to (n / size, size, ...), the last tile filled up with copies of x_0."""
    fill = -len(x) % size
    x = jnp.concatenate([x, jnp.broadcast_to(x[:1], (fill, *x.shape[1:]))]) if fill else x
    return x.reshape(-1, size, *x.shape[1:])


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def differentiable(kernel, x, s):
    """kernel.value(x, s), whose derivative is the kernel's own pullback."""
    return kernel.value(x, s)


def _differentiable_forward(kernel, x, s):
    return kernel.value(x, s), (x, s)


def _differentiable_backward(kernel, residuals, w):
    x, s = residuals
    return kernel.value_and_pullback(x, s)[1](w)


differentiable.defvjp(_differentiable_forward, _differentiable_backward)


@dataclasses.dataclass(frozen=True)
class Stax(Tiled):
    """Any `neural_tangents.stax` network's NTK behind the interface of `kernels`.

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

    def diagonal(self, x):
        """k(x_i, x_i), shape (n,)."""
        return jax.lax.map(lambda a: self._tile(a[None], a[None])[0, 0], x)

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

    def diagonal(self, x):
        """k(x_i, x_i), shape (n,): linear in the squares of x_i, exact where arccos rounds."""
        sigma = self._convolve(_pixels_first(x**2).mean(2))
        theta = sigma
        for _ in range(self.depth - 1):
            sigma, theta = self._convolve(sigma / 2), theta / 2
            theta = sigma + self.W_std**2 * _box(theta)
        return self.W_std**2 * (sigma + theta).mean((0, 1)) / 2 + self.b_std**2

    def _tile_shape(self, x):
        # 128 columns keep vector units busy and, on CPUs, one row of them in the nearest cache.
        columns = 128
        floats_per_pair = 16 * x.shape[1] * x.shape[2]
        return max(1, min(len(x), tile_floats() // (columns * floats_per_pair))), columns

    def _convolve(self, sigma):
        return self.W_std**2 * _box(sigma) + self.b_std**2

    def _tile(self, a, b):
        """Arrays are (H, W, n, m): pixels in front, so that a loop over pairs is contiguous."""
        x, s = _pixels_first(a)[..., :, None], _pixels_first(b)[..., None, :]
        # One array after the other is finished: XLA would recompute a box for each use of it.
        done = jax.lax.optimization_barrier
        sigma = done(self._convolve((x * s).mean(2)))
        p, q = (done(self._convolve((v**2).mean(2))) for v in (x, s))
        theta = sigma
        for layer in range(self.depth):
            if layer:
                sigma, p, q = (done(self._convolve(v)) for v in (sigma, p, q))
                theta = done(sigma + self.W_std**2 * _box(theta))
            sigma, theta = _relu(sigma, theta, p, q)
            p, q = p / 2, q / 2
        k = (sigma + theta).reshape(sigma.shape[0] * sigma.shape[1], -1)
        mean = product(jnp.ones((1, len(k)), k.dtype), k).reshape(sigma.shape[2:]) / len(k)
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
    k0 = jax.lax.optimization_barrier(0.5 - arccos(c) / (2 * math.pi))
    root = jnp.sqrt(p) * jnp.sqrt(q)
    k1 = root * jnp.sqrt(square) / (2 * math.pi) + sigma * k0
    return (k1, theta * k0), (sigma, theta, p, q, k0)


def _relu_backward(residuals, g):
    """With s = sqrt(1 - c^2): d kappa_1 / dc = kappa_0, d kappa_0 / dc = 1 / (pi s); and
    d(r kappa_1) / dp = r s / (2 pi p), dc / dp = -c / (2 p)."""
    sigma, theta, p, q, k0 = residuals
    g_sigma, g_theta = g
    c, square = _correlation(sigma, p, q)
    sine = jnp.sqrt(square)
    to_c = g_theta * theta * sine / (2 * math.pi * jnp.maximum(square, cusp_width(c.dtype)))
    to_log = g_sigma * sine * (jnp.sqrt(p) * jnp.sqrt(q)) / (4 * math.pi) - to_c * c / 2
    # A sum that is fused with what it sums would not use vector units on CPUs.
    to_log = jax.lax.optimization_barrier(to_log)
    inverse_p, inverse_q = inverse(p), inverse(q)
    return (
        g_sigma * k0 + to_c * (jnp.sqrt(inverse_p) * jnp.sqrt(inverse_q)),
        g_theta * k0,
        to_log.sum(3, keepdims=True) * inverse_p,
        to_log.sum(2, keepdims=True) * inverse_q,
    )


_relu.defvjp(_relu_forward, _relu_backward)


def _correlation(sigma, p, q):
    """c and 1 - c^2."""
    c = jnp.clip(sigma * (jnp.sqrt(inverse(p)) * jnp.sqrt(inverse(q))), -1.0, 1.0)
    return c, (1 - c) * (1 + c)


def cusp_width(dtype):
    """1 - c^2 below this counts as the cusp c = 1, where 1 / s is replaced by 0."""
    return 4 * jnp.finfo(dtype).eps


def inverse(p):
    """1 / p, and 0 for p = 0: a zero image with b_std = 0 has kernel and derivatives 0."""
    return jnp.where(p > 0, 1 / jnp.where(p > 0, p, 1), 0)


def arccos(c):
    """arccos; in float32 by Abramowitz and Stegun 4.4.46 (absolute error 2e-8, one sqrt).

    arccos c = sqrt(1 - c) poly(c) for c >= 0 and pi - arccos(-c) below. XLA's own arccos is
    many times slower on CPUs and no more accurate in float32.
    """
    if c.dtype != jnp.float32:
        return jnp.arccos(c)
    a = jnp.abs(c)
    poly = -0.0012624911
    for coefficient in (
        0.0066700901, -0.0170881256, 0.0308918810, -0.0501743046,
        0.0889789874, -0.2145988016, 1.5707963050,
    ):  # fmt: skip
        poly = poly * a + coefficient
    positive = jnp.sqrt(1 - a) * poly
    return jnp.where(c < 0, math.pi - positive, positive)


def check_architecture(depth, W_std, b_std):
    """Raises ValueError unless depth >= 1, W_std > 0 and b_std >= 0."""
    if depth < 1 or not W_std > 0 or not b_std >= 0:
        raise ValueError(
            "expected depth >= 1, W_std > 0 and b_std >= 0, got "
            f"{depth}, {W_std}, {b_std}; pass for example depth=3"
        )
