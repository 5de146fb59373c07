"""Kernels of images whose pixels are cut into pieces first (see `Pieces`)."""

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from advkip.kernel import Kernel, as_floats


@dataclasses.dataclass(frozen=True)
class Pieces(Kernel):
    """k(phi(x), phi(s)): before k sees it, phi turns each channel of each pixel into n of them,

        phi_j(a) = clip(a, (j - 1) / n, j / n) - (j - 1) / n,   j = 1, ..., n,

    where the first piece has no lower end and the last none above, so that they add up to a. In
    [0, 1] phi_j(a) = relu(a - (j - 1) / n) - relu(a - j / n): a fixed first layer of ReLUs on
    single pixels. It is the piecewise linear encoding of Gorishniy et al. (2022, On Embeddings for
    Numerical Features) without its division by the width of a piece, and a thermometer code
    (Buckman et al. 2018) without its steps. Nothing is rounded, and no gradient is lost: at every a
    one piece has slope 1, and between two of them each has 1/2.

    Why: the NTK of a fully connected net knows two images by their inner product and norms alone,
    so it has no preference between a change of all pixels and one as long of a few; only the
    support can tell its machine which directions matter. With pieces a pixel near 0 or 1 that
    moves by less than 1/n leaves the middle ones as they are, and a machine may heed those. Whether
    it does is up to the training set.

    A pixel of 1 is n pieces of 1/n, and k divides by n times as many inputs: next to b_std^2 what
    depends on the image is up to n^2 times smaller than without pieces.

    Args:
      kernel: k, of images with n times as many channels, of which n S D numbers are held for a
        support of S images of D, and as many for its gradient.
      n: pieces of a pixel, 2 or more.

    Raises:
      ValueError: fewer pieces.
    """

    kernel: Kernel
    n: int

    def __post_init__(self):
        if self.n < 2:
            raise ValueError(f"expected 2 pieces of a pixel or more, got {self.n}; pass k itself")

    @property
    def floats_per_pair(self) -> int:
        """Working floats held for one pair of images while a tile is computed."""
        return self.kernel.floats_per_pair

    def value(self, x, s) -> jax.Array:
        """K like `__call__`, without a derivative rule of its own."""
        return self.kernel.value(encode(x, self.n), encode(s, self.n))

    def diagonal(self, x) -> jax.Array:
        """k(x_i, x_i), shape (n,)."""
        return self.kernel.diagonal(encode(x, self.n))

    def value_and_pullback(self, x, s) -> tuple[jax.Array, Callable]:
        """K (n, m) and its pullback to x and s."""
        phi = partial(encode, n=self.n)
        (x, pull_x), (s, pull_s) = (jax.vjp(phi, as_floats(a)) for a in (x, s))
        k, pull = self.kernel.value_and_pullback(x, s)
        return k, Partial(_pull, pull, pull_x, pull_s)


def _pull(pull, pull_x, pull_s, w):
    x, s = pull(w)
    return *pull_x(x), *pull_s(s)


def encode(x, n) -> jax.Array:
    """phi(x) of images (N, H, W, C) in [0, 1]: (N, H, W, n C), piece 1 of all channels first."""
    x = as_floats(x)
    ends = [-jnp.inf, *(j / n for j in range(1, n)), jnp.inf]
    pieces = [jnp.clip(x, ends[j], ends[j + 1]) - j / n for j in range(n)]
    return jnp.concatenate(pieces, -1)
