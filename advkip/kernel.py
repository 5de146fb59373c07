"""The interface of a kernel: all that the engine (`krr`, `attacks`, `algorithm`) asks of one.

All of it is pure and usable inside `jax.jit`, and a kernel is hashable, so it can be a static
argument. Inside jit, the part of a pullback that is not used costs nothing. The pullback is all
that Algorithm 1 ever needs: an attack pulls w = G alpha^T back to the attacked images, the outer
step pulls -B alpha^T back to the support (see `krr`).
"""

import abc
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp


class Kernel(abc.ABC):
    """A positive definite kernel of images (n, ...) of one shape.

    Where x_i = s_j a ReLU network's kernel has a cusp: near it k falls off like |x - s|, so the
    derivative with respect to x alone depends on the direction. There the mean over all directions
    is expected, which is finite. (The diagonal of K_SS, where both arguments move together, is
    smooth: `diagonal`.)
    """

    @property
    @abc.abstractmethod
    def floats_per_pair(self) -> int:
        """Working floats held for one pair of images while a tile of K is computed."""

    @abc.abstractmethod
    def value(self, x: jax.Array, s: jax.Array) -> jax.Array:
        """K, shape (n, m), for images x (n, ...) and s (m, ...)."""

    @abc.abstractmethod
    def diagonal(self, x: jax.Array) -> jax.Array:
        """k(x_i, x_i), shape (n,); differentiable by JAX."""

    @abc.abstractmethod
    def value_and_pullback(self, x: jax.Array, s: jax.Array) -> tuple[jax.Array, Callable]:
        """K and its pullback, which is, for w of shape (n, m),

        sum_j w_ij d k(x_i, s_j) / d x_i, shape of x, and
        sum_i w_ij d k(x_i, s_j) / d s_j, shape of s.
        """

    def __call__(self, x: jax.Array, s: jax.Array) -> jax.Array:
        """K like `value`, differentiable with respect to x and s by the kernel's own pullback."""
        return _differentiable(self, as_floats(x), as_floats(s))


def as_floats(x) -> jax.Array:
    """x, with integers as the floats of the same numbers: uint8 squares would wrap at 256."""
    return x if jnp.issubdtype(x.dtype, jnp.inexact) else jnp.asarray(x, jnp.result_type(float))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _differentiable(kernel, x, s):
    """kernel.value(x, s), whose derivative is the kernel's own pullback."""
    return kernel.value(x, s)


def _differentiable_forward(kernel, x, s):
    return kernel.value(x, s), (x, s)


def _differentiable_backward(kernel, residuals, w):
    x, s = residuals
    return kernel.value_and_pullback(x, s)[1](w)


_differentiable.defvjp(_differentiable_forward, _differentiable_backward)
