"""Experiments that differ in a few settings, as one table: what a switch is worth."""

import json
from collections import Counter

from advkip import tables

COLUMNS = 5
"""Settings that have a column each; of more, one column names those that are not as in most
records."""


def differing(found: list[dict]) -> list[str]:
    """The settings, by path, in which the experiments of records differ, but for seeds."""
    settings = [_settings(record) for record in found]
    paths = dict.fromkeys(path for one in settings for path in one)
    return [path for path in paths if len({json.dumps(one.get(path)) for one in settings}) > 1]


def table(found: list[dict], *, trained_on="adv-kip") -> str:
    """Markdown: a row for each model on the distilled sets of each point, seeds together.

    Where more than COLUMNS settings differ, as when switches are tried one at a time, a row names
    the ones that are not as in most records.

    Args:
      found: records (see `records.read`).
      trained_on: the set whose models are shown.

    Raises:
      ValueError: no such model in any of the records.
    """
    paths, groups = differing(found), {}
    for record in found:
        of_point = _settings(record)
        key = json.dumps([of_point.get(path) for path in paths])
        groups.setdefault(key, []).append(record)
    rows = [
        (json.loads(key), line)
        for key, some in groups.items()
        for line in tables.lines(some)
        if line.trained_on.split(" ")[0] == trained_on
    ]
    if not rows:
        raise ValueError(f"expected models of {trained_on!r} sets in the records, got none")
    attacks = tables.attacks_of([line for _, line in rows])
    names = [path.split(".")[-1] for path in paths]
    names = [
        path if names.count(name) > 1 else name for path, name in zip(paths, names, strict=True)
    ]
    if len(paths) > COLUMNS:
        names, rows = ["changed"], _in_one_column(paths, names, rows, found)
    # Of the variants of notebook 05 a machine's set has the name behind it.
    if len({line.trained_on for _, line in rows if line.model.startswith("kernel:")}) > 1:
        names = [*names, "variant"]
        rows = [([*v, line.trained_on.removeprefix(trained_on).strip()], line) for v, line in rows]
    head = [*names, "model", "images", "tested on", "seeds", *attacks]
    body = [
        [*map(_shown, values), line.model, f"{line.images:,}", f"{line.n_test:,}", _seeds(line)]
        + [tables.cell(line.cells.get(attack), 1) for attack in attacks]
        for values, line in rows
    ]
    return tables.markdown([head, *body], "l" * (len(names) + 1) + "r" * (3 + len(attacks)))


def _in_one_column(paths, names, rows, found):
    """The rows, whose values are one text: what is not as in most records."""
    usual = []
    for path in paths:
        values = Counter(json.dumps(_settings(record).get(path)) for record in found)
        usual.append(json.loads(values.most_common(1)[0][0]))
    merged = []
    for values, line in rows:
        changed = [
            f"{name} {_shown(value)}"
            for name, value, mostly in zip(names, values, usual, strict=True)
            if value != mostly
        ]
        merged.append(([", ".join(changed) or "none"], line))
    return merged


def _settings(record):
    """All settings that may tell points apart; what a record of before lacks has its default."""
    every = tables.defaults() | tables.that_matter(record)
    free = {*tables.FREE, *tables.OF_NETWORKS, "seed"}
    return {path: value for path, value in every.items() if path not in free}


def _seeds(line):
    return str(max(len(value) for value in line.cells.values() if isinstance(value, dict)))


def _shown(value):
    return f"{value:g}" if isinstance(value, float) else str(value)
