"""How a network is trained: one frozen dataclass, and what it makes of the labels."""

import dataclasses
import json

import torch

from advkip import inputs
from advkip.attacks import Threat
from advkip.config import LOSSES
from advkip.nets import device


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a network is trained.

    Args:
      epochs: at most.
      learning_rate: fixed, or divided by 10 at each of `milestones`.
      batch_size: 0 means all images at once.
      optimizer: 'adam' or 'sgd' (momentum 0.9).
      milestones: epochs after which the learning rate is divided by 10.
      weight_decay: L2 penalty.
      loss: 'cross-entropy' or 'mse' (Eq. 6).
      target: 'labels' (label vectors as they are), 'softmax' (of the label vectors) or 'argmax'.
      threat, step_size: of the attacks below.
      eval_every: epochs between two lines of the history.
      eval_pgd_steps: PGD steps of the robust validation accuracy.
      patience: stop after this many epochs without a better one; 0 means never.
      adversarial_steps: PGD steps, from a random start, on each training batch (Madry et al.
        2018); 0 is plain training.
      adversarial_warmup: epochs in which the radius grows from 0 to the threat's, and the step
        size with it; at once (0), a short training on MNIST can end in a constant network.
    """

    epochs: int
    learning_rate: float
    threat: Threat
    step_size: float
    batch_size: int = 128
    optimizer: str = "adam"
    milestones: tuple[int, ...] = ()
    weight_decay: float = 0.0
    loss: str = "cross-entropy"
    target: str = "argmax"
    eval_every: int = 10
    eval_pgd_steps: int = 20
    patience: int = 0
    adversarial_steps: int = 0
    adversarial_warmup: int = 0

    def __post_init__(self):
        if self.target not in ("labels", "softmax", "argmax"):
            raise ValueError(
                f"expected target 'labels', 'softmax' or 'argmax', got {self.target!r}; pass one"
            )
        if self.loss not in LOSSES or self.optimizer not in ("adam", "sgd"):
            raise ValueError(
                "expected loss 'cross-entropy' or 'mse' and optimizer 'adam' or 'sgd', got "
                f"{self.loss!r} and {self.optimizer!r}; pass one of each"
            )
        if self.loss == "cross-entropy" and self.target == "labels":
            raise ValueError(
                "expected target 'softmax' or 'argmax' with cross-entropy, got 'labels', which "
                "need not be distributions; pass one of them, or loss 'mse'"
            )

    @classmethod
    def of(cls, experiment, *, adversarial=False):
        """The experiment's recipe for networks, or for adversarial training.

        The learning rate is the first of the grid. For convolutional networks pass
        `experiment.for_cnns()`.
        """
        e = experiment
        own = {
            "epochs": e.net_epochs, "learning_rate": e.net_learning_rates[0],
            "optimizer": e.net_optimizer, "milestones": e.net_milestones,
            "weight_decay": e.net_weight_decay, "loss": e.net_loss, "target": e.net_target,
            "eval_every": e.net_eval_every, "patience": e.net_patience,
        }  # fmt: skip
        if adversarial:
            own = {
                "epochs": e.at_epochs, "learning_rate": e.at_learning_rates[0],
                "optimizer": e.at_optimizer, "milestones": e.at_milestones,
                "weight_decay": e.at_weight_decay, "eval_every": e.at_eval_every,
                "adversarial_steps": e.at_pgd_steps, "adversarial_warmup": e.at_warmup,
            }  # fmt: skip
        return cls(
            threat=Threat(e.norm, e.epsilon), step_size=e.step_size, batch_size=e.net_batch_size,
            eval_pgd_steps=e.net_pgd_steps, **own,
        )  # fmt: skip

    def identity(self):
        """The settings that a state of training depends on, as text."""
        rest = dataclasses.asdict(self)
        return json.dumps({k: v for k, v in rest.items() if k not in ("epochs", "patience")})


def targets(y, n, recipe):
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
