"""A grid on a local Dask cluster: a worker that is killed, a notebook that fails, nothing twice."""

import fnmatch
import json
from pathlib import Path

import nbformat
import pytest

from advkip import grid, run, sweep
from tests.sections import experiment

CELLS = [
    "seed = 0\noutput = '.'",
    """import os, signal, time
from pathlib import Path
folder = Path(output)
(folder / f'ran-{time.time_ns()}').touch()
if seed == 1 and not (folder / 'killed').exists():
    (folder / 'killed').touch()
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(60)""",
    "if seed == 2 and not Path('..', 'mended').exists():\n    1 / 0",
    "print(seed, len(os.sched_getaffinity(0)))",
]


@pytest.fixture
def project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notebooks").mkdir()
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in CELLS])
    notebook.cells[0].metadata["tags"] = ["parameters"]
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3"}
    notebook.metadata["language_info"] = {"name": "python"}
    nbformat.write(notebook, tmp_path / "notebooks" / "tiny.ipynb")
    (tmp_path / "x.yaml").write_text(
        json.dumps({"name": "x", "notebooks": ["tiny"], "grid": {"seed": [0, 1, 2, 3]}})
    )
    return tmp_path


def runs(project):
    """How often each experiment's notebook was begun."""
    return {
        folder.name: len(list(folder.glob("ran-*")))
        for folder in sorted((project / "reports").iterdir())
    }


def test_a_grid_is_finished_whatever_happens(project, capfd):
    assert run.main(["x.yaml", "--workers", "2"]) == 1
    out = capfd.readouterr().out
    assert runs(project) == {"x-seed0": 1, "x-seed1": 2, "x-seed2": 1, "x-seed3": 1}
    assert "failed   x-seed2: reports/x-seed2/tiny.ipynb: cell [4] failed with ZeroDivision" in out
    for name in ("x-seed0", "x-seed1", "x-seed3"):
        assert f"finished {name}" in out
        assert (project / "reports" / name / "tiny.ipynb").exists()
    assert "this continues: python -m advkip.run x.yaml --workers 2" in out
    assert not list(project.glob(f"reports/*/{sweep.STATUS}"))
    assert "3 1" not in out  # what notebooks print is in their log
    assert "running" in (project / "reports" / "x-seed3" / sweep.LOG).read_text()
    cells = nbformat.read("reports/x-seed3/tiny.ipynb", 4).cells
    seed, cores = cells[-1].outputs[0].text.split()
    assert seed == "3"
    assert int(cores) == max(1, len(__import__("os").sched_getaffinity(0)) // 2)

    (project / "mended").touch()
    assert run.main(["x.yaml", "--workers", "2"]) == 0
    assert runs(project) == {"x-seed0": 1, "x-seed1": 2, "x-seed2": 2, "x-seed3": 1}
    capfd.readouterr()
    assert run.main(["x.yaml", "--workers", "2"]) == 0
    assert runs(project) == {"x-seed0": 1, "x-seed1": 2, "x-seed2": 2, "x-seed3": 1}
    assert "failed" not in capfd.readouterr().out


def test_without_workers_a_grid_runs_one_after_another(project, capfd):
    (project / "mended").touch()
    (project / "reports" / "x-seed1").mkdir(parents=True)
    (project / "reports" / "x-seed1" / "killed").touch()
    assert run.main(["x.yaml"]) == 0
    assert runs(project) == {"x-seed0": 1, "x-seed1": 1, "x-seed2": 1, "x-seed3": 1}


def test_a_grid_unfolds_into_named_experiments(tmp_path):
    path = tmp_path / "y.yaml"
    path.write_text(
        "grid: {seed: [0, 1], support.n_support: [20, 30], threat.epsilon: [8/255]}\n"
        "threat: {step_size: 2/255}\n"
    )
    found = grid.experiments(path, ["kip=null"])
    assert [one.name for one in found] == [
        f"y-seed{seed}-n_support{n}-epsilon8-255" for seed in (0, 1) for n in (20, 30)
    ]
    assert [(one.seed, one.support.n_support) for one in found] == [
        (0, 20), (0, 30), (1, 20), (1, 30),
    ]  # fmt: skip
    assert {(one.threat.epsilon, one.kip) for one in found} == {(8 / 255, None)}
    path.write_text(
        "grid:\n  seed: [0, 1]\n  switch:\n    the paper's: {}\n"
        "    hinge:\n      adv_kip.inner_loss: margin\n      adv_kip: {outer_loss: hinge}\n"
        "      support.clip: true\n"
    )
    found = grid.experiments(path, ["support.n_support=40"])
    assert [one.name for one in found] == [
        "y-seed0-the-paper-s", "y-seed0-hinge", "y-seed1-the-paper-s", "y-seed1-hinge",
    ]  # fmt: skip
    assert found[2] == experiment(name=found[2].name, seed=1, support__n_support=40)
    assert found[3] == experiment(
        name="y-seed1-hinge", seed=1, support__n_support=40, support__clip=True,
        adv_kip__inner_loss="margin", adv_kip__outer_loss="hinge",
    )  # fmt: skip
    with pytest.raises(
        ValueError, match=r"than those of the grid, got \['seed'\]; pass.*grid.seed="
    ):
        grid.experiments(path, ["seed =7"])
    with pytest.raises(ValueError, match=r"got \['support.clip', 'adv_kip'\]"):
        grid.experiments(path, ["support.clip=false", "adv_kip={outer_loss: mse}"])
    assert len(grid.experiments(path, ["grid.seed=[7]"])) == 2
    path.write_text(
        "grid: {x: {a: {adv_kip: {inner_loss: margin}}}, y: {b: {adv_kip: {outer_loss: hinge}}}}"
    )
    (both,) = grid.experiments(path)
    assert (both.adv_kip.inner_loss, both.adv_kip.outer_loss) == ("margin", "hinge")
    path.write_text("seed: 3")
    assert [one.seed for one in grid.experiments(path)] == [3]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("grid: [1]", "lists of values, or a word to named settings, got .1."),
        ("grid: {}", "expected grid to map settings to lists"),
        ("grid: {seed: 1}", "expected grid to map settings to lists"),
        ("grid: {seed: []}", "expected grid to map settings to lists"),
        ("grid: {support.n: [1]}", "support.n: expected a known setting"),
        ("grid: {switch: {}}", "expected grid to map settings to lists"),
        ("grid: {switch: {a: [1]}}", "expected grid to map settings to lists"),
        ("grid: {switch: {a: {support.n: 1}}}", "support.n: expected a known setting"),
        (
            "grid: {seed: [1], x: {a: {seed: 2}}}",
            "expected each setting in one.*'seed'. in y-seed1-a",
        ),
        ("grid: {x: {a: {name: b}}}", "expected each setting in one.*, and no name, got .'name'."),
        (
            "grid: {support.n_support: [20], x: {a: {support: {n_support: 9}}}}",
            "expected each setting in one.*'support.n_support'. in y-n_support20-a",
        ),
        ("grid: {seed: [1, 1]}", "expected a name for each point of the grid, got 'y-seed1' twice"),
        ("grid: {seed: [x]}", "seed: expected a valid integer, got 'x'"),
    ],
)
def test_grids_that_are_none(tmp_path, text, message):
    path = tmp_path / "y.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"y.yaml.*{message}"):
        grid.experiments(path)


def test_what_experiments_share_is_made_once():
    """Another recipe of CNNs needs no other distilled set or adversarial training; a seed does."""
    shared = {"notebooks": ["01_kernels", "03_cnns"]}
    a = experiment(name="a", **shared)
    b = experiment(name="b", cnns__epochs=3, **shared)
    c = experiment(name="c", seed=1, **shared)
    d = experiment(name="d", seed=1, adversarial_training__epochs=3, **shared)
    tasks = sweep.plan([a, b, c, d])
    assert [(one.experiment.name, one.notebook, one.after) for one in tasks] == [
        ("a", "01_kernels", None), ("a", "03_cnns", 0), ("b", "01_kernels", None),
        ("b", "03_cnns", 2), ("c", "01_kernels", None), ("c", "03_cnns", 4),
        ("d", "01_kernels", None), ("d", "03_cnns", 6),
    ]  # fmt: skip
    (sets, *_), *_, (robust, *_) = sweep.SHARED
    assert [one.takes for one in tasks] == [
        (), (), ((0, sets),), ((0, sets), (1, robust)), (), (), ((4, sets),), ((4, sets),),
    ]  # fmt: skip


def test_other_networks_inside_the_outer_steps_make_another_set():
    shared = {"notebooks": ["02_transfer"], "networks__sets": ["unrolled"]}
    a, b, c = (
        experiment(name=str(i), unrolled__net_steps=n, fully_connected__epochs=epochs, **shared)
        for i, (n, epochs) in enumerate([(5, 1), (6, 1), (5, 2)])
    )
    sets, unrolled = sweep.SHARED[0][0], sweep.UNROLLED
    first, second, third = (one.takes for one in sweep.plan([a, b, c]))
    assert (first, second) == ((), ((0, sets),))
    assert third == ((0, sets), (0, unrolled), (0, sweep.EXPERTS))
    for name, patterns in (
        ("adv-kip", [sets]), ("kip", [sets]), ("unrolled", [unrolled])
    ):  # fmt: skip
        file = f"distillation-{name}.npz"
        assert [one for one in (sets, unrolled) if fnmatch.fnmatch(file, one)] == patterns


def test_files_are_taken_once(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    (tmp_path / "a" / "distillation-kip.npz").write_text("made")
    (tmp_path / "a" / "results.json").write_text("own")
    sweep._take(tmp_path / "a", tmp_path / "b", "distillation-*.npz")
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["distillation-kip.npz"]
    (tmp_path / "b" / "distillation-kip.npz").write_text("mine")
    sweep._take(tmp_path / "a", tmp_path / "b", "distillation-*.npz")
    assert (tmp_path / "b" / "distillation-kip.npz").read_text() == "mine"


def test_without_dask_it_says_so(project, capfd, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "distributed", None)
    assert run.main(["x.yaml", "--workers", "2"]) == 2
    assert "install the extra [cluster]" in capfd.readouterr().err
    assert not Path("reports").exists()


def test_no_scheduler_there(project, capfd, monkeypatch):
    assert run.main(["x.yaml", "--scheduler", "tcp://127.0.0.1:9"]) == 2
    assert "expected a Dask scheduler at tcp://127.0.0.1:9" in capfd.readouterr().err


def test_a_cluster_of_ones_own(project, capfd):
    from distributed import LocalCluster

    (project / "mended").touch()
    with LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=":0") as cluster:
        address = cluster.scheduler_address
        assert run.main(["x.yaml", "--scheduler", address, "--set", "grid.seed=[0, 3]"]) == 0
    assert runs(project) == {"x-seed0": 1, "x-seed3": 1}
    assert "finished x-seed3" in capfd.readouterr().out
