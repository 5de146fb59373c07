"""The runner: checks first, executes, skips, resumes, names the cell that fails."""

import json
from pathlib import Path

import nbformat
import pytest

from advkip import run

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


def params(folder, name="x", **settings):
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps({"name": name, "notebooks": ["good"], **settings}))
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


def test_a_failing_cell_is_named(project, capfd):
    path = params(project, notebooks=["good", "bad"])
    assert run.main([path]) == 1
    error = capfd.readouterr().err
    assert "x: cell 3 failed with ZeroDivisionError: division by zero" in error
    assert "# the faulty cell" in error
    names = sorted(p.name for p in Path("reports/x").glob("*.ipynb"))
    assert names == ["bad.failed.ipynb", "good.ipynb"]


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
    results = {"experiment": {"seed": 5}, "environment": {}, "rows": []}
    Path("reports/x/results.json").write_text(json.dumps(results))
    assert run.main([path]) == 2
    assert "pass --set name=" in capfd.readouterr().err


def test_paths_in_executed_notebooks_are_relative(project):
    assert run.main([params(project)]) == 0
    text = Path("reports/x/good.ipynb").read_text()
    assert str(project) not in text
    assert json.loads(text)["metadata"]["papermill"]["parameters"]["output"] == "../reports/x"
