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
import yaml

from advkip import attacks, data, distill, evaluate, kernels, krr
from advkip.config import Experiment, field_names

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted(ROOT.glob("notebooks/*.py"))
PARAMS = sorted(ROOT.glob("params/*.yaml")) + sorted(ROOT.glob("params/paper/*.yaml"))

# Which modules of the package each one may import.
IMPORTS = {
    "__init__": set(),
    "config": set(),
    "compat": set(),
    "data": {"config"},
    "devices": set(),
    "tiled": {"devices"},
    "kernels": {"config", "compat", "devices", "tiled"},
    "krr": {"devices"},
    "attacks": {"devices"},
    "distill": {"config", "data", "kernels", "krr", "attacks"},
    "evaluate": {"attacks", "krr"},
    "figures": set(),
    "records": {"config"},
    "run": {"config", "records"},
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


def test_defaults_of_the_kernel_notebook_are_a_valid_experiment():
    declared = papermill.inspect_notebook(ROOT / "notebooks/01_kernels.ipynb")
    values = {k: ast.literal_eval(v["default"]) for k, v in declared.items()}
    experiment = Experiment.from_notebook(values)
    assert experiment.dataset == "digits"


def test_there_is_a_file_for_every_row_of_the_papers_kernel_tables():
    from advkip import records

    found = set()
    for path in PARAMS:
        e = Experiment.from_file(path)
        if path.parent.name == "paper":
            assert path.stem == e.name
            found |= {(e.dataset, e.kernel, e.n_support, method) for method in e.methods}
    assert {row[1:5] for row in records.PAPER} <= found


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


def test_reports_hold_small_files_and_no_machine_paths():
    for name in tracked("reports"):
        path = ROOT / name
        assert path.suffix in (".json", ".png", ".ipynb", ".md"), name
        assert path.stat().st_size < 2_000_000, name
        if path.suffix != ".png":
            assert not re.search(r"/(home|root|tmp|work|Users)/", path.read_text()), name
