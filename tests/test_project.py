"""The shape of the project: imports, notebooks, params files, pins."""

import ast
import importlib.metadata
import re
import subprocess
from pathlib import Path

import jupytext
import numpy as np
import papermill
import pytest
import torch
import yaml

from advkip import (
    attacks,
    data,
    diagnose,
    distill,
    evaluate,
    features,
    kernels,
    krr,
    tables,
    training,
)
from advkip.config import Experiment, field_names

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted(ROOT.glob("notebooks/*.py"))
PARAMS = sorted(ROOT.glob("params/*.yaml")) + sorted(ROOT.glob("params/paper/*.yaml"))

# Which modules of the package each one may import.
IMPORTS = {
    "__init__": set(),
    "values": set(),
    "config": {"values"},
    "compat": set(),
    "data": {"inputs"},
    "devices": set(),
    "inputs": set(),
    "files": set(),
    "tiled": {"devices"},
    "kernels": {"config", "compat", "devices", "tiled"},
    "krr": {"devices", "inputs"},
    "attacks": {"devices", "inputs"},
    "torch_attacks": {"attacks", "inputs"},
    "bridge": {"devices", "krr", "attacks"},
    "nets": {"config", "data"},
    "recipe": {"config", "inputs", "attacks", "torch_attacks", "nets"},
    "training": {"data", "files", "inputs", "torch_attacks", "nets", "recipe"},
    "checkpoint": {"files"},
    "distill": {"checkpoint", "config", "data", "kernels", "krr", "attacks"},
    "models": {"around", "config", "attacks", "torch_attacks", "krr", "bridge", "nets"},
    "evaluate": {"config", "files", "inputs", "attacks", "krr", "nets", "models"},
    "around": {"torch_attacks"},
    "hard_label": {"torch_attacks"},
    "verdict": set(),
    "diagnose": {
        "around",
        "attacks",
        "config",
        "evaluate",
        "hard_label",
        "models",
        "nets",
        "torch_attacks",
        "verdict",
    },
    "features": {"data", "files", "nets"},
    "figures": set(),
    "preflight": {"config", "data", "files", "inputs"},
    "records": {"config", "files", "preflight"},
    "tables": {"config", "records"},
    "run": {"config", "files", "preflight", "records", "tables"},
}


def imported(path):
    """Names that a module imports: (of advkip, of other packages)."""
    ours, others = set(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            first, _, rest = name.partition(".")
            if first == "advkip":
                ours.add(rest.split(".")[0])
            else:
                others.add(first)
    return ours - {""}, others


def test_import_table():
    modules = {path.stem: imported(path) for path in ROOT.glob("advkip/*.py")}
    assert set(modules) == set(IMPORTS)
    for name, (ours, others) in modules.items():
        assert ours <= IMPORTS[name], name
        assert "neural_tangents" not in others or name == "compat"


def test_modules_are_short():
    for path in ROOT.glob("advkip/*.py"):
        assert len(path.read_text().splitlines()) <= 420, path.name


def tracked(folder="."):
    """Files below a folder that git knows."""
    command = ["git", "-C", ROOT, "ls-files", folder]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [Path(line) for line in out.splitlines()]


def test_top_level():
    assert {path.parts[0] for path in tracked()} <= {
        "notebooks", "advkip", "params", "reports", "tests", "environment.yml", "README.md",
        "CHANGELOG.md", "LICENSE", "pyproject.toml", "requirements.txt",
        "requirements-nodeps.txt", "Makefile", ".ci", ".gitignore",
    }  # fmt: skip


def pins():
    lines = [
        line.strip()
        for name in ("requirements.txt", "requirements-nodeps.txt")
        for line in (ROOT / name).read_text().splitlines()
    ]
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def test_pins_are_installed_and_stand_in_one_place():
    for package, version in pins().items():
        assert importlib.metadata.version(package) == version
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    *conda, pip = environment["dependencies"]
    assert conda == ["python=3.11", "pip", "make"]
    assert pip == {"pip": ["-r requirements.txt"]}
    assert "==" not in (ROOT / "pyproject.toml").read_text()
    assert "==" not in (ROOT / "Makefile").read_text()


def test_every_direct_dependency_is_pinned():
    names = {"sklearn": "scikit-learn", "yaml": "PyYAML", "IPython": "ipykernel"}
    names |= {"neural_tangents": "neural-tangents"}
    used = set()
    for folder in ("advkip", "notebooks", "tests"):
        for path in ROOT.glob(f"{folder}/*.py"):
            used |= imported(path)[1]
    standard = set(__import__("sys").stdlib_module_names) | {"tests"}
    assert {names.get(name, name) for name in used - standard} <= set(pins())


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_pairs_are_in_step(path):
    script, notebook = jupytext.read(path), jupytext.read(path.with_suffix(".ipynb"))
    assert [(c.cell_type, c.source) for c in script.cells] == [
        (c.cell_type, c.source) for c in notebook.cells
    ]
    for cell in notebook.cells:
        assert not cell.get("outputs")
    for one in (script, notebook):
        assert one.metadata["kernelspec"]["name"] == "python3"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_style(path):
    """A parameters cell of annotated literals; no long function, training loop, jit, install."""
    notebook = jupytext.read(path)
    tagged = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", [])]
    assert len(tagged) == 1
    for node in ast.parse(tagged[0].source).body:
        assert isinstance(node, ast.AnnAssign)
        ast.literal_eval(node.value)
    declared = papermill.inspect_notebook(path.with_suffix(".ipynb"))
    assert "output" in declared
    settings = set(declared) - {"output"}
    assert settings <= set(field_names()) or not settings & set(field_names())
    code = "\n".join(c.source for c in notebook.cells if c.cell_type == "code")
    assert not re.search(r"jit\b|pip install|urllib|requests\.|savefig|plt\.", code)
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.FunctionDef):
            assert len(ast.unparse(node).splitlines()) <= 8
    assert "assert " in code
    assigned = {
        node.id
        for cell in notebook.cells
        if cell.cell_type == "code" and cell not in tagged
        for node in ast.walk(ast.parse(cell.source))
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    }
    assert not assigned & set(field_names())  # from_notebook would take it for a setting


def defaults(notebook):
    declared = papermill.inspect_notebook(ROOT / f"notebooks/{notebook}.ipynb")
    return Experiment.from_notebook(
        {k: ast.literal_eval(v["default"]) for k, v in declared.items()}
    )


@pytest.mark.parametrize("notebook", ["01_kernels", "02_transfer", "03_cnns", "04_shortcomings"])
def test_defaults_of_notebooks_are_one_valid_experiment(notebook):
    experiment = defaults(notebook)
    assert experiment.dataset == "digits"
    # So that 02 and 03 take the set that 01 left behind.
    assert experiment.distillation() == defaults("01_kernels").distillation()
    assert experiment.n_steps == defaults("01_kernels").n_steps


def test_there_is_a_file_for_every_row_of_the_papers_tables():
    # 50,000 is all of CIFAR-10's training images, of which some have to be held out.
    nearest = {50_000: 49_000}
    found = set()
    for path in (p for p in PARAMS if p.parent.name == "paper"):
        e = Experiment.from_file(path)
        assert path.stem == e.name
        found |= {(e.dataset, f"kernel:{e.kernel}", e.n_support, m) for m in e.methods}
        models = [e.fc_nets, e.cnns]
        for notebook, names in zip(("02_transfer", "03_cnns"), models, strict=True):
            if notebook in e.notebooks:
                made = f"adv-kip {e.kernel}"
                found |= {(e.dataset, net, e.n_support, made) for net in names}
                if notebook == "03_cnns" and e.at_epochs:
                    found |= {(e.dataset, net, 0, tables.ADVERSARIAL) for net in names}
        if "04_shortcomings" in e.notebooks and "robust-features" in e.diagnosed_sets:
            found |= {(e.dataset, net, nearest[50_000], "robust-features") for net in e.cnns}
    rows = {(*row[1:3], nearest.get(row[3], row[3]), row[4]) for row in tables.PAPER}
    assert rows <= found


SHAPES = {"digits": (8, 8), "mnist": (28, 28), "fashion_mnist": (28, 28), "cifar10": (32, 32, 3)}


@pytest.mark.parametrize("path", PARAMS, ids=lambda p: p.stem)
def test_params_file_runs_at_reduced_size(path, tmp_path, rng):
    """Every setting of the file, the real image size, few images of noise, two steps."""
    e = Experiment.from_file(path)
    shape = SHAPES.get(e.dataset, (8, 8))
    x = rng.integers(0, 256, (80, *shape)).astype("uint8")
    y = np.arange(80) % 10
    np.savez(tmp_path / f"{e.dataset}.npz", x_train=x, y_train=y, x_test=x[:20], y_test=y[:20])
    e = e.replace(
        data_dir=str(tmp_path), n_support=20, n_target=10, n_validation=10, n_test=10, n_steps=1,
        kip_steps=1, pgd_steps=min(e.pgd_steps, 2), eval_pgd_steps=2,
    )  # fmt: skip
    splits = data.split(data.load(e.dataset, e.data_dir), e)
    kernel = kernels.by_name(e.kernel, W_std=e.W_std, b_std=e.b_std)
    for method in e.methods:
        settings = {"adv-kip": e, "kip": e.as_kip()}[method]
        result = distill.distill(settings, splits, checkpoint_dir=tmp_path, progress=False)
        assert [line["step"] for line in result.history] == [0, 1]
        (checkpoint,) = tmp_path.glob(f"checkpoint-{settings.fingerprint()}.npz")
        moved = np.abs(np.load(checkpoint)["leaf0"] - result.x_initial)
        assert 0 < moved.max() < 0.1
        machine = krr.fit(kernel, result.x_support, result.y_support, diag_reg=e.diag_reg).machine
        outcomes = evaluate.evaluate(
            machine, splits.x_test, splits.y_test, threat=attacks.Threat(e.norm, e.epsilon),
            attack_names=["fgsm", "pgd2"], step_size=e.step_size, progress=False,
        )  # fmt: skip
        assert len(outcomes) == 3
    if set(e.notebooks) & {"02_transfer", "03_cnns", "04_shortcomings"}:
        assert not e.distilled_set or e.distilled_set.startswith("reports/")
        net = check_networks(e.replace(distilled_set=""), splits, tmp_path)
    if "04_shortcomings" in e.notebooks:
        check_diagnosis(e, net, splits, tmp_path)


def check_networks(e, splits, folder):
    """An epoch of each network, plain and adversarial, and the attacks of the file but AutoAttack,
    whose name alone is checked: it takes minutes on a large network."""
    dataset = data.load(e.dataset, e.data_dir)
    sets = distill.training_sets(e.replace(n_original=20), splits, dataset, folder)
    e = e.replace(net_epochs=1, net_eval_every=1, net_pgd_steps=1, at_epochs=1, at_pgd_steps=1)
    for name in (*e.fc_nets, *e.cnns):
        for adversarial in (False, True):
            found = training.search(
                name, *sets["original" if adversarial else "adv-kip"][:2],
                recipe=training.Recipe.of(e, adversarial=adversarial), progress=False,
                learning_rates=(e.at_learning_rates if adversarial else e.net_learning_rates)[:1],
                seeds=e.net_seed_list()[:1],
                watched=training.watched(splits, 5, seed=0),
            )  # fmt: skip
            (line,) = found.best[0].history
            assert np.isfinite(line["loss"])
    names = [re.sub(r"pgd\d+", "pgd2", a) for a in e.net_attacks if "auto" not in a]
    outcomes = evaluate.evaluate(
        found.best[0].net, splits.x_test, splits.y_test, attack_names=names, progress=False,
        threat=attacks.Threat(e.norm, e.epsilon), step_size=e.step_size,
        threat_l2=attacks.Threat("l2", e.epsilon_l2), step_size_l2=e.step_size_l2,
    )  # fmt: skip
    assert len(outcomes) == 1 + len(names)
    return found.best[0].net


def check_diagnosis(e, net, splits, folder):
    """Robust features, loaded or made in two steps, and a diagnosis without AutoAttack."""
    labels = data.one_hot(splits.y_pool, splits.n_classes)
    if e.robust_features:
        images = torch.as_tensor(splits.x_pool).movedim(3, 1)
        torch.save([images], folder / features.IMAGES)
        torch.save([torch.as_tensor(splits.y_pool)], folder / features.LABELS)
        made = features.training_set(folder, shape=SHAPES["cifar10"], n_classes=10)
    else:
        assert set(e.at_nets) <= {*e.fc_nets, *e.cnns}
        made = features.generate(
            net, splits.x_pool, labels, n=5, steps=2, step_size=e.robust_step_size, seed=e.seed,
            noise=e.robust_noise, progress=False,
        )  # fmt: skip
    assert made.x.shape[1:] == splits.x_test.shape[1:]
    found = diagnose.diagnose(
        net, splits.x_test, splits.y_test, threat=attacks.Threat(e.norm, e.epsilon), n_steps=1,
        step_size=e.step_size, parts=(), progress=False,
    )  # fmt: skip
    assert found.n == 10
    asked = {check.name for check in found.checks if check.passed is not None}
    assert asked >= {"order", "zero gradients", "large radius"}


def test_reports_hold_small_files_and_no_machine_paths():
    for name in tracked("reports"):
        path = ROOT / name
        assert path.suffix in (".json", ".png", ".ipynb", ".md"), name
        assert path.stat().st_size < 2_000_000, name
        if path.suffix != ".png":
            assert not re.search(r"/(home|root|tmp|work|Users)/", path.read_text()), name
