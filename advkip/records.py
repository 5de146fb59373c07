"""Results as JSON files. `results.json` is the one source of every table (see `tables`):

{"experiment": {all settings},
 "data": {setting that names a file: digest of its content},
 "environment": {versions, commit, device, seconds},
 "rows": [one measured accuracy each],
 "diagnoses": [one `diagnose.Diagnosis` each, where there are]}
"""

import importlib.metadata
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from advkip import files, preflight
from advkip.config import OUTER_SETTINGS, ignored_settings

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
        self.rows, self.diagnoses = [], []
        self._environment, self._began = environment(), time.time()
        self._data = preflight.digests(experiment)

    def add(self, outcomes, *, model, trained_on, training, diagnosis=None, **more):
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

    def own(self):
        """The record of this run alone: what a notebook's own tables are made from."""
        return {
            "experiment": self.experiment.to_dict(), "data": self._data,
            "environment": self._environment,
            "rows": self.rows, "diagnoses": self.diagnoses,
        }  # fmt: skip

    def learning_rates(self, model, trained_on):
        """What the notebooks before chose for plain training with these settings, as a list."""
        if not self.path.exists():
            return []
        old = read(self.path)
        rows = (row for row in old["rows"] if self._stays(row["notebook"], old))
        asked = {"model": model, "trained_on": trained_on, "training": "plain"}
        rates = {row.get("learning_rate") for row in rows if asked.items() <= row.items()}
        return sorted(rates - {None})

    def _stays(self, notebook, old):
        """Whether what `notebook` wrote into the record `old` still belongs beside our own."""
        pair = notebook, self.notebook
        same = self.experiment.same_results(old["experiment"], *pair)
        same = same and preflight.same_data(old.get("data", {}), self._data, *pair)
        return same and notebook != self.notebook

    def write(self):
        """Writes the file; rows that other notebooks wrote for the same settings stay."""
        settings, digests = self.experiment.to_dict(), self._data
        rows, diagnoses, seconds = [], [], {}
        if self.path.exists():
            old = read(self.path)
            rows, diagnoses = (
                [one for one in old.get(key, []) if self._stays(one["notebook"], old)]
                for key in ("rows", "diagnoses")
            )
            seconds = old["environment"].get("seconds", {})
            seconds = {k: v for k, v in seconds.items() if self._stays(k, old)}
            if rows:
                # This notebook was not given them, so those of its neighbours hold.
                free = ignored_settings(self.notebook)
                settings |= {k: v for k, v in old["experiment"].items() if k in free}
                digests = digests | {k: v for k, v in old.get("data", {}).items() if k in free}
        seconds = {**seconds, self.notebook: round(time.time() - self._began, 1)}
        record = {
            "experiment": settings,
            "data": digests,
            "environment": {**self._environment, "seconds": seconds},
            "rows": rows + self.rows,
        }
        if diagnoses or self.diagnoses:
            record["diagnoses"] = diagnoses + self.diagnoses
        check(record)
        with files.replacing(self.path) as file:
            file.write((json.dumps(record, indent=1) + "\n").encode())
        return record


def read(path):
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


def check(record):
    """Raises ValueError unless `record` has the layout in the module's text."""
    _need(record, ("experiment", "environment", "rows"), "")
    _need(record["experiment"], ("dataset", "n_support"), " in 'experiment'")
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


def check_folder(folder, experiment, advice):
    """Raises ValueError if a folder's results are of other settings than an experiment's.

    A run may go on with more steps. Networks are trained anew when their settings change, and
    nothing else depends on these.
    """
    path = Path(folder) / "results.json"
    if not path.exists():
        return
    old = read(path)["experiment"]
    steps = {k: old[k] for k in ("n_steps", "kip_steps") if old[k] < getattr(experiment, k)}
    if experiment.replace(**steps).same_results(old, "01_kernels"):
        return
    new = experiment.to_dict()
    may_differ = {*steps, *OUTER_SETTINGS, *ignored_settings("01_kernels")}
    changed = sorted(k for k in new.keys() - may_differ if old.get(k, new[k]) != new[k])
    raise ValueError(
        f"expected {path} to be of the same settings, got other {changed}; pass {advice}"
    )


def environment():
    """Versions, commit and device of this process."""
    import jax
    import torch

    versions = {"python": ".".join(map(str, sys.version_info[:3]))}
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


def commit():
    """The commit of the code, '+' appended when code or params differ from it; None without git."""
    root = Path(__file__).parents[1]

    def git(*arguments):
        return subprocess.run(
            ["git", "-C", root, *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", "advkip", "notebooks", "params")
        return git("rev-parse", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def verdict_of(found):
    """The verdict; of an empty claim, records of before there was a fourth say 'genuine'."""
    nothing = found["kept"] is None and found["verdict"] == "genuine"
    return "nothing claimed" if nothing else found["verdict"]
