"""One experiment: sections of settings, what depends on which, read from a params file.

A params file is YAML with the fields of `Experiment`, whose sections are in `settings`; what it
leaves out keeps its default. `params/schema.json` is made from here.
"""

import json
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, get_args

import yaml
from pydantic import BeforeValidator, Field, model_validator

from advkip import method_settings as m
from advkip import settings as s
from advkip.checked import Loader, Section, Strings, merged

ROOT = Path(__file__).parents[1]
"""The project's folder, where relative paths of settings are looked for."""


def _over(default):
    """A section that is given in part is completed from an instance's values."""
    return BeforeValidator(
        lambda given: default.model_dump() | given if isinstance(given, dict) else given
    )


class Experiment(Section):
    """Settings of one experiment, shared by all notebooks. Paper: "Algorithm 1", "Settings".

    Distances (epsilon, step_size) are in pixel units of [0, 1].
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.-]*$")] = "scratch"
    """folder below reports/"""
    notebooks: Annotated[Strings, Field(min_length=1)] = ("01_kernels",)
    """files below notebooks/, in this order"""
    seed: Annotated[int, Field(ge=0)] = 0
    """every random choice derives from it"""
    dataset: s.Data = s.Data()
    kernel: s.Kernel = s.Kernel()
    support: s.Support = s.Support()
    threat: s.Threat = s.Threat()
    """of distillation, training and evaluation"""
    threat_l2: s.ThreatL2 = s.ThreatL2()
    adv_kip: m.Distillation | None = m.Distillation()
    """null leaves it out"""
    kip: Annotated[m.Distillation | None, _over(m.KIP)] = m.KIP
    """the baseline without an inner maximum (Table 9); null leaves it out"""
    unrolled: m.Unrolled | None = None
    """Algorithm 1 with networks in the kernel's place; null leaves it out"""
    networks: s.Common = s.Common()
    fully_connected: Annotated[s.Networks, _over(s.FULLY_CONNECTED)] = s.FULLY_CONNECTED
    """of notebook 02"""
    cnns: Annotated[s.Networks, _over(s.CONVOLUTIONAL)] = s.CONVOLUTIONAL
    """of notebook 03"""
    adversarial_training: s.AdversarialTraining | None = s.AdversarialTraining()
    """null leaves it out"""
    relabelling: s.Relabelling = s.Relabelling()
    robust_features: s.RobustFeatures = s.RobustFeatures()
    diagnosis: s.Diagnosis = s.Diagnosis()
    remedies: m.Remedies = m.Remedies()
    evaluation: s.Evaluation = s.Evaluation()

    @model_validator(mode="after")
    def _relations(self):
        if self.kip and self.kip.pgd_steps:
            raise ValueError(
                f"expected kip.pgd_steps 0, got {self.kip.pgd_steps}; pass pgd_steps in adv_kip"
            )
        if self.adv_kip and not self.adv_kip.pgd_steps:
            raise ValueError(
                "expected adv_kip.pgd_steps >= 1, got 0; pass adv_kip: null, kip is Algorithm 1 "
                "with no inner steps"
            )
        precision = self.adv_kip.attack_precision if self.adv_kip else "full"
        if self.kernel.dtype == "float64" and precision != "full":
            raise ValueError(
                f"expected adv_kip.attack_precision 'full' with kernel.dtype 'float64', got "
                f"{precision!r}; pass 'full', or dtype 'float32'"
            )
        if "01_kernels" in self.notebooks and not self.methods:
            raise ValueError("expected adv_kip or kip, got null for both; pass settings of one")
        if self.unrolled and self.unrolled.start_from == "adv-kip" and not self.adv_kip:
            raise ValueError(
                "expected settings of adv_kip behind unrolled.start_from 'adv-kip', got null; pass "
                "them, or start_from 'original'"
            )
        asked = dict.fromkeys(("02_transfer", "03_cnns"), self.networks.sets)
        for notebook, sets in (asked | {"04_shortcomings": self.diagnosis.sets}).items():
            teacher = self.relabelling.teacher or any(
                map(s.is_path, sets)
            )  # one may be the teacher
            needed = {"adv-kip" if name == "relabelled" and not teacher else name for name in sets}
            made = needed.intersection(get_args(s.Method))
            missing = [name for name in made if not self.distillation(name)]
            at = self.adversarial_training
            robust = self.relabelling.teacher == s.ADVERSARIAL and "relabelled" in sets
            if notebook in self.notebooks and robust and not (at and at.nets):
                raise ValueError(
                    "expected adversarial_training with nets behind relabelling.teacher "
                    f"{s.ADVERSARIAL!r}, got none; pass them, or the path of a distilled set"
                )
            if notebook in self.notebooks and missing:
                raise ValueError(
                    f"expected settings of {sorted(missing)}, which {notebook} trains on, got "
                    "null; pass them, or sets without it"
                )
            own = {"02_transfer": self.fully_connected.nets, "03_cnns": self.cnns.nets}
            if notebook in self.notebooks and "relabelled" in sets:
                self._check_features(own.get(notebook, self.diagnosed_nets()))
        if "04_shortcomings" in self.notebooks:
            self._check_diagnosis()
        if "05_remedies" in self.notebooks:
            if not self.adv_kip:
                raise ValueError(
                    "expected settings of adv_kip, which 05_remedies varies, got null; pass them"
                )
            if self.remedies.copies:
                self._check_features([self.remedies.student])
            self.variants()
        return self

    def _check_diagnosis(self):
        at, sets = self.adversarial_training, self.diagnosis.sets
        files = set(filter(s.is_path, sets))  # whose sets may have any name
        if not files and (strangers := set(at.sets if at else ()) - {"original", *sets}):
            raise ValueError(
                f"expected adversarial_training.sets among diagnosis.sets, got {sorted(strangers)} "
                "besides; pass them in both, or in neither"
            )
        if "robust-features" in sets and not (at and at.nets):
            raise ValueError(
                "expected adversarial training behind the robust features to make, got none; pass "
                "adversarial_training with nets, diagnosis.sets with the path of a set that is "
                "there, or without it"
            )

    def _check_features(self, nets):
        relabelling = self.relabelling
        scouts = (relabelling.scout,) * bool(relabelling.rounds)
        for net in (*nets, *scouts):
            section = self.section_of(net)
            if relabelling.shift and not section.takes_features:
                raise ValueError(
                    f"expected loss 'mse' and target 'labels' for {net} with relabelling.shift, "
                    f"got {section.loss!r} and {section.target!r}; pass these, or shift 0"
                )

    def section_of(self, net: str) -> s.Networks:
        """The section whose recipe a network of that name is plainly trained with."""
        return self.fully_connected if net.startswith("fc") else self.cnns

    def variants(self) -> dict[str, "Experiment"]:
        """The experiments of `remedies.variants`; their own names are folders for checkpoints.

        Raises:
          ValueError: a variant that is no experiment.
        """
        own, found = self.of(*MACHINE, "adv_kip"), {}
        for one in self.remedies.variants:
            changes = one.to_dict()
            digest = zlib.crc32(json.dumps([own, changes]).encode())
            name = f"{file_name(changes.pop('name')).strip('.-')}-{digest:08x}"
            try:
                changes |= {"name": name, "notebooks": ["01_kernels"]}
                found[one.name] = self.replace(**changes)
            except ValueError as error:
                raise ValueError(
                    f"expected remedies.variants to be experiments, got {one.name!r}: {error}"
                ) from None
        return found

    @property
    def methods(self) -> tuple[s.Method, ...]:
        """Which sets are distilled."""
        return tuple(name for name in s.METHODS if self.distillation(name))

    def distillation(self, method: s.Method) -> m.Distillation | None:
        """The settings of a method."""
        return {"adv-kip": self.adv_kip, "kip": self.kip, "unrolled": self.unrolled}[method]

    @classmethod
    def from_notebook(cls, namespace: Mapping[str, Any], notebook: str) -> "Experiment":
        """An experiment from a notebook's `globals()`: those variables that are sections."""
        given = {k: v for k, v in namespace.items() if k in cls.model_fields}
        return cls.from_params(given | {"notebooks": [notebook]})

    @classmethod
    def from_file(
        cls, path: str | Path, overrides: Iterable[str] = (), given: Mapping[str, Any] | None = None
    ) -> "Experiment":
        """An experiment from a YAML file and `path.of.key=value` strings that replace its values.

        Without a `name` in it, the experiment has the file's; `given` are further values by path.
        Of a file with a `grid` (see `grid`) it is what the grid changes.

        Raises:
          ValueError: as `from_params`, naming the file (and what overrides it); OSError: no file.
        """
        params = read_params(path, overrides)
        params.pop("grid", None)
        try:
            for key, value in (given or {}).items():
                params = merged(params, _at(key, value))
            return cls.from_params(params)
        except ValueError as error:
            text = str(error).replace("\n", "\n  ")
            raise ValueError(f"{_source(path, overrides)}: {text}") from None

    def changes(self) -> dict[str, Any]:
        """The settings that differ from the defaults, as plain JSON values."""
        default = Experiment().to_dict()
        found = {}
        for key, value in self.to_dict().items():
            if isinstance(value, dict) and isinstance(default[key], dict):
                value = {k: v for k, v in value.items() if v != default[key][k]}
                if value:
                    found[key] = value
            elif value != default[key]:
                found[key] = value
        return found

    def of(self, *sections: str, without: Iterable[str] = ()) -> dict[str, Any]:
        """The settings of some sections that results depend on, as plain JSON values by path."""
        free = {*FREE, *without}
        settings = self.to_dict()
        found = by_path({section: settings[section] for section in sections})
        return {path: value for path, value in found if path not in free}

    def diagnosed_nets(self) -> tuple[str, ...]:
        """Networks of notebook 04 with plain training."""
        every = (*self.fully_connected.nets, *self.cnns.nets)
        return every if self.diagnosis.nets is None else self.diagnosis.nets

    def net_seeds(self) -> list[int]:
        """The seeds of the networks of each kind, derived from `seed`."""
        return [1000 * self.seed + i for i in range(self.networks.n_seeds)]


def file_name(text: object) -> str:
    """A text as a part of a folder's name: 'n_support500'."""
    return re.sub(r"[^\w.-]", "-", str(text))


def by_path(settings: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """('section.key', value) of all settings."""
    for key, value in settings.items():
        parts = value.items() if isinstance(value, dict) else [("", value)]
        yield from ((f"{key}.{part}".strip("."), one) for part, one in parts)


FREE = (
    "name", "notebooks", "dataset.folder", "kernel.block_size", "adv_kip.checkpoint_every",
    "kip.checkpoint_every", "unrolled.checkpoint_every", "adv_kip.keep_every", "kip.keep_every",
    "unrolled.keep_every",
)  # fmt: skip
"""Settings that no result depends on."""

MACHINE = ("seed", "dataset", "kernel", "support", "threat")
"""Sections that a kernel machine on a support set depends on."""

_NETS = (
    *MACHINE, "adv_kip", "kip", "unrolled", "threat_l2", "networks", "relabelling", "evaluation",
)  # fmt: skip
SECTIONS = {
    "00_walkthrough": (),
    "01_kernels": (*MACHINE, "adv_kip", "kip"),
    "02_transfer": (*_NETS, "fully_connected", "adversarial_training"),
    "03_cnns": (*_NETS, "cnns", "adversarial_training"),
    "04_shortcomings": (
        *_NETS, "fully_connected", "cnns", "adversarial_training", "robust_features", "diagnosis",
    ),
    "05_remedies": (*_NETS, "fully_connected", "cnns", "diagnosis", "remedies"),
}  # fmt: skip
"""Notebook: the sections that its results depend on. Another notebook depends on all."""


def sections(*notebooks: str, scouts: object = False) -> list[str]:
    """The sections that results of these notebooks depend on; `scouts` adds both of networks."""
    every = tuple(Experiment.model_fields)
    asked = {section for one in notebooks for section in SECTIONS.get(one, every)}
    asked.update(("fully_connected", "cnns") if scouts else ())
    return [section for section in every if section in asked]


def read_params(path: str | Path, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """The mapping in a params file with `path.of.key=value` strings merged into it, unchecked.

    Raises:
      ValueError: no YAML mapping, or an override that is none; OSError: no file.
    """
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
            params = merged(params, _at(key.strip(), yaml.load(value, Loader)))
        return params
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{_source(path, overrides)}: {error}") from None


def _at(path, value):
    """{"a": {"b": value}} of "a.b"."""
    for part in reversed(path.split(".")):
        value = {part: value}
    return value


def _source(path, overrides):
    return " ".join([str(path), *(f"--set {item}" for item in overrides)])


def schema() -> str:
    """The JSON schema of a params file, for editors: `python -m advkip.config`."""
    found = Experiment.model_json_schema()
    found["properties"]["grid"] = {
        "type": "object",
        "description": "settings by path, each with its values, or a word of your own with named "
        "settings: one experiment for each point",
        "additionalProperties": {
            "anyOf": [
                {"type": "array", "minItems": 1},
                {"type": "object", "additionalProperties": {"type": "object"}, "minProperties": 1},
            ]
        },
    }
    return json.dumps(found, indent=1) + "\n"


if __name__ == "__main__":
    print(schema(), end="")
