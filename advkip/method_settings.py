"""The sections of settings of Algorithm 1 and its variants, and what its switches choose from."""

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from advkip.checked import Count, Epochs, NotNegative, Number, Positive, Rates, Section, listed
from advkip.settings import AS_GIVEN, ORIGINAL_IMAGES, Chooser, Loss, Net, Nets, Networks

InnerLoss = Literal["cross-entropy", "mse", "margin", "dlr", "targeted", "mixture"]
OuterLoss = Literal["cross-entropy", "mse", "hinge", "squared-hinge"]
"""Of Algorithm 1 (see `losses`, `objective`)."""

MIXTURE = ("cross-entropy", "margin", "targeted")
"""Inner losses that share a target batch in 'mixture'."""


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


def several(net: str | list[str]) -> list[str]:
    """The names of a pool of networks, of which there may be one."""
    return [net] if isinstance(net, str) else net


class Unrolled(Distillation):
    """Algorithm 1 with networks that are trained inside each outer step (see `unrolled`)."""

    net: str | list[str] = "fc1-256"
    """or a pool, whose networks take turns"""
    net_steps: Count = 60
    """of gradient descent, on the whole support"""
    net_learning_rate: Positive = 0.1
    n_nets: Count = 2
    """in each outer step, of other first weights"""
    start_from: Literal["original", "adv-kip"] = "original"
    """images as drawn, or the set that the kernel's Algorithm 1 makes of them (kept beside it)"""
    warmup: Annotated[int, Field(ge=0)] = 0
    """outer steps (epochs of experts) in which the radius grows, from a quarter of it"""
    n_experts: Annotated[int, Field(ge=0)] = 0
    """adversarially trained networks whose way is followed (see `trajectories`; then the attack is
    theirs, and what the support lowers is no loss of Algorithm 1); 0: none"""
    expert_epochs: Count = 100
    expert_learning_rate: Positive = 0.1
    expert_smoothing: Annotated[NotNegative, Field(lt=1)] = 0.99
    """of their weights, in each step"""
    expert_ahead: Count = 20
    """epochs of theirs that net_steps are to follow"""
    n_steps: Count = 100
    learning_rate: Positive = 2e-3
    label_learning_rate: Positive = 2e-3
    inner_loss: InnerLoss = "margin"
    random_start: bool = True
    outer_loss: OuterLoss = "hinge"
    hinge_margin: Positive = 0.2
    clean_weight: Annotated[NotNegative, Field(le=1)] = 0.5
    choose_by: Chooser = "worst-case"

    @model_validator(mode="after")
    def _fully_connected(self):
        pattern = r"fc[1-9]-[1-9]\d*(-pieces[2-9])?"
        if not (self.pool and all(re.fullmatch(pattern, net) for net in self.pool)):
            raise ValueError(
                "expected in unrolled.net a fully connected network, depth and width, or a list of "
                f"them, got {self.net!r}; pass such as 'fc1-256' or ['fc1-64', 'fc2-128-pieces3']"
            )
        return self

    @model_validator(mode="after")
    def _in_full_precision(self):
        if self.attack_precision != "full":
            raise ValueError(
                "expected unrolled.attack_precision 'full', got "
                f"{self.attack_precision!r}; pass that, networks have no other"
            )
        return self

    @model_validator(mode="after")
    def _experts_are_adversarial(self):
        if self.n_experts and not (self.expert_ahead <= self.expert_epochs > self.warmup):
            raise ValueError(
                "expected unrolled.expert_epochs beyond unrolled.warmup, and unrolled.expert_ahead "
                f"of at most these, got {self.expert_epochs}, {self.warmup}, {self.expert_ahead}; "
                "pass more epochs"
            )
        if self.n_experts and not self.pgd_steps:
            raise ValueError(
                "expected unrolled.pgd_steps of at least 1 with unrolled.n_experts, which are "
                "trained adversarially, got 0; pass more, or no experts"
            )
        return self

    @property
    def may_differ(self) -> tuple[str, ...]:
        experts = [name for name in type(self).model_fields if name.startswith("expert_")]
        return (
            *super().may_differ, *self.at_default("start_from", "n_experts"),
            *(() if self.n_experts else experts),
        )  # fmt: skip

    @property
    def teacher(self) -> str:
        """What tables say of a set that was optimised through the training of networks."""
        start = f" from {self.start_from}" * (self.start_from != "original")
        return ", ".join(self.pool) + start + ", adversarial trajectories" * bool(self.n_experts)

    @property
    def pool(self) -> list[str]:
        """The names of the networks that take turns; the first is the one that is validated."""
        return several(self.net)

    @property
    def sizes(self) -> list[tuple[int, int, int]]:
        """Hidden layers, width and pieces of each network of the pool."""
        found = (map(int, re.findall(r"\d+", f"{net}-1")[:3]) for net in self.pool)
        return [(depth, width, pieces) for depth, width, pieces in found]


class Variant(Section):
    """Settings that a distillation changes, in sections (notebook 05)."""

    name: Annotated[str, Field(min_length=1)]
    kernel: dict[str, Any] = {}
    support: dict[str, Any] = {}
    adv_kip: dict[str, Any] = {}

    @model_validator(mode="after")
    def _differs(self):
        taken = self.name == AS_GIVEN or self.name.startswith(ORIGINAL_IMAGES)
        if taken or "dtype" in self.kernel:
            raise ValueError(
                f"expected a variant whose name is not {AS_GIVEN!r} and does not begin with "
                f"{ORIGINAL_IMAGES!r}, without a dtype of its own, got {self.name!r} and "
                f"{self.kernel}; pass such a one"
            )
        return self


HINGE = {"choose_by": "worst-case", "inner_loss": "margin", "outer_loss": "hinge"}


class Remedies(Networks):
    """Of notebook 05: variants of the distillation, and networks on the set of one of them."""

    variants: Annotated[tuple[Variant, ...], BeforeValidator(listed)] = (
        Variant(
            name="FC1, margin and hinge",
            kernel={"name": "fc1"},
            adv_kip=HINGE | {"eval_every": 20, "keep_every": 20},
        ),
        Variant(name="the same in 3 pieces", kernel={"name": "fc1-pieces3"}, adv_kip=HINGE),
    )
    hand_on: str = "FC1, margin and hinge"
    """whose set the networks are trained on: a variant's, or 'as given'"""
    nets: Nets = ("fc1-256-ntk0.1", "fc1-2048-ntk0.1")
    epochs: Count = 100
    batch_size: Count | None = None
    optimizer: Literal["adam", "sgd"] = "sgd"
    learning_rates: Rates = (2.0,)
    eval_every: Count = 20
    loss: Loss = "mse"
    target: Literal["labels", "softmax", "argmax"] = "labels"
    copies: Epochs = (1, 4)
    """of each original image, for networks on classes and on the answers of that set's machine"""
    student: Net = "fc1-256"
    """which networks those are, of the recipe of fully_connected or cnns"""
    student_rate: Positive = 1e-3
    """their learning rate"""

    @model_validator(mode="after")
    def _as_many_steps(self):
        if rest := [n for n in self.copies if max(self.copies) % n]:
            raise ValueError(
                f"expected copies that divide the largest, {max(self.copies)}, for as many steps "
                f"of training, got {rest}; pass such as (1, 2, 4)"
            )
        return self

    @model_validator(mode="after")
    def _known(self):
        names = [AS_GIVEN, *(one.name for one in self.variants)]
        if self.hand_on not in names or len(set(names)) < len(names):
            raise ValueError(
                f"expected hand_on to be one of the variants, each of a name of its own, got "
                f"{self.hand_on!r} and {names}; pass hand_on: {AS_GIVEN!r}, say"
            )
        return self
