"""A robustness figure as it is printed elsewhere, beside the same in pixels.

Several repositories standardise images, z = (x - mean) / std, and attack z with "8/255", clipped to
[0, 1] as if z were pixels. A step of epsilon in z is one of epsilon * std in x: with CIFAR-10's std
of about 0.25 a quarter of the radius that the figure is printed for, and what withstands the one
need not withstand the other.
"""

from typing import NamedTuple

import numpy as np
import torch

from advkip import answers, inputs, nets, torch_attacks
from advkip.attacks import check_numbers
from advkip.threat import Threat


class Published(NamedTuple):
    """Accuracies in [0, 1] of the same network on the same images."""

    clean: float
    as_published: float  # under PGD with epsilon in standardised units
    radius: tuple[float, float]  # smallest and largest epsilon * std of a channel, in pixels
    in_pixels: float  # under the same PGD with epsilon in pixels

    def sentence(self) -> str:
        """What to say of such a figure."""
        low, high = (f"{255 * value:.2g}" for value in self.radius)
        radius = low if low == high else f"{low} to {high}"
        return (
            f"{self.as_published:.1%} as published is at a radius of {radius}/255 in pixels; "
            f"at the radius that is printed it is {self.in_pixels:.1%}"
        )


def compare(
    net, x, y, *, mean, std, epsilon, step_size, n_steps=20, batch_size=100
) -> Published:  # fmt: skip
    """PGD (l_inf, cross-entropy) on standardised images and on pixels.

    Args:
      net: of standardised images (n, C, H, W), in evaluation mode.
      x, y: images in [0, 1], shape (n, H, W, C), and integer labels (n,).
      mean, std: that the network's images were standardised with, as for `evaluate.evaluate`.
      epsilon, step_size: as printed; taken in standardised units first, and then in pixels.
      n_steps: of PGD, from the image itself.
      batch_size: images at a time.

    Raises:
      ValueError: mean or std that do not fit, or none; bad numbers; images, labels or answers that
        are none (see `inputs`, `answers`).
    """
    if mean is None or std is None:
        raise ValueError(
            f"expected mean and std, got {mean!r} and {std!r}; pass those of the training images"
        )
    check_numbers(n_steps, step_size, 1, "cross-entropy", torch_attacks.LOSSES)
    x = np.asarray(x)
    inputs.images(x)
    y = inputs.labels(y, len(x), vectors=False)
    model = nets.in_pixels(net, mean, std, channels=x.shape[3])
    images, labels = nets.to_tensor(x, like=model.mean), torch.as_tensor(y)
    labels = labels.to(images.device)
    with torch.no_grad():
        first = nets.to_numpy(model(images[: max(batch_size, answers.ASKED)]))
    answers.check_logits(first, y, machine=False)
    standardised = (images - model.mean) / model.std
    threat = Threat("linf", epsilon)

    def right(f, points, attacked):
        found = []
        for a, b in zip(points.split(batch_size), labels.split(batch_size), strict=True):
            if attacked:
                # It clips standardised images to [0, 1], too, as the repositories in question do.
                for point in torch_attacks.ascent(f, a, a, b, threat, n_steps, step_size):
                    a = point
            with torch.no_grad():
                found.append(f(a).argmax(1) == b)
        return torch.cat(found)

    clean = right(model, images, attacked=False)
    # An attack that fails leaves the image, which is how official AutoAttack counts.
    published = clean & right(net, standardised, attacked=True)
    pixels = clean & right(model, images, attacked=True)
    stds = epsilon * model.std.flatten()
    return Published(
        float(clean.float().mean()), float(published.float().mean()),
        (float(stds.min()), float(stds.max())), float(pixels.float().mean()),
    )  # fmt: skip
