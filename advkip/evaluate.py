"""Clean, FGSM and PGD accuracy of a kernel machine, as the worst case of each image.

An image counts as robust against an attack when it is classified correctly after it *and* after
every attack before it in the list. Accuracy can therefore only fall along the list, as it must:
the clean image, and what FGSM finds, are points of the ball that PGD searches.
"""

import re
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from advkip import attacks, krr

TOLERANCE = 1e-5
"""How far an attacked image may leave the ball: rounding of float32 pixels and their norms."""


class Outcome(NamedTuple):
    """One attack on n images."""

    attack: str  # "clean", "fgsm", "pgd10", "pgd10-l2", ...
    norm: str
    epsilon: float
    accuracy: float  # worst case of this attack and those before it, in [0, 1]
    accuracy_alone: float  # of this attack by itself
    robust: np.ndarray  # bool, shape (n,): which images are right in the worst case
    right: np.ndarray  # bool, shape (n,): which are right after this attack by itself
    x_attacked: np.ndarray  # the first `keep` attacked images


def evaluate(
    machine, x, y, *, threat, attack_names, step_size, batch_size=0, keep=0, progress=True
):
    """Measures accuracy under attacks that accumulate (columns of the paper's Tables 1, 2, 9).

    Args:
      machine: a `krr.KernelMachine`.
      x, y: images in [0, 1], shape (n, H, W, C), and integer labels (n,).
      threat: an `attacks.Threat`.
      attack_names: a list of 'fgsm' and 'pgdN' (N steps, from the image itself); 'clean' comes
        first by itself.
      step_size: of PGD, in pixel units.
      batch_size: images at a time; 0 chooses.
      keep: how many attacked images to return of each attack, for figures.
      progress: shows a bar.

    Returns:
      A list of `Outcome`, 'clean' first.

    Raises:
      ValueError: an unknown attack, labels that do not fit, pixels outside the range.
      FloatingPointError: logits that are not finite, or an attack that left the ball.
    """
    x, y = np.asarray(x), np.asarray(y)
    if y.shape != x.shape[:1] or not np.issubdtype(y.dtype, np.integer) or not len(y):
        raise ValueError(
            f"expected one integer label an image, got labels {y.shape} of {y.dtype} for images "
            f"{x.shape}; pass argmax of one-hot labels"
        )
    attacks.check_images(x, threat)
    batch_size = batch_size or krr.rows_of_tile(machine.kernel, len(machine.x_support))
    functions = {name: _attack(machine, name, threat, step_size) for name in attack_names}

    outcomes, robust = [], np.ones(len(y), bool)
    suffix = "-l2" if threat.norm == "l2" else ""
    for name, attack in tqdm(
        {"clean": lambda x, y: jnp.asarray(x), **functions}.items(),
        desc="attacks", disable=not progress,
    ):  # fmt: skip
        attacked = np.asarray(attacks.in_batches(attack, x, y, batch_size=batch_size))
        _check_attacked(name, attacked, x, threat)
        logits = np.asarray(attacks.predict(machine, attacked, batch_size=batch_size))
        if not np.isfinite(logits).all():
            raise FloatingPointError(
                f"expected finite logits under {name}, got NaN or infinity; "
                "fit the machine with a larger diag_reg or in float64"
            )
        right = logits.argmax(1) == y
        robust = robust & right
        outcomes.append(
            Outcome(
                name if name == "clean" else name + suffix,
                threat.norm, 0.0 if name == "clean" else threat.epsilon,
                float(robust.mean()), float(right.mean()), robust, right, attacked[:keep],
            )
        )  # fmt: skip
    return outcomes


def _attack(machine, name, threat, step_size):
    """The attack of a name as a function of images and labels."""
    if name == "fgsm":
        return lambda x, y: attacks.fgsm(machine, x, y, threat=threat)
    if not re.fullmatch(r"pgd[1-9]\d*", name):
        raise ValueError(f"expected attacks 'fgsm' or 'pgd10', got {name!r}; pass one of them")
    steps = int(name[3:])
    return lambda x, y: attacks.pgd(
        machine, x, y, threat=threat, n_steps=steps, step_size=step_size
    )


def _check_attacked(name, attacked, x, threat):
    distance = float(np.max(attacks.distance(attacked, x, threat.norm)))
    if distance > threat.epsilon + TOLERANCE:
        raise FloatingPointError(
            f"expected {name} to stay within {threat.epsilon:g} ({threat.norm}), got {distance:g}; "
            "report this as a bug"
        )
    attacks.check_images(attacked, threat)
