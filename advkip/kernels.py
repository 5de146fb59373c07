"""Infinite-width neural tangent kernels: values and exact input derivatives, tile by tile.

Five kinds of `kernel.Kernel`:

- `FullyConnected`: the NTK of a ReLU net of any depth in closed form. The value and both
  derivatives come out of one pass over the layer recursion.
- `Convolutional`: 3x3 convolutions of any depth, with derivatives of its own (see `convolutional`).
- `Pieces`: one of these two, of images whose pixels are cut into pieces first (see `pieces`).
- `Mirrored`: one of these three, averaged over an image and its mirror image.
- `Stax`: any `neural_tangents.stax` network, differentiated by JAX (see `tiled`).
"""

import dataclasses
import math
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from advkip import compat, settings
from advkip.convolutional import Convolutional
from advkip.devices import MANTISSA_BITS, product, rounded_product
from advkip.kernel import Kernel, as_floats
from advkip.pieces import Pieces
from advkip.tiled import (
    Stax,
    arccos,
    check_architecture,
    cusp_width,
    inverse,
)

__all__ = [
    "Convolutional", "FullyConnected", "Mirrored", "Pieces", "Stax",
    "by_name", "set_precision", "stax_module",
]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class FullyConnected(Kernel):
    """NTK of an infinitely wide fully-connected ReLU net (Jacot et al. 2018), closed form.

    With `depth` hidden layers, D inputs, `sigma_0 = W_std^2 <x, s> / D + b_std^2` and
    `theta_0 = sigma_0`, each layer maps

        sigma <- W_std^2 r kappa_1(c) / 2 + b_std^2,     c = sigma / r,  r = sqrt(p_x p_s)
        theta <- sigma (new) + W_std^2 theta kappa_0(c) / 2
        kappa_0(c) = 1 - arccos(c) / pi
        kappa_1(c) = (sqrt(1 - c^2) + (pi - arccos c) c) / pi

    where p_x is the same recursion for (x, x). This equals `neural_tangents.stax` with
    `parameterization='ntk'`, and the depth convention is KIP's: fc3 has three hidden layers.

    Args:
      depth: number of hidden layers, 1 or more.
      W_std, b_std: standard deviations of weights (> 0) and biases (>= 0).
      precision: of the products of images with images and with weights, see
        `devices.rounded_product`.
    """

    depth: int
    W_std: float = math.sqrt(2)
    b_std: float = 0.1
    precision: str = "full"

    def __post_init__(self):
        check_architecture(self.depth, self.W_std, self.b_std)
        if self.precision not in ("full", *MANTISSA_BITS):
            raise ValueError(
                f"expected precision 'full' or one of {[*MANTISSA_BITS]}, got {self.precision!r}; "
                "pass one of them"
            )

    @property
    def floats_per_pair(self) -> int:
        """Working floats held for one pair of images while a tile is computed."""
        return 4

    def value(self, x, s) -> jax.Array:
        """K like `__call__`, without a derivative rule of its own."""
        return self._recursion(x, s, self._covariance(x, s))[0]

    def diagonal(self, x) -> jax.Array:
        """k(x_i, x_i), shape (n,): linear in |x_i|^2, so exact where arccos would round."""
        p = self._first_layer((_flat(x) ** 2).sum(1), x)
        theta = p
        for _ in range(self.depth):
            p = self.W_std**2 * p / 2 + self.b_std**2
            theta = p + self.W_std**2 * theta / 2
        return theta

    def value_and_pullback(self, x, s) -> tuple[jax.Array, Callable]:
        """K (n, m) and its pullback to x and s: a product of n m D forward, one back for each."""
        sigma = self._covariance(x, s)
        k, sigma = _in_order(self._recursion(x, s, sigma)[0], sigma)
        return k, Partial(partial(_pull_closed_form, self), x, s, sigma)

    def _first_layer(self, inner_products, x):
        return self.W_std**2 / _flat(x).shape[1] * inner_products + self.b_std**2

    def _covariance(self, x, s):
        """sigma_0, shape (n, m)."""
        return self._first_layer(rounded_product(_flat(x), _flat(s).T, self.precision), x)

    def _recursion(self, x, s, sigma, *, exchanged=False):
        """theta and its derivatives by sigma_0 and p_x; XLA drops those that are not used.

        With `exchanged`, the derivative by p_s instead of p_x.
        """
        p = self._first_layer((_flat(x) ** 2).sum(1), x)[:, None]
        q = self._first_layer((_flat(s) ** 2).sum(1), s)[None, :]
        p, q = (q, p) if exchanged else (p, q)
        return _relu_recursion(sigma, p, q, self.depth, self.W_std**2, self.b_std**2)


def _relu_recursion(sigma, p, q, depth, w2, b2):
    """theta, d theta / d sigma_0 and d theta / d p_0 in one pass over the layers.

    The derivatives follow from d kappa_1 / dc = kappa_0 and d kappa_0 / dc = 1 / (pi s),
    s = sqrt(1 - c^2), by forward differentiation: `*_u` by sigma_0, `*_p` by p_0.
    """
    state = sigma, sigma, p, q, 1.0, (1.0, 1.0), (0.0, 0.0)
    for _ in range(depth):
        state = _relu_layer(*state, w2, b2)
    _, theta, *_, (_, theta_u), (_, theta_p) = state
    return theta, theta_u, theta_p


@partial(jax.jit, static_argnames=("w2", "b2"))
def _relu_layer(sigma, theta, p, q, p_p, by_u, by_p, w2, b2):
    """The next layer. A function of its own to JAX, which traces it once for all layers (XLA puts
    it in their place, with the same bits): otherwise a deep net takes seconds before it runs."""
    (sigma_u, theta_u), (sigma_p, theta_p) = by_u, by_p
    # A zero image with b_std = 0 has p = 0: its kernel and derivatives are set to 0.
    inverse_p, inverse_q = inverse(p), inverse(q)
    root, inverse_root = jnp.sqrt(p) * jnp.sqrt(q), jnp.sqrt(inverse_p) * jnp.sqrt(inverse_q)
    c = jnp.clip(sigma * inverse_root, -1.0, 1.0)
    square = (1 - c) * (1 + c)
    sine = jnp.sqrt(square)
    k0 = 0.5 - arccos(c) / (2 * math.pi)
    k1 = root * sine / (2 * math.pi) + sigma * k0
    k0_c = sine / (
        2 * math.pi * jnp.maximum(square, cusp_width(sigma.dtype))
    )  # 1 / sine; 0 on the cusp
    k0_u = k0_c * inverse_root * sigma_u
    k0_p = k0_c * (inverse_root * sigma_p - 0.5 * p_p * inverse_p * c)

    sigma_p = w2 * (k0 * sigma_p + p_p / (4 * math.pi) * sine * root * inverse_p)
    sigma_u = w2 * k0 * sigma_u
    theta_p = sigma_p + w2 * (k0 * theta_p + theta * k0_p)
    theta_u = sigma_u + w2 * (k0 * theta_u + theta * k0_u)
    sigma = w2 * k1 + b2
    theta = sigma + w2 * k0 * theta
    p, q, p_p = w2 * p / 2 + b2, w2 * q / 2 + b2, w2 * p_p / 2
    return sigma, theta, p, q, p_p, (sigma_u, theta_u), (sigma_p, theta_p)


def _pull_closed_form(kernel, x, s, sigma, w):
    """To x_i: sum_j w_ij (theta_u s_j + 2 theta_p x_i) W_std^2 / D, as d sigma_0 = s dx and
    d p_0 = 2 x dx; to s_j likewise, with the roles of x and s exchanged."""
    xf, sf = _flat(x), _flat(s)
    weights, sigma = _in_order(w * kernel._recursion(x, s, sigma)[1], sigma)
    # Sums as products with ones: XLA's CPU reductions would not vectorise what is fused in.
    ones_s, ones_x = (jnp.ones((len(a), 1), w.dtype) for a in (sf, xf))
    sums_x = product(w * kernel._recursion(x, s, sigma)[2], ones_s)
    sums_x, sigma = _in_order(sums_x, sigma)
    sums_s = product((w * kernel._recursion(x, s, sigma, exchanged=True)[2]).T, ones_x)
    scale = kernel.W_std**2 / xf.shape[1]
    to_x = scale * (rounded_product(weights, sf, kernel.precision) + 2 * sums_x * xf)
    to_s = scale * (rounded_product(weights.T, xf, kernel.precision) + 2 * sums_s * sf)
    return to_x.reshape(x.shape), to_s.reshape(s.shape)


def _in_order(first, sigma):
    """Makes XLA finish `first` before it uses `sigma` again.

    Otherwise it would store every intermediate layer that two outputs of the recursion share.
    One output at a time is one loop over the tile with everything in registers: on CPUs that is
    several times faster, although the recursion runs again, and needs no memory.
    """
    return jax.lax.optimization_barrier((first, sigma))


def _flat(x):
    return as_floats(x).reshape(x.shape[0], -1)


@dataclasses.dataclass(frozen=True)
class Mirrored(Kernel):
    """(k(x, s) + k(x, s')) / 2 with s' the mirror image of s, which swaps left and right.

    k must not change when both of its images are mirrored, as those of `FullyConnected` and
    `Convolutional` do not. It is then the mean of k over both sides of both images, and its
    machines answer to an image as to its mirror image. Regression with it is regression with k on a
    support that holds each image and its mirror image, with the same label (Li et al. 2019,
    Enhanced Convolutional Neural Tangent Kernels).

    Args:
      kernel: k.
    """

    kernel: Kernel

    @property
    def floats_per_pair(self) -> int:
        """Working floats held for one pair of images while a tile is computed."""
        return 2 * self.kernel.floats_per_pair

    def value(self, x, s) -> jax.Array:
        """K like `__call__`, without a derivative rule of its own."""
        return (self.kernel.value(x, s) + self.kernel.value(x, mirror(s))) / 2

    def diagonal(self, x) -> jax.Array:
        """k(x_i, x_i), shape (n,)."""

        def across(pair):
            return self.kernel(*(a[None] for a in pair))[0, 0]

        x = as_floats(x)
        across_all = jax.lax.map(across, (x, mirror(x)), batch_size=min(len(x), 64))
        return (self.kernel.diagonal(x) + across_all) / 2

    def value_and_pullback(self, x, s) -> tuple[jax.Array, Callable]:
        """K (n, m) and its pullback to x and s."""
        k, pull = self.kernel.value_and_pullback(x, s)
        k_mirrored, pull_mirrored = self.kernel.value_and_pullback(x, mirror(s))
        return (k + k_mirrored) / 2, Partial(_pull_mirrored, pull, pull_mirrored)


def _pull_mirrored(pull, pull_mirrored, w):
    (x, s), (x_mirrored, s_mirrored) = pull(w / 2), pull_mirrored(w / 2)
    return x + x_mirrored, s + mirror(s_mirrored)


def mirror(x):
    """Images (n, H, W, C) with left and right swapped."""
    return x[:, :, ::-1]


def stax_module() -> Any:
    """Returns `neural_tangents.stax`, importable on the installed JAX (see `compat`)."""
    return compat.load().stax


def by_name(name, *, W_std=math.sqrt(2), b_std=0.1) -> Kernel:
    """The paper's kernels by name: 'fc1', 'fc2', ... and 'conv1', 'conv2', ...

    'convN' has N 3x3 convolutions with SAME padding and ReLU, flattened, no pooling.

    Args:
      name: 'fc' or 'conv' followed by the number of hidden layers, by '-pieces' and a number from 2
        to 9 for that many `Pieces` of a pixel, and by '-mirror' if it shall be `Mirrored`.
      W_std, b_std: standard deviations of weights and biases of every layer.

    Returns:
      A `FullyConnected` or a `Convolutional` kernel, or one of them in `Pieces` or `Mirrored`.

    Raises:
      ValueError: another name.
    """
    match = re.fullmatch(r"(fc|conv)([1-9]\d?)(?:-pieces([2-9]))?(-mirror)?", name)
    if not match:
        raise ValueError(
            f"expected a kernel name such as 'fc3' or 'conv3', got {name!r}; "
            "for a network of your own pass Stax(stax.serial(...)[2])"
        )
    kind = FullyConnected if match[1] == "fc" else Convolutional
    kernel = kind(int(match[2]), W_std, b_std)
    kernel = Pieces(kernel, int(match[3])) if match[3] else kernel
    return Mirrored(kernel) if match[4] else kernel


def of(section: settings.Kernel) -> Kernel:
    """The kernel of an experiment's section."""
    return by_name(section.name, W_std=section.W_std, b_std=section.b_std)


def rounded(kernel, precision) -> Kernel:
    """The kernel with its large products in another precision (see `devices.rounded_product`).

    Raises:
      ValueError: a kernel without a `precision`, unless it is to be 'full'.
    """
    if precision == "full":
        return kernel
    if isinstance(kernel, Mirrored | Pieces):
        return dataclasses.replace(kernel, kernel=rounded(kernel.kernel, precision))
    if not hasattr(kernel, "precision"):
        raise ValueError(
            f"expected a kernel with a precision, as 'fc3', for attack_precision {precision!r}, "
            f"got {type(kernel).__name__}; pass attack_precision 'full'"
        )
    return dataclasses.replace(kernel, precision=precision)


def set_precision(dtype) -> None:
    """Switches JAX to 'float32' or 'float64' for the whole process; call it before any array.

    Raises:
      ValueError: another dtype.
    """
    if dtype not in ("float32", "float64"):
        raise ValueError(f"expected dtype 'float32' or 'float64', got {dtype!r}; pass one of them")
    jax.config.update("jax_enable_x64", dtype == "float64")
