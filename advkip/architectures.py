"""The layers of the paper's networks, for images of a shape (H, W, C) and so many classes; weights
are random."""

import math

import torch
import torchvision
from torch import nn


class Pieces(nn.Module):
    """The fixed first layer of a network of `pieces.Pieces`: each channel becomes n, as there.

    Images (N, C, H, W) become (N, n C, H, W), piece 1 of all channels first.
    """

    def __init__(self, n):
        super().__init__()
        self.n = n

    def forward(self, x) -> torch.Tensor:
        # Where two pieces meet, torch.maximum and minimum share the slope, as JAX does.
        parts = []
        for j in range(self.n):
            part = x
            if j > 0:
                part = torch.maximum(part, x.new_full((), j / self.n))
            if j + 1 < self.n:
                part = torch.minimum(part, x.new_full((), (j + 1) / self.n))
            parts.append(part - j / self.n)
        return torch.cat(parts, 1)


class WithFeatures(nn.Module):
    """A network whose last outputs are features that only its training asks for (`relabel`).

    In training mode it gives all outputs (N, classes + features), else the logits (N, classes).
    """

    def __init__(self, net, n_classes):
        super().__init__()
        self.net, self.n_classes = net, n_classes

    def forward(self, x) -> torch.Tensor:
        found = self.net(x)
        return found if self.training else found[:, : self.n_classes]


def fully_connected(shape, depth, width, n_classes) -> nn.Sequential:
    """`depth` hidden layers of a width, each with ReLU."""
    layers: list[nn.Module] = [nn.Flatten()]
    before = math.prod(shape)
    for _ in range(depth):
        layers += [nn.Linear(before, width), nn.ReLU()]
        before = width
    return nn.Sequential(*layers, nn.Linear(before, n_classes))


def simple_cnn(shape, n_classes) -> nn.Sequential:
    """Three 3x3 convolutions of width 64, each with ReLU and 2x2 max-pooling, one linear layer."""
    height, width, channels = shape
    layers = []
    for before in (channels, 64, 64):
        layers += [nn.Conv2d(before, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2, 2)]
    return nn.Sequential(
        *layers, nn.Flatten(), nn.Linear(64 * (height // 8) * (width // 8), n_classes)
    )


def alexnet(shape, n_classes) -> nn.Module:
    """AlexNet's five convolutions and three linear layers; 2x2 pooling, small first kernel."""
    net = torchvision.models.AlexNet(num_classes=n_classes)
    features = [nn.Conv2d(shape[2], 64, 3, stride=2, padding=1), *list(net.features)[1:]]
    features[3] = nn.Conv2d(64, 192, 3, padding=1)
    net.features = _small_pools(features)
    net.avgpool = nn.AdaptiveAvgPool2d((2, 2))
    net.classifier[1] = nn.Linear(256 * 2 * 2, 4096)
    return net


def vgg11(shape, n_classes) -> nn.Sequential:
    """VGG11's eight convolutions (with batch normalisation) and one linear layer."""
    features = list(torchvision.models.vgg11_bn().features)
    features[0] = nn.Conv2d(shape[2], 64, 3, padding=1)
    return nn.Sequential(
        _small_pools(features), nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten(),
        nn.Linear(512, n_classes),
    )  # fmt: skip


def _small_pools(layers):
    """2x2 pools that keep at least one pixel, so that 8x8 images pass, too."""
    return nn.Sequential(
        *(nn.MaxPool2d(2, 2, ceil_mode=True) if isinstance(v, nn.MaxPool2d) else v for v in layers)
    )


BUILDERS = {"simple-cnn": simple_cnn, "alexnet": alexnet, "vgg11": vgg11}
