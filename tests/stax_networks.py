"""The paper's networks in neural_tangents, which our kernels are measured against."""

import jax
import jax.numpy as jnp

from advkip import kernels


def fully_connected(depth, W_std=2**0.5, b_std=0.1):
    """kernel_fn(x, s, "ntk") of `depth` hidden layers with ReLU."""
    stax = kernels.stax_module()
    layers = [stax.Flatten()]
    layers += [stax.Dense(1, W_std=W_std, b_std=b_std), stax.Relu()] * depth
    return stax.serial(*layers, stax.Dense(1, W_std=W_std, b_std=b_std))[2]


def convolutional(depth, W_std=2**0.5, b_std=0.1):
    """kernel_fn(x, s, "ntk") of `depth` 3x3 convolutions with ReLU, flattened."""
    stax = kernels.stax_module()
    conv = stax.Conv(1, (3, 3), padding="SAME", W_std=W_std, b_std=b_std)
    layers = [conv, stax.Relu()] * depth + [stax.Flatten()]
    return stax.serial(*layers, stax.Dense(1, W_std=W_std, b_std=b_std))[2]


def mirrored(kernel_fn):
    """kernel_fn(x, s, "ntk") of the mean of another over an image and its mirror image."""
    return lambda x, s, get: (kernel_fn(x, s, get) + kernel_fn(x, s[:, :, ::-1], get)) / 2


def in_pieces(kernel_fn, n):
    """kernel_fn(x, s, "ntk") of another, of images whose pixels are cut into n pieces."""

    def cut(x):
        ramps = [x, *(jnp.maximum(x - j / n, 0) for j in range(1, n)), jnp.zeros_like(x)]
        return jnp.concatenate([a - b for a, b in zip(ramps[:-1], ramps[1:], strict=True)], -1)

    return lambda x, s, get: kernel_fn(cut(x), cut(s), get)


def with_pullback(function, w, *arguments):
    """(function(*arguments), what w pulls back to each argument), compiled as one program.

    JAX would compile each operation for itself, which takes far longer than they do.
    """
    return jax.jit(lambda w, *arguments: _pulled(jax.vjp(function, *arguments), w))(w, *arguments)


def own_pullback(kernel, w, x, s):
    """The same by the kernel's own `value_and_pullback`."""
    return jax.jit(lambda w, x, s: _pulled(kernel.value_and_pullback(x, s), w))(w, x, s)


def _pulled(pair, w):
    value, pull = pair
    return value, pull(w)
