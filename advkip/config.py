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

OPTIMIZERS = ("adabelief", "adam", "adamax", "adamw", "lion", "nadam", "rmsprop", "sgd", "yogi")
"""Optax optimisers that take nothing but a learning rate."""

LOSSES = ("cross-entropy", "mse")
METHODS = ("adv-kip", "kip")

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
    n_steps: int = 100  # outer steps at most
    learning_rate: float = 1e-2  # of the images
    label_learning_rate: float = 1e-2  # of the labels
    optimizer: str = "adam"
    outer_loss: str = "cross-entropy"
    logit_scale: float = 1.0  # logits are multiplied by it in both losses
    eval_every: int = 10  # outer steps between two lines of the history
    patience: int = 0  # stop after this many steps without improvement; 0 means never
    checkpoint_every: int = 50  # outer steps between two checkpoints

    # KIP, the baseline without an inner maximum (Table 9)
    kip_steps: int = 100
    kip_learning_rate: float = 1e-3
    kip_loss: str = "mse"
    kip_patience: int = 0

    def __post_init__(self):
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, _typed(field, getattr(self, field.name)))
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
        for key in ("seed", "n_test", "pgd_steps", "block_size", "patience", "kip_patience"):
            check(getattr(self, key) >= 0, key, ">= 0", "0 or more")
        for key in (
            "n_validation", "n_support", "n_target", "eval_pgd_steps", "n_steps", "kip_steps",
            "eval_every", "checkpoint_every",
        ):  # fmt: skip
            check(getattr(self, key) >= 1, key, ">= 1", "1 or more")
        for key in (
            "W_std", "epsilon", "step_size", "learning_rate", "label_learning_rate",
            "kip_learning_rate", "logit_scale",
        ):  # fmt: skip
            check(getattr(self, key) > 0, key, "> 0", "a positive number")
        for key in ("b_std", "diag_reg"):
            check(getattr(self, key) >= 0, key, ">= 0", "0 or more")
        if self.norm == "linf":
            check(self.epsilon <= 1, "epsilon", "in [0, 1] pixel units", "8/255 as 0.03137")
        check(
            self.step_size <= 2 * self.epsilon,
            "step_size", f"<= 2 epsilon = {2 * self.epsilon:g}", "a step inside the ball",
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
            params = yaml.load(Path(path).read_text(), _Loader) or {}
            if not isinstance(params, dict):
                raise ValueError(
                    f"expected 'key: value' lines, got {type(params).__name__}; pass a YAML mapping"
                )
            params.setdefault("name", Path(path).stem)
            for item in overrides:
                key, equals, value = item.partition("=")
                if not equals:
                    raise ValueError(f"expected key=value, got {item!r}; pass --set seed=1")
                params[key.strip()] = yaml.load(value, _Loader)
            return cls.from_params(params)
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

    def to_dict(self):
        """All settings as plain JSON values."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    def distillation(self):
        """The settings that a distilled set depends on, other than its number of steps."""
        rest = {
            *OUTER_SETTINGS, "name", "methods", "n_test", "n_steps",
            "kip_steps", "kip_learning_rate", "kip_loss", "kip_patience",
        }  # fmt: skip
        return {k: v for k, v in self.to_dict().items() if k not in rest}

    def fingerprint(self):
        """12 hex digits of `distillation`; settings at their defaults do not count."""
        default = Experiment().to_dict()
        changed = {k: v for k, v in self.distillation().items() if v != default[k]}
        return hashlib.sha256(json.dumps(changed, sort_keys=True).encode()).hexdigest()[:12]

    def same_results(self, settings):
        """Whether a record with these settings is of this experiment; new settings may be absent.

        Raises:
          ValueError: settings that are not (or no longer) valid.
        """
        old, new = Experiment.from_params(settings).to_dict(), self.to_dict()
        return all(old[key] == new[key] for key in new if key not in OUTER_SETTINGS)


def field_names():
    """Names of all settings, in order."""
    return [field.name for field in dataclasses.fields(Experiment)]


def _typed(field, value):
    """`value` if it is of the field's type; integers pass as floats, lists as tuples."""
    if field.type == tuple[str, ...]:
        if isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value):
            return tuple(value)
        expected = "a list of strings"
    else:
        if field.type is float and type(value) is int:
            return float(value)
        if type(value) is field.type and value == value and value not in (_INF, -_INF):
            return value
        expected = f"a finite {field.type.__name__}"
    hint = "; in YAML 1.0e-6 is a number and 1e-6 is text" if field.type is float else ""
    raise ValueError(
        f"expected {field.name} to be {expected}, got {value!r} ({type(value).__name__}); "
        f"pass for example {field.default!r}{hint}"
    )


_INF = float("inf")


class _Loader(yaml.SafeLoader):
    """YAML without silent duplicates: a key that stands twice is an error."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = sorted({str(key) for key in keys if keys.count(key) > 1})
        if twice:
            raise ValueError(f"expected each key once, got {twice} twice; pass one value for each")
        return super().construct_mapping(node, deep)
