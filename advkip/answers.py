"""Whether what a model answers are logits, of each image alone: what `evaluate` asks first."""

import numpy as np

ASKED = 100
"""Images at least that a model is asked for its answers to."""


def check_logits(logits, y, *, machine) -> None:
    """Refuses what are no logits (n, C) for labels y; of a kernel `machine` any numbers may come.

    Raises:
      ValueError, FloatingPointError: what is wrong with them, and what to pass.
    """
    if logits.ndim != 2 or logits.shape[1] < 2 or y.max() >= logits.shape[1]:
        raise ValueError(
            f"expected logits (n, classes) for labels {y.min()} to {y.max()}, got shape "
            f"{logits.shape}; pass a model with one logit a class, two or more"
        )
    if not np.isfinite(logits).all():
        masked = np.isneginf(logits).any() and not np.isnan(logits).any()
        hint = (
            "pass a model whose impossible classes have -1e4 instead of -inf"
            if masked
            else "fit the machine with a larger diag_reg, or train the network with a smaller "
            "learning rate"
        )
        kind = "-inf" if masked else "NaN or infinity"
        raise FloatingPointError(f"expected finite logits on clean images, got {kind}; {hint}")
    if machine or (logits == logits[:1]).all():  # constant answers say nothing of their kind
        return
    sums = logits.sum(1)
    shares = (logits >= 0).all() and np.allclose(sums, sums.mean(), rtol=0.02)
    if shares or ((logits >= 0).all() and (logits <= 1).all()):
        kind = "probabilities" if shares else "sigmoids or probabilities, all in [0, 1]"
        raise ValueError(
            f"expected logits, got rows that are {kind}; remove the softmax or sigmoid, which "
            "flattens the gradients that attacks need"
        )


REPEATS = 12
"""Passes over the same batch, of which one differs if a network is random."""


def check_order_of_images(net, x, logits) -> None:
    """Refuses a network (`models.judged`) that answers otherwise in another batch of images.

    One that is random anyway is not asked.

    Raises:
      ValueError: its answer to an image depends on the others.
    """
    if len(x) < 2:
        return
    half = len(x) // 2
    close = {"rtol": 1e-2, "atol": 1e-2 * np.abs(logits).max()}

    def others(found):
        return (~np.isclose(found, logits, **close)).any(1).sum()

    orders = np.arange(half)[::-1], np.arange(half, len(x))[::-1]
    found = np.concatenate([net.logits(x[order])[::-1] for order in orders])
    # One image of ten may be on the edge of a step: products of other shapes round otherwise.
    few = max(1, len(x) // 10)
    if others(found) > few and not any(others(net.logits(x)) for _ in range(REPEATS)):
        raise ValueError(
            "expected an answer to each image that depends on it alone, got others in another "
            "batch; pass a network whose normalisation has running statistics, in evaluation mode"
        )
