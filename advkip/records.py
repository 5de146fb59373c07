"""Results as JSON files. `results.json` is the one source of every table (see `tables`):

{"experiment": {all settings},
 "data": {setting that names a file: digest of its content},
 "environment": {versions, commit, device, seconds},
 "rows": [one measured accuracy each],
 "diagnoses": [one `diagnose.Diagnosis` each, where there are],
 "notes": {notebook: {what: figures of another form}, where there are}}
"""

import importlib.metadata
import json
import os
import subprocess
import sys
import time
from functools import cache, partial
from pathlib import Path

from advkip import files, preflight
from advkip.config import Experiment, sections

PACKAGES = (
    "jax", "jaxlib", "neural-tangents", "optax", "numpy", "scipy", "torch", "torchvision",
    "pyautoattack",
)  # fmt: skip

ROW_KEYS = {
    "notebook": str, "model": str, "trained_on": str, "training": str, "attack": str,
    "norm": str, "epsilon": float, "accuracy": float, "n_test": int, "seed": int,
}  # fmt: skip

DIAGNOSIS_KEYS = ("kept", "verdict", "model", "trained_on", "training", "n_test", "seed")


class Recorder:
    """Collects the rows of one notebook and merges them into `<folder>/results.json`.

    Make it at the notebook's start: commit and clock are those of that moment.

    Args:
      experiment: the notebook's `config.Experiment`.
      folder: where results.json is.
      notebook: the notebook's name, as '01_kernels'.

    Raises:
      ValueError: see `check_folder`.
    """

    def __init__(self, experiment, folder, notebook):
        self.experiment, self.notebook = experiment, notebook
        self.path = Path(folder) / "results.json"
        check_folder(
            folder, experiment, f"output = '{folder}-2' for a folder of its own, or delete it"
        )
        self.rows, self.diagnoses, self.notes = [], [], {}
        self._environment, self._began = environment(), time.time()
        self._data = preflight.digests(experiment)

    def add(self, outcomes, *, model, trained_on, training, diagnosis=None, **more) -> None:
        """Adds one row for each `evaluate.Outcome`; `more` are further columns.

        A `diagnose.Diagnosis` of the same model is kept beside them.
        """
        same = {
            "notebook": self.notebook, "model": model, "trained_on": trained_on,
            "training": training, "n_test": len(outcomes[0].robust), "seed": self.experiment.seed,
            **more,
        }  # fmt: skip
        for o in outcomes:
            row = {
                "attack": o.attack, "norm": o.norm, "epsilon": o.epsilon, "accuracy": o.accuracy,
                "accuracy_alone": o.accuracy_alone,
            }  # fmt: skip
            self.rows.append(same | row)
        if diagnosis:
            self.diagnoses.append(same | diagnosis.to_dict())

    def note(self, **found) -> None:
        """Keeps what is no accuracy of a model under an attack: dicts of numbers and texts."""
        self.notes |= found

    def own(self) -> dict:
        """The record of this run alone: what a notebook's own tables are made from."""
        return {
            "experiment": self.experiment.to_dict(), "data": self._data,
            "environment": self._environment,
            "rows": self.rows, "diagnoses": self.diagnoses,
            "notes": {self.notebook: self.notes} if self.notes else {},
        }  # fmt: skip

    def _stays(self, notebook, old):
        """Whether what `notebook` wrote into the record `old` still belongs beside our own."""
        same = same_results(self.experiment, old["experiment"], notebook)
        same = same and preflight.same_data(old.get("data", {}), self._data, notebook)
        return same and notebook != self.notebook

    def write(self) -> dict:
        """Writes the file; rows that other notebooks wrote for the same settings stay."""
        own = self.own()
        if self.path.exists():
            old = read(self.path)
            stays = cache(partial(self._stays, old=old))
            for key in ("rows", "diagnoses"):
                own[key] = [one for one in old.get(key, []) if stays(one["notebook"])] + own[key]
            others = {k: v for k, v in old.get("notes", {}).items() if stays(k)}
            own["notes"] = others | own["notes"]
            seconds = old["environment"].get("seconds", {})
            seconds = {k: v for k, v in seconds.items() if stays(k)}
            own["data"] = old.get("data", {}) | own["data"]
        else:
            seconds = {}
        seconds |= {self.notebook: round(time.time() - self._began, 1)}
        record = own | {"environment": {**self._environment, "seconds": seconds}}
        for key in ("diagnoses", "notes"):
            if not record[key]:
                del record[key]
        check(record)
        with files.replacing(self.path) as file:
            file.write((json.dumps(record, indent=1) + "\n").encode())
        return record


def read(path) -> dict:
    """A checked record from a results.json.

    Raises:
      ValueError: not such a file, naming what is missing.
    """
    try:
        record = json.loads(Path(path).read_text())
        check(record)
        for found in record.get("diagnoses", ()):
            found["verdict"] = verdict_of(found)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return record


def check(record) -> None:
    """Raises ValueError unless `record` has the layout in the module's text."""
    _need(record, ("experiment", "environment", "rows"), "")
    _need(record["experiment"], ("dataset", "support"), " in 'experiment'")
    for found in record.get("diagnoses", ()):
        _need(found, DIAGNOSIS_KEYS, " in each of the diagnoses")
    for row in record["rows"]:
        for key, kind in ROW_KEYS.items():
            if not isinstance(row.get(key), kind):
                raise ValueError(
                    f"expected {key} ({kind.__name__}) in each row, got {row.get(key)!r}; "
                    "pass a results.json of advkip.run"
                )
        if not 0 <= row["accuracy"] <= 1:
            raise ValueError(f"expected accuracy in [0, 1], got {row['accuracy']}; pass fractions")


def _need(part, keys, where):
    for key in keys:
        if not isinstance(part, dict) or key not in part:
            raise ValueError(f"expected the key {key!r}{where}; pass a results.json of advkip.run")


def check_folder(folder, experiment, advice) -> None:
    """Raises ValueError if a folder's results are of other settings than an experiment's.

    At a constant rate a run may go on with more steps. Networks are trained anew when their
    settings change, and nothing else depends on these.
    """
    path = Path(folder) / "results.json"
    if not path.exists():
        return
    parts = [*sections("01_kernels")]
    if experiment.unrolled and (Path(folder) / "distillation-unrolled.npz").exists():
        parts.append("unrolled")
    old, new = (one.of(*parts) for one in (_settings(path), experiment))
    changed = {key for key in old.keys() | new.keys() if old.get(key) != new.get(key)}
    more = {
        f"{method}.n_steps"
        for method in ("adv_kip", "kip", "unrolled")
        if new.get(f"{method}.schedule") == "constant"
        and old.get(f"{method}.n_steps", 0) < new[f"{method}.n_steps"]
    }
    if changed - more:
        raise ValueError(
            f"expected {path} to be of the same settings, got other {sorted(changed - more)}; pass "
            f"{advice}"
        )


def _settings(path):
    try:
        return Experiment.from_params(read(path)["experiment"])
    except ValueError as error:
        raise ValueError(f"{path}: {error}; delete the file, or pass another folder") from None


def same_results(experiment: Experiment, settings: dict, notebook: str) -> bool:
    """Whether a notebook's results under a record's settings are an experiment's.

    Raises:
      ValueError: settings that are not (or no longer) valid.
    """
    parts = sections(notebook, scouts=experiment.relabelling.rounds)
    return Experiment.from_params(settings).of(*parts) == experiment.of(*parts)


def of_set(chosen, *, n_train: int | None = None) -> dict:
    """Columns of a row that say which `data.TrainingSet` a model was made from."""
    n_train = len(chosen.x) if n_train is None else n_train
    arrays = [part for part in (chosen.x, chosen.y, chosen.features) if part is not None]
    return {"n_train": n_train, "set": files.digest_of_arrays(*arrays)}


def of_training(chosen, found, trained=None) -> dict:
    """Columns of a row about a network of a `training.Search` on a set, and its epoch."""
    columns = of_set(chosen) | {"learning_rate": found.learning_rate}
    columns["set_kernel"] = chosen.kernel.name if chosen.kernel else chosen.teacher
    return columns | ({"epoch": trained.epoch} if trained else {})


def title(model: str, trained_on: str, training: str) -> str:
    """What figures and tables call a model."""
    return f"{model}: {trained_on}" + ", adversarially" * (training == "adversarial")


def folder_of(experiment: Experiment, output: str | None) -> str:
    """Where a notebook's results go: `output`, or reports/<name> of the project."""
    above = ".." if Path.cwd().name == "notebooks" else "."
    return output or str(Path(above) / "reports" / experiment.name)


def environment() -> dict:
    """Versions, commit and device of this process."""
    import jax
    import torch

    versions: dict = {"python": ".".join(map(str, sys.version_info[:3]))}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    device = jax.devices()[0]
    return {
        "versions": versions,
        "commit": commit(),
        "device": f"{jax.device_count()} x {device.device_kind} ({device.platform})",
        "torch_device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "cores": os.cpu_count(),
    }


def commit() -> str | None:
    """The commit of the code, '+' appended when code or params differ from it; None without git.

    A copy that has no git, as on a cluster's node, is told by the environment variable
    ADVKIP_COMMIT.
    """
    if told := os.environ.get("ADVKIP_COMMIT"):
        return told
    root = files.ROOT

    def git(*arguments):
        return subprocess.run(
            ["git", "-C", root, *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", "advkip", "notebooks", "params")
        return git("rev-parse", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def verdict_of(found) -> str:
    """The verdict; of an empty claim, records of before there was a fourth say 'genuine'."""
    nothing = found["kept"] is None and found["verdict"] == "genuine"
    return "nothing claimed" if nothing else found["verdict"]
