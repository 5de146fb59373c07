"""The worst case of several losses: a quick attack that sees what the cross-entropy does not.

PGD on the cross-entropy plateaus while the accuracy that AutoAttack leaves goes on rising, so what
is reported under AutoAttack is chosen by this: PGD from the image itself on the cross-entropy, on
the margin, and towards each of the RIVALS classes with the largest wrong logits (the targets of
APGD-T, of which it has nine). An image that one of them breaks is not tried again.
"""

import numpy as np

from advkip import attacks

N_STEPS = 40
"""Of each attack."""

RIVALS = 3
"""Classes that targeted attacks push to."""

GROUP = 128
"""Images left are filled up to a multiple of this, or of all, so that few shapes are compiled."""


def plans(n_classes) -> list[tuple[str, int]]:
    """(loss, rank of the class to push to, 0 being the largest wrong logit) of each attack."""
    targeted = [("targeted", rank) for rank in range(min(RIVALS, n_classes - 1))]
    return [("cross-entropy", 0), ("margin", 0), *targeted]


def rivals(logits, y) -> np.ndarray:
    """The wrong classes of each image, the largest logit first: (n, C - 1), of logits (n, C)."""
    logits = np.array(logits)
    logits[np.arange(len(y)), y] = np.inf
    return np.argsort(-logits, 1, kind="stable")[:, 1:]


def withstood(
    logits_fn, x, y, *, threat, step_size, batch_size, n_steps=N_STEPS
) -> np.ndarray:  # fmt: skip
    """Which images a model in JAX classifies correctly after every attack.

    Args:
      logits_fn: as of `attacks.pgd`.
      x, y: images (n, ...) and integers (n,).
      threat, step_size: as of `attacks.pgd`.
      batch_size: images at a time, at most.
      n_steps: of each attack.

    Returns:
      A bool array (n,).
    """
    x, y = np.asarray(x), np.asarray(y)
    logits = np.asarray(attacks.predict(logits_fn, x, batch_size=batch_size))
    left, classes = logits.argmax(1) == y, rivals(logits, y)
    for loss, rank in plans(logits.shape[1]):
        index = np.flatnonzero(left)
        if not len(index):
            break
        group = min(GROUP, len(y))
        rows = np.resize(index, -(-len(index) // group) * group)

        def attack(x, y, aim, loss=loss):
            return attacks.pgd(
                logits_fn, x, y, threat=threat, n_steps=n_steps, step_size=step_size, loss=loss,
                aim=aim if loss == "targeted" else None,
            )  # fmt: skip

        attacked = attacks.in_batches(
            attack, x[rows], y[rows], classes[rows, rank], batch_size=batch_size
        )
        found = np.asarray(attacks.predict(logits_fn, attacked, batch_size=batch_size)).argmax(1)
        left[index] = found[: len(index)] == y[index]
    return left
