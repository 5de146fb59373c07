"""The results page, reports/index.html: `python -m advkip.report reports`.

Everything on it is made from records (`records`), the paper's numbers (`tables.PAPER`) and the
benchmarks; the page is one file that needs no network.
"""

import argparse
import base64
import io
import json
import math
import os
import re
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import jinja2
import yaml
from PIL import Image

from advkip import grid, records, tables

TITLES = {
    "1": "Kernels on MNIST", "2": "Kernels on CIFAR-10",
    "3": "Fully connected networks on MNIST", "4": "Fully connected networks on CIFAR-10",
    "5": "simple-CNN on MNIST", "6": "CNNs on CIFAR-10",
    "7": "Adversarial training on CIFAR-10", "8": "Robust features on CIFAR-10",
    "9": "KIP, without an attack in the loop", "10": "AutoAttack, and PGD in the l2 ball",
}  # fmt: skip
"""The paper's ten tables."""

FIGURES = (
    ("1", "Accuracy while the kernel's set is distilled", "figure1_training_curves.png"),
    ("2", "Loss and gradient of a network in training", "figure2_loss_and_gradient.png"),
    ("3", "Accuracy while networks train", "figure3_training_curves.png"),
    ("4", "Input gradients during distillation", "figure4_gradient_norm.png"),
    ("5", "Images before and after", "figure5_images_adv-kip.png"),
    ("6", "Images of the baseline before and after", "figure5_images_kip.png"),
)
"""The paper's six figures, and what notebooks call theirs."""

DATA = {
    "original": "original images", "adv-kip": "adv-KIP", "kip": "KIP",
    "robust-features": "robust features",
    "relabelled": "original images that a kernel machine or a network labelled",
    "other": "others, as noisy copies",
}  # fmt: skip
"""Of which sets a chart has marks of their own."""

WIDTH = 640
"""Pixels of an embedded figure; a click opens the whole one."""


class Point(NamedTuple):
    """A model in a chart: what it is, and where it stands, in percent of the axes."""

    title: str
    x: float
    y: float
    kind: str  # "kernel", "plain", "adversarial": its colour
    data: str  # one of DATA: its shape


def build(
    folder: str | Path, runs: Iterable[str] | None = None, *, params: str | Path = "params",
    base: str = "",
) -> str:  # fmt: skip
    """The page of the records below a folder, as HTML.

    Args:
      folder: with <name>/results.json and benchmarks/*.json.
      runs: names; None means all that are there.
      params: the folder of params files; a cell without a run names the one that fills it.
      base: what links begin with, '' for a page in `folder`.

    Raises:
      ValueError: a record that is not one, or none at all.
    """
    folder = Path(folder)
    names = sorted(path.parent.name for path in folder.glob("*/results.json"))
    names = names if runs is None else list(runs)
    if not names:
        raise ValueError(f"expected a results.json below {folder}, got none; run an experiment")
    found = {name: records.read(folder / name / "results.json") for name in names}
    lines = tables.lines(list(found.values()))
    drawn = tables.compared(lines)
    head, *body = tables.summary_rows(list(found.values()))
    fills = _files(Path(params))
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("advkip"), autoescape=True, trim_blocks=True,
        lstrip_blocks=True, undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    return environment.get_template("report.html").render(
        base=base, data=DATA, summary={"head": head, "body": body},
        charts=[chart for name in tables.DATA_SETS if (chart := clean_against_robust(drawn, name))],
        scaling=scaling(drawn),
        tables=[_paper_table(number, lines, fills) for number in TITLES],
        figures=[_figure(folder, found, *figure) for figure in FIGURES],
        verdicts=[evidence(*one) for one in found.items() if "diagnoses" in one[1]],
        speed=_speed(folder / "benchmarks"),
        runs=[_run(folder / name, record) for name, record in found.items()],
    )  # fmt: skip


def _kind(line):
    if line.model.startswith("kernel:"):
        return "kernel"
    return "adversarial" if tables.is_adversarial(line.trained_on) else "plain"


def _data(line):
    name = line.trained_on.split(",")[0].split(" ")[0]
    name = re.sub(r"-\d+$", "", name)  # of a step of its own
    return name if name in DATA else "other"


def _first(value):
    """The mean of a cell: a number, (mean, std) or {seed: number}."""
    if isinstance(value, dict):
        return sum(value.values()) / len(value)
    return value[0] if isinstance(value, tuple) else value


def clean_against_robust(lines: list[tables.Line], data_set: str) -> dict | None:
    """Clean accuracy and what AutoAttack leaves of every model of a data set, for a chart."""
    points = [
        Point(
            f"{line.model}, {line.trained_on}, {line.images:,} images", _first(line.cells["clean"]),
            _first(line.cells["autoattack"]), _kind(line), _data(line),
        )
        for line in lines
        if line.data_set == data_set and "autoattack" in line.cells
    ]  # fmt: skip
    marks = [
        (f"the paper's adversarially trained {line.model}", _first(line.cells["autoattack"]))
        for line in tables.published()
        if line.data_set == data_set
        and line.trained_on == tables.ADVERSARIAL
        and "autoattack" in line.cells
    ]
    best = max((mark for mark in marks), key=lambda mark: mark[1], default=None)
    yardsticks = [("a constant answer", 10.0), *([best] if best else [])]
    if not points:
        return None
    top = max([point.y for point in points] + [value for _, value in yardsticks])
    title = tables.DATA_SETS[data_set]
    return {"title": title, "points": points, "top": _top(top), "yardsticks": yardsticks}


def _top(value):
    """The end of an axis of five equal parts that holds a percentage."""
    return next(top for top in (5, 10, 15, 20, 25, 30, 40, 50, 75, 100) if top >= value)


def scaling(lines: list[tables.Line]) -> list[dict]:
    """Robust accuracy of kernel machines on distilled sets against n_support, for a chart.

    Of each data set the kernel of the most sizes.
    """
    found = []
    for data_set, title in tables.DATA_SETS.items():
        kernels: dict[str, dict] = {}
        for line in lines:
            own = line.data_set == data_set and line.model.startswith("kernel:")
            if own and line.trained_on == "adv-kip" and "autoattack" in line.cells:
                points = kernels.setdefault(line.model, {})
                points.setdefault(line.images, {}).update(line.cells["autoattack"])
        model, points = max(kernels.items(), key=lambda one: len(one[1]), default=("", {}))
        values = [
            {"n": n, "mean": _first(seeds), "text": tables.cell(seeds, 1), "seeds": len(seeds),
             "low": min(seeds.values()), "high": max(seeds.values())}
            for n, seeds in sorted(points.items())
        ]  # fmt: skip
        if values:
            top = max(value["high"] for value in values)
            title = f"{title}, {model.removeprefix('kernel:')}"
            found.append({"title": title, "values": values, "top": _top(top)})
    return found


def _files(params):
    """{(data set, model, trained on): [(n_support, params file)]} of what files would measure."""
    found = defaultdict(list)
    for path in [*sorted(params.glob("*.yaml")), *sorted(params.glob("paper/*.yaml"))]:
        for e in grid.experiments(path):
            name, made = e.dataset.name, f"adv-kip {e.kernel.name}"
            methods = e.methods if "01_kernels" in e.notebooks else ()
            keys = [(name, f"kernel:{e.kernel.name}", method) for method in methods]
            nets = {"02_transfer": e.fully_connected.nets, "03_cnns": e.cnns.nets}
            for notebook in set(e.notebooks) & set(nets):
                keys += [(name, net, made) for net in nets[notebook]]
                if notebook == "03_cnns" and e.adversarial_training:
                    keys += [(name, net, tables.ADVERSARIAL) for net in nets[notebook]]
            if "04_shortcomings" in e.notebooks:
                keys += [(name, net, "robust-features") for net in e.diagnosed_nets()]
            for key in keys:
                found[key].append((e.support.n_support, path.relative_to(params.parent).as_posix()))
    return found


def _file(fills, line):
    """The params file for a line of the paper: of its size or the nearest, of two the latter."""
    options = fills.get((line.data_set, line.model, line.trained_on), [(0, "")])

    def far(option):
        return abs(math.log(option[0] / line.images)) if line.images and option[0] else 0

    return min(reversed(options), key=far)[1]


def _paper_table(number, lines, fills):
    """The rows of one of the paper's tables, each with ours of the same kind below it."""
    rows, shown = [], []
    for theirs in tables.published([number]):
        key = theirs.data_set, theirs.model, theirs.trained_on
        ours = [one for one in lines if (one.data_set, one.model, one.trained_on) == key]
        rows.append((theirs, ours, "" if ours else _file(fills, theirs)))
        shown += [theirs, *ours]
    attacks = tables.attacks_of(shown)
    body = []
    for theirs, ours, file in rows:
        for line in (theirs, *ours):
            seeds = max((len(v) for v in line.cells.values() if isinstance(v, dict)), default=0)
            body.append({
                "ours": line.source.startswith("ours"), "source": line.source, "model": line.model,
                "images": line.images, "trained_on": line.trained_on, "n_test": line.n_test,
                "seeds": seeds, "cells": [tables.cell(line.cells.get(a)) for a in attacks],
            })  # fmt: skip
        if not ours:
            body.append({"missing": file, "model": theirs.model, "trained_on": theirs.trained_on})
    return {"number": number, "title": TITLES[number], "attacks": attacks, "body": body}


def _figure(folder, found, number, title, file):
    """A figure of every run that has it; those named after another, as x-scaled, are its links."""
    parts: list[dict] = []
    for name in sorted(name for name in found if (folder / name / file).exists()):
        part = {"name": name, "path": f"{name}/{file}", "variants": []}
        run = next((one for one in parts if name.startswith(f"{one['name']}-")), None)
        if run:
            run["variants"].append(part)
        else:
            parts.append({**part, "data": _embedded(folder / name / file)})
    return {"number": number, "title": title, "parts": parts}


def _embedded(path):
    """A figure as a data: address, no wider than WIDTH: PNG of few colours, or WebP if smaller."""
    image = Image.open(path).convert("RGB")
    if image.width > WIDTH:
        size = WIDTH, round(image.height * WIDTH / image.width)
        image = image.resize(size, Image.Resampling.LANCZOS)
    lines, photographs = io.BytesIO(), io.BytesIO()
    image.quantize(48).save(lines, "PNG", optimize=True)
    image.save(photographs, "WEBP", quality=75, method=6)
    forms = {"png": lines.getvalue(), "webp": photographs.getvalue()}
    kind = min(forms, key=lambda kind: len(forms[kind]))
    return f"data:image/{kind};base64," + base64.b64encode(forms[kind]).decode()


def evidence(name: str, record: dict) -> dict:
    """What each attack breaks of what is claimed of each model of a record, for a table."""
    diagnoses = record["diagnoses"]
    attacks = list(dict.fromkeys(attack for one in diagnoses for attack in one["broken"]))
    rows = [
        {"title": records.title(one["model"], one["trained_on"], one["training"])
         + (f", {one['variant']}" if "variant" in one else ""),
         "verdict": one["verdict"], "claimed": 100 * one["claimed"], "strong": 100 * one["strong"],
         "broken": [one["broken"].get(attack) for attack in attacks]}
        for one in diagnoses
    ]  # fmt: skip
    return {"name": name, "attacks": attacks, "rows": rows, "n": diagnoses[0]["n_test"]}


def _speed(folder):
    rows = []
    for path in sorted(folder.glob("*.json")):
        found = json.loads(path.read_text())
        for row in found if isinstance(found, list) else []:
            if "ours_s" in row:
                rows.append({key: row.get(key) for key in
                             ("work", "reference_s", "ours_s", "ratio", "peak_gb")})  # fmt: skip
    return rows


def _run(folder, record):
    notebooks = sorted(path for path in folder.glob("*.ipynb") if ".failed" not in path.name)
    e, environment = record["experiment"], record["environment"]
    return {
        "name": folder.name, "dataset": e["dataset"]["name"], "kernel": e["kernel"]["name"],
        "n_support": e["support"]["n_support"], "seed": e["seed"],
        "minutes": sum(environment.get("seconds", {}).values()) / 60,
        "device": environment.get("device", ""), "commit": (environment.get("commit") or "")[:7],
        "settings": yaml.safe_dump(e, sort_keys=False, default_flow_style=None),
        "notebooks": [
            {"name": path.stem, "path": f"{folder.name}/{path.name}",
             "html": f"{folder.name}/{path.stem}.html" * path.with_suffix(".html").exists()}
            for path in notebooks
        ],
    }  # fmt: skip


def render(folder: str | Path, run: str = "*") -> list[Path]:
    """Renders the executed notebooks of runs to HTML beside them; returns the pages."""
    made = []
    for path in sorted(Path(folder).glob(f"{run}/*.ipynb")):
        page = path.with_suffix(".html")
        if ".failed" in path.name or ".running" in path.name:
            continue
        if not page.exists() or page.stat().st_mtime < path.stat().st_mtime:
            page.write_text(as_html(path))
        made.append(page)
    return made


def as_html(path: str | Path) -> str:
    """An executed notebook as one HTML page."""
    from nbconvert import HTMLExporter

    return HTMLExporter().from_filename(str(path))[0]


def main(arguments=None) -> int:
    """Writes the page; returns the exit code."""
    parser = argparse.ArgumentParser("python -m advkip.report", description=__doc__)
    parser.add_argument("folder", nargs="?", default="reports", help="of the runs")
    parser.add_argument("--runs", nargs="+", help="their names; all that are there if left out")
    parser.add_argument("--output", help="the page; <folder>/index.html if left out")
    parser.add_argument("--html", action="store_true", help="renders executed notebooks, too")
    options = parser.parse_args(arguments)
    folder = Path(options.folder)
    page = Path(options.output or folder / "index.html")
    try:
        for name in (options.runs or ["*"]) if options.html else []:
            render(folder, name)
        base = os.path.relpath(folder, page.parent)
        text = build(folder, options.runs, base="" if base == "." else f"{base}/")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    page.write_text(text)
    print(f"the results page: {page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
