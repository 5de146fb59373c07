"""A kernel machine as a PyTorch module, so that PyTorch's attacks run on it.

Values and input gradients are computed by JAX, with the kernel's exact pullback. On one GPU the
arrays are shared; elsewhere they go through the host's memory.
"""

import dataclasses
from contextlib import nullcontext
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import torch

from advkip.attacks import in_batches, predict
from advkip.devices import jit, operand, over_rows
from advkip.gram import rows_of_tile

FEW, FREE = 16, 150_000
"""Batches are filled up to the first if that takes no more than so many pixels of pairs: far less
work, with any kernel, than compiling for a further size."""


class KernelNet(torch.nn.Module):
    """Images (n, C, H, W) to logits (n, classes), like any network; in evaluation mode.

    Images (n, H, W, C) of the support's shape are taken as what they are; others are refused.
    `double()`, here or of a module around this one, puts the machine's sums into float64.

    Args:
      machine: a `krr.KernelMachine`.
      batch_size: rows that JAX is given at a time; 0 chooses. Smaller batches are filled up to
        the next power of two, those on a small support to FEW, so that JAX compiles for few sizes.
    """

    def __init__(self, machine, *, batch_size=0):
        super().__init__()
        self.machine = machine
        self.batch_size = batch_size or rows_of_tile(machine.kernel, len(machine.x_support))
        self.fewest = FEW if FEW * machine.x_support.size <= FREE else 1
        # Its dtype follows `double()` and `float()`, also those of a module around this one.
        self.register_buffer("precision", torch.zeros(0), persistent=False)
        self.eval()

    def forward(self, x) -> torch.Tensor:
        height, width, channels = self.machine.x_support.shape[1:]
        if x.shape[1:] == (height, width, channels) != (channels, height, width):
            x = x.movedim(3, 1)  # channels last, as the machine's own images are
        elif x.shape[1:] != (channels, height, width):
            raise ValueError(
                f"expected images (n, {channels}, {height}, {width}), got shape {tuple(x.shape)}; "
                "pass them as PyTorch has them, channels first (nets.to_tensor)"
            )
        return _Logits.apply(x, self)

    def _apply(self, fn, recurse=True):
        before = self.precision.dtype
        super()._apply(fn, recurse)
        if self.precision.dtype != before:
            wide = self.precision.dtype == torch.float64
            self.machine = _in_precision(self.machine, "float64" if wide else "float32")
        return self

    def rows(self, n) -> int:
        """Of the batches that n images come in, the last one filled up."""
        return min(self.batch_size, max(self.fewest, 1 << max(n - 1, 0).bit_length()))

    def in_float64(self) -> "KernelNet":
        """The same machine with its sums in double precision."""
        return KernelNet(self.machine, batch_size=self.batch_size).double()


def _in_precision(machine, dtype):
    """The machine with its arrays, and so its sums, in another precision."""
    with jax.enable_x64(dtype == "float64"):
        arrays = {key: jnp.asarray(np.asarray(getattr(machine, key)), dtype)
                  for key in ("x_support", "alpha")}  # fmt: skip
    return dataclasses.replace(machine, **arrays)


class _Logits(torch.autograd.Function):
    """The machine's logits; the backward pass is the pullback at the same images."""

    @staticmethod
    def forward(context, x, net):
        context.save_for_backward(x)
        context.net = net
        return _rows_of(net, predict, x).to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(context, g):
        (x,) = context.saved_tensors
        gradient = _rows_of(context.net, _pullback, x, g)
        return gradient.movedim(3, 1).to(x.dtype), None


def _rows_of(net, function, x, *rest):
    """function(machine, NHWC images, *rest, batch_size=) as a tensor, for batches of few sizes."""
    dtype = net.machine.alpha.dtype
    # PyTorch may call backward passes in threads of its own, where JAX has its default precision.
    with jax.enable_x64(True) if dtype == np.float64 else nullcontext():
        n, size = len(x), net.rows(len(x))
        arrays = [_to_jax(_filled(a, -n % size), dtype) for a in (x.movedim(1, 3), *rest)]
        return _to_torch(function(net.machine, *arrays, batch_size=size), x.device)[:n]


def _filled(tensor, more):
    """With so many rows of zeros at the end."""
    return torch.nn.functional.pad(tensor, [0, 0] * (tensor.ndim - 1) + [0, more])


def _shares(tensor_device):
    """Whether JAX and PyTorch hold their arrays on the same one GPU."""
    return (
        tensor_device.type == "cuda" and jax.default_backend() == "gpu" and jax.device_count() == 1
    )


def _to_jax(tensor, dtype):
    if _shares(tensor.device):
        return jnp.from_dlpack(tensor.detach().contiguous()).astype(dtype)
    return tensor.detach().cpu().numpy().astype(dtype, copy=False)


def _to_torch(array, tensor_device):
    if _shares(tensor_device):
        return torch.from_dlpack(array)
    return torch.from_numpy(np.array(array)).to(tensor_device)


def _pullback(machine, x, g, *, batch_size):
    """Of logits' cotangents g (n, classes) to images x, in batches."""
    arrays = operand(x), operand(g)
    return in_batches(partial(_pull_batch, machine), *arrays, batch_size=batch_size)


@jit
def _pull_batch(machine, x, g):
    def pull(rows, machine):
        x, g = rows
        return jax.vjp(machine, x)[1](g)[0]

    return over_rows(pull, (x, g), machine)
