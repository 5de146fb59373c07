"""The shape of the project: imports, notebooks, params files, pins."""

import ast
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import jupytext
import numpy as np
import papermill
import pytest
import torch
import yaml

from advkip import (
    data,
    diagnose,
    distill,
    docs,
    evaluate,
    features,
    grid,
    hard_label,
    questions,
    search,
    sets,
    tables,
    training,
)
from advkip.attack_names import Attack
from advkip.config import Experiment, schema
from advkip.settings import TEACHERS, is_path

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted(ROOT.glob("notebooks/*.py"))
PARAMS = sorted(ROOT.glob("params/*.yaml")) + sorted(ROOT.glob("params/paper/*.yaml"))

# Which modules of the package each one imports: only such as stand above it here.
IMPORTS = {
    "__init__": set(),
    "answers": set(),
    "losses": set(),
    "threat": set(),
    "attack_names": set(),
    "ascent": {"threat"},
    "checked": set(),
    "settings": {"attack_names", "checked"},
    "method_settings": {"checked", "settings"},
    "config": {"checked", "method_settings", "settings"},
    "grid": {"config"},
    "files": set(),
    "store": {"files"},
    "progress": set(),
    "inputs": set(),
    "devices": set(),
    "compat": set(),
    "kernel": set(),
    "tiled": {"kernel"},
    "stencil": set(),
    "convolutional": {"devices", "kernel", "stencil", "tiled"},
    "pieces": {"kernel"},
    "kernels": {"compat", "convolutional", "devices", "kernel", "pieces", "settings", "tiled"},
    "gram": {"devices"},
    "krylov": {"devices"},
    "solver": {"devices", "gram", "kernel", "krylov"},
    "residuals": {"devices"},
    "krr": {"devices", "gram", "inputs", "krylov", "residuals", "solver"},
    "attacks": {"ascent", "devices", "inputs", "losses", "threat"},
    "worst_case": {"attacks"},
    "torch_attacks": {"attacks", "inputs", "worst_case"},
    "probes": {"torch_attacks"},
    "hard_label": {"torch_attacks"},
    "bridge": {"attacks", "devices", "gram"},
    "data": {"config", "files", "inputs", "settings"},
    "objective": {"attacks", "data", "kernels", "krr", "losses", "method_settings", "threat"},
    "lazy": set(),
    "architectures": set(),
    "nets": {"architectures", "data", "inputs", "lazy", "settings"},
    "published": {"answers", "attacks", "inputs", "nets", "threat", "torch_attacks"},
    "recipe": {"attacks", "config", "inputs", "nets", "settings"},
    "training": {
        "data",
        "files",
        "inputs",
        "nets",
        "progress",
        "recipe",
        "settings",
        "store",
        "torch_attacks",
    },
    "search": {"config", "data", "nets", "recipe", "settings", "training"},
    "optimizers": {"method_settings"},
    "growth": {"attacks", "config", "data", "files", "gram", "kernels", "krr", "settings"},
    "algorithm": {
        "attacks",
        "config",
        "data",
        "gram",
        "growth",
        "kernels",
        "krr",
        "objective",
        "optimizers",
        "settings",
        "store",
        "worst_case",
    },
    "unrolled": {"algorithm", "data", "kernel", "pieces"},
    "trajectories": {
        "algorithm",
        "data",
        "files",
        "kernels",
        "nets",
        "progress",
        "store",
        "unrolled",
    },
    "distill": {
        "algorithm",
        "config",
        "data",
        "files",
        "growth",
        "kernels",
        "progress",
        "settings",
        "trajectories",
        "unrolled",
    },
    "features": {"data", "files", "nets", "progress", "settings", "store"},
    "relabel": {
        "algorithm",
        "attacks",
        "config",
        "data",
        "distill",
        "files",
        "gram",
        "inputs",
        "nets",
    },
    "aggregate": {
        "attack_names",
        "config",
        "data",
        "files",
        "inputs",
        "nets",
        "recipe",
        "relabel",
        "store",
        "torch_attacks",
        "training",
    },
    "sets": {
        "aggregate",
        "config",
        "data",
        "distill",
        "features",
        "files",
        "growth",
        "kernels",
        "krr",
        "method_settings",
        "relabel",
        "search",
        "settings",
        "training",
    },
    "models": {"attack_names", "attacks", "bridge", "krr", "nets", "probes", "torch_attacks"},
    "evaluate": {
        "answers",
        "attack_names",
        "attacks",
        "config",
        "files",
        "inputs",
        "krr",
        "models",
        "nets",
        "progress",
        "store",
    },
    "verdict": set(),
    "questions": {
        "attack_names",
        "attacks",
        "evaluate",
        "hard_label",
        "models",
        "nets",
        "probes",
        "torch_attacks",
        "verdict",
    },
    "diagnose": {
        "attack_names",
        "evaluate",
        "inputs",
        "nets",
        "probes",
        "progress",
        "questions",
        "verdict",
    },
    "figures": set(),
    "pictures": {"figures"},
    "preflight": {
        "attack_names",
        "config",
        "data",
        "files",
        "growth",
        "inputs",
        "settings",
    },
    "records": {"config", "files", "preflight"},
    "tables": {"attack_names", "config", "method_settings", "records"},
    "ablation": {"tables"},
    "texts": {"ablation", "records", "tables"},
    "report": {"grid", "records", "tables"},
    "panel": {
        "algorithm",
        "attack_names",
        "attacks",
        "config",
        "data",
        "distill",
        "figures",
        "kernels",
        "krr",
        "models",
        "pictures",
        "torch_attacks",
    },
    "signals": set(),
    "execute": {"config", "preflight", "progress", "records"},
    "sweep": {"config", "execute", "files", "progress"},
    "run": {
        "config",
        "execute",
        "files",
        "grid",
        "preflight",
        "records",
        "signals",
        "sweep",
        "tables",
    },
    "docs": {"files", "report"},
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
        assert ours == IMPORTS[name], name
        assert "neural_tangents" not in others or name == "compat"
    order = list(IMPORTS)
    for name, above in IMPORTS.items():
        assert all(order.index(one) < order.index(name) for one in above), name


def test_the_documentation_has_every_module():
    named = [name for names in docs.LAYERS.values() for name in names.split()]
    assert sorted(named) == sorted(set(IMPORTS) - {"__init__"})


def test_modules_are_short():
    for path in ROOT.glob("advkip/*.py"):
        assert len(path.read_text().splitlines()) <= 350, path.name


def tracked(folder="."):
    """Files below a folder that git knows."""
    command = ["git", "-C", ROOT, "ls-files", folder]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [Path(line) for line in out.splitlines()]


def test_top_level():
    assert {path.parts[0] for path in tracked()} <= {
        "notebooks", "advkip", "params", "reports", "tests", "environment.yml", "README.md",
        "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "LICENSE", "pyproject.toml",
        "requirements.txt", "requirements-lab.txt", "requirements-test.txt",
        "requirements-cluster.txt", "requirements-docs.txt",
        "requirements-nodeps.txt", "Makefile", ".ci", ".gitignore", ".pre-commit-config.yaml",
    }  # fmt: skip


def pins():
    lines = [
        line.strip()
        for name in sorted(ROOT.glob("requirements*.txt"))
        for line in name.read_text().splitlines()
    ]
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def test_pins_are_installed_and_stand_in_one_place():
    for package, version in pins().items():
        assert importlib.metadata.version(package) == version
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    *conda, pip = environment["dependencies"]
    assert conda == ["python=3.11", "pip", "make"]
    extras = ("lab", "test", "cluster", "docs")
    files = ["requirements.txt", *(f"requirements-{name}.txt" for name in extras)]
    assert pip == {"pip": [f"-r {name}" for name in files]}
    assert "==" not in (ROOT / "pyproject.toml").read_text()
    assert "==" not in (ROOT / "Makefile").read_text()


def test_every_direct_dependency_is_pinned():
    names = {"sklearn": "scikit-learn", "yaml": "PyYAML", "IPython": "ipykernel"}
    names |= {"neural_tangents": "neural-tangents", "PIL": "pillow"}
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
    given = set(declared) - {"output"}
    sections = set(Experiment.model_fields)
    assert given <= sections or not given & sections
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
    assert not (
        given & sections and assigned & sections
    )  # from_notebook would take it for a setting


@pytest.mark.parametrize("notebook", [path.stem for path in NOTEBOOKS if path.stem[0:2] != "00"])
def test_notebooks_show_the_one_set_of_defaults(notebook):
    declared = papermill.inspect_notebook(ROOT / f"notebooks/{notebook}.ipynb")
    shown = {key: ast.literal_eval(value["default"]) for key, value in declared.items()}
    found = Experiment.from_notebook(shown, notebook).changes()
    assert {k: v for k, v in found.items() if k != "notebooks"} == {}
    default = Experiment().to_dict()
    for section, values in shown.items():  # what is shown is there, and by its value
        if isinstance(values, dict):
            for key, value in values.items():  # a variant shows what it changes alone
                assert key == "variants" or value == default[section][key]


def test_schema_is_current_and_named():
    assert (ROOT / "params" / "schema.json").read_text() == schema()
    for path in PARAMS:
        above = "" if path.parent.name == "params" else "../"
        first = path.read_text().splitlines()[0]
        assert first == f"# yaml-language-server: $schema={above}schema.json"


ROBUST = sets.ROBUST_FEATURES
PUBLISHED = {"data/robust_features_cifar"}
"""Folders that params files name for the published files of that set."""


def test_there_is_a_file_for_every_row_of_the_papers_tables():
    # 50,000 is all of CIFAR-10's training images, of which some have to be held out.
    nearest = {50_000: 49_000}
    found = set()
    for path in (p for p in PARAMS if p.parent.name == "paper"):
        e = Experiment.from_file(path)
        assert path.stem == e.name
        n, data_set = e.support.n_support, e.dataset.name
        found |= {(data_set, f"kernel:{e.kernel.name}", n, method) for method in e.methods}
        models = [e.fully_connected.nets, e.cnns.nets]
        for notebook, names in zip(("02_transfer", "03_cnns"), models, strict=True):
            if notebook in e.notebooks:
                made = f"adv-kip {e.kernel.name}"
                found |= {(data_set, net, n, made) for net in names}
                if notebook == "03_cnns" and e.adversarial_training:
                    found |= {(data_set, net, 0, tables.ADVERSARIAL) for net in names}
        if "04_shortcomings" in e.notebooks and set(e.diagnosis.sets) & {ROBUST, *PUBLISHED}:
            found |= {(data_set, net, nearest[50_000], ROBUST) for net in e.cnns.nets}
    rows = {(*row[1:3], nearest.get(row[3], row[3]), row[4]) for row in tables.PAPER}
    assert rows <= found


SHAPES = {"digits": (8, 8), "mnist": (28, 28), "fashion_mnist": (28, 28), "cifar10": (32, 32, 3)}


def diagnosed():
    """The first file for each kind of model and images that verdicts are given on: {kind: path}.

    Of kernels and of large networks one kind each is enough.
    """
    files = {}
    for path in PARAMS:
        e = grid.experiments(path)[-1]
        if "04_shortcomings" in e.notebooks and not e.kernel.name.startswith("conv"):
            last = (e.fully_connected.nets + e.cnns.nets or ("kernel",))[-1]
            last = "large" if last in ("alexnet", "vgg11") else last
            grey = last != "kernel" and e.dataset.name != "cifar10"
            files.setdefault((last, grey), path)
    return files


DIAGNOSED = diagnosed()


@pytest.mark.parametrize("path", PARAMS, ids=lambda p: p.stem)
def test_params_file_runs_at_reduced_size(path, tmp_path, rng, monkeypatch):
    """Every setting of the file, the real image size, few images of noise, two steps."""
    monkeypatch.setattr(questions, "SWEEP_STEPS", 2)
    monkeypatch.setattr(hard_label, "RAYS", 20)
    e = grid.experiments(path)[-1]
    shape = SHAPES.get(e.dataset.name, (8, 8))
    x = rng.integers(0, 256, (80, *shape)).astype("uint8")
    y = np.arange(80) % 10
    name = e.dataset.name
    np.savez(tmp_path / f"{name}.npz", x_train=x, y_train=y, x_test=x[:20], y_test=y[:20])
    few = {"eval_pgd_steps": 2, "n_steps": 1}
    through = few | {"expert_epochs": 2, "expert_ahead": 1, "warmup": 0}
    if e.unrolled:
        through["warmup"] = min(e.unrolled.warmup, 1)
    inner = e.adv_kip and {"adv_kip": few | {"pgd_steps": min(e.adv_kip.pgd_steps, 2)}}
    e = e.replace(
        dataset={"folder": str(tmp_path), "n_validation": 10, "n_test": 10},
        support={"n_support": 20, "n_target": 10}, networks={"n_original": 20},
        **inner or {}, **{"kip": few} if e.kip else {},
        **{"unrolled": through} if e.unrolled else {},
    )  # fmt: skip
    e = e.replace(support={"grown_from": grown_from(e, tmp_path)})
    splits = data.split(data.load(name, tmp_path), e)
    protocol = evaluate.Protocol.of(e).with_attacks("fgsm", "pgd2")
    for method in e.methods:
        result = distill.distill(e, splits, method=method, checkpoint_dir=tmp_path, progress=False)
        assert [line["step"] for line in result.history] == [0, 1]
        moved = np.load(tmp_path / f"distillation-{method}.npz")["/0/0"] - result.x_initial
        assert 0 < np.abs(moved).max() < 0.1
        made = data.TrainingSet(result.x_support, result.y_support, e.kernel)
        model = sets.machine(made, e)
        outcomes = protocol(model, splits.x_test, splits.y_test, progress=False)
        assert len(outcomes) == 3
    if e.fully_connected.nets + e.cnns.nets and set(e.notebooks) - {"00_walkthrough", "01_kernels"}:
        model = check_networks(e, splits, tmp_path)
    if "04_shortcomings" in e.notebooks:
        check_robust_features(e, model, splits, tmp_path)
    if path in DIAGNOSED.values():
        check_diagnosis(e, model, splits)


def grown_from(e, folder):
    """A set in place of the one that the file's support starts from, whose own file fits, too."""
    if e.support.grown_from is None:
        return None
    whole = Experiment.from_file(ROOT / "params" / f"{e.name}.yaml")
    smaller = Experiment.from_file(
        ROOT / "params" / f"{Path(e.support.grown_from).parent.name}.yaml"
    )
    assert e.support.grown_from == f"reports/{smaller.name}/adv-kip.npz"
    as_large = smaller.support.n_support == whole.support.n_support
    assert as_large or smaller.support.n_support < whole.support.n_support
    mirrored = smaller.kernel.replace(name=f"{smaller.kernel.name}-mirror")
    assert as_large or whole.kernel in (smaller.kernel, mirrored)
    assert smaller.seed == whole.seed
    assert smaller.dataset == whole.dataset
    assert smaller.support.clip == whole.support.clip
    n = e.support.n_support if as_large else 10
    e = smaller.replace(support={"n_support": n, "n_target": 10}, dataset=e.dataset.to_dict())
    return drawn_set(e, data.load(e.dataset.name, folder), folder / "smaller.npz")


def drawn_set(e, dataset, path):
    """The path of a file like a distilled set's, with the support as it was drawn."""
    x, y = distill.initial_support(e, data.split(dataset, e))
    about = {"method": "adv-kip"}
    made = distill.Distilled(x, y, x, y, step=0, history=[], stopped="n_steps", about=about)
    distill.save(path, made, e, dataset)
    return str(path)


def teacher(e, dataset, folder):
    """A set in place of the file's teacher, which is of the same images."""
    if (path := e.relabelling.teacher) in (None, *TEACHERS):
        return path
    theirs, own = (
        Experiment.from_file(ROOT / "params" / f"{name}.yaml")
        for name in (Path(path).parent.name, e.name)
    )
    assert path == f"reports/{theirs.name}/adv-kip.npz"
    assert (theirs.seed, theirs.dataset) == (own.seed, own.dataset)
    theirs = theirs.replace(support={"n_support": 20, "n_target": 10}, dataset=e.dataset.to_dict())
    return drawn_set(theirs, dataset, folder / "teacher.npz")


def check_networks(e, splits, folder):
    """An epoch of each network, plain and adversarial, and the attacks of the file but AutoAttack,
    whose name alone is checked: it takes minutes on a large network."""
    dataset = data.load(e.dataset.name, e.dataset.folder)
    for name in filter(is_path, (*e.networks.sets, *e.diagnosis.sets)):
        assert name.startswith("reports/") or name in PUBLISHED
    asked = [name for name in e.networks.sets if not is_path(name)]
    e = e.replace(relabelling={"teacher": teacher(e, dataset, folder)})
    once = {"epochs": 1, "eval_every": 1}
    at = e.adversarial_training and {"adversarial_training": once | {"pgd_steps": 1}}
    e = e.replace(
        fully_connected=once, cnns=once, networks={"pgd_steps": 1, "n_seeds": 1}, **at or {}
    )
    chosen = sets.load({"original": 0} | dict.fromkeys(asked), e, splits, dataset, folder)
    train = search.Trainer(e, training.watched(splits, 5, seed=0))
    for net in (*e.fully_connected.nets, *e.cnns.nets):
        for adversarially in (False, True) if at else (False,):
            section = e.adversarial_training if adversarially else e.section_of(net)
            rates = section.learning_rates
            name = "original" if adversarially else next(iter(chosen))
            found = train(
                net, name, chosen[name], adversarially=adversarially, learning_rates=rates[:1],
                progress=False,
            )  # fmt: skip
            (line,) = found.best[0].history
            assert np.isfinite(line["loss"])
    attacks = [Attack.parse(name) for name in e.evaluation.attacks]
    names = [re.sub(r"pgd\d+", "pgd2", one.name) for one in attacks if one.kind in ("fgsm", "pgd")]
    protocol = evaluate.Protocol.of(e).with_attacks(*names)
    outcomes = protocol(found.best[0].net, splits.x_test, splits.y_test, progress=False)
    assert len(outcomes) == 1 + len(names)
    return found.best[0].net


def check_robust_features(e, net, splits, folder):
    """Loaded, or made in two steps."""
    if ROBUST in e.diagnosis.sets:
        assert set(e.adversarial_training.nets) <= {*e.fully_connected.nets, *e.cnns.nets}
        e = e.replace(robust_features={"n_images": 5, "n_steps": 2})
        made = sets.invert(net, data.draw_original(e, splits), e, folder)
        assert made.x.shape[1:] == splits.x_test.shape[1:]
    elif PUBLISHED & set(e.diagnosis.sets):
        images = torch.as_tensor(splits.x_pool).movedim(3, 1)
        torch.save([images], folder / features.IMAGES)
        torch.save([torch.as_tensor(splits.y_pool)], folder / features.LABELS)
        assert sets.from_path(folder)[1].x.shape[1:] == splits.x_test.shape[1:]


def check_diagnosis(e, net, splits):
    """A diagnosis without AutoAttack of the file's last model."""
    found = diagnose.by_protocol(
        evaluate.Protocol.of(e), net, splits.x_test, splits.y_test, n_steps=1, parts=(),
        progress=False,
    )  # fmt: skip
    assert found.n == 10
    asked = {check.name for check in found.checks if check.passed is not None}
    assert asked >= {"order", "zero gradients", "large radius"}


def test_reports_hold_small_files_and_no_machine_paths():
    for name in tracked("reports"):
        path = ROOT / name
        assert path.suffix in (".json", ".png", ".ipynb", ".md", ".html", ".npz"), name
        assert path.stat().st_size < 2_000_000, name
        if path.suffix == ".npz":
            assert path.name == "sample.npz", name
            of, made = sets.from_path(path)
            assert (of, made.kernel is None) == ("adv-kip", False)
            assert len(made.x) == len(made.y) <= 5_000
        elif path.suffix != ".png":
            assert not re.search(r"/(home|root|tmp|work|Users)/", path.read_text()), name


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_memory_is_kept_for_the_next_arrays():
    """Pages that the system clears anew for 40 arrays of 24 MB, 6,000 pages each."""
    program = """import resource, numpy
for _ in range(40):
    numpy.ones(3_000_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
"""
    bare = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    bare["NUMPY_MADVISE_HUGEPAGE"] = "0"

    def pages(first, **given):
        found = subprocess.run(
            [sys.executable, "-c", first + program], env=bare | given, cwd=ROOT,
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        return int(found.stdout)

    own = {"MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_THRESHOLD_": "100000"}
    assert pages("import advkip\n") < 40_000
    assert pages("import advkip\n", **own) > 200_000


def test_what_the_package_sets_for_the_libraries_it_loads():
    """Threads that sleep, a GPU that JAX and PyTorch share, programs that XLA does not choose by
    the clock; each only where nothing is set."""
    names = ("OMP_WAIT_POLICY", "XLA_PYTHON_CLIENT_PREALLOCATE", "XLA_FLAGS")
    steady = "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"
    other = "--xla_gpu_autotune_level=2 --xla_dump_to=x"
    program = f"import advkip, os; print([os.environ[name] for name in {names}])"
    bare = {k: v for k, v in os.environ.items() if k not in names}
    for given, expected in (
        ({}, ["PASSIVE", "false", steady]),
        ({names[0]: "ACTIVE"}, ["ACTIVE", "false", steady]),
        ({names[2]: steady}, ["PASSIVE", "false", steady]),
        ({names[2]: other}, ["PASSIVE", "false", f"--xla_gpu_enable_triton_gemm=false {other}"]),
    ):
        found = subprocess.run(
            [sys.executable, "-c", program], env=bare | given, cwd=ROOT, capture_output=True,
            text=True,
        )  # fmt: skip
        assert found.stdout.strip() == str(expected)
