"""The robust-feature data set (Ilyas et al. 2019; section 6 of the paper): loaded, or made anew.

Such a set holds images that an adversarially trained network cannot tell from the originals, and
that show nothing else of them: each starts as another image and is moved until its
*representation*, the input of the network's last layer, is that of the original. What the network
does not look at stays as it was at the start, so only the features it uses, the robust ones, go
with the label.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from advkip import data, files, nets, store
from advkip.progress import tqdm
from advkip.settings import PUBLISHED

IMAGES, LABELS = PUBLISHED
"""The published files: lists of tensors, images (n, 3, 32, 32) and labels (n,)."""

DTYPES = (
    torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.bool, torch.uint8,
    torch.int8, torch.int16, torch.int32, torch.int64,
)  # fmt: skip
"""What is read from the files; what fits where is checked thereafter."""


class Inverted(NamedTuple):
    """Images made by `generate`."""

    x: np.ndarray  # (n, H, W, C), float32 in [0, 1]
    y: np.ndarray  # label vectors (n, classes), those of the originals
    x_original: np.ndarray  # whose representations they have
    x_start: np.ndarray  # what they were made from
    distance: np.ndarray  # |g(x) - g(x_original)|_2 / |g(x_start) - g(x_original)|_2, shape (n,)


def load(folder, *, n_classes=10, center=False) -> tuple[np.ndarray, np.ndarray]:
    """(images, label vectors) of the published set; nothing but tensors is read from the files.

    Args:
      folder: with the files CIFAR_ims and CIFAR_lab.
      n_classes, center: of the labels, see `data.one_hot`.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: a file that is not a list of such tensors, or that holds other Python objects.
    """
    folder = Path(folder).expanduser()
    x, y = (_tensors(folder / name) for name in (IMAGES, LABELS))
    if x.dim() != 4 or x.shape[1] not in (1, 3) or not x.is_floating_point():
        raise ValueError(
            f"{folder / IMAGES}: expected float images (n, 3, H, W), got {tuple(x.shape)} of "
            f"{x.dtype}; pass the published file"
        )
    if not (torch.isfinite(x).all() and x.min() >= -1e-6 and x.max() <= 1 + 1e-6):
        raise ValueError(
            f"{folder / IMAGES}: expected pixels in [0, 1], got [{x.min():.4g}, {x.max():.4g}]; "
            "pass images without standardisation and without NaN"
        )
    y = y.reshape(-1)
    if (
        y.is_floating_point()
        or y.dtype == torch.bool
        or len(y) != len(x)
        or y.min() < 0
        or y.max() >= n_classes
    ):
        raise ValueError(
            f"{folder / LABELS}: expected {len(x)} integers from 0 to {n_classes - 1}, got "
            f"{len(y)} of {y.dtype}; pass the file that belongs to {IMAGES}"
        )
    labels = data.one_hot(y.numpy(), n_classes, center=center)
    return nets.to_array(x.float().clamp(0, 1)), labels


def _tensors(path):
    """The tensors of a list in a file, one after another."""
    if not path.exists():
        raise FileNotFoundError(
            f"expected {path}; pass a folder with {IMAGES} and {LABELS}, as published with "
            "'Adversarial Examples Are Not Bugs, They Are Features'"
        )
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
        found = [found] if isinstance(found, torch.Tensor) else list(found)
        parts = [torch.as_tensor(part) for part in found]
        if not (all(map(_is_plain, parts)) and sum(part.numel() for part in parts)):
            raise ValueError("expected numbers")
        return torch.cat(parts)
    except Exception as error:  # a hostile or damaged file can fail in any way
        raise ValueError(
            f"{path}: expected a list of tensors, got a file that cannot be read as one "
            f"({type(error).__name__}); nothing else is loaded from it, pass the published file"
        ) from None


def _is_plain(tensor):
    """Whether a tensor is of common numbers, all of which are there (an expanded one has fewer)."""
    plain = tensor.layout == torch.strided and not tensor.is_nested and tensor.device.type == "cpu"
    size = tensor.numel() * tensor.element_size()
    return plain and tensor.dtype in DTYPES and tensor.untyped_storage().nbytes() >= size


def generate(
    net, x, y, *, n, steps, step_size, noise, seed, batch_size=250, checkpoint_dir=None,
    progress=True,
) -> Inverted:  # fmt: skip
    """Inverts the representations of n images of an adversarially trained network.

        x_r <- clip( x_r - step_size * g / |g|_2 ),  g = grad |h(x_r) - h(x)|_2^2 / 2

    from x_r = another of the images, with h the input of the last linear layer. On images with much
    black, as MNIST's, an adversarially trained network ignores whatever is darker than epsilon and
    has no gradient there; noise mixed into the start gives it one.

    Args:
      net: in evaluation mode, images (n, C, H, W) in [0, 1] to logits.
      x, y: images in [0, 1], shape (N, H, W, C), and label vectors (N, classes).
      n: how many, at most N: the first n of x.
      steps, step_size: step_size in l2, pixel units.
      noise: share of uniform noise in the start, in [0, 1].
      seed: of the images to start from.
      batch_size: images at a time.
      checkpoint_dir: folder of a file that is read instead when it was made of the same network,
        images and settings; None for none.
      progress: shows a bar.

    Returns:
      An `Inverted`.

    Raises:
      ValueError: numbers or labels that do not fit, a network without a linear layer or with a
        layer in training mode, a file that cannot be read.
    """
    x, y = np.asarray(x, "float32")[:n], np.asarray(y, "float32")[:n]
    numbers = steps >= 1 and step_size > 0 and 0 <= noise <= 1
    if not (0 < n == len(x) == len(y)) or y.ndim != 2 or not numbers:
        raise ValueError(
            "expected n in [1, N], label vectors, steps >= 1, step_size > 0 and noise in [0, 1], "
            f"got n = {n}, images {x.shape}, labels {y.shape}, {steps}, {step_size} and {noise}; "
            "pass such numbers"
        )
    nets.check_evaluated(net)
    generator = data.generator(seed, "robust")
    order = generator.permutation(len(x))
    start = np.empty_like(x)
    start[order] = x[np.roll(order, 1)]  # none is its own start, unless it is the only one
    if noise:
        start = (1 - noise) * start + noise * generator.random(x.shape, "float32")
    like = next(net.parameters())
    with torch.no_grad(), nets.deterministic():
        # They tell networks apart whose difference is in no weight.
        seen = [nets.representation(net, nets.to_tensor(a[:16], like=like)) for a in (x, start)]
    about = {
        "net": str(net), "steps": steps, "step_size": step_size, "noise": noise, "seed": seed,
        "images and weights": files.digest_of_arrays(
            x, y, *map(nets.to_numpy, (*seen, *net.state_dict().values()))
        ),
    }  # fmt: skip
    path = checkpoint_dir and Path(checkpoint_dir) / f"inverted-{store.digest(about)}.npz"
    if path and path.exists():
        (made, distance), _ = store.load(path, (x, x[:, 0, 0, 0]), about=about)
        return Inverted(made, y, x, start, distance)

    made, distances = [], []
    with nets.deterministic():
        for i in tqdm(
            range(0, n, batch_size), desc="inversion", unit="batch", disable=not progress
        ):
            part = slice(i, i + batch_size)
            found, distance = _invert(net, x[part], start[part], steps, step_size)
            made.append(found)
            distances.append(distance)
    inverted = Inverted(np.concatenate(made), y, x, start, np.concatenate(distances))
    if path:
        store.save(path, (inverted.x, inverted.distance), about=about)
    return inverted


def _invert(net, x, start, steps, step_size):
    """(images, relative distances) of one batch."""
    like = next(net.parameters())
    x, moved = (nets.to_tensor(a, like=like) for a in (x, start))
    with torch.no_grad():
        goal = nets.representation(net, x)
        before = (nets.representation(net, moved) - goal).norm(dim=1)
    for _ in range(steps):
        moved.requires_grad_()
        loss = ((nets.representation(net, moved) - goal) ** 2).sum() / 2
        (g,) = torch.autograd.grad(loss, moved)
        length = g.flatten(1).norm(dim=1).view(-1, 1, 1, 1).clamp_min(1e-12)
        moved = (moved.detach() - step_size * g / length).clamp(0, 1)
    with torch.no_grad():
        after = (nets.representation(net, moved) - goal).norm(dim=1)
    return nets.to_array(moved), (after / before.clamp_min(1e-12)).cpu().numpy()
