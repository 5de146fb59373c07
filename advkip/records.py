"""Results as JSON files, the paper's numbers, and the tables that set them side by side.

`results.json` is the one source of every table:

    {"experiment": {all settings},
     "environment": {versions, commit, device, seconds},
     "rows": [one measured accuracy each]}
"""

import importlib.metadata
import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev

from advkip.config import OUTER_SETTINGS

PACKAGES = ("jax", "jaxlib", "neural-tangents", "optax", "numpy", "scipy", "torch", "pyautoattack")

ROW_KEYS = {
    "notebook": str, "model": str, "trained_on": str, "training": str, "attack": str,
    "norm": str, "epsilon": float, "accuracy": float, "n_test": int, "seed": int,
}  # fmt: skip

# Paper tables on kernels: table, data set, kernel, n_support, trained on,
# {attack: accuracy in % or (mean, std)}.
PAPER = (
    ("1", "mnist", "conv3", 5000, "adv-kip", {"clean": 96.31, "fgsm": 94.82, "pgd10": 76.62}),
    ("1", "mnist", "fc7", 30000, "adv-kip", {"clean": 97.21, "fgsm": 67.04, "pgd10": 50.34}),
    ("2", "cifar10", "fc2", 40000, "adv-kip", {"clean": 59.65, "fgsm": 20.49, "pgd6": 20.37}),
    ("2", "cifar10", "fc3", 40000, "adv-kip", {"clean": 59.95, "fgsm": 21.67, "pgd6": 21.56}),
    ("9", "mnist", "fc3", 5000, "kip", {"clean": (97.51, 0.03), "fgsm": (0.0, 0.0)}),
    ("9", "mnist", "fc7", 30000, "kip", {"clean": (98.23, 0.06), "fgsm": (0.0, 0.0)}),
    ("9", "cifar10", "fc3", 1000, "kip", {"clean": (48.45, 0.34), "fgsm": (2.5, 0.21)}),
    ("9", "cifar10", "fc3", 5000, "kip", {"clean": (52.48, 0.23), "fgsm": (0.22, 0.05)}),
    ("9", "cifar10", "fc3", 10000, "kip", {"clean": (54.04, 0.41), "fgsm": (0.1, 0.04)}),
)


class Recorder:
    """Collects the rows of one notebook and merges them into `<folder>/results.json`.

    Make it at the notebook's start: commit and clock are those of that moment.

    Args:
      experiment: the notebook's `config.Experiment`.
      folder: where results.json is.
      notebook: the notebook's name, as '01_kernels'.
    """

    def __init__(self, experiment, folder, notebook):
        self.experiment, self.notebook = experiment, notebook
        self.path = Path(folder) / "results.json"
        self.rows = []
        self._environment, self._began = environment(), time.time()

    def add(self, outcomes, *, model, trained_on, training, **more):
        """Adds one row for each `evaluate.Outcome`; `more` are further columns."""
        for o in outcomes:
            row = {
                "notebook": self.notebook, "model": model, "trained_on": trained_on,
                "training": training, "attack": o.attack, "norm": o.norm, "epsilon": o.epsilon,
                "accuracy": o.accuracy, "n_test": len(o.robust), "seed": self.experiment.seed,
                "accuracy_alone": o.accuracy_alone, **more,
            }  # fmt: skip
            self.rows.append(row)

    def write(self):
        """Writes the file; rows that other notebooks wrote for the same settings stay."""
        settings = self.experiment.to_dict()
        rows, seconds = [], {}
        if self.path.exists():
            old = read(self.path)
            if self.experiment.same_results(old["experiment"]):
                rows = [row for row in old["rows"] if row["notebook"] != self.notebook]
                seconds = old["environment"]["seconds"]
        seconds = {**seconds, self.notebook: round(time.time() - self._began, 1)}
        record = {
            "experiment": settings,
            "environment": {**self._environment, "seconds": seconds},
            "rows": rows + self.rows,
        }
        check(record)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(record, indent=1) + "\n")
        os.replace(temporary, self.path)
        return record


def read(path):
    """A checked record from a results.json.

    Raises:
      ValueError: not such a file, naming what is missing.
    """
    try:
        record = json.loads(Path(path).read_text())
        check(record)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return record


def check(record):
    """Raises ValueError unless `record` has the layout in the module's text."""
    for key in ("experiment", "environment", "rows"):
        if not isinstance(record, dict) or key not in record:
            raise ValueError(f"expected the key {key!r}; pass a results.json of advkip.run")
    for row in record["rows"]:
        for key, kind in ROW_KEYS.items():
            if not isinstance(row.get(key), kind):
                raise ValueError(
                    f"expected {key} ({kind.__name__}) in each row, got {row.get(key)!r}; "
                    "pass a results.json of advkip.run"
                )
        if not 0 <= row["accuracy"] <= 1:
            raise ValueError(f"expected accuracy in [0, 1], got {row['accuracy']}; pass fractions")


def environment():
    """Versions, commit and device of this process."""
    import jax

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


def table(records, *, tables=("1", "2", "9")):
    """Markdown: our rows of each data set, and below them the paper's for the same data set.

    Records that differ in nothing but the seed are one line, mean +- standard deviation.

    Args:
      records: a list of records (see `read`).
      tables: which of the paper's tables to show.
    """
    lines = defaultdict(lambda: defaultdict(dict))
    for record in records:
        e = record["experiment"]
        rest = {k: v for k, v in e.items() if k not in (*OUTER_SETTINGS, "name", "seed")}
        for row in record["rows"]:
            # The settings keep apart what only looks alike; they are not shown.
            settings = json.dumps([rest, row["n_test"]], sort_keys=True)
            key = (e["dataset"], "ours", row["model"], e["n_support"], row["trained_on"], settings)
            lines[key][row["attack"]][row["seed"]] = 100 * row["accuracy"]
    data_sets = list(dict.fromkeys(key[0] for key in lines))
    for number, data_set, kernel, n_support, trained_on, accuracies in PAPER:
        if data_set in data_sets and number in tables:
            source = f"paper, Table {number}"
            lines[data_set, source, f"kernel:{kernel}", n_support, trained_on, ""] = accuracies
    return "\n\n".join(_one_table(data_set, lines) for data_set in data_sets)


def _one_table(data_set, lines):
    lines = {key[1:]: cells for key, cells in lines.items() if key[0] == data_set}
    attacks = list(dict.fromkeys(attack for cells in lines.values() for attack in cells))
    head = [data_set, "model", "n_support", "trained on", *attacks]
    body = [
        [source, model, f"{n:,}", trained_on, *(_cell(cells.get(a)) for a in attacks)]
        for (source, model, n, trained_on, _), cells in lines.items()
    ]
    rule = ["---"] * 4 + ["---:"] * len(attacks)
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, rule, *body])


def _cell(value):
    """A percentage; (mean, std), or {seed: value} of several seeds, becomes mean +- std."""
    if value is None:
        return ""
    if isinstance(value, dict):
        values = list(value.values())
        value = (mean(values), stdev(values)) if len(values) > 1 else values[0]
    if isinstance(value, tuple):
        return f"{value[0]:.2f} ± {value[1]:.2f}"
    return f"{value:.2f}"


def update_readme(readme, paths):
    """Puts the table of the given results.json files between the README's `results` marks."""
    start, end = "<!-- results -->\n", "<!-- /results -->"
    text = Path(readme).read_text()
    before, _, rest = text.partition(start)
    _, mark, after = rest.partition(end)
    if not mark:
        raise ValueError(f"expected {start.strip()} and {end} in {readme}; add them")
    return before + start + table([read(path) for path in paths]) + "\n" + end + after


if __name__ == "__main__":
    # python -m advkip.records README.md reports/*/results.json
    Path(sys.argv[1]).write_text(update_readme(sys.argv[1], sys.argv[2:]))
