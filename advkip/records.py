"""Results as JSON files, the paper's numbers, and the tables that set them side by side.

`results.json` is the one source of every table:

    {"experiment": {all settings},
     "environment": {versions, commit, device, seconds},
     "rows": [one measured accuracy each],
     "diagnoses": [one `diagnose.Diagnosis` each, where there are]}
"""

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev

from advkip import files
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

ADVERSARIAL = "original, adversarial training"

# The paper's tables: table, data set, model, number of training images (0: not stated), trained on,
# {attack: accuracy in % or (mean, std)}. "adv-kip fc3": the set that the FC3 kernel made.
PAPER = (
    ("1", "mnist", "kernel:conv3", 5000, "adv-kip", {
        "clean": 96.31, "fgsm": 94.82, "pgd10": 76.62}),
    ("1", "mnist", "kernel:fc7", 30000, "adv-kip", {"clean": 97.21, "fgsm": 67.04, "pgd10": 50.34}),
    ("2", "cifar10", "kernel:fc2", 40000, "adv-kip", {
        "clean": 59.65, "fgsm": 20.49, "pgd6": 20.37}),
    ("2", "cifar10", "kernel:fc3", 40000, "adv-kip", {
        "clean": 59.95, "fgsm": 21.67, "pgd6": 21.56}),
    ("3", "mnist", "fc3-1024", 30000, "adv-kip fc3", {
        "clean": 80.08, "fgsm": 77.67, "pgd40": 53.85}),
    ("3", "mnist", "fc5-1024", 30000, "adv-kip fc5", {
        "clean": 97.75, "fgsm": 64.83, "pgd40": 35.14}),
    ("3", "mnist", "fc7-1024", 30000, "adv-kip fc7", {
        "clean": 97.45, "fgsm": 70.58, "pgd40": 40.70}),
    ("4", "cifar10", "fc2-1024", 40000, "adv-kip fc2", {
        "clean": 46.29, "fgsm": 20.98, "pgd20": 16.89}),
    ("4", "cifar10", "fc3-1024", 40000, "adv-kip fc3", {
        "clean": 46.33, "fgsm": 40.07, "pgd20": 39.15}),
    ("5", "mnist", "simple-cnn", 30000, "adv-kip fc3", {
        "clean": (98.15, 0.12), "fgsm": (98.06, 0.18), "pgd40": (97.17, 0.10), "autoattack": 0.0}),
    ("5", "mnist", "simple-cnn", 30000, "adv-kip fc5", {
        "clean": (97.96, 0.55), "fgsm": (97.87, 0.64), "pgd40": (97.20, 0.74), "autoattack": 0.0}),
    ("5", "mnist", "simple-cnn", 30000, "adv-kip fc7", {
        "clean": (98.03, 0.16), "fgsm": (97.91, 0.22), "pgd40": (97.14, 0.43), "autoattack": 0.0}),
    ("5", "mnist", "simple-cnn", 0, ADVERSARIAL, {
        "clean": 99.11, "fgsm": 97.52, "pgd40": 95.82, "autoattack": 88.77}),
    ("6", "cifar10", "simple-cnn", 50000, "adv-kip fc3", {
        "clean": (72.10, 0.10), "fgsm": (67.45, 0.37), "pgd20": (67.03, 0.24)}),
    ("6", "cifar10", "alexnet", 50000, "adv-kip fc3", {
        "clean": (68.87, 0.76), "fgsm": (49.30, 0.69), "pgd20": (49.06, 0.63)}),
    ("6", "cifar10", "vgg11", 50000, "adv-kip fc3", {
        "clean": (74.88, 0.45), "fgsm": (53.98, 9.71), "pgd20": (53.18, 10.32)}),
    ("7", "cifar10", "simple-cnn", 0, ADVERSARIAL, {
        "clean": 58.07, "fgsm": 33.94, "pgd20": 31.49, "pgd20-l2": 43.89, "autoattack": 26.18}),
    ("7", "cifar10", "alexnet", 0, ADVERSARIAL, {
        "clean": 44.35, "fgsm": 30.12, "pgd20": 24.41, "pgd20-l2": 16.68, "autoattack": 18.95}),
    ("7", "cifar10", "vgg11", 0, ADVERSARIAL, {
        "clean": 69.65, "fgsm": 31.30, "pgd20": 24.68, "pgd20-l2": 46.67, "autoattack": 23.85}),
    # Which PGD column of Table 8 its readable figures stand in is uncertain.
    ("8", "cifar10", "simple-cnn", 50000, "robust-features", {
        "clean": (65.25, 0.44), "pgd20-l2": (60.73, 0.24)}),
    ("8", "cifar10", "alexnet", 50000, "robust-features", {
        "clean": (57.07, 1.25), "pgd20": (25.12, 5.46)}),
    ("8", "cifar10", "vgg11", 50000, "robust-features", {
        "clean": (68.41, 1.95), "pgd20": (42.92, 11.23)}),
    ("9", "mnist", "kernel:fc3", 5000, "kip", {"clean": (97.51, 0.03), "fgsm": (0.0, 0.0)}),
    ("9", "mnist", "kernel:fc7", 30000, "kip", {"clean": (98.23, 0.06), "fgsm": (0.0, 0.0)}),
    ("9", "cifar10", "kernel:fc3", 1000, "kip", {"clean": (48.45, 0.34), "fgsm": (2.5, 0.21)}),
    ("9", "cifar10", "kernel:fc3", 5000, "kip", {"clean": (52.48, 0.23), "fgsm": (0.22, 0.05)}),
    ("9", "cifar10", "kernel:fc3", 10000, "kip", {"clean": (54.04, 0.41), "fgsm": (0.1, 0.04)}),
    ("10", "cifar10", "simple-cnn", 50000, "adv-kip fc3", {
        "autoattack": (0.0, 0.0), "pgd20-l2": (70.79, 0.07)}),
    ("10", "cifar10", "alexnet", 50000, "adv-kip fc3", {
        "autoattack": (0.89, 1.41), "pgd20-l2": (50.07, 1.42)}),
    ("10", "cifar10", "vgg11", 50000, "adv-kip fc3", {
        "autoattack": (0.27, 0.18), "pgd20-l2": (59.60, 6.71)}),
)  # fmt: skip


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
        self.rows, self.diagnoses = [], []
        self._environment, self._began = environment(), time.time()

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
            "experiment": self.experiment.to_dict(), "environment": self._environment,
            "rows": self.rows, "diagnoses": self.diagnoses,
        }  # fmt: skip

    def learning_rates(self, model, trained_on):
        """What the notebooks before chose for plain training with these settings, as a list."""
        if not self.path.exists():
            return []
        old = read(self.path)
        rows = (row for row in old["rows"] if self._stays(row["notebook"], old["experiment"]))
        asked = {"model": model, "trained_on": trained_on, "training": "plain"}
        rates = {row.get("learning_rate") for row in rows if asked.items() <= row.items()}
        return sorted(rates - {None})

    def _stays(self, notebook, settings):
        """Whether what `notebook` wrote with `settings` still belongs beside our own."""
        same = self.experiment.same_results(settings, notebook, self.notebook)
        return same and notebook != self.notebook

    def write(self):
        """Writes the file; rows that other notebooks wrote for the same settings stay."""
        settings = self.experiment.to_dict()
        rows, diagnoses, seconds = [], [], {}
        if self.path.exists():
            old = read(self.path)
            rows, diagnoses = (
                [one for one in old.get(key, []) if self._stays(one["notebook"], old["experiment"])]
                for key in ("rows", "diagnoses")
            )
            seconds = old["environment"].get("seconds", {})
            seconds = {k: v for k, v in seconds.items() if self._stays(k, old["experiment"])}
            if rows:
                # This notebook was not given them, so those of its neighbours hold.
                free = ignored_settings(self.notebook)
                settings |= {k: v for k, v in old["experiment"].items() if k in free}
        seconds = {**seconds, self.notebook: round(time.time() - self._began, 1)}
        record = {
            "experiment": settings,
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
            found["verdict"] = _verdict(found)
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


def table(records, *, tables=None, models=None):
    """Markdown: our rows of each data set, and below them the paper's for the same data set.

    Ours are in groups: kernels, networks by name, adversarial training. Records that differ in
    nothing but the seed are one line, mean +- standard deviation.

    Args:
      records: a list of records (see `read`).
      tables: which of the paper's tables to show, as ("1", "2"); None means all.
      models: a regular expression of the models to show, as "kernel:.*"; None means all.
    """
    lines = defaultdict(lambda: defaultdict(dict))
    for record in records:
        e = record["experiment"]
        rest = {k: v for k, v in e.items() if k not in (*OUTER_SETTINGS, "name", "seed")}
        # The settings keep apart what only looks alike; they are not shown.
        settings = json.dumps(rest, sort_keys=True)

        def line_of(row, e=e, settings=settings):
            n = row.get("n_train", e["n_support"])
            trained_on = _trained_on(row)
            return lines[e["dataset"], "ours", row["model"], n, trained_on, row["n_test"], settings]

        for row in record["rows"]:
            line_of(row)[row["attack"]][row["seed"]] = 100 * row["accuracy"]
        # Without figures, as of an older run, a verdict is no line.
        for found in record.get("diagnoses", ()):
            if line := line_of(found):
                line["verdict"][found["seed"]] = _verdict(found)
    data_sets = list(dict.fromkeys(key[0] for key in lines))
    lines = {key: cells for key, cells in lines.items() if cells}
    lines = {key: lines[key] for key in sorted(lines, key=lambda key: _group(key[2], key[4]))}
    for number, data_set, model, n, trained_on, accuracies in PAPER:
        if data_set in data_sets and (tables is None or number in tables):
            source = f"paper, Table {number}"
            lines[data_set, source, model, n, trained_on, 0, ""] = accuracies
    shown = {k: v for k, v in lines.items() if models is None or re.fullmatch(models, k[2])}
    return "\n\n".join(_one_table(data_set, shown) for data_set in data_sets)


def checks_table(diagnoses, *, columns=6):
    """Markdown: one line a check, one column a model; what fails is in bold.

    A check fails when its share exceeds the limit beyond doubt (see `verdict`).

    Args:
      diagnoses: {title: `diagnose.Diagnosis.to_dict()`, or the like in a record}.
      columns: models in one table; more go into further tables below it.
    """
    titles = list(diagnoses)
    parts = [titles[start : start + columns] for start in range(0, len(titles), columns)]
    return "\n\n".join(_checks_part({one: diagnoses[one] for one in part}) for part in parts)


def _checks_part(diagnoses):
    titles, found = list(diagnoses), list(diagnoses.values())
    checks = list(dict.fromkeys(c["name"] for one in found for c in one["checks"]))
    lines = [["", *titles], ["---", *["---:"] * len(titles)]]
    lines.append(["**verdict**", *(f"**{_verdict(one)}**" for one in found)])
    for key, name in (
        ("clean", "clean accuracy"), ("claimed", "claimed: under FGSM and PGD"),
        ("strong", "left after every attack"),
    ):  # fmt: skip
        lines.append([name, *(f"{one[key]:.0%}" for one in found)])
    for key in ("right", "wrong"):
        norms = (one["gradients"][key] for one in found)
        cells = ("-" if n is None else f"{n:.2g}" for n in norms)
        lines.append([f"mean gradient norm, images read {key}", *cells])
    for key, part in (("partly", "at least in part"), ("wholly", "to 0")):
        shares = (f"{one['rounded'][key]:.0%}" for one in found)
        lines.append([f"images read right whose gradient float32 rounds {part}", *shares])
    for name in checks:
        of_models = [next((c for c in one["checks"] if c["name"] == name), None) for one in found]
        limit = next(c["limit"] for c in of_models if c)
        lines.append([f"{name} (at most {limit:.0%})", *map(_checked_cell, of_models)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _verdict(found):
    """The verdict; of an empty claim, records of before there was a fourth say 'genuine'."""
    nothing = found["kept"] is None and found["verdict"] == "genuine"
    return "nothing claimed" if nothing else found["verdict"]


def _checked_cell(check):
    if check is None or check["value"] is None:
        return "-"
    return f"{check['value']:.0%}" if check["passed"] else f"**{check['value']:.0%}**"


def _group(model, trained_on):
    """Kernels, networks by name, adversarial training."""
    return "adversarial" in trained_on, not model.startswith("kernel:"), model


def _trained_on(row):
    name = f"{row['trained_on']} {row.get('set_kernel', '')}".strip()
    return name + ", adversarial training" * (row["training"] == "adversarial")


def _one_table(data_set, lines):
    lines = {key[1:]: cells for key, cells in lines.items() if key[0] == data_set}
    attacks = sorted({attack for cells in lines.values() for attack in cells}, key=_rank)
    head = [data_set, "model", "images", "trained on", "tested on", *attacks]

    def number(n):
        return f"{n:,}" if n else ""

    body = [
        [source, model, number(n), trained_on, number(n_test)]
        + [_cell(cells.get(a)) for a in attacks]
        for (source, model, n, trained_on, n_test, _), cells in lines.items()
    ]
    rule = ["---", "---", "---:", "---", "---:"] + ["---:"] * len(attacks)
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, rule, *body])


def _rank(attack):
    """Weak attacks first, l2 after l_inf."""
    base = attack.removesuffix("-l2")
    steps = re.match(r"pgd(\d+)", base)
    kind = {"clean": 0, "fgsm": 1, "autoattack": 5}.get(base, 2 if steps else 4)
    return attack == "verdict", attack.endswith("-l2"), kind, int(steps[1]) if steps else 0, attack


def _cell(value):
    """A percentage; (mean, std), or {seed: value} of several seeds, becomes mean +- std.

    Of {seed: verdict}, the verdicts that occur.
    """
    if value is None:
        return ""
    if isinstance(value, dict):
        values = list(value.values())
        if isinstance(values[0], str):
            return ", ".join(dict.fromkeys(values))
        value = (mean(values), stdev(values)) if len(values) > 1 else values[0]
    if isinstance(value, tuple):
        return f"{value[0]:.2f} ± {value[1]:.2f}"
    return f"{value:.2f}"


def update_readme(readme, paths):
    """The README's text with the table of results.json files between its `results` marks."""
    start, end = "<!-- results -->\n", "<!-- /results -->"
    text = Path(readme).read_text()
    before, _, rest = text.partition(start)
    _, mark, after = rest.partition(end)
    if not mark:
        raise ValueError(f"expected {start.strip()} and {end} in {readme}; add them")
    return before + start + table([read(path) for path in paths]) + "\n" + end + after


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit("usage: python -m advkip.records README.md reports/*/results.json")
    Path(sys.argv[1]).write_text(update_readme(sys.argv[1], sys.argv[2:]))
