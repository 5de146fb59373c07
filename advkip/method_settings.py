"""The section of settings of Algorithm 1, and what its switches choose from."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from advkip.checked import Count, NotNegative, Number, Positive, Section
from advkip.settings import Chooser

InnerLoss = Literal["cross-entropy", "mse", "margin", "dlr", "targeted", "mixture"]
OuterLoss = Literal["cross-entropy", "mse", "hinge", "squared-hinge"]
"""Of Algorithm 1 (see `losses`, `objective`)."""

MIXTURE = ("cross-entropy", "margin", "targeted")
"""Inner losses that share a target batch in 'mixture'."""


ADVERSARIAL = "adversarial"
"""The teacher of relabelled sets that is a network of adversarial_training (`sets`)."""

OPTIMIZERS = Literal[
    "adabelief", "adam", "adamax", "adamw", "lion", "nadam", "rmsprop", "sgd", "yogi"
]
"""Optax optimisers that take nothing but a learning rate."""


class Distillation(Section):
    """Algorithm 1: the outer minimum (Eq. 7) over an inner maximum (Eq. 8)."""

    n_steps: Count = 60
    """outer steps at most"""
    learning_rate: Positive = 1e-2
    """of the images"""
    label_learning_rate: Positive = 1e-2
    schedule: Literal["constant", "cosine", "exponential", "linear"] = "constant"
    """of both rates, over n_steps; with another than constant a run cannot go on with more steps"""
    final_rate: Annotated[Positive, Field(le=1)] = 0.01
    """where a schedule ends, relative to where it begins"""
    optimizer: OPTIMIZERS = "adam"
    pgd_steps: Annotated[int, Field(ge=0)] = 10
    """of the inner maximum; 0 is KIP, 1 is FGSM"""
    attack_precision: Literal["full", "tfloat32", "bfloat16"] = "full"
    """of the inner maximum's products; the others use the tensor cores of an accelerator"""
    inner_loss: InnerLoss = "cross-entropy"
    """what the attack raises; a mixture shares the target batch among three"""
    random_start: bool = False
    """of the attack; else from the image itself, as in the paper"""
    restarts: Count = 1
    """random starts of the attack, of which the worst for each image counts"""
    step_rule: Literal["fixed", "apgd"] = "fixed"
    """of the attack; APGD chooses its steps itself"""
    outer_loss: OuterLoss = "cross-entropy"
    """what the support lowers; for the other switches see `objective`"""
    hinge_margin: Positive = 1.0
    """that the hinge losses ask for"""
    clean_weight: Annotated[NotNegative, Field(le=1)] = 0.0
    """share of the loss on clean target images"""
    hard_weight: NotNegative = 0.0
    """how much more an attacked image of larger margin loss counts; 0: all the same"""
    gradient_penalty: Number = 0.0
    """of the input-gradient norm at clean target images; negative rewards it"""
    logit_scale: Positive = 1.0
    """logits are multiplied by it in cross-entropies"""
    choose_by: Chooser = "pgd"
    """what chooses the best support on validation images"""
    eval_pgd_steps: Count = 10
    """of PGD on validation images, and on test images in notebook 01"""
    eval_every: Count = 10
    """outer steps between two lines of the history"""
    patience: Count | None = None
    """stop after this many steps without improvement; null: never"""
    checkpoint_every: Count = 50
    """outer steps between two checkpoints"""
    keep_every: Count | None = None
    """outer steps between two supports that stay, as <method>-<step>.npz; null: the best alone"""

    @model_validator(mode="after")
    def _restarts_are_random(self):
        if self.restarts > 1 and not self.random_start:
            raise ValueError(
                f"expected random_start with {self.restarts} restarts, got false; pass true"
            )
        return self

    @property
    def may_differ(self) -> tuple[str, ...]:
        """Settings that a checkpoint need not share: no step depends on them.

        A checkpoint at a constant rate names no schedule, and switches at their defaults are not
        named, as in those of before there was a choice.
        """
        steps = ("n_steps", "schedule", "final_rate") if self.schedule == "constant" else ()
        return (*steps, *self.at_default(*SWITCHES))


SWITCHES = (
    "attack_precision", "random_start", "restarts", "step_rule", "hinge_margin", "clean_weight",
    "hard_weight", "gradient_penalty", "choose_by",
)  # fmt: skip
"""Settings of Algorithm 1 that came later than checkpoints that still go on."""

KIP = Distillation(pgd_steps=0, outer_loss="mse", learning_rate=1e-3, label_learning_rate=1e-3)
