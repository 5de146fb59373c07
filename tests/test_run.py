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

from advkip import files, run

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
    checkpoint = Path("reports/x/checkpoint-0.npz")
    checkpoint.touch()
    assert run.main([path, "--set", "seed=8", "--force"]) == 0
    assert not checkpoint.exists()
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
    sizes = {"n_support": 10, "n_target": 10, "n_validation": 10}
    path = params(project, dataset="mine", data_dir=".", **sizes)
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
    path = params(project, dataset="mine", data_dir="elsewhere", **sizes)
    assert not ran()


def test_new_prose_reaches_finished_notebooks_and_new_code_does_not(project, capfd):
    notebook, path = project / "notebooks" / "good.ipynb", params(project)
    content = nbformat.read(notebook, 4)
    content.cells.insert(1, nbformat.v4.new_markdown_cell("An old sentence."))
    nbformat.write(content, notebook)
    assert run.main([path, "--set", "seed=7"]) == 0
    executed = Path("reports/x/good.ipynb")
    before = nbformat.read(executed, 4)
    content.cells[1].source = "A better one."
    nbformat.write(content, notebook)
    assert run.main([path, "--set", "seed=7"]) == 0
    after = nbformat.read(executed, 4)
    old = next(c for c in before.cells if c.cell_type == "markdown")
    old.source = "A better one."
    assert after == before  # nothing else has changed, outputs and injected parameters least
    assert output_of(executed) == "seed is 7\n"
    assert "has changed since" not in capfd.readouterr().out
    content.cells[1].source = "Prose about other code."
    content.cells[2].source += "\nprint('more')"
    nbformat.write(content, notebook)
    assert run.main([path, "--set", "seed=7"]) == 0
    assert nbformat.read(executed, 4) == after
    assert "finished, with code that has changed since, skipped" in capfd.readouterr().out


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

    monkeypatch.setattr(run.papermill, "execute_notebook", interrupted)
    assert run.main([params(project)]) == 130
    assert "continues from the last checkpoint" in capfd.readouterr().err


def test_relative_data_folders_hold_from_where_one_stands(project, monkeypatch):
    notebook = project / "notebooks" / "good.ipynb"
    content = nbformat.read(notebook, 4)
    content.cells[0].source = "seed = 0\ndata_dir = ''\noutput = '.'"
    content.cells[
        1
    ].source = "import os\nprint(os.path.isdir(data_dir), os.path.isdir(os.environ['ADVKIP_DATA']))"
    nbformat.write(content, notebook)
    (project / "images").mkdir()
    monkeypatch.setenv("ADVKIP_DATA", "images")
    assert run.main([params(project, data_dir="images")]) == 0
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
    assert "| ours | kernel:fc3 | 100 | kip | 8 | 87.50 |" in out
    assert "reports/x/" in out.splitlines()[-1]


def test_a_terminal_that_is_not_utf8(project):
    """The table has signs that ASCII has not."""
    path = params(project, dataset="mnist", n_support=5000)
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
        ({"learning_rate": "1e-6"}, "y.yaml: expected learning_rate to be a finite float"),
        ({"epsilom": 0.1}, "y.yaml: expected known settings, got ['epsilom']"),
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
        results = {"experiment": {**experiment, **changes}, "environment": {}, "rows": []}
        Path("reports/x/results.json").write_text(json.dumps(results))
        return run.main([path])

    assert with_results_of(seed=5) == 2
    assert "got other ['seed']; pass --set name=" in capfd.readouterr().err
    assert with_results_of(n_steps=1000) == 2
    # More steps, other notebooks, and settings that did not exist then, are the same experiment.
    assert with_results_of(n_steps=1) == 0
    assert with_results_of(notebooks=["bad"]) == 0
    assert with_results_of(net_epochs=1) == 0
    del experiment["kip_patience"]
    assert with_results_of() == 0


def test_settings_of_networks_reach_their_notebooks_alone(project):
    for name in ("01_kernels", "03_cnns"):
        cells = ["seed = 0\noutput = '.'", "print(sorted(globals().keys() & {'cnns', 'seed'}))"]
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
        notebook.cells[0].metadata["tags"] = ["parameters"]
        notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3"}
        notebook.metadata["language_info"] = {"name": "python"}
        nbformat.write(notebook, project / "notebooks" / f"{name}.ipynb")
    path = params(project, notebooks=["01_kernels", "03_cnns"], cnns=["vgg11"])
    assert run.main([path]) == 0
    assert output_of("reports/x/01_kernels.ipynb") == "['seed']\n"
    assert output_of("reports/x/03_cnns.ipynb") == "['cnns', 'seed']\n"
    before = [Path(f"reports/x/{n}.ipynb").stat().st_mtime_ns for n in ("01_kernels", "03_cnns")]
    assert run.main([path, "--set", "net_epochs=3", "--set", "block_size=64"]) == 0
    after = [Path(f"reports/x/{n}.ipynb").stat().st_mtime_ns for n in ("01_kernels", "03_cnns")]
    assert after[0] == before[0]  # not run again
    assert after[1] > before[1]
    e = run.Experiment.from_file(path, ["distilled_set=sets/a.npz"])
    found = run.parameters_for("03_cnns", e, Path("reports/x"))
    assert found["distilled_set"] == "../sets/a.npz"
    assert "distilled_set" not in run.parameters_for("01_kernels", e, Path("reports/x"))


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
    for name in ("checkpoint-1.npz", "kip.npz", "adv-kip.npz", "robust-features.npz"):
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
        ({"n_support": 5000}, "n_support = 5000: expected 500 images of class 0"),
        ({"n_target": 1300}, "n_target = 1300: expected at most 1237 images"),
        ({"n_validation": 2000}, "n_validation = 2000"),
        ({"n_original": 3000}, "n_original = 3000"),
        ({"n_test": 800}, "n_test = 800"),
        ({"dataset": "nowhere"}, "expected a data set in"),
        ({"data_dir": "nowhere"}, "expected data_dir to be a folder"),
        ({"distilled_set": "no.npz"}, "expected distilled_set to be a .npz file, got no.npz"),
        ({"robust_features": "no"}, "expected robust_features to be a folder or a .npz, got no"),
        ({"norm": "l2", "epsilon": 9.0}, "expected an l2 radius of at most 8.0"),
        ({"net_attacks": ["pgd2-l2"], "epsilon_l2": 9.0}, "expected an l2 radius of at most 8.0"),
        ({"dataset": "three", "data_dir": ".", "n_support": 6, "n_target": 6, "n_validation": 6,
          "notebooks": ["02_transfer"]}, "net_attacks for 3 classes, got ..autoattack"),
        ({"distilled_set": "three.npz"}, r"three.npz: expected images \(8, 8, 1\) of 10 classes"),
    ],
)  # fmt: skip
def test_data_that_do_not_fit_are_refused_before_anything_runs(project, capfd, settings, message):
    rng = np.random.default_rng(0)
    parts = {f"x_{part}": rng.uniform(0, 1, (60, 6, 6)) for part in ("train", "test")}
    labels = {f"y_{part}": np.arange(60) % 3 for part in ("train", "test")}
    np.savez(project / "three.npz", **parts, **labels)
    good = project / "notebooks" / "good.ipynb"
    (project / "notebooks" / "02_transfer.ipynb").write_bytes(good.read_bytes())
    assert run.main([params(project, **settings), "--check"]) == 2
    error = capfd.readouterr().err
    assert "x.yaml: " in error
    assert re.search(message, error)
