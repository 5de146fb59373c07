"""Markdown tables of records, with the paper's numbers beside them.

`python -m advkip.tables README.md reports/*/results.json` writes the table into a README.
"""

import json
import re
import sys
from collections import defaultdict
from importlib import resources
from pathlib import Path
from statistics import mean, stdev

import yaml

from advkip import records
from advkip.config import OUTER_SETTINGS

ADVERSARIAL = "original, adversarial training"


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


def accuracy(found, *, tables=None, models=None):
    """Markdown: our rows of each data set, and below them the paper's for the same data set.

    Ours are in groups: kernels, networks by name, adversarial training. Records that differ in
    nothing but the seed are one line, mean +- standard deviation.

    Args:
      found: a list of records (see `records.read`).
      tables: which of the paper's tables to show, as ("1", "2"); None means all.
      models: a regular expression of the models to show, as "kernel:.*"; None means all.
    """
    lines = defaultdict(lambda: defaultdict(dict))
    for record in found:
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
        for diagnosis in record.get("diagnoses", ()):
            if line := line_of(diagnosis):
                line["verdict"][diagnosis["seed"]] = records.verdict_of(diagnosis)
    data_sets = list(dict.fromkeys(key[0] for key in lines))
    lines = {key: cells for key, cells in lines.items() if cells}
    lines = {key: lines[key] for key in sorted(lines, key=lambda key: _group(key[2], key[4]))}
    for number, data_set, model, n, trained_on, accuracies in PAPER:
        if data_set in data_sets and (tables is None or number in tables):
            source = f"paper, Table {number}"
            lines[data_set, source, model, n, trained_on, 0, ""] = accuracies
    shown = {k: v for k, v in lines.items() if models is None or re.fullmatch(models, k[2])}
    return "\n\n".join(_one_table(data_set, shown) for data_set in data_sets)


def checks(diagnoses, *, columns=6):
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
    lines = [["", *titles], ["---", *["---:"] * len(titles)]]
    lines.append(["**verdict**", *(f"**{records.verdict_of(one)}**" for one in found)])
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
    for name in names:
        of_models = [next((c for c in one["checks"] if c["name"] == name), None) for one in found]
        limit = next(c["limit"] for c in of_models if c)
        lines.append([f"{name} (at most {limit:.0%})", *map(_checked_cell, of_models)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


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
    return before + start + accuracy([records.read(path) for path in paths]) + "\n" + end + after


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit("usage: python -m advkip.tables README.md reports/*/results.json")
    Path(sys.argv[1]).write_text(update_readme(sys.argv[1], sys.argv[2:]))
