"""Sections of settings, one for each concern, with the constraints beside the fields.

The defaults are the seconds-on-a-CPU case on scikit-learn's digits, and the only ones: notebooks
show them. `null` means "none", "never" or "all", as the field says.
"""

import re
from typing import Annotated, Literal, NamedTuple

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from advkip.checked import Count, Epochs, NotNegative, Positive, Rates, Section, Strings, listed

Loss = Literal["cross-entropy", "mse"]
Method = Literal["adv-kip", "kip"]
METHODS: tuple[Method, ...] = ("adv-kip", "kip")
SETS = ("original", *METHODS, "robust-features")
"""Names of training sets; anything else is a path (see `sets`)."""


def is_path(name: str) -> bool:
    """Whether a set's name is that of a file or folder."""
    return name not in SETS


FC_NET = r"fc([1-9]\d?)-([1-9]\d*)"
"""Names of fully connected networks: hidden layers, width."""

CNNS = ("simple-cnn", "alexnet", "vgg11")
ATTACK_PARTS = ("apgd-ce", "apgd-t", "fab-t", "square")
"""What AutoAttack 'standard' runs, in its order."""

UNTARGETED_PARTS = ("apgd-ce", "square")
"""Those that work with two classes; the others need four."""

OPTIMIZERS = Literal[
    "adabelief", "adam", "adamax", "adamw", "lion", "nadam", "rmsprop", "sgd", "yogi"
]
"""Optax optimisers that take nothing but a learning rate."""


PUBLISHED = ("CIFAR_ims", "CIFAR_lab")
"""Files of the published robust features, in one folder: images and labels."""


class Attack(NamedTuple):
    """What an attack's name says: 'fgsm', 'pgd40', 'pgd40x5', 'autoattack', a part of it; '-l2'."""

    name: str
    kind: str  # "clean", "fgsm", "pgd", "autoattack" or one of ATTACK_PARTS
    n_steps: int = 0  # of PGD
    n_restarts: int = 0  # random starts of PGD; 0 starts from the image itself
    l2: bool = False  # in the l2 ball beside an l_inf threat

    @classmethod
    def parse(cls, name: str) -> "Attack":
        """Raises ValueError: not such a name."""
        kinds = "|".join(("clean", "fgsm", "autoattack", *ATTACK_PARTS))
        pattern = rf"({kinds}|(pgd)([1-9]\d*)(?:x([1-9]\d*))?)(-l2)?"
        found = re.fullmatch(pattern, name)
        if not found:
            raise ValueError(
                f"expected attacks 'fgsm', 'pgd10', 'pgd40x5', 'autoattack' or one of "
                f"{ATTACK_PARTS}, with '-l2' behind it or not, got {name!r}; pass one of them"
            )
        whole, pgd, steps, restarts, l2 = found.groups()
        return cls(name, pgd or whole, int(steps or 0), int(restarts or 0), bool(l2))

    @property
    def targeted(self) -> bool:
        """Whether it has losses towards each of three other classes or more."""
        return self.kind in ("autoattack", "apgd-t", "fab-t")


def _attack(name: str) -> str:
    return Attack.parse(name).name


Net = Annotated[str, Field(pattern=rf"^({FC_NET}|{'|'.join(CNNS)})$")]
Nets = Annotated[tuple[Net, ...], BeforeValidator(listed)]
Attacks = Annotated[tuple[Annotated[str, AfterValidator(_attack)], ...], BeforeValidator(listed)]


class Data(Section):
    name: Annotated[str, Field(pattern=r"^\w[\w.-]*$")] = "digits"
    """digits, mnist, fashion_mnist, cifar10, or a file <name>.npz"""
    folder: str | None = None
    """of .npz files; null: the environment variable ADVKIP_DATA"""
    n_validation: Count = 200
    """images held out of the training data, for choices"""
    n_test: Count | None = None
    """test images of kernel machines; null: all"""


class Kernel(Section):
    name: Annotated[str, Field(pattern=r"^(fc|conv)[1-9]\d?$")] = "fc3"
    """fc1, fc2, ... or conv1, conv2, ...: a family and a number of hidden layers"""
    W_std: Positive = 2**0.5
    """standard deviation of the weights"""
    b_std: NotNegative = 0.1
    """standard deviation of the biases"""
    diag_reg: NotNegative = 1e-6
    """ridge / mean diagonal of K_SS"""
    dtype: Literal["float32", "float64"] = "float32"
    block_size: Count | None = None
    """rows of a tile; null chooses"""


class Support(Section):
    n_support: Count = 100
    """S: images that are optimised"""
    n_target: Count = 100
    """T: images that each outer step attacks"""
    center_labels: bool = True
    """one-hot minus 1/C instead of one-hot"""
    learn_labels: bool = True
    """distil the labels, too"""
    clip: bool = False
    """keep the distilled images in the pixel range"""


class Ball(Section):
    epsilon: Positive
    """attack radius in pixel units of [0, 1]"""
    step_size: Positive
    """of PGD, in pixel units"""

    @model_validator(mode="after")
    def _step_inside(self):
        if self.step_size > 2 * self.epsilon:
            raise ValueError(
                f"expected step_size <= 2 epsilon = {2 * self.epsilon:g}, got {self.step_size:g}; "
                "pass a step inside the ball"
            )
        return self


class Threat(Ball):
    norm: Literal["linf", "l2"] = "linf"
    epsilon: Positive = 0.2
    step_size: Positive = 0.05

    @model_validator(mode="after")
    def _radius_in_pixels(self):
        if self.norm == "linf" and self.epsilon > 1:
            raise ValueError(
                f"expected epsilon in [0, 1] pixel units, got {self.epsilon:g}; pass 8/255 for "
                "what is often written 8"
            )
        return self


class ThreatL2(Ball):
    """Of the attacks that end in -l2."""

    epsilon: Positive = 128 / 255
    step_size: Positive = 15 / 255


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
    inner_loss: Loss = "cross-entropy"
    outer_loss: Loss = "cross-entropy"
    logit_scale: Positive = 1.0
    """logits are multiplied by it in cross-entropies"""
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

    @property
    def may_differ(self) -> tuple[str, ...]:
        """Settings that a checkpoint need not share: no step depends on them.

        A checkpoint at a constant rate names no schedule, and one in full precision no other, as
        those of before there was a choice.
        """
        steps = ("n_steps", "schedule", "final_rate") if self.schedule == "constant" else ()
        return (*steps, "attack_precision") if self.attack_precision == "full" else steps


class Training(Section):
    """How networks of one kind are trained, and which."""

    epochs: Count = 60
    """at most"""
    batch_size: Count | None = 128
    """null: all images at once"""
    optimizer: Literal["adam", "sgd"] = "adam"
    """sgd has momentum 0.9"""
    learning_rates: Rates = (1e-3,)
    """the grid; validation images choose"""
    milestones: Epochs = ()
    """epochs after which the rate is divided by 10"""
    weight_decay: NotNegative = 0.0
    eval_every: Count = 10
    """epochs between two lines of the history"""
    patience: Count | None = None
    """stop after this many epochs without improvement; null: never"""


class Networks(Training):
    nets: Nets = ()
    loss: Loss = "cross-entropy"
    target: Literal["labels", "softmax", "argmax"] = "argmax"
    """the label vectors as they are (mse), their softmax, or the class of the largest"""

    @model_validator(mode="after")
    def _target_of_loss(self):
        check_target(self.loss, self.target)
        return self


def check_target(loss: str, target: str) -> None:
    """Raises ValueError for label vectors as they are with cross-entropy."""
    if (loss, target) == ("cross-entropy", "labels"):
        raise ValueError(
            "expected target 'softmax' or 'argmax' with cross-entropy, got 'labels', which "
            "need not be distributions; pass one of them, or loss 'mse'"
        )


class AdversarialTraining(Training):
    """The baseline (Madry et al. 2018)."""

    nets: Nets = ("simple-cnn",)
    """of notebook 04, on original images and on `sets`; the first makes robust features"""
    sets: Strings = ("original",)
    """a choice of diagnosis.sets"""
    epochs: Count = 20
    learning_rates: Rates = (2e-3,)
    pgd_steps: Count = 10
    warmup: Annotated[int, Field(ge=0)] = 0
    """epochs in which the radius grows to epsilon"""
    eval_every: Count = 1


class Common(Section):
    """What all networks share."""

    sets: Strings = ("adv-kip", "original")
    """what networks of notebooks 02 and 03 are trained on; see `sets`"""
    n_original: Count | None = 500
    """original images, plain and adversarial; null: all but validation's"""
    n_seeds: Count = 1
    """networks of each kind; tables give mean and standard deviation"""
    n_watch: Count = 200
    """validation images that choose, and test images that figures follow"""
    pgd_steps: Count = 20
    """of the robust validation accuracy, and of a verdict's claim"""


class RobustFeatures(Section):
    """The set of Ilyas et al. (2019), made by inverting representations (section 6, Table 8)."""

    n_images: Count | None = None
    """null: as many as support images"""
    n_steps: Count = 30
    """of the inversion of each image"""
    step_size: Positive = 0.1
    """l2 length of a step"""
    noise: Annotated[NotNegative, Field(le=1)] = 0.0
    """share of noise in the images to start from"""


class Diagnosis(Section):
    sets: Strings = ("adv-kip", "original", "robust-features")
    """what networks of notebook 04 are trained on; see `sets`"""
    nets: Nets | None = ("simple-cnn",)
    """with plain training; null: those of fully_connected and cnns"""
    n_images: Count = 20
    """test images of a verdict; 100 or more say something"""
    kernels: bool = True
    """the kernel machine of each set, too, under AutoAttack"""


class Evaluation(Section):
    attacks: Attacks = ("fgsm", "pgd20", "autoattack")
    """see `evaluate`"""
    n_test: Count | None = 50
    """test images of the networks' numbers; null: all of data.n_test"""


KIP = Distillation(pgd_steps=0, outer_loss="mse", learning_rate=1e-3, label_learning_rate=1e-3)
FULLY_CONNECTED = Networks(
    nets=("fc3-256",), learning_rates=(1e-4, 3e-4, 1e-3, 3e-3), loss="mse", target="labels"
)
CONVOLUTIONAL = Networks(nets=("simple-cnn",))
