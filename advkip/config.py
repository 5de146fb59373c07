"""One experiment: a frozen dataclass that checks every value, read from a params file.

A params file is YAML with the names of `Experiment`'s fields; what it leaves out keeps its
default. The defaults are the seconds-on-a-CPU case on scikit-learn's digits.
"""

import dataclasses
import hashlib
import json
import re
from pathlib import Path

import yaml

from advkip.values import Loader, typed

OPTIMIZERS = ("adabelief", "adam", "adamax", "adamw", "lion", "nadam", "rmsprop", "sgd", "yogi")
"""Optax optimisers that take nothing but a learning rate."""

LOSSES = ("cross-entropy", "mse")
METHODS = ("adv-kip", "kip")
NET_SETS = ("distilled", "original")

FC_NET = r"fc([1-9]\d?)-([1-9]\d*)"
"""Names of fully connected networks: hidden layers, width."""

CNNS = ("simple-cnn", "alexnet", "vgg11")

ATTACK_PARTS = ("apgd-ce", "apgd-t", "fab-t", "square")
"""What AutoAttack 'standard' runs, in its order."""

UNTARGETED_PARTS = ("apgd-ce", "square")
"""Those that work with two classes; the others need four."""

ATTACK = rf"(fgsm|pgd[1-9]\d*(x[1-9]\d*)?|autoattack|{'|'.join(ATTACK_PARTS)})(-l2)?"
"""Names of attacks; see `evaluate`."""

DIAGNOSED_SETS = ("adv-kip", "original", "kip", "robust-features")

IGNORED_FROM = {
    "00_walkthrough": "distilled_set",
    "01_kernels": "distilled_set",
    "02_transfer": "cnns",
    "03_cnns": "diagnosed_sets",
}
"""Notebook: the first of the settings that it does not depend on; the rest of the list follows."""

OUTER_SETTINGS = ("notebooks", "data_dir", "block_size", "checkpoint_every")
"""Settings that no result depends on."""


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Settings of one experiment, shared by all notebooks. Paper: "Algorithm 1", "Settings".

    Distances (epsilon, step_size) are in pixel units of [0, 1].
    """

    # What is run
    name: str = "scratch"  # folder below reports/
    notebooks: tuple[str, ...] = ("01_kernels",)  # files below notebooks/, in this order
    methods: tuple[str, ...] = METHODS  # which sets are distilled
    seed: int = 0  # every random choice derives from it
    dtype: str = "float32"  # "float32" or "float64"

    # Data
    dataset: str = "digits"  # digits, mnist, fashion_mnist, cifar10, or a <dataset>.npz file
    data_dir: str = ""  # folder of .npz files; "" means the environment variable ADVKIP_DATA
    n_validation: int = 200  # images held out of the training data, for choices
    n_test: int = 0  # test images of the reported numbers; 0 means all

    # Kernel
    kernel: str = "fc3"  # fc1, fc2, ...; conv1, conv2, ...
    W_std: float = 2**0.5  # standard deviation of the weights
    b_std: float = 0.1  # standard deviation of the biases
    diag_reg: float = 1e-6  # ridge / mean diagonal of K_SS
    block_size: int = 0  # rows of a kernel tile; 0 chooses

    # Support and target
    n_support: int = 100  # S, size of the distilled set
    n_target: int = 100  # T, target batch of an outer step
    center_labels: bool = True  # one-hot minus 1/C instead of one-hot
    learn_labels: bool = True  # distil the labels, too
    clip_support: bool = False  # keep the distilled images in the pixel range

    # Threat model and inner maximum (Eq. 8)
    norm: str = "linf"  # "linf" or "l2"
    epsilon: float = 0.2  # attack radius
    step_size: float = 0.05  # of PGD, in distillation and in evaluation
    pgd_steps: int = 10  # inner steps; 0 is KIP, 1 is FGSM
    inner_loss: str = "cross-entropy"
    eval_pgd_steps: int = 10  # steps of PGD in evaluation

    # Outer minimum (Eq. 7)
    n_steps: int = 60  # outer steps at most
    learning_rate: float = 1e-2  # of the images
    label_learning_rate: float = 1e-2  # of the labels
    optimizer: str = "adam"
    outer_loss: str = "cross-entropy"
    logit_scale: float = 1.0  # logits are multiplied by it in both losses
    eval_every: int = 10  # outer steps between two lines of the history
    patience: int = 0  # stop after this many steps without improvement; 0 means never
    checkpoint_every: int = 50  # outer steps between two checkpoints

    # KIP, the baseline without an inner maximum (Table 9)
    kip_steps: int = 60
    kip_learning_rate: float = 1e-3
    kip_loss: str = "mse"
    kip_patience: int = 0

    # Networks (sections 4 and 5 of the paper)
    distilled_set: str = ""  # a .npz with a training set; "" means what 01_kernels makes
    net_sets: tuple[str, ...] = NET_SETS  # what networks are trained on
    n_original: int = 0  # original images, plain and adversarial; 0 means all but validation's
    fc_nets: tuple[str, ...] = ("fc3-1024",)  # of notebook 02; see `nets.build`
    net_seeds: int = 1  # networks of each kind; tables give mean and standard deviation
    net_epochs: int = 100  # at most
    net_batch_size: int = 128  # 0 means all images at once
    net_optimizer: str = "adam"  # "adam" or "sgd" (momentum 0.9)
    net_learning_rates: tuple[float, ...] = (1e-3,)  # the grid; validation images choose
    net_milestones: tuple[int, ...] = ()  # epochs after which the rate is divided by 10
    net_weight_decay: float = 0.0
    net_loss: str = "cross-entropy"  # "cross-entropy" or "mse"
    net_target: str = "argmax"  # "labels" as they are (mse), their "softmax" or their "argmax"
    net_pgd_steps: int = 20  # of the robust validation accuracy
    net_eval_every: int = 10  # epochs between two lines of the history
    net_patience: int = 0  # stop after this many epochs without improvement; 0 means never
    n_watch: int = 200  # validation images that choose, and test images that figures follow
    net_n_test: int = 0  # test images of the networks' numbers; 0 means all of n_test
    net_attacks: tuple[str, ...] = ("fgsm", "pgd20", "autoattack")  # see `evaluate`
    epsilon_l2: float = 128 / 255  # radius of the attacks that end in -l2
    step_size_l2: float = 15 / 255

    # Convolutional networks (section 5); what is not given is as above
    cnns: tuple[str, ...] = ("simple-cnn",)  # of notebook 03; see `nets.build`
    cnn_epochs: int = 0  # at most; 0 means net_epochs
    cnn_learning_rates: tuple[float, ...] = ()  # empty means net_learning_rates
    cnn_patience: int = 0  # 0 means net_patience

    # Adversarial training on the original images, the baseline
    at_epochs: int = 20  # 0 leaves it out
    at_optimizer: str = "adam"
    at_learning_rates: tuple[float, ...] = (1e-3,)
    at_milestones: tuple[int, ...] = ()
    at_weight_decay: float = 0.0
    at_pgd_steps: int = 10
    at_warmup: int = 0  # epochs in which the radius grows to epsilon
    at_eval_every: int = 1

    # Notebook 04: robust features (section 6, Table 8) and the diagnosis
    diagnosed_sets: tuple[str, ...] = DIAGNOSED_SETS
    diagnosed_nets: tuple[str, ...] = ()  # empty means fc_nets and cnns
    at_nets: tuple[str, ...] = ("simple-cnn",)  # trained adversarially; the first makes features
    at_sets: tuple[str, ...] = ("original",)  # on these; on original images in any case
    robust_features: str = ""  # folder of CIFAR_ims and CIFAR_lab, or a .npz; "" makes the set
    n_robust: int = 0  # images to make; 0 means n_support
    robust_steps: int = 100  # of the inversion of each image
    robust_step_size: float = 0.1  # l2 length of a step
    robust_noise: float = 0.0  # share of noise in the images to start from
    n_diagnose: int = 100  # test images of a verdict
    diagnose_kernels: bool = True  # the kernel machine of each set, too, under AutoAttack

    def __post_init__(self):
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, typed(field, getattr(self, field.name)))
        self._check_values()

    def _check_values(self):
        def check(good, key, expected, hint):
            if not good:
                raise ValueError(
                    f"expected {key} {expected}, got {getattr(self, key)!r}; pass {hint}"
                )

        def check_in(key, values):
            check(getattr(self, key) in values, key, f"in {list(values)}", "one of them")

        check(
            re.fullmatch(r"[A-Za-z0-9][\w.-]*", self.name),
            "name", "of letters, digits, '.', '_' and '-'", "a folder name",
        )  # fmt: skip
        check(len(self.notebooks) > 0, "notebooks", "not empty", "for example ['01_kernels']")
        check(
            self.methods and set(self.methods) <= set(METHODS),
            "methods", f"a choice of {list(METHODS)}", "one or both",
        )  # fmt: skip
        check(
            set(self.net_sets) <= set(NET_SETS), "net_sets", f"a choice of {list(NET_SETS)}",
            "none, one or both",
        )  # fmt: skip
        for key in ("diagnosed_sets", "at_sets"):
            check(
                set(getattr(self, key)) <= set(DIAGNOSED_SETS), key,
                f"a choice of {list(DIAGNOSED_SETS)}", "none or some",
            )  # fmt: skip
        check(
            re.fullmatch(r"\w[\w.-]*", self.dataset),
            "dataset", "to be a data set's name", "'mnist' for mnist.npz",
        )  # fmt: skip
        check(
            re.fullmatch(r"(fc|conv)[1-9]\d?", self.kernel),
            "kernel", "such as 'fc3' or 'conv3'", "a family and a number of hidden layers",
        )  # fmt: skip
        check_in("dtype", ("float32", "float64"))
        check_in("norm", ("linf", "l2"))
        check_in("optimizer", OPTIMIZERS)
        for key in ("inner_loss", "outer_loss", "kip_loss"):
            check_in(key, LOSSES)
        for key in (
            "seed", "n_test", "pgd_steps", "block_size", "patience", "kip_patience", "n_original",
            "cnn_epochs", "cnn_patience", "net_batch_size", "net_weight_decay", "net_patience",
            "net_n_test", "at_epochs", "at_warmup", "at_weight_decay", "n_robust",
        ):  # fmt: skip
            check(getattr(self, key) >= 0, key, ">= 0", "0 or more")
        for key in (
            "n_validation", "n_support", "n_target", "eval_pgd_steps", "n_steps", "kip_steps",
            "eval_every", "checkpoint_every", "net_seeds", "net_epochs", "net_pgd_steps",
            "net_eval_every", "n_watch", "at_pgd_steps", "at_eval_every", "robust_steps",
            "n_diagnose",
        ):  # fmt: skip
            check(getattr(self, key) >= 1, key, ">= 1", "1 or more")
        for key in (
            "W_std", "epsilon", "step_size", "learning_rate", "label_learning_rate",
            "kip_learning_rate", "logit_scale", "epsilon_l2", "step_size_l2", "robust_step_size",
        ):  # fmt: skip
            check(getattr(self, key) > 0, key, "> 0", "a positive number")
        check(self.robust_noise <= 1, "robust_noise", "in [0, 1]", "a share")
        for key in ("b_std", "diag_reg", "robust_noise"):
            check(getattr(self, key) >= 0, key, ">= 0", "0 or more")
        for key, pattern, hint in (
            ("fc_nets", FC_NET, "for example ['fc3-1024']"),
            ("cnns", "|".join(CNNS), f"a choice of {list(CNNS)}"),
            ("at_nets", "|".join((FC_NET, *CNNS)), f"a choice of {list(CNNS)} and 'fc3-1024'"),
            ("diagnosed_nets", "|".join((FC_NET, *CNNS)), f"a choice of {list(CNNS)}, 'fc3-1024'"),
            ("net_attacks", ATTACK, "for example ['fgsm', 'pgd40', 'autoattack']"),
        ):
            good = all(re.fullmatch(pattern, name) for name in getattr(self, key))
            check(good, key, "to be known names", hint)
        check_in("net_loss", LOSSES)
        check_in("net_target", ("labels", "softmax", "argmax"))
        check(
            (self.net_loss, self.net_target) != ("cross-entropy", "labels"),
            "net_target", "'softmax' or 'argmax' with cross-entropy", "one of them, or mse",
        )  # fmt: skip
        for key in ("net_optimizer", "at_optimizer"):
            check_in(key, ("adam", "sgd"))
        for key in ("net_learning_rates", "at_learning_rates", "cnn_learning_rates"):
            rates = getattr(self, key)
            good = rates or key == "cnn_learning_rates"
            check(
                good and all(rate > 0 for rate in rates),
                key,
                "to be positive numbers",
                "for example [1.0e-3]",
            )
        if self.norm == "linf":
            check(self.epsilon <= 1, "epsilon", "in [0, 1] pixel units", "8/255 as 0.03137")
        for key, radius in (("step_size", self.epsilon), ("step_size_l2", self.epsilon_l2)):
            check(
                getattr(self, key) <= 2 * radius,
                key, f"<= 2 epsilon = {2 * radius:g}", "a step inside the ball",
            )  # fmt: skip

    @classmethod
    def from_params(cls, params):
        """An experiment from a mapping of field names to values.

        Raises:
          ValueError: an unknown key, a value of another type, or an impossible value.
        """
        unknown = sorted(map(str, set(params) - set(field_names())))
        if unknown:
            raise ValueError(
                f"expected known settings, got {unknown}; pass a choice of {field_names()}"
            )
        experiment = cls(**params)
        if experiment.pgd_steps == 0 and "adv-kip" in experiment.methods:
            raise ValueError(
                "expected pgd_steps >= 1 for the method 'adv-kip', got 0; pass methods ['kip'], "
                "which is Algorithm 1 with no inner steps"
            )
        return experiment

    def check_diagnosis(self):
        """Raises ValueError unless notebook 04 can have the sets that it is asked for."""
        if "adv-kip" in self.diagnosed_sets and not (self.pgd_steps or self.distilled_set):
            raise ValueError(
                "expected pgd_steps >= 1 for the diagnosed set 'adv-kip', got 0; pass "
                "diagnosed_sets without it, or a distilled_set"
            )
        strangers = set(self.at_sets) - {"original", *self.diagnosed_sets}
        if strangers:
            raise ValueError(
                f"expected at_sets among diagnosed_sets, got {sorted(strangers)} besides; pass "
                "them in both, or in neither"
            )
        made = "robust-features" in self.diagnosed_sets and not self.robust_features
        if made and not (self.at_epochs and self.at_nets):
            raise ValueError(
                "expected adversarial training behind the robust features to make, got at_epochs = "
                f"{self.at_epochs}, at_nets = {list(self.at_nets)}; pass both, robust_features for "
                "a set that is there, or diagnosed_sets without it"
            )

    @classmethod
    def from_notebook(cls, namespace):
        """An experiment from a notebook's `globals()`: those variables that are settings."""
        return cls.from_params({k: v for k, v in namespace.items() if k in field_names()})

    @classmethod
    def from_file(cls, path, overrides=()):
        """An experiment from a YAML file and `key=value` strings that replace its values.

        Without a `name` in it, the experiment has the file's.

        Raises:
          ValueError: as `from_params`, naming the file (and what overrides it); OSError: no file.
        """
        source = " ".join([str(path), *(f"--set {item}" for item in overrides)])
        try:
            params = yaml.load(Path(path).read_text(), Loader) or {}
            if not isinstance(params, dict):
                raise ValueError(
                    f"expected 'key: value' lines, got {type(params).__name__}; pass a YAML mapping"
                )
            params.setdefault("name", Path(path).stem)
            for item in overrides:
                key, equals, value = item.partition("=")
                if not equals:
                    raise ValueError(f"expected key=value, got {item!r}; pass --set seed=1")
                params[key.strip()] = yaml.load(value, Loader)
            experiment = cls.from_params(params)
            if "04_shortcomings" in experiment.notebooks:
                experiment.check_diagnosis()
            return experiment
        except (ValueError, yaml.YAMLError) as error:
            raise ValueError(f"{source}: {error}") from None

    def replace(self, **changes):
        """A copy with other values, checked like a new one."""
        return dataclasses.replace(self, **changes)

    def as_kip(self):
        """The KIP baseline of this experiment: Algorithm 1 with no inner maximum."""
        return self.replace(
            pgd_steps=0,
            outer_loss=self.kip_loss,
            logit_scale=1.0,
            learning_rate=self.kip_learning_rate,
            label_learning_rate=self.kip_learning_rate,
            n_steps=self.kip_steps,
            patience=self.kip_patience,
        )

    def for_cnns(self):
        """The experiment with the settings of convolutional networks in the place of the others."""
        return self.replace(
            net_epochs=self.cnn_epochs or self.net_epochs,
            net_learning_rates=self.cnn_learning_rates or self.net_learning_rates,
            net_patience=self.cnn_patience or self.net_patience,
        )

    def net_seed_list(self):
        """The seeds of the networks of each kind, derived from `seed`."""
        return [1000 * self.seed + i for i in range(self.net_seeds)]

    def to_dict(self):
        """All settings as plain JSON values."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    def changes(self):
        """The settings that differ from the defaults, as plain JSON values."""
        default = Experiment().to_dict()
        return {key: value for key, value in self.to_dict().items() if value != default[key]}

    def distillation(self):
        """The settings that a distilled set depends on, other than its number of steps."""
        rest = {
            *OUTER_SETTINGS, "name", "methods", "n_test", "n_steps",
            "kip_steps", "kip_learning_rate", "kip_loss", "kip_patience",
            *ignored_settings("01_kernels"),
        }  # fmt: skip
        return {k: v for k, v in self.to_dict().items() if k not in rest}

    def fingerprint(self):
        """12 hex digits of `distillation`; settings at their defaults do not count."""
        default = Experiment().to_dict()
        changed = {k: v for k, v in self.distillation().items() if v != default[k]}
        return hashlib.sha256(json.dumps(changed, sort_keys=True).encode()).hexdigest()[:12]

    def same_results(self, settings, *notebooks):
        """Whether a record with these settings is of this experiment; new settings may be absent.

        What one of `notebooks` does not depend on does not count.

        Raises:
          ValueError: settings that are not (or no longer) valid.
        """
        old, new = Experiment.from_params(settings).to_dict(), self.to_dict()
        free = {*OUTER_SETTINGS}.union(*map(ignored_settings, notebooks))
        return all(old[key] == new[key] for key in new if key not in free)


def field_names():
    """Names of all settings, in order."""
    return [field.name for field in dataclasses.fields(Experiment)]


def ignored_settings(notebook):
    """Names of the settings that a notebook's results do not depend on."""
    names = field_names()
    return names[names.index(IGNORED_FROM[notebook]) :] if notebook in IGNORED_FROM else []
