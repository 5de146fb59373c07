"""PyTorch networks of the paper: fully connected, simple-CNN, AlexNet and VGG11.

Networks take images (n, C, H, W) in [0, 1] and give logits; whatever normalisation one wants is a
layer of the network, so that attacks work in pixels. Arrays outside are NHWC (see `to_tensor`).
"""

import math
import re
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from torch import nn

from advkip import architectures, data, inputs, lazy
from advkip.settings import CNNS, CONV_NET, FC_NET, NET


def build(name, *, shape, n_classes, seed, n_features=0) -> nn.Module:
    """A network with random weights that derive from the seed alone.

    Args:
      name: 'fc3-1024' (3 hidden ReLU layers of width 1024; any numbers), 'simple-cnn' (three 3x3
        convolutions of width 64, each with ReLU and 2x2 max-pooling, one linear layer), 'alexnet'
        or 'vgg11' (torchvision's layers with the first strides and the pooling made for small
        images; vgg11 with batch normalisation); 'fc3-1024x4', an `Ensemble` of 4 (up to 9) of the
        first; or what a kernel is at infinite width, see `lazy`:
        'fc3-1024-ntk', 'conv1-256-ntk' (1 convolution of 256 channels, ReLU, a linear layer), and
        with a scale of 0.1 (below 1, or an integer) 'fc3-1024-ntk0.1'. Any of them ends with
        '-pieces3' if 3 (2 to 9) `pieces` of each pixel go into it.
      shape: (H, W, C) of an image.
      n_classes: 2 or more.
      seed: of the weights.
      n_features: outputs beside the logits while it is trained (`architectures.WithFeatures`).

    Returns:
      A `torch.nn.Module` in training mode, on `device()`.

    Raises:
      ValueError: another name.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derived_seed(seed, "weights"))
        plain, _, pieces = name.partition("-pieces")
        if not re.fullmatch(NET, name):
            raise ValueError(
                f"expected a network in {['fc3-1024', 'conv1-256-ntk', *CNNS]}, got {name!r}; "
                "pass one of them (any depth and width for fc and conv), or a torch.nn.Module of "
                "your own to training.train"
            )
        channels = shape[2] * int(pieces or 1)
        parts = members(_plain(plain, (*shape[:2], channels), n_classes + n_features))
        if pieces:
            parts = [nn.Sequential(architectures.Pieces(int(pieces)), net) for net in parts]
        if n_features:
            parts = [architectures.WithFeatures(net, n_classes) for net in parts]
        net: Any = Ensemble(parts) if len(parts) > 1 else parts[0]
    # Channels last in memory: up to twice as fast on CPUs, and what tensor cores want.
    return net.to(device(), memory_format=torch.channels_last)


def _plain(name, shape, n_classes):
    match = re.fullmatch(FC_NET, name) or re.fullmatch(CONV_NET, name)
    if not match:
        return architectures.BUILDERS[name](shape, n_classes)
    sizes = shape, int(match[1]), int(match[2]), n_classes
    if several := re.search(r"x(\d)$", name):
        return Ensemble(architectures.fully_connected(*sizes) for _ in range(int(several[1])))
    if "-ntk" not in name:
        return architectures.fully_connected(*sizes)
    make = lazy.convolutional if name.startswith("conv") else lazy.fully_connected
    return make(*sizes, float(match[3] or 1))


class Ensemble(nn.Module):
    """Networks side by side as one, whose logits are the mean of theirs.

    Plain training (`training.train`) trains each by itself. What differs between them by the chance
    of their first weights is less in the mean.
    """

    def __init__(self, members):
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, x) -> torch.Tensor:
        return torch.stack([net(x) for net in self.members]).mean(0)


def members(net) -> list[nn.Module]:
    """The networks of an `Ensemble`; of any other network itself."""
    return list(net.members) if isinstance(net, Ensemble) else [net]


@torch.no_grad()
def at_start(net, images) -> list[tuple]:
    """For each of a network's `members` what f_0 makes of the images, ((n, C),), if it is `Lazy`.

    These logits never change, so training makes them once and hands them to `Lazy.forward`. f - f_0
    is then 0 at the start but for rounding. A `Lazy` within another module, as with pieces, makes
    its own each time, and has () here like any other network.

    Args:
      net: a network.
      images: `Images` on which it is trained, as they are; None gives () for each member.
    """
    if images is None:
        return [() for _ in members(net)]
    size = batch_size(net, images[:1].shape[1:])
    parts = torch.arange(len(images)).to(device()).split(size)
    with torch.backends.cudnn.flags(enabled=True, deterministic=True):
        return [
            (torch.cat([one.initial(images[part]) for part in parts]),)
            if isinstance(one, lazy.Lazy)
            else ()
            for one in members(net)
        ]


HALF = (torch.float16, torch.bfloat16)


class Logits(nn.Module):
    """A network as attacks need it, whatever it does with its input and in whatever precision.

    It is given a copy of the images, so that one which changes them in place spoils nothing; one in
    half precision is given them in its own, while the attack's pixels stay in single (float16
    rounds them by more than an attack may leave its ball); logits come back in single or double.

    Raises:
      ValueError: what comes back is not one tensor of floats.
    """

    def __init__(self, net):
        super().__init__()
        self.net = net
        self.training = False  # as the network is; exported ones refuse `eval`

    def own(self) -> torch.Tensor | None:
        """A tensor of the network's device and of the dtype that its images have; None: any."""
        return next((t for t in _tensors(self.net) if t.is_floating_point()), None)

    def forward(self, x) -> torch.Tensor:
        own = self.own()
        copy = x.clone() if own is None or own.dtype not in HALF else x.to(own.dtype, copy=True)
        logits = self.net(copy)
        if not isinstance(logits, torch.Tensor) or not logits.is_floating_point():
            kind = getattr(logits, "dtype", type(logits).__name__)
            raise ValueError(
                f"expected the network to return one tensor of float logits, got {kind}; pass a "
                "module whose forward returns the logits alone"
            )
        return logits.float() if logits.dtype in HALF else logits


class Standardised(nn.Module):
    """A network of images (x - mean) / std as one of pixels x, so that attacks work in pixels."""

    def __init__(self, net, mean, std):
        super().__init__()
        self.net = net
        self.training = False  # as the network is; exported ones refuse `eval`
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.as_tensor(values, dtype=torch.float32).view(-1, 1, 1))

    def forward(self, x) -> torch.Tensor:
        return self.net((x - self.mean.to(x)) / self.std.to(x))


def in_pixels(model, mean, std, *, channels) -> Any:
    """`Standardised` where mean and std are given, else the model itself.

    Args:
      model: a network; a kernel machine only without mean and std.
      mean, std: a number, or one for each channel; std > 0. None for both: nothing to do.
      channels: of an image.

    Raises:
      ValueError: one without the other, other shapes, a std that is not positive, no network.
    """
    if mean is None and std is None:
        return model
    given = [np.atleast_1d(np.asarray(part, float)) for part in (mean, std) if part is not None]
    if len(given) < 2 or any(part.shape not in ((1,), (channels,)) for part in given):
        raise ValueError(
            f"expected mean and std, a number or {channels} each, got {mean!r} and {std!r}; pass "
            "those that the training images were standardised with, in pixels of [0, 1]"
        )
    if not (given[1] > 0).all():
        raise ValueError(f"expected std > 0, got {std!r}; pass that of the training images")
    if max(part.max() for part in given) > 1:
        raise ValueError(
            f"expected mean and std of pixels in [0, 1], got {mean!r} and {std!r}; pass them "
            "divided by 255"
        )
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"expected a network with mean and std, got {type(model).__name__}; pass a kernel "
            "machine without"
        )
    check_evaluated(model)
    wide = [np.broadcast_to(part, (channels,)).copy() for part in given]
    return Standardised(model, *wide).to(next(_tensors(model), torch.empty(0)).device)


def _tensors(net):
    yield from net.parameters()
    yield from net.buffers()


def representation(net, x) -> torch.Tensor:
    """What goes into a network's last linear layer, shape (n, features), with its gradient.

    Raises:
      ValueError: no linear layer, or one that is not used; an `Ensemble`.
    """
    if isinstance(net, Ensemble):
        raise ValueError(
            f"expected one network, got an ensemble of {len(net.members)}; pass one of its members"
        )
    layers = [module for module in net.modules() if isinstance(module, nn.Linear)]
    if not layers:
        raise ValueError(
            f"expected a network with a linear layer, got {type(net).__name__} without; pass one "
            "of nets.build"
        )
    found = []
    handle = layers[-1].register_forward_pre_hook(lambda _, inputs: found.append(inputs[0]))
    try:
        net(x)
    finally:
        handle.remove()
    if len(found) != 1:
        raise ValueError(f"expected the last linear layer to be used once, got {len(found)} times")
    return found[0].flatten(1)


def device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


HEAVY = 4_000_000
"""Weights from which a pass over 100 images takes its time for reading them."""


PIXELS = 32 * 32 * 3
"""Numbers in an image up to which a network is given as many images as it can take."""


def batch_size(net, shape=()) -> int:
    """Images that a network is given at a time: 500, or 100 on a CPU if it is not `HEAVY`.

    Of images of a larger `shape` than `PIXELS` as many fewer, since activations grow with it.
    """
    heavy = sum(weights.numel() for weights in net.parameters()) > HEAVY
    most = 500 if heavy or device().type != "cpu" else 100
    return max(1, most * PIXELS // max(PIXELS, math.prod(shape)))


def to_tensor(x, *, like=None) -> torch.Tensor:
    """NHWC array to an NCHW tensor, contiguous, so that any network can `view` it.

    Device and dtype are those of the tensor `like`; without one, `device()` and float32.
    """
    like = torch.empty(0, dtype=torch.float32, device=device()) if like is None else like
    x = torch.as_tensor(np.ascontiguousarray(x, "float32")).movedim(3, 1)
    return x.to(like.device, like.dtype).contiguous()


class Images:
    """Images (n, H, W, C) on `device()`, those of 8 bits as such: there may be half a million.

    images[index] is the tensor (k, C, H, W) of the floats that went in, bit for bit.
    """

    def __init__(self, x):
        levels = inputs.as_eight_bit(x)
        self.levels = None
        if levels is None:
            self.x = to_tensor(x)
        else:
            self.x = torch.as_tensor(np.ascontiguousarray(np.moveaxis(levels, 3, 1))).to(device())
            self.levels = torch.as_tensor(data.to_float(np.arange(256, dtype="uint8"))).to(device())

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        x = self.x[index]
        return x if self.levels is None else self.levels[x.int()]


def to_numpy(x) -> np.ndarray:
    """Any tensor as an array; NumPy has no bfloat16, so that one goes as float32."""
    x = x.detach().cpu()
    return (x.float() if x.dtype == torch.bfloat16 else x).numpy()


def to_array(x) -> np.ndarray:
    """NCHW tensor to an NHWC array."""
    return np.moveaxis(x.detach().cpu().numpy(), 1, 3)


def check_evaluated(net) -> None:
    """Raises ValueError unless the network and all its layers are in evaluation mode.

    Exported ones (`torch.export`) have the mode that they were exported in, and frozen ones none.
    """
    if _is_training(net):
        raise ValueError(
            "expected a network in evaluation mode, got one in training mode; call net.eval()"
        )


def _is_training(module):
    if "train" in vars(module):  # where torch.export says that the mode is fixed
        return False
    return getattr(module, "training", False) or any(map(_is_training, module.children()))


def deterministic() -> AbstractContextManager:
    """A context in which cuDNN gives the same numbers every time, and all digits of float32."""
    return torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)


NOTHING = 1e-30
"""Weights and moments below this are 0 for all that they do."""


@torch.no_grad()
def flush(optimizer) -> None:
    """Sets weights and moments of an optimiser that are next to nothing to 0, on a CPU.

    Weight decay, and moments of units that have died, shrink by a factor in each step until they
    are denormal, with which a CPU takes many times as long. (`torch.set_flush_denormal` reaches one
    thread only.)
    """
    for group in optimizer.param_groups:
        for weights in group["params"]:
            for part in (weights, *optimizer.state[weights].values()):
                if torch.is_tensor(part) and part.device.type == "cpu":
                    part.masked_fill_(part.abs() < NOTHING, 0)


def derived_seed(seed, stream, step=0) -> int:
    """An integer seed for torch, of one purpose (`data.STREAMS`) and step."""
    return int(data.generator(seed, stream, step).integers(2**62))
