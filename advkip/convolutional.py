"""The NTK of convolutions without pooling, with a reverse pass of its own.

One image x_i and m images s_j make a tile. Its arrays are (H, W m): the pixels of one row of all m
pairs are one contiguous run, a shift by a pixel is a shift by m, and all arithmetic is elementwise.
What depends on one image alone is computed once for it. Accelerators, which want more to do at a
time, get tiles of many images x_i at once.
"""

import dataclasses
import math
import os
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from advkip import stencil
from advkip.devices import even_size, tile_floats
from advkip.kernel import Kernel, as_floats
from advkip.tiled import angle, check_architecture, cusp_width, inverse

LANES, CPU_ELEMENTS = 16, 20_000
"""Pairs of a tile are a multiple of the first (an AVX-512 register of float32); on a CPU the arrays
of a tile have about as many elements as the second, which keeps them in its caches."""

CPU_CHAINS, CPU_SMALL = 4, 2**20
"""Tiles at most that a CPU works on at the same time, one on each core; and pixels of pairs up to
which it works on one, since each takes its time to compile."""


@dataclasses.dataclass(frozen=True)
class Convolutional(Kernel):
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

    @property
    def floats_per_pair(self) -> int:
        """Working floats held for one pair of images outside the tiles."""
        return 2

    def diagonal(self, x) -> jax.Array:
        """k(x_i, x_i), shape (n,): linear in the squares of x_i, exact where arccos rounds."""
        norms = self._norms(_lanes(as_floats(x)))
        theta = norms[0]
        for sigma in norms[1:]:
            theta = sigma + self.W_std**2 / 9 * stencil.box(theta / 2)
        return self.W_std**2 * (norms[-1] + theta).mean((0, 1)) / 2 + self.b_std**2

    def value(self, x, s) -> jax.Array:
        """K like `__call__`, without a derivative rule of its own."""
        x, s = _alike(as_floats(x), as_floats(s))
        size = _Size.of(self, x, s)

        def block(stores, s):
            row = partial(_value_row, self, size, self._columns(size, s))
            return size.over_images(row, stores, x)

        stores = size.stores([*_forward_names(self.depth), "total", "rows"], x)
        k = jax.lax.scan(block, stores, size.blocks(s))[1]
        return k.swapaxes(0, 1).reshape(len(x), -1)[:, : len(s)]

    def value_and_pullback(self, x, s) -> tuple[jax.Array, Callable]:
        """K (n, m) and its pullback to x and s; the pullback recomputes each tile."""
        x, s = as_floats(x), as_floats(s)
        return self.value(x, s), Partial(partial(_pull, self), x, s)

    def _convolve(self, sigma):
        return self.W_std**2 / 9 * stencil.box(sigma) + self.b_std**2

    def _norms(self, x):
        """p of each layer, (H, W, ...) of images (H, W, C, ...): sigma of an image with itself
        before each ReLU."""
        norms = [self._convolve((x**2).mean(2))]
        for _ in range(self.depth - 1):
            norms.append(self._convolve(norms[-1] / 2))
        return norms

    def _features(self, x):
        """What a tile needs of images x (H, W, C, m): channels, p and p^-1/2 of each layer."""
        norms = self._norms(x)
        roots = [jnp.sqrt(inverse(p)) for p in norms]
        return [x[:, :, c] for c in range(x.shape[2])], norms, roots

    def _columns(self, size, s):
        """The features of a block, (rounds, chains, H, W m)."""
        tiles = _lanes(s.reshape(-1, size.m, *s.shape[1:]), 1)  # (tiles, H, W, C, m)
        shape = size.rounds, size.chains, s.shape[1], -1
        columns = jax.tree.map(lambda a: a.reshape(shape), jax.vmap(self._features)(tiles))
        # W_std^2 so many times; the barrier keeps XLA from seeing that they are the same.
        starts = jnp.full((size.rounds, size.chains, stencil.STARTS, 1, 1), self.W_std**2, s.dtype)
        return *columns, jax.lax.optimization_barrier(starts)

    def _image(self, size, a):
        """The features of one image (H, W, C), (H, W m)."""
        shape = *a.shape[:2], size.m
        spread = lambda a: jnp.broadcast_to(a, shape).reshape(a.shape[0], -1)  # noqa: E731
        return jax.tree.map(spread, self._features(a[..., None]))


@dataclasses.dataclass(frozen=True)
class _Size:
    """How columns are divided: blocks of rounds, a round has `chains` tiles of m images. `at_once`
    images x_i share a round."""

    m: int
    chains: int
    rounds: int
    at_once: int

    @classmethod
    def of(cls, kernel, x, s):
        """On a CPU tiles that fit its caches; elsewhere as many pairs as `tile_floats` allows."""
        height, width, channels = x.shape[1:]
        on_cpu = _on_cpu()
        large = len(x) * len(s) * height * width > CPU_SMALL
        chains = min(CPU_CHAINS, os.cpu_count() or 1) if on_cpu and large else 1
        floats = tile_floats() // (height * width)
        largest = CPU_ELEMENTS // (height * width) if on_cpu else floats // (20 * kernel.depth)
        most = -(-len(s) // (chains * LANES)) * LANES
        m = max(LANES, min(largest // LANES * LANES, most))
        in_block = max(1, floats // (2 * (channels + 2 * kernel.depth) * m * chains))
        rounds = -(-len(s) // (m * chains))
        at_once = 1 if on_cpu else even_size(len(x), max(1, largest // m))
        return cls(m, chains, even_size(rounds, in_block), at_once)

    def stores(self, names, x):
        """What loops over images (n, H, W, C) carry: `stencil.stores`, `at_once` times."""
        shape = x.shape[1], x.shape[2] * self.m
        found = stencil.stores(names, shape, self.m, self.chains, x.dtype)
        several = (self.at_once,) if self.at_once > 1 else ()
        return jax.tree.map(lambda a: jnp.broadcast_to(a, (*several, *a.shape)), found)

    def over_images(self, function, stores, *arrays):
        """(stores, results) of function(stores, *row) for the rows of arrays, `at_once` a time."""
        if self.at_once == 1:
            return jax.lax.scan(lambda stores, rows: function(stores, *rows), stores, arrays)
        n, several = len(arrays[0]), jax.vmap(function)
        filled = (jnp.concatenate([a, jnp.repeat(a[:1], -n % self.at_once, 0)]) for a in arrays)
        groups = tuple(a.reshape(-1, self.at_once, *a.shape[1:]) for a in filled)
        stores, found = jax.lax.scan(lambda held, rows: several(held, *rows), stores, groups)
        return stores, jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:])[:n], found)

    def blocks(self, s):
        """(n, ...) to (blocks, images, ...), filled up with copies of s_0."""
        images = self.rounds * self.chains * self.m
        fill = jnp.broadcast_to(s[:1], (-len(s) % images, *s.shape[1:]))
        return jnp.concatenate([s, fill]).reshape(-1, images, *s.shape[1:])


def _value_row(kernel, size, columns, stores, a):
    """(stores, k(a, s_j)) of one image with a block of images, shape (images,)."""
    image = kernel._image(size, a)
    pixels = a.shape[0] * a.shape[1]

    def step(stores, tiles):
        stores, values = list(stores), []
        for g in range(size.chains):
            store = stencil.Store(stores[g], size.m)
            tile = _part(tiles, g)
            _forward(kernel, store, image, tile)
            rows = store.put("rows", stencil.sum_pairwise(store.arrays["total"][:-1]))
            mean = stencil.sum_pairwise(rows.reshape(-1, size.m))[0] / pixels
            values.append(store.maximum(tile[3]) * mean + kernel.b_std**2)
            stores[g] = store.arrays
        return stores, jnp.stack(values)

    stores, k = jax.lax.scan(step, stores, columns)
    return stores, k.reshape(-1)


def _part(tree, index):
    return jax.tree.map(lambda a: a[index], tree)


def _pull(kernel, x, s, w):
    """To x, and to s by symmetry; in two loops, since XLA drops a loop that is not needed."""
    (a, b), dtypes = _alike(x, s), (x.dtype, s.dtype)
    w = w.astype(a.dtype)
    pulled = _pull_to_rows(kernel, a, b, w), _pull_to_rows(kernel, b, a, w.T)
    return tuple(part.astype(dtype) for part, dtype in zip(pulled, dtypes, strict=True))


def _pull_to_rows(kernel, x, s, w):
    """sum_j w_ij d k(x_i, s_j) / d x_i, shape of x."""
    size = _Size.of(kernel, x, s)
    blocks, sums = size.blocks(s), _sums(kernel.depth, x.shape[3])
    w = jnp.pad(w, ((0, 0), (0, blocks.shape[0] * blocks.shape[1] - len(s))))
    w = w.reshape(len(x), *blocks.shape[:2]).swapaxes(0, 1)

    def add(state, block):
        to, stores = state
        s, w = block
        row = partial(_pull_row, kernel, size, kernel._columns(size, s))
        stores, more = size.over_images(row, stores, x, w)
        return (jax.tree.map(jnp.add, to, more), stores), None

    names = _forward_names(kernel.depth) + _reverse_names(kernel.depth) + sums
    to = {name: jnp.zeros(x.shape[:3], x.dtype) for name in sums}
    to = jax.lax.scan(add, (to, size.stores(names, x)), (blocks, w))[0][0]
    norms, pull_norms = jax.vjp(jax.vmap(kernel._norms), x)
    to_norms = [to[f"to_log{layer}"] * inverse(p) for layer, p in enumerate(norms)]
    to_pixels = jnp.stack([to[f"to_x{c}"] for c in range(x.shape[3])], 3)
    return to_pixels + pull_norms(to_norms)[0]


def _pull_row(kernel, size, columns, stores, a, w):
    """(stores, sums over a block of images of what flows to one image a), each (H, W)."""
    image, sums = kernel._image(size, a), _sums(kernel.depth, a.shape[2])
    height, width = a.shape[:2]
    w = w.reshape(size.rounds, size.chains, 1, size.m) * (kernel.W_std**2 / (height * width))
    w = jnp.broadcast_to(w, (size.rounds, size.chains, width, size.m))
    w = w.reshape(size.rounds, size.chains, 1, -1)

    def step(stores, given):
        stores, (tiles, weights, goes_on) = list(stores), given
        for g in range(size.chains):
            store = stencil.Store(stores[g], size.m)
            tile, spread = _part((tiles, weights), g)
            _forward(kernel, store, image, tile)
            _reverse(kernel, store, image, tile, spread, goes_on)
            stores[g] = store.arrays
        return stores, None

    # The first round begins the sums. XLA's workers would share the many small operations that set
    # them to 0 before, and one that then runs the loop below is missing to the chains in it.
    stores, _ = jax.lax.scan(step, stores, (columns, w, jnp.arange(size.rounds) > 0))

    def total(name):
        parts = [store[name][:-1].reshape(height, width, size.m).sum(2) for store in stores]
        return sum(parts[1:], parts[0])

    return stores, {name: total(name) for name in sums}


def _forward_names(depth):
    names = [f"{name}{layer}" for name in ("sigma", "sine", "k0") for layer in range(depth)]
    return names + ["box_sigma", "box_theta0", "box_theta1"]


def _reverse_names(depth):
    per_layer = ("theta", "slope", "g_sigma", "g_theta", "box_g_sigma", "box_g_theta")
    return [f"{name}{layer}" for name in per_layer for layer in range(depth)] + ["to_pixel"]


def _sums(depth, channels):
    """Names of what is summed over the pairs of an image."""
    return [f"to_log{layer}" for layer in range(depth)] + [f"to_x{c}" for c in range(channels)]


def _forward(kernel, store, image, tile):
    """The layers of a tile, kept in `store`; "total" there, if it is, is sigma + theta at the end.

    With s = (p q - sigma^2)^1/2 = r sqrt(1 - c^2): r kappa_1 / 2 = s / (2 pi) + sigma kappa_0 / 2.
    Near c = 1, p - |sigma| and q - |sigma| are exact, and all digits of s come from them. Where p
    or q is 0, so are sigma and s; there c = 0 and 1 - |c| = 1, the mean over all directions, while
    elsewhere 1 - |c| is never more than the sine.
    """
    (x, p, over_p), (s, q, over_q, _) = image, tile
    scale, shift = kernel.W_std**2 / 9, kernel.b_std**2
    inner = sum((a * b for a, b in zip(x[1:], s[1:], strict=True)), x[0] * s[0])
    store.put("box_sigma", inner / len(x))
    for i in range(kernel.depth):
        sigma = store.put(f"sigma{i}", scale * store.box("box_sigma") + shift)
        theta = sigma + scale * store.box(f"box_theta{i % 2}") if i else sigma
        if i and f"theta{i}" in store.arrays:
            theta = store.put(f"theta{i}", theta)
        size, roots = jnp.abs(sigma), over_p[i] * over_q[i]
        over, above = p[i] - size, q[i] - size
        square = over * above + size * (over + above)
        sine = store.put(f"sine{i}", jnp.sqrt(jnp.maximum(square, 0)))
        c = jnp.clip(sigma * roots, -1, 1)
        k0 = 0.5 - angle(c, jnp.maximum(sine * roots, 1 - jnp.abs(c))) / (2 * math.pi)
        k0 = store.put(f"k0{i}", k0)
        if i < kernel.depth - 1:
            store.put("box_sigma", sine / (2 * math.pi) + sigma * k0)
            store.put(f"box_theta{(i + 1) % 2}", theta * k0)
        elif "total" in store.arrays:
            store.put("total", sine / (2 * math.pi) + (sigma + theta) * k0)


def _reverse(kernel, store, image, tile, weights, goes_on):
    """Adds to what flows to the pixels of the image and to the logarithm of p of each layer; where
    `goes_on` is False these sums begin.

    d (s / 2 pi + sigma kappa_0 / 2) / d sigma = kappa_0 / 2, by d log p: s / (4 pi); and
    d (kappa_0 / 2) / d sigma = 1 / (2 pi s), by d log p: -sigma / (4 pi s).
    """
    scale, p, (channels, q, _, starts) = kernel.W_std**2 / 9, image[1], tile
    g_sigma = g_theta = jnp.broadcast_to(weights, p[0].shape)

    def so_far(name):
        return jnp.where(goes_on, store.arrays[name][:-1], 0)

    for i in reversed(range(kernel.depth)):
        names = ("sigma", "theta" if i else "sigma", "sine", "k0")
        sigma, theta, sine, k0 = (store.arrays[f"{name}{i}"][:-1] for name in names)
        least = cusp_width(sine.dtype) * (p[i] * q[i]) + float(jnp.finfo(sine.dtype).tiny)
        slope = g_theta * theta * sine / (2 * math.pi * jnp.maximum(sine * sine, least))
        slope = store.put(f"slope{i}", slope)
        to_log = g_sigma * sine / (4 * math.pi) - slope * sigma / 2
        store.put(f"to_log{i}", so_far(f"to_log{i}") + to_log)
        store.put(f"box_g_sigma{i}", (g_sigma + g_theta) * k0 + slope)
        if i:
            store.put(f"box_g_theta{i}", g_theta * k0)
            g_sigma = store.put(f"g_sigma{i}", scale * store.box(f"box_g_sigma{i}"))
            g_theta = store.put(f"g_theta{i}", scale * store.box(f"box_g_theta{i}"))
    scale = store.maximum(starts) / (9 * len(channels))
    to_pixel = store.put("to_pixel", scale * store.box("box_g_sigma0"))
    for c, s in enumerate(channels):
        store.put(f"to_x{c}", so_far(f"to_x{c}") + to_pixel * s)


def _on_cpu():
    return jax.local_devices()[0].platform == "cpu"


def _lanes(x, axis=0):
    """Images in the last axis instead of `axis`."""
    return jnp.moveaxis(x, axis, -1)


def _alike(x, s):
    """Both in the precision of the better one."""
    dtype = jnp.result_type(x, s)
    return x.astype(dtype), s.astype(dtype)
