"""Sections of settings, one for each concern, with the constraints beside the fields.

The defaults are the seconds-on-a-CPU case on scikit-learn's digits, and the only ones: notebooks
show them. `null` means "none", "never" or "all", as the field says.
"""

from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from advkip.attack_names import named_attack
from advkip.checked import (
    Count,
    Epochs,
    NotNegative,
    Positive,
    Rates,
    Section,
    Strings,
    listed,
)

Loss = Literal["cross-entropy", "mse"]
"""Of networks."""

Chooser = Literal["pgd", "worst-case"]
"""What chooses on validation images: PGD with the cross-entropy, as in the paper, or the worst case
of several losses (see `worst_case`), without which no AutoAttack accuracy is to be reported."""

SCORES: dict[Chooser, str] = {"pgd": "pgd", "worst-case": "strong"}
"""Which figure of a history's line it looks at."""

Method = Literal["adv-kip", "kip", "unrolled"]
METHODS: tuple[Method, ...] = ("adv-kip", "kip")
"""Those with a kernel."""

ADVERSARIAL, ORIGINAL, CLASSES = "adversarial", "original", "classes"
TEACHERS = (ADVERSARIAL, ORIGINAL, CLASSES)
"""Of relabelled sets, by name (`sets`): a network of adversarial_training; and two controls, the
machine of as many original images as support images, and none, so that classes stay."""

SETS = (ORIGINAL, *METHODS, "unrolled", "noisy", "relabelled", "robust-features")
"""Names of training sets; anything else is a path (see `sets`)."""


def is_path(name: str) -> bool:
    """Whether a set's name is that of a file or folder."""
    return name not in SETS


_NTK = r"-ntk(0\.\d*[1-9]|[1-9]\d*)?"
FC_NET = rf"fc([1-9]\d?)-([1-9]\d*)(?:{_NTK}|x[2-9])?"
"""Names of fully connected networks: hidden layers, width; NTK and scale, or how many in one."""

CONV_NET = rf"conv([1-9])-([1-9]\d*){_NTK}"
"""Names of convolutional networks in the NTK's parametrisation: convolutions, channels, scale."""

CNNS = ("simple-cnn", "alexnet", "vgg11")
PIECES = r"(?:-pieces[2-9])?"
"""How the name of a network or a kernel of `pieces` ends."""

PUBLISHED = ("CIFAR_ims", "CIFAR_lab")
"""Files of the published robust features, in one folder: images and labels."""

NET = rf"(?:{FC_NET}|{CONV_NET}|{'|'.join(CNNS)}){PIECES}"
Net = Annotated[str, Field(pattern=f"^{NET}$")]
Nets = Annotated[tuple[Net, ...], BeforeValidator(listed)]
Attacks = Annotated[
    tuple[Annotated[str, AfterValidator(named_attack)], ...], BeforeValidator(listed)
]


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
    name: Annotated[str, Field(pattern=rf"^(fc|conv)[1-9]\d?{PIECES}(-mirror)?$")] = "fc3"
    """fc1, conv3, ...: family and number of hidden layers; fc3-pieces3, fc1-mirror: `kernels`"""
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
    copies: Count = 1
    """of each drawn image in the support, which are then optimised apart"""
    copy_noise: NotNegative = 0.0
    """half the range of the uniform noise on copies, in pixel units; the first has none"""
    mirror: bool = False
    """mirrors half of the target images, and every second copy"""
    label_scale: Positive = 1.0
    """what the labels are multiplied by at the start"""
    grown_from: str | None = None
    """a distilled set, an .npz of at most S images, that the support starts from (see `growth`)"""
    true_share: Annotated[NotNegative, Field(le=1)] = 0.0
    """of the true label in those of the images that are added; the rest is what that set answers"""

    @model_validator(mode="after")
    def _copies_differ(self):
        if self.n_support % self.copies:
            raise ValueError(
                f"expected n_support to be a multiple of copies, got {self.n_support} and "
                f"{self.copies}; pass a multiple"
            )
        if self.copies > (2 if self.mirror else 1) and not self.copy_noise:
            raise ValueError(
                f"expected copy_noise > 0 with {self.copies} copies, whose kernel matrix is "
                "singular without, got 0; pass 0.05, say"
            )
        return self

    @property
    def may_differ(self) -> tuple[str, ...]:
        """Switches at their defaults, which checkpoints of before did not name."""
        return self.at_default("copies", "copy_noise", "mirror", "label_scale", "true_share")


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
    dtype: Literal["float32", "bfloat16"] = "float32"
    """of the passes of training (autocast); weights, attacks and accuracies are in float32"""

    def longer(self, times: int):
        """The same section with all that counts epochs so many times as large."""
        counts = "epochs", "eval_every", *(("patience",) if self.patience else ())
        changes = {key: times * getattr(self, key) for key in counts}
        milestones = tuple(times * epoch for epoch in self.milestones)
        return self.model_copy(update=changes | {"milestones": milestones})


class Networks(Training):
    nets: Nets = ()
    loss: Loss = "cross-entropy"
    target: Literal["labels", "softmax", "argmax"] = "argmax"
    """the label vectors as they are (mse), their softmax, or the class of the largest"""

    @model_validator(mode="after")
    def _target_of_loss(self):
        check_target(self.loss, self.target)
        return self

    @property
    def takes_features(self) -> bool:
        """Whether networks can be asked for numbers beside those of the classes."""
        return (self.loss, self.target) == ("mse", "labels")


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
    """of notebook 04, on original images and on `sets`; of the first robust features, or labels"""
    sets: Strings = ("original",)
    """a choice of diagnosis.sets, of a path there the name of what it holds"""
    epochs: Count = 20
    learning_rates: Rates = (2e-3,)
    pgd_steps: Count = 10
    warmup: Annotated[int, Field(ge=0)] = 0
    """epochs in which the radius grows to epsilon"""
    eval_every: Count = 1

    @model_validator(mode="after")
    def _names(self):
        if paths := list(filter(is_path, self.sets)):
            raise ValueError(
                f"expected names in adversarial_training.sets, got {paths}; pass what the file "
                "holds, as 'adv-kip', or its name without .npz"
            )
        return self


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
    choose_by: Chooser = "pgd"
    """what chooses epochs and learning rates on validation images"""


class Relabelling(Section):
    """Of the sets 'noisy' and 'relabelled' (see `relabel`)."""

    copies: Count = 4
    """of each original image, the first as it is"""
    kind: Literal["noise", "mixup"] = "noise"
    """of the other copies: pixels with noise, or mixtures of two images"""
    noise: Annotated[NotNegative, Field(le=1)] | None = None
    """what each pixel differs by, up or down, in pixel units; null: as far as the threat allows"""
    mirror: bool = False
    """mirrors half of the images of each copy but the first"""
    teacher: str | None = None
    """a distilled set, an .npz, whose machine answers, or 'adversarial', 'original' or 'classes'
    (`sets`); null: adv-kip"""
    rounds: Annotated[int, Field(ge=0)] = 0
    """of attacks on `scout`, trained as those of its kind, whose images are added (`aggregate`)"""
    scout: Net = "fc3-1024"
    shift: Annotated[int, Field(ge=0, le=8)] = 0
    """pixels by which images are moved for features: what the teacher answers to the moved ones"""

    @model_validator(mode="after")
    def _one_fits_another(self):
        if self.kind == "mixup" and self.noise is not None:
            raise ValueError(
                "expected relabelling.noise null with relabelling.kind 'mixup', got "
                f"{self.noise}; pass kind 'noise'"
            )
        if self.teacher == CLASSES and self.shift:
            raise ValueError(
                f"expected relabelling.shift 0 with relabelling.teacher {CLASSES!r}, got "
                f"{self.shift}; pass 0, or another teacher"
            )
        return self


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


AS_GIVEN, ORIGINAL_IMAGES = "as given", "original images"
"""Rows of notebook 05 that are no variants."""


FULLY_CONNECTED = Networks(
    nets=("fc3-256",), learning_rates=(1e-4, 3e-4, 1e-3, 3e-3), loss="mse", target="labels"
)
CONVOLUTIONAL = Networks(nets=("simple-cnn",))
