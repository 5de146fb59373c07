"""How a network is trained: one frozen dataclass, and what it makes of the labels."""

import dataclasses
import typing

import torch

from advkip import inputs
from advkip.attacks import Threat
from advkip.config import Experiment
from advkip.nets import device
from advkip.settings import AdversarialTraining, Loss, Networks, check_target


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a network is trained.

    Args:
      epochs: at most.
      learning_rate: fixed, or divided by 10 at each of `milestones`.
      batch_size: None means all images at once.
      optimizer: 'adam' or 'sgd' (momentum 0.9).
      milestones: epochs after which the learning rate is divided by 10.
      weight_decay: L2 penalty.
      loss: 'cross-entropy' or 'mse' (Eq. 6).
      target: 'labels' (label vectors as they are), 'softmax' (of the label vectors) or 'argmax'.
      threat, step_size: of the attacks below.
      eval_every: epochs between two lines of the history.
      eval_pgd_steps: PGD steps of the robust validation accuracy.
      choose_by: 'pgd', or 'worst-case' of several losses (see `worst_case`).
      patience: stop after this many epochs without a better one; None means never.
      dtype: 'float32', or 'bfloat16' for the passes of training (autocast), which is faster where
        the hardware has it. Weights, attacks and accuracies are in float32.
      adversarial_steps: PGD steps, from a random start, on each training batch (Madry et al.
        2018); 0 is plain training.
      adversarial_warmup: epochs in which the radius grows from 0 to the threat's, and the step
        size with it; at once (0), a short training on MNIST can end in a constant network.
    """

    epochs: int
    learning_rate: float
    threat: Threat
    step_size: float
    batch_size: int | None = 128
    optimizer: str = "adam"
    milestones: tuple[int, ...] = ()
    weight_decay: float = 0.0
    loss: str = "cross-entropy"
    target: str = "argmax"
    eval_every: int = 10
    eval_pgd_steps: int = 20
    choose_by: str = "pgd"
    patience: int | None = None
    dtype: str = "float32"
    adversarial_steps: int = 0
    adversarial_warmup: int = 0

    def __post_init__(self):
        if self.target not in ("labels", "softmax", "argmax"):
            raise ValueError(
                f"expected target 'labels', 'softmax' or 'argmax', got {self.target!r}; pass one"
            )
        if self.loss not in typing.get_args(Loss) or self.optimizer not in ("adam", "sgd"):
            raise ValueError(
                "expected loss 'cross-entropy' or 'mse' and optimizer 'adam' or 'sgd', got "
                f"{self.loss!r} and {self.optimizer!r}; pass one of each"
            )
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(
                f"expected dtype 'float32' or 'bfloat16', got {self.dtype!r}; pass one"
            )
        check_target(self.loss, self.target)

    @classmethod
    def of(cls, section: Networks | AdversarialTraining, experiment: Experiment) -> "Recipe":
        """The recipe of a section of settings; the learning rate is the first of the grid."""
        shared = (
            "epochs", "batch_size", "optimizer", "milestones", "weight_decay", "eval_every",
            "patience", "dtype",
        )  # fmt: skip
        own = {key: getattr(section, key) for key in shared}
        if isinstance(section, Networks):
            own |= {"loss": section.loss, "target": section.target}
        else:
            own |= {"adversarial_steps": section.pgd_steps, "adversarial_warmup": section.warmup}
        threat = experiment.threat
        return cls(
            learning_rate=section.learning_rates[0], threat=Threat(threat.norm, threat.epsilon),
            step_size=threat.step_size, eval_pgd_steps=experiment.networks.pgd_steps,
            choose_by=experiment.networks.choose_by, **own,
        )  # fmt: skip

    def identity(self) -> dict:
        """The settings that a state of training depends on, as plain JSON values."""
        rest = dataclasses.asdict(self)
        free = ["epochs", "patience"]
        # States of before there was a choice go on.
        free += [k for k, v in {"choose_by": "pgd", "dtype": "float32"}.items() if rest[k] == v]
        return {k: v for k, v in rest.items() if k not in free}


def targets(y, n, recipe) -> torch.Tensor:
    """What the loss compares logits with, as a tensor.

    Args:
      y: label vectors (n, classes), or integers (n,).
      n: number of images.
      recipe: a `Recipe`.

    Raises:
      ValueError: labels that do not fit.
    """
    y = inputs.labels(y, n)
    integers = y.ndim == 1
    if recipe.target == "argmax" and recipe.loss == "cross-entropy":
        return torch.as_tensor(y if integers else y.argmax(1)).to(device())
    if integers:
        raise ValueError(
            f"expected label vectors for loss {recipe.loss!r} and target {recipe.target!r}, got "
            "integers; pass data.one_hot(y, n_classes)"
        )
    y = torch.as_tensor(y, dtype=torch.float32).to(device())
    if recipe.target == "softmax":
        return y.softmax(1)
    if recipe.target == "argmax":
        return torch.nn.functional.one_hot(y.argmax(1), y.shape[1]).float()
    return y
