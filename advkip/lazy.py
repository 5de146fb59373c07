"""Networks in NTK parametrisation: what the kernels are at infinite width, at a finite one."""

import copy
import math
from typing import Any

import torch
from torch import nn


class _NTK:
    """What linear and convolutional layers of the NTK's parametrisation share."""

    weight: Any
    bias: Any
    W_std, b_std = math.sqrt(2), 0.1

    def __init__(self, *args, scale: float = 1.0, **options):
        self.scale = scale
        super().__init__(*args, **options)

    def reset_parameters(self) -> None:
        """Draws the weights."""
        nn.init.normal_(self.weight, std=self.scale)
        nn.init.normal_(self.bias, std=self.scale)

    def scales(self) -> tuple[float, torch.Tensor]:
        """(W_std / sqrt(n), b_std b) for n inputs of an output, in terms of the parameters."""
        gain = self.W_std / math.sqrt(self.weight[0].numel()) / self.scale
        return gain, self.b_std / self.scale * self.bias


class NTKLinear(_NTK, nn.Linear):
    """y = W_std W x / sqrt(n) + b_std b for n inputs, all weights from N(0, 1) at the start.

    Gradient descent on it at infinite width is kernel regression with `kernels.FullyConnected` of
    the same W_std and b_std (Jacot et al. 2018), with learning rates that do not depend on widths.
    With a `scale` the parameters are scale * W and scale * b (see `Lazy`).
    """

    def forward(self, x) -> torch.Tensor:
        gain, bias = self.scales()
        return nn.functional.linear(gain * x, self.weight, bias)  # a batch is less than weights


class NTKConv(_NTK, nn.Conv2d):
    """The same of a 3x3 convolution with zero padding, whose outputs have 9 inputs a channel."""

    def forward(self, x) -> torch.Tensor:
        gain, bias = self.scales()
        return self._conv_forward(x, gain * self.weight, bias)  # and weights less than a batch


class Lazy(nn.Module):
    """scale (f(x) - f_0(x)), f_0 being the network f as it was drawn: 0 at the start, as in Eq. 4.

    At infinite width the scale is without effect, since parameters have it, too. At a finite one it
    says how far weights move (Chizat et al. 2019): with a large scale hardly, so that training
    is that of a linear model in the features at the start; with a small one they learn features.
    """

    def __init__(self, net, scale: float = 1.0):
        super().__init__()
        self.scale = scale
        self.initial = copy.deepcopy(net)
        for module in self.initial.modules():
            for name, weights in list(module._parameters.items()):
                delattr(module, name)
                module.register_buffer(name, weights.detach())
        self.net = net

    def forward(self, x, at_start=None) -> torch.Tensor:
        """Logits of images x (n, C, H, W); `at_start`: f_0(x), without the scale; None makes it."""
        return self.scale * (self.net(x) - (self.initial(x) if at_start is None else at_start))


def fully_connected(shape, depth, width, n_classes, scale) -> Lazy:
    """The network of `kernels.FullyConnected` for images of a shape (H, W, C)."""
    layers: list[nn.Module] = [nn.Flatten()]
    before = math.prod(shape)
    for _ in range(depth):
        layers += [NTKLinear(before, width, scale=scale), nn.ReLU()]
        before = width
    return Lazy(nn.Sequential(*layers, NTKLinear(before, n_classes, scale=scale)), scale)


def convolutional(shape, depth, width, n_classes, scale) -> Lazy:
    """The network of `kernels.Convolutional` for images of a shape (H, W, C)."""
    layers, before = [], shape[2]
    for _ in range(depth):
        layers += [NTKConv(before, width, 3, padding=1, scale=scale), nn.ReLU()]
        before = width
    last = NTKLinear(before * shape[0] * shape[1], n_classes, scale=scale)
    return Lazy(nn.Sequential(*layers, nn.Flatten(), last), scale)
