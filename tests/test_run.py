"""The runner: checks first, executes, skips, resumes, names the cell that fails."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import numpy as np
import psutil
import pytest

from advkip import execute, files, run
from tests.sections import nested

NETS = {"notebooks": ["02_transfer"]}

GOOD = ["seed = 0\noutput = '.'", "import json\nprint('seed is', seed)"]
BAD = ["output = '.'", "value = 1", "# the faulty cell\n1 / (value - 1)"]


@pytest.fixture
def project(tmp_path, monkeypatch):
    """An empty project with two tiny notebooks."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notebooks").mkdir()
    for name, cells in (("good", GOOD), ("bad", BAD)):
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
        notebook.cells[0].metadata["tags"] = ["parameters"]
        notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3"}
        notebook.metadata["language_info"] = {"name": "python"}
        nbformat.write(notebook, tmp_path / "notebooks" / f"{name}.ipynb")
    return tmp_path


def params(folder, file="x", **settings):
    path = folder / f"{file}.yaml"
    path.write_text(json.dumps({"name": file, "notebooks": ["good"]} | settings))
    return str(path)


def output_of(path):
    cells = nbformat.read(path, 4).cells
    return "".join(o.get("text", "") for c in cells for o in c.get("outputs", []))


def test_executes_skips_and_runs_again(project, capfd):
    path = params(project)
    assert run.main([path, "--set", "seed=7"]) == 0
    executed = Path("reports/x/good.ipynb")
    assert output_of(executed) == "seed is 7\n"
    assert [p.name for p in Path("reports/x").glob("*.ipynb")] == ["good.ipynb"]
    changed = executed.stat().st_mtime_ns
    capfd.readouterr()
    assert run.main([path, "--set", "seed=7"]) == 0
    assert "finished, skipped" in capfd.readouterr().out
    assert executed.stat().st_mtime_ns == changed
    assert run.main([path, "--set", "seed=8"]) == 0
    assert output_of(executed) == "seed is 8\n"
    checkpoint = Path("reports/x/network-0.npz")
    checkpoint.touch()
    variant = Path("reports/x") / execute.VARIANTS / "a-0" / "distillation-adv-kip.npz"
    variant.parent.mkdir(parents=True)
    variant.touch()
    assert run.main([path, "--set", "seed=8", "--force"]) == 0
    assert not checkpoint.exists()
    assert not variant.exists()
    assert "finished, skipped" not in capfd.readouterr().out


def test_a_notebook_of_other_data_is_run_again(project, capfd):
    def save(name, **changes):
        rng = np.random.default_rng(0)
        parts = {f"x_{part}": rng.uniform(0, 1, (60, 6, 6)) for part in ("train", "test")}
        labels = {f"y_{part}": np.arange(60) % 10 for part in ("train", "test")}
        np.savez(project / name, **(parts | labels | changes))

    def ran():
        assert run.main([path]) == 0
        return "finished, skipped" not in capfd.readouterr().out

    save("mine.npz")

    def of_folder(folder):
        found = {"name": "mine", "folder": folder, "n_validation": 10}
        small = {"support": {"n_support": 10, "n_target": 10}, "networks": {"n_original": 10}}
        return params(project, dataset=found, **small)

    path = of_folder(".")
    assert ran()
    assert not ran()
    time.sleep(2.1)  # a zip file keeps the time in steps of two seconds
    save("mine.npz")
    assert not ran()
    save("mine.npz", x_test=np.zeros((60, 6, 6)))
    assert ran()
    assert not ran()
    (project / "elsewhere").mkdir()
    (project / "mine.npz").rename(project / "elsewhere" / "mine.npz")
    path = of_folder("elsewhere")
    assert not ran()


def test_new_code_is_said_of_a_finished_notebook(project, capfd):
    notebook, path = project / "notebooks" / "good.ipynb", params(project)
    assert run.main([path, "--set", "seed=7"]) == 0
    before = nbformat.read("reports/x/good.ipynb", 4)
    content = nbformat.read(notebook, 4)
    content.cells.insert(1, nbformat.v4.new_markdown_cell("A sentence."))
    nbformat.write(content, notebook)
    assert run.main([path, "--set", "seed=7"]) == 0
    assert "has changed since" not in capfd.readouterr().out
    content.cells[2].source += "\nprint('more')"
    nbformat.write(content, notebook)
    assert run.main([path, "--set", "seed=7"]) == 0
    assert nbformat.read("reports/x/good.ipynb", 4) == before
    assert "finished, with code that has changed since, skipped" in capfd.readouterr().out


def test_without_git_no_notebook_differs(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert not execute._differs("01_kernels")


def test_a_failing_cell_is_named(project, capfd):
    path = params(project, notebooks=["good", "bad"])
    assert run.main([path]) == 1
    error = capfd.readouterr().err
    assert "reports/x/bad.ipynb: cell [4] failed with ZeroDivisionError: division by" in error
    assert "# the faulty cell" in error
    names = sorted(p.name for p in Path("reports/x").glob("*.ipynb"))
    assert names == ["bad.failed.ipynb", "good.ipynb"]


def test_a_notebook_that_was_cut_off_is_run_again_in_the_same_folder(project, capfd):
    notebook = project / "notebooks" / "bad.ipynb"
    content = nbformat.read(notebook, 4)
    content.cells[
        1
    ].source = "from pathlib import Path\nPath(output, 'half.txt').touch(exist_ok=False)"
    content.cells[2].source = "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)"
    nbformat.write(content, notebook)
    path = params(project, notebooks=["bad"])
    assert run.main([path]) == 1
    assert "bad.ipynb: the kernel died" in capfd.readouterr().err
    content.cells[1].source = "from pathlib import Path\nassert Path(output, 'half.txt').exists()"
    content.cells[2].source = "print('resumed')"
    nbformat.write(content, notebook)
    assert run.main([path]) == 0
    assert output_of("reports/x/bad.ipynb") == "resumed\n"
    assert "running" not in " ".join(p.name for p in Path("reports/x").iterdir())


def test_interruption_says_how_to_go_on(project, capfd, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(execute.papermill, "execute_notebook", interrupted)
    assert run.main([params(project)]) == 130
    assert "continues from the last checkpoint" in capfd.readouterr().err


def test_relative_data_folders_hold_from_where_one_stands(project, monkeypatch):
    notebook = project / "notebooks" / "good.ipynb"
    content = nbformat.read(notebook, 4)
    content.cells[0].source = "seed = 0\ndataset = {}\noutput = '.'"
    content.cells[1].source = """import os
from advkip import files
print(files.find(dataset['folder']).is_dir(), os.path.isdir(os.environ['ADVKIP_DATA']))"""
    nbformat.write(content, notebook)
    (project / "images").mkdir()
    monkeypatch.setenv("ADVKIP_DATA", "images")
    assert run.main([params(project, dataset={"folder": "images"})]) == 0
    assert output_of("reports/x/good.ipynb") == "True True\n"


def test_the_end_shows_the_table_and_where_to_look(project, capfd):
    path = params(project)
    experiment = run.Experiment.from_file(path)
    row = {
        "notebook": "good", "model": "kernel:fc3", "trained_on": "kip", "training": "kernel",
        "attack": "clean", "norm": "linf", "epsilon": 0.0, "accuracy": 0.875, "n_test": 8,
        "seed": 0,
    }  # fmt: skip
    record = {"experiment": experiment.to_dict(), "environment": {"seconds": {}}, "rows": [row]}
    Path("reports/x").mkdir(parents=True)
    Path("reports/x/results.json").write_text(json.dumps(record))
    assert run.main([path]) == 0
    out = capfd.readouterr().out
    assert "| ours, 0.2 | kernel:fc3 | 100 | kip | 8 | 87.50 |" in out
    assert "reports/x/" in out.splitlines()[-1]


def test_a_terminal_that_is_not_utf8(project):
    """The table has signs that ASCII has not."""
    path = params(project, dataset={"name": "mnist"}, support={"n_support": 5000})
    experiment = run.Experiment.from_file(path)
    record = {"experiment": experiment.to_dict(), "environment": {}, "rows": []}
    row = dict.fromkeys(("notebook", "model", "trained_on", "training", "attack", "norm"), "clean")
    row |= {"epsilon": 0.3, "accuracy": 0.5, "n_test": 8, "seed": 0}
    record["rows"] = [row]
    folder = project / "reports" / "x"
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(record))
    environment = os.environ | {"PYTHONIOENCODING": "ascii:strict"}
    command = [sys.executable, "-m", "advkip.run", path]
    environment["PYTHONPATH"] = str(Path(run.__file__).parents[1])
    found = subprocess.run(command, cwd=project, env=environment, capture_output=True)
    assert found.returncode == 0, found.stderr
    assert b"0.03 |" in found.stdout  # 97.51 +- 0.03


def test_everything_is_checked_before_anything_runs(project, capfd):
    first = params(project)
    for settings, message in (
        ({"seed": "1e-6"}, "y.yaml: seed: expected a valid integer, got '1e-6' (str)"),
        ({"threat": {"epsilom": 0.1}}, "y.yaml: threat.epsilom: expected a known setting"),
        ({"notebooks": ["09_none"]}, "y.yaml: expected notebooks to name files of notebooks/"),
        ({"name": "x"}, "y.yaml: expected a name of its own, got 'x'"),
    ):
        second = params(project, "y", **settings)
        assert run.main([first, second]) == 2
        assert message in capfd.readouterr().err
    assert run.main([first, "nowhere.yaml"]) == 2
    assert "nowhere.yaml" in capfd.readouterr().err
    assert not Path("reports").exists()
    assert run.main([first, "--check"]) == 0
    assert not Path("reports").exists()


def test_results_of_other_settings_are_not_overwritten(project, capfd):
    path = params(project)
    assert run.main([path]) == 0
    experiment = run.Experiment.from_file(path).to_dict()

    def with_results_of(**changes):
        changed = run.Experiment.from_params(experiment).replace(**changes).to_dict()
        results = {"experiment": changed, "environment": {}, "rows": []}
        Path("reports/x/results.json").write_text(json.dumps(results))
        return run.main([path])

    assert with_results_of(seed=5) == 2
    assert "got other ['seed']; pass --set name=" in capfd.readouterr().err
    assert with_results_of(adv_kip={"n_steps": 1000}) == 2
    # More steps, other notebooks, and settings that did not exist then, are the same experiment.
    assert with_results_of(adv_kip={"n_steps": 1}) == 0
    assert with_results_of(notebooks=["bad"]) == 0
    assert with_results_of(cnns={"epochs": 1}) == 0
    del experiment["kip"]["patience"]
    assert with_results_of() == 0


def test_a_change_of_a_section_reruns_what_depends_on_it_alone(project):
    for name in ("01_kernels", "03_cnns"):
        cells = ["seed = 0\noutput = '.'", "print(sorted(globals().keys() & {'cnns'}))"]
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
        notebook.cells[0].metadata["tags"] = ["parameters"]
        notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3"}
        notebook.metadata["language_info"] = {"name": "python"}
        nbformat.write(notebook, project / "notebooks" / f"{name}.ipynb")
    path = params(project, notebooks=["01_kernels", "03_cnns"], cnns={"nets": ["vgg11"]})
    assert run.main([path]) == 0
    assert output_of("reports/x/03_cnns.ipynb") == "['cnns']\n"  # the seed is at its default

    def ran(*changes):
        notebooks = [Path(f"reports/x/{n}.ipynb") for n in ("01_kernels", "03_cnns")]
        before = [path.stat().st_mtime_ns for path in notebooks]
        assert run.main([path, *(f"--set={change}" for change in changes)]) == 0
        return [one.stat().st_mtime_ns > old for one, old in zip(notebooks, before, strict=True)]

    assert ran("cnns.epochs=3", "kernel.block_size=64") == [False, True]
    assert ran("cnns.epochs=3", "fully_connected.epochs=7", "diagnosis.n_images=5") == [False] * 2
    assert ran("cnns.epochs=3", "adv_kip.n_steps=7") == [True, True]


def test_paths_in_executed_notebooks_are_relative(project):
    assert run.main([params(project)]) == 0
    text = Path("reports/x/good.ipynb").read_text()
    assert str(project) not in text
    assert json.loads(text)["metadata"]["papermill"]["parameters"]["output"] == "../reports/x"


def start(project, *arguments):
    environment = os.environ | {"PYTHONPATH": str(Path(run.__file__).parents[1])}
    return subprocess.Popen(
        [sys.executable, "-m", "advkip.run", *arguments], cwd=project, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def wait_for(path):
    for _ in range(600):
        if path.exists():
            return
        time.sleep(0.1)
    raise AssertionError(f"{path} did not come")


@pytest.fixture
def slow(project):
    """A notebook that works on until it is interrupted, and then saves what it has."""
    notebook = project / "notebooks" / "good.ipynb"
    content = nbformat.read(notebook, 4)
    content.cells[1].source = """import time
from pathlib import Path
folder = Path(output)
try:
    (folder / 'began').touch()
    time.sleep(60)
except KeyboardInterrupt:
    (folder / 'saved').touch()
    raise"""
    nbformat.write(content, notebook)
    return params(project)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_lets_the_cell_save(project, slow, number, status):
    process = start(project, slow)
    wait_for(project / "reports/x/began")
    process.send_signal(number)
    out, error = process.communicate(timeout=60)
    assert process.returncode == status
    assert (project / "reports/x/saved").exists()
    assert "the same command continues from the last checkpoint" in error
    assert not {"Traceback", "ZMQ", "encryption"} & set((out + error).replace(":", " ").split())
    assert not list((project / "reports/x").glob("*.ipynb"))


def test_a_signal_that_comes_before_the_kernel_is_ready_is_not_lost(project, slow):
    """It comes as soon as the kernel's process is there."""
    process = start(project, slow)
    while not psutil.Process(process.pid).children():
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 143, error
    assert "the same command continues from the last checkpoint" in error
    assert not (project / "reports/x/began").exists()


def test_a_signal_that_a_cell_swallows_ends_before_the_next(project, slow):
    notebook = project / "notebooks" / "good.ipynb"
    content = nbformat.read(notebook, 4)
    content.cells[1].source = content.cells[1].source.replace("    raise", "")
    content.cells.append(nbformat.v4.new_code_cell("(folder / 'next').touch()"))
    nbformat.write(content, notebook)
    process = start(project, slow)
    wait_for(project / "reports/x/began")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 143
    assert (project / "reports/x/saved").exists()
    assert not (project / "reports/x/next").exists()


def test_a_second_run_in_a_folder_is_refused_until_the_first_is_gone(project, slow):
    first = start(project, slow)
    wait_for(project / "reports/x/began")
    second = start(project, slow, "--set", "seed=1")
    _, error = second.communicate(timeout=60)
    assert second.returncode == 2
    assert f"got a run in it (process {first.pid} on " in error
    assert "pass --set name=... for a folder of its own" in error
    first.kill()
    first.communicate(timeout=60)
    with files.taken(project / "reports/x"):  # nothing of it hinders
        pass


def test_other_runs_go_on_when_asked_to(project, capfd):
    paths = [params(project, "a", notebooks=["bad"]), params(project, "b")]
    assert run.main(paths) == 1
    error = capfd.readouterr().err
    assert "not run: b (--keep-going runs them)" in error
    assert not Path("reports/b/good.ipynb").exists()
    assert run.main([*paths, "--keep-going"]) == 1
    error = capfd.readouterr().err
    assert "ZeroDivisionError" in error
    assert "failed: a (see above)" in error
    assert Path("reports/b/good.ipynb").exists()


def test_from_another_folder_it_says_where_to_run(project, capfd, monkeypatch):
    path = params(project)
    (project / "elsewhere").mkdir()
    monkeypatch.chdir(project / "elsewhere")
    assert run.main([path]) == 2
    assert "run from the project's folder" in capfd.readouterr().err


def test_starting_over_leaves_nothing_to_mix(project):
    folder = project / "reports" / "x"
    assert run.main([params(project)]) == 0
    path = params(project, notebooks=["good", "bad"])
    for name in ("distillation-kip.npz", "network-1.npz", "adv-kip.npz", "robust-features.npz"):
        (folder / name).touch()
    (folder / "mine.npz").touch()
    assert run.main([path, "--force"]) == 1  # cut off before its end
    assert {p.name for p in folder.iterdir()} == {
        "good.ipynb", "bad.failed.ipynb", "mine.npz", ".lock",
    }  # fmt: skip


@pytest.mark.parametrize("folder", ["runs {user}", "runs-{seed}", "a}b"])
def test_braces_in_the_folder_of_results(project, folder):
    assert run.main([params(project), "--reports", folder]) == 0
    assert (project / folder / "x" / "good.ipynb").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"support__n_support": 5000}, "n_support = 5000: expected 500 images of class 0"),
        ({"support__n_target": 1300}, "n_target = 1300: expected at most 1237 images"),
        ({"dataset__n_validation": 2000}, "n_validation = 2000"),
        ({"networks__n_original": 3000}, "n_original = 3000"),
        ({"dataset__n_test": 800}, "n_test = 800"),
        ({"dataset__name": "nowhere"}, "expected a data set in"),
        ({"dataset__folder": "nowhere"}, "expected dataset.folder to be a folder"),
        ({"networks__sets": ["no.npz"], **NETS}, "or a path, got 'no.npz', which is not there"),
        ({"networks__sets": ["."], **NETS}, "published robust features in ., got a folder without"),
        ({"threat__norm": "l2", "threat__epsilon": 9.0}, "expected an l2 radius of at most 8.0"),
        ({"evaluation__attacks": ["pgd2-l2"], "threat_l2__epsilon": 9.0}, "l2 radius of at most 8"),
        ({"dataset__name": "three", "dataset__folder": ".", "support__n_support": 6,
          "support__n_target": 6, "dataset__n_validation": 6, "networks__n_original": 6, **NETS},
         "evaluation.attacks for 3 classes, got ..autoattack"),
        ({"networks__sets": ["three.npz"], **NETS},
         r"three.npz: expected images \(8, 8, 1\) of 10 classes"),
    ],
)  # fmt: skip
def test_data_that_do_not_fit_are_refused_before_anything_runs(project, capfd, settings, message):
    rng = np.random.default_rng(0)
    parts = {f"x_{part}": rng.uniform(0, 1, (60, 6, 6)) for part in ("train", "test")}
    labels = {f"y_{part}": np.arange(60) % 3 for part in ("train", "test")}
    np.savez(project / "three.npz", **parts, **labels)
    good = project / "notebooks" / "good.ipynb"
    (project / "notebooks" / "02_transfer.ipynb").write_bytes(good.read_bytes())
    assert run.main([params(project, **nested(**settings)), "--check"]) == 2
    error = capfd.readouterr().err
    assert "x.yaml: " in error
    assert re.search(message, error)


def test_papermill_alone_takes_a_params_file_and_a_section(tmp_path):
    """As `papermill notebooks/01_kernels.ipynb out.ipynb -f params/x.yaml -y 'threat: ...'`."""
    (tmp_path / "x.yaml").write_text(
        "name: by-papermill\nsupport: {n_support: 20, n_target: 20}\nkip: null\n"
        "adv_kip: {n_steps: 2, eval_every: 1, pgd_steps: 2}\ndataset: {n_test: 40}\n"
    )
    section = "threat: {epsilon: 8/255, step_size: 2/255}"
    source = Path(run.__file__).parents[1] / "notebooks" / "01_kernels.ipynb"
    found = subprocess.run(
        [sys.executable, "-m", "papermill", source, "out.ipynb", "-f", "x.yaml", "-y", section],
        cwd=tmp_path, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(source.parents[1])},
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    record = json.loads((tmp_path / "reports" / "by-papermill" / "results.json").read_text())
    assert record["experiment"]["threat"] == {
        "epsilon": 8 / 255, "step_size": 2 / 255, "norm": "linf",
    }  # fmt: skip
    assert record["experiment"]["kip"] is None
    assert {row["trained_on"] for row in record["rows"]} == {"original", "adv-kip"}
    assert record["rows"][0]["n_test"] == 40
