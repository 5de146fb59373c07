"""Markdown tables of records, with the paper's numbers beside them.

`python -m advkip.tables README.md reports/README.md reports/*/results.json` writes the summary
into the one and all rows into the other.
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
from advkip.config import FREE
from advkip.settings import Attack

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


def accuracy(found, *, tables=None, models=None) -> str:
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
        e, seen = record["experiment"], defaultdict(list)
        # The settings keep apart what only looks alike; they are not shown.
        settings = json.dumps(_that_matter(e), sort_keys=True)

        def line_of(row, e=e, settings=settings, seen=seen):
            n = row.get("n_train", e["support"]["n_support"])
            trained_on = _trained_on(row)
            # Of sets of one name in one record, the first, the second ...
            known = seen[trained_on]
            if row.get("set") not in known:
                known.append(row.get("set"))
            apart = f"{settings} {known.index(row.get('set'))}"
            return lines[
                e["dataset"]["name"], "ours", row["model"], n, trained_on, row["n_test"], apart
            ]

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


def _that_matter(experiment):
    """The settings that tell experiments of several seeds apart."""
    free = {*FREE, "seed"}
    return {
        key: {k: v for k, v in value.items() if f"{key}.{k}" not in free}
        if isinstance(value, dict)
        else value
        for key, value in experiment.items()
        if key not in free
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
    lines = [["", *titles], ["---", *["---:"] * len(titles)]]
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
    if attack == "verdict":
        return (True,)
    one = Attack.parse(attack)
    kind = {"clean": 0, "fgsm": 1, "pgd": 2, "autoattack": 5}.get(one.kind, 4)
    return False, one.l2, kind, one.n_steps, attack


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


SUMMARY = (
    ("kernel:fc3", "kernel"), ("fc3-1024", "plain"), ("simple-cnn", "plain"),
    ("simple-cnn", "adversarial"),
)  # fmt: skip
"""(model, training) of the lines of `summary`, on original images and on distilled ones."""

DATA_SETS = {"cifar10": "CIFAR-10, 8/255", "mnist": "MNIST, 0.3"}


def summary(found) -> str:
    """Markdown: clean and AutoAttack accuracy of a few models, and the paper's AutoAttack.

    Args:
      found: a list of records (see `records.read`).
    """
    cells = {}
    for record in found:
        for row in record["rows"]:
            if row["attack"] in ("clean", "autoattack"):
                line = (
                    row["model"],
                    row["training"],
                    row["trained_on"],
                    record["experiment"]["dataset"]["name"],
                )
                images = row.get("n_train", record["experiment"]["support"]["n_support"])
                same = images, row["n_test"], row["notebook"]
                cells.setdefault(line, {}).setdefault(same, {})[row["attack"]] = row["accuracy"]
    published = {
        (data_set, model, "adversarial" if trained_on == ADVERSARIAL else "plain"): accuracies
        for _, data_set, model, _, trained_on, accuracies in PAPER
        if "autoattack" in accuracies
    }
    head = ["model, training", "data"]
    for name in DATA_SETS.values():
        head += [f"{name}: images", "clean", "AutoAttack", "paper"]
    lines = [head, ["---", "---", *["---:"] * (len(head) - 2)]]
    for model, training in SUMMARY:
        for trained_on in ("original", "adv-kip"):
            line = [f"{model.removeprefix('kernel:')}, {training}", trained_on]
            for data_set in DATA_SETS:
                of_sizes = cells.get((model, training, trained_on, data_set), {})
                whole = [(n, one) for (n, *_), one in of_sizes.items() if "autoattack" in one]
                n, one = whole[0] if whole else (0, {})
                same = trained_on == ("original" if training == "adversarial" else "adv-kip")
                theirs = published.get((data_set, model, training), {}) if same else {}
                line += [f"{n:,}" if n else "", *(
                    f"{100 * one[key]:.1f}" if key in one else "" for key in ("clean", "autoattack")
                ), _cell(theirs.get("autoattack"))]  # fmt: skip
            lines.append(line)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def updated(text, mark, table) -> str:
    """A text with a table between its marks <!-- mark --> and <!-- /mark -->.

    Raises:
      ValueError: no such marks.
    """
    start, end = f"<!-- {mark} -->\n", f"<!-- /{mark} -->"
    before, _, rest = text.partition(start)
    _, found, after = rest.partition(end)
    if not found:
        raise ValueError(f"expected {start.strip()} and {end} in the text; add them")
    return f"{before}{start}{table}\n{end}{after}"


def main(readme, report, *paths) -> None:
    """Writes `summary` into a README and `accuracy` into the report's."""
    found = [records.read(path) for path in paths]
    for path, mark, table in ((readme, "summary", summary), (report, "results", accuracy)):
        Path(path).write_text(updated(Path(path).read_text(), mark, table(found)))


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit(
            "usage: python -m advkip.tables README.md reports/README.md reports/*/results.json"
        )
    main(*sys.argv[1:])
