"""Optimisers of the outer minimum (Eq. 7): optax's, with rates that follow a schedule."""

import optax

from advkip.method_settings import Distillation


def learning_rate(start, settings: Distillation) -> float | optax.Schedule:
    """The rate, or the rate by step, from `start` at step 0 to final_rate * start at step n_steps.

    With f = final_rate and t = step / n_steps, after which it stays,

        cosine        start (f + (1 - f) (1 + cos(pi t)) / 2)
        exponential   start f^t
        linear        start (1 - (1 - f) t)

    A constant rate is a number: an optimiser's state then counts no steps for it.
    """
    n_steps, final = settings.n_steps, settings.final_rate
    match settings.schedule:
        case "cosine":
            return optax.cosine_decay_schedule(start, n_steps, alpha=final)
        case "exponential":
            return optax.exponential_decay(start, n_steps, final, end_value=final * start)
        case "linear":
            return optax.linear_schedule(start, final * start, n_steps)
    return start


def of(
    settings: Distillation, *, learn_labels: bool
) -> tuple[optax.GradientTransformation, optax.GradientTransformation | None]:
    """(of the images, of the labels), each with its own rate; None for labels that stay."""
    make = getattr(optax, settings.optimizer)
    rates = (settings.learning_rate, settings.label_learning_rate)
    images, labels = (make(learning_rate(rate, settings)) for rate in rates)
    return images, labels if learn_labels else None
