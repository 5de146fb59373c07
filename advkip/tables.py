"""Markdown tables of records, with the paper's numbers beside them.
`texts` writes them into README.md and reports/README.md.
"""

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable
from importlib import resources
from statistics import mean, stdev
from typing import NamedTuple

import yaml

from advkip import records
from advkip.attack_names import ATTACKED, Attack
from advkip.config import FREE, Experiment, by_path, sections
from advkip.method_settings import Unrolled

_ADVERSARIALLY = ", adversarial training"
ADVERSARIAL = "original" + _ADVERSARIALLY


def _paper():
    rows = yaml.safe_load(resources.files("advkip").joinpath("paper.yaml").read_text())
    keys = ("table", "dataset", "model", "images", "trained_on", "accuracy")
    for row in rows:
        row["accuracy"] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in row["accuracy"].items()
        }
    return tuple(tuple(row[key] for key in keys) for row in rows)


PAPER = _paper()
"""The paper's tables: table, data set, model, number of training images, what these are,
{attack: accuracy in % or (mean, std)}; see paper.yaml."""


class Line(NamedTuple):
    """A line of a table: who measured which model of which data."""

    data_set: str
    source: str  # "ours", with the radius where it is not the data set's; or "paper, Table 1"
    model: str
    images: int  # it was made from; 0 where that is not known
    trained_on: str
    n_test: int
    cells: dict  # {attack: accuracy in %, (mean, std) or {seed: ...}}; "verdict": {seed: verdict}


OF_NETWORKS = ("remedies.nets", "remedies.copies")
"""What is measured besides kernel machines: theirs are the same lines with and without."""


def lines(found: list[dict]) -> list[Line]:
    """Our lines: kernels, networks by name, adversarial training.

    Records that differ in nothing but the seed are one line.

    Args:
      found: records (see `records.read`).
    """
    cells = defaultdict(lambda: defaultdict(dict))
    for record in found:
        e, seen = record["experiment"], defaultdict(list)
        # The settings keep apart what only looks alike; they are not shown.
        matter = that_matter(record)
        of_kernels = {path: value for path, value in matter.items() if path not in OF_NETWORKS}
        settings = [json.dumps(one, sort_keys=True) for one in (matter, of_kernels)]
        data_set, source = e["dataset"]["name"], _source(e)

        def line_of(row, e=e, settings=settings, seen=seen, data_set=data_set, source=source):
            n = row.get("n_train", e["support"]["n_support"])
            trained_on = _trained_on(row, e)
            # Of sets of one name in one record, the first, the second ...
            known = seen[trained_on]
            if row.get("set") not in known:
                known.append(row.get("set"))
            own = settings[row["model"].startswith("kernel:")]
            apart = f"{own} {known.index(row.get('set'))}"
            return cells[data_set, source, row["model"], n, trained_on, row["n_test"], apart]

        for row in record["rows"]:
            line_of(row)[row["attack"]][row["seed"]] = 100 * row["accuracy"]
        # Without figures, as of an older run, a verdict is no line.
        for diagnosis in record.get("diagnoses", ()):
            if line := line_of(diagnosis):
                line["verdict"][diagnosis["seed"]] = records.verdict_of(diagnosis)
    made = [Line._make((*key[:6], dict(one))) for key, one in cells.items() if one]
    return sorted(made, key=lambda line: _group(line.model, line.trained_on))


def _source(settings):
    """'ours', and under which threat if it is not that of the data set in the paper."""
    norm, epsilon = (settings["threat"][key] for key in ("norm", "epsilon"))
    if (norm, epsilon) == ("linf", RADII.get(settings["dataset"]["name"])):
        return "ours"
    return f"ours, {epsilon:.3g}" + f" in {norm}" * (norm != "linf")


def published(tables: Iterable[str] | None = None) -> list[Line]:
    """The paper's lines, of some of its tables or of all."""
    return [
        Line(data_set, f"paper, Table {number}", model, n, trained_on, 0, accuracies)
        for number, data_set, model, n, trained_on, accuracies in PAPER
        if tables is None or number in tables
    ]


def accuracy(found, *, tables=None, models=None) -> str:
    """Markdown: our rows of each data set (`lines`), and below them the paper's for the same.

    Args:
      found: a list of records (see `records.read`).
      tables: which of the paper's tables to show, as ("1", "2"); None means all.
      models: a regular expression of the models to show, as "kernel:.*"; None means all.
    """
    data_sets = dict.fromkeys(record["experiment"]["dataset"]["name"] for record in found)
    every = [*lines(found), *published(tables)]
    shown = [line for line in every if models is None or re.fullmatch(models, line.model)]
    return "\n\n".join(
        _one_table(name, [line for line in shown if line.data_set == name]) for name in data_sets
    )


def defaults() -> dict:
    """Every setting's default, by path; of `unrolled`, null by default, also those in it."""
    inside = {"unrolled": Unrolled().to_dict()}
    return dict(by_path(Experiment().to_dict())) | dict(by_path(inside))


def that_matter(record) -> dict:
    """The settings that tell experiments of several seeds apart, by path.

    Those at their default are left out, since a record of before there was a setting lacks it; and
    so are sections that none of its notebooks depends on, whose defaults may have changed since.
    """
    free, default = {*FREE, "seed"}, defaults()
    scouts = record["experiment"].get("relabelling", {}).get("rounds")
    own = sections(*{row["notebook"] for row in record["rows"]}, scouts=scouts)
    return {
        path: value
        for path, value in by_path(record["experiment"])
        if path not in free
        and (path not in default or value != default[path] and path.split(".")[0] in own)
    }


def checks(diagnoses, *, columns=6) -> str:
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
    names = list(dict.fromkeys(c["name"] for one in found for c in one["checks"]))
    lines = [["", *titles]]
    lines.append(["**verdict**", *(f"**{records.verdict_of(one)}**" for one in found)])
    for key, name in (
        ("clean", "clean accuracy"), ("claimed", "claimed: under FGSM and PGD"),
        ("strong", "left after every attack"),
    ):  # fmt: skip
        lines.append([name, *(f"{one[key]:.0%}" for one in found)])
    for key, kind in (("right", "correctly classified"), ("wrong", "misclassified")):
        norms = (one["gradients"][key] for one in found)
        cells = ("-" if n is None else f"{n:.2g}" for n in norms)
        lines.append([f"mean gradient norm, {kind} images", *cells])
    for key, part in (("partly", "at least in part"), ("wholly", "to 0")):
        shares = (f"{one['rounded'][key]:.0%}" for one in found)
        lines.append([f"correctly classified images whose gradient float32 rounds {part}", *shares])
    for name in names:
        of_models = [next((c for c in one["checks"] if c["name"] == name), None) for one in found]
        limit = next(c["limit"] for c in of_models if c)
        lines.append([f"{name} (at most {limit:.0%})", *map(_checked_cell, of_models)])
    return markdown(lines, "l" + "r" * len(titles))


def markdown(rows, columns) -> str:
    """A table of rows of text, the head first; each column is 'l', left, or 'r', right."""
    head, *body = rows
    rule = [{"l": "---", "r": "---:"}[one] for one in columns]
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, rule, *body))


def _checked_cell(check):
    if check is None or check["value"] is None:
        return "-"
    return f"{check['value']:.0%}" if check["passed"] else f"**{check['value']:.0%}**"


def _group(model, trained_on):
    """Kernels, networks by name, adversarial training."""
    return is_adversarial(trained_on), not model.startswith("kernel:"), model


def is_adversarial(trained_on: str) -> bool:
    """Whether a `Line` is of adversarial training: not of a set that such a network labelled."""
    return trained_on.endswith(_ADVERSARIALLY)


def _trained_on(row, settings):
    name = " ".join(filter(None, map(row.get, ("trained_on", "set_kernel", "variant"))))
    rounds = settings.get("relabelling", {}).get("rounds")
    attacked = rounds and row["notebook"] != "05_remedies"
    if row["trained_on"] == "relabelled" and attacked and not name.endswith(ATTACKED):
        name += ATTACKED  # in records of before the set's teacher said so
    return name + _ADVERSARIALLY * (row["training"] == "adversarial")


def attacks_of(shown: list[Line]) -> list[str]:
    """The columns of a table: weak attacks first, l2 after l_inf, the verdict last."""
    return sorted({attack for line in shown for attack in line.cells}, key=_rank)


def _one_table(data_set, shown):
    attacks = attacks_of(shown)
    head = [data_set, "model", "images", "trained on", "tested on", *attacks]

    def number(n):
        return f"{n:,}" if n else ""

    body = [
        [line.source, line.model, number(line.images), line.trained_on, number(line.n_test)]
        + [cell(line.cells.get(attack)) for attack in attacks]
        for line in shown
    ]
    return markdown([head, *body], "llrlr" + "r" * len(attacks))


def _rank(attack):
    """Weak attacks first, l2 after l_inf."""
    if attack == "verdict":
        return (True,)
    one = Attack.parse(attack)
    kind = {"clean": 0, "fgsm": 1, "pgd": 2, "autoattack": 5}.get(one.kind, 4)
    return False, one.l2, kind, one.n_steps, attack


def cell(value, digits: int = 2) -> str:
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
        return f"{value[0]:.{digits}f} ± {value[1]:.{digits}f}"
    return f"{value:.{digits}f}"


IN_PIECES = "relabelled fc7-pieces3 + attacked"
WITH_CLASSES = "relabelled classes + attacked"
SUMMARY = (
    ("kernel:fc3", "original"), ("kernel:fc3", "adv-kip"), ("kernel:fc1-mirror", "adv-kip"),
    ("kernel:fc7-pieces3", "adv-kip"), ("fc3-1024", "original"), ("fc3-1024", "adv-kip fc3"),
    ("fc3-1024", "relabelled fc1"), ("fc3-1024", "relabelled fc1 + attacked"),
    ("fc3-1024", WITH_CLASSES), ("fc3-1024-pieces3", "original"), ("fc3-1024-pieces3", IN_PIECES),
    ("fc3-1024-pieces3", WITH_CLASSES), ("simple-cnn", "original"), ("simple-cnn", "adv-kip fc3"),
    ("simple-cnn", IN_PIECES), ("simple-cnn", ADVERSARIAL),
    ("simple-cnn", "adv-kip fc3, adversarial training"),
)  # fmt: skip
"""(model, what it was trained on) of the lines of `summary`."""

USUAL_IMAGES = 5000
"""The size of most training sets in `summary`, which makes its lines comparable."""

DATA_SETS = {"cifar10": "CIFAR-10, 8/255", "mnist": "MNIST, 0.3"}
RADII = {"cifar10": 8 / 255, "mnist": 0.3}
"""What they are attacked with in the paper: only lines of it are compared and drawn."""


def _weight(line):
    return line.n_test, -abs(math.log((line.images or 1) / USUAL_IMAGES))


def compared(ours: list[Line]) -> list[Line]:
    """Those of our lines that were attacked as in the paper."""
    return [line for line in ours if line.source == "ours"]


def summary(found) -> str:
    """`summary_rows` as Markdown."""
    rows = summary_rows(found)
    return markdown(rows, "ll" + "r" * (len(rows[0]) - 2))


def summary_rows(found) -> list[list[str]]:
    """Clean and AutoAttack accuracy of a few models, and the paper's AutoAttack; the head first.

    Of several lines of one model, the one with most test images counts, of these the one with a
    number of training images nearest USUAL_IMAGES as a ratio, and the first of these. Lines of
    another threat than the paper's are left out.

    Args:
      found: a list of records (see `records.read`).
    """
    ours, theirs = (
        {(line.model, line.trained_on, line.data_set): line
         for line in sorted(reversed(some), key=_weight)
         if "autoattack" in line.cells}
        for some in (compared(lines(found)), published())
    )  # fmt: skip
    head = ["model", "trained on"]
    for name in DATA_SETS.values():
        head += [f"{name}: images", "clean", "AutoAttack", "paper"]
    rows = [head]
    for key in SUMMARY:
        rows.append(list(key))
        for data_set in DATA_SETS:
            own, other = ours.get((*key, data_set)), theirs.get((*key, data_set))
            rows[-1] += [f"{own.images:,}" if own else ""]
            rows[-1] += [cell(own.cells.get(k), 1) if own else "" for k in ("clean", "autoattack")]
            rows[-1] += [cell(other.cells["autoattack"], 1) if other else ""]
    return rows
