"""Tables in texts: the README's, the report's, and those of experiments that differ a little."""

import subprocess
import sys
from pathlib import Path

import pytest

from advkip import ablation, records, tables, texts
from tests.sections import experiment
from tests.test_records import outcome, write

ROOT = Path(__file__).parents[1]


def test_texts_have_the_tables_of_the_committed_records():
    listed = ["git", "-C", str(ROOT), "ls-files", "reports/*/results.json"]
    out = subprocess.run(listed, capture_output=True, text=True, check=True).stdout
    found = {Path(name).parent.name: records.read(ROOT / name) for name in out.split()}
    assert found
    for name, mark, table in (
        ("README.md", "summary", tables.summary), ("reports/README.md", "results", tables.accuracy),
    ):  # fmt: skip
        text = (ROOT / name).read_text()
        made = texts.updated(text, mark, table(list(found.values())))
        assert texts.filled(made, found) == text


def test_a_text_without_marks():
    with pytest.raises(ValueError, match="add them"):
        texts.updated("no marks", "results", "| table |")
    assert texts.updated("a\n<!-- x -->\nold\n<!-- /x -->\nb", "x", "new") == (
        "a\n<!-- x -->\nnew\n<!-- /x -->\nb"
    )


def grid(folder):
    """Records of two sizes of the target batch, two seeds each, one at another learning rate."""
    found = {}
    for name, options in {
        "t10": {}, "t10-seed1": {"seed": 1, "accuracy": 0.5}, "t20": {"support__n_target": 20},
        "rate": {"adv_kip__learning_rate": 0.5, "accuracy": 0.2}, "other": {"support__clip": True},
    }.items():  # fmt: skip
        found[name] = write(folder / name, **options)
    return found


def test_what_the_notebooks_of_a_record_do_not_depend_on_is_no_difference(tmp_path):
    found = [write(tmp_path / "a"), write(tmp_path / "b", support__n_target=20)]
    found[0]["experiment"]["remedies"]["variants"] = []
    found[0]["experiment"]["robust_features"]["n_steps"] = 7
    assert ablation.differing(found) == ["support.n_target"]
    for record in found:
        record["rows"][0]["notebook"] = "05_remedies"
    assert ablation.differing(found) == ["support.n_target", "remedies.variants"]


def test_a_table_of_what_differs(tmp_path):
    found = grid(tmp_path)
    of_grid = [record for name, record in found.items() if name != "other"]
    assert ablation.differing(of_grid) == ["support.n_target", "adv_kip.learning_rate"]
    lines = ablation.table(of_grid).splitlines()
    assert lines[0] == (
        "| n_target | learning_rate | model | images | tested on | seeds | clean | pgd10 |"
    )
    assert lines[2:] == [
        "| 10 | 0.01 | kernel:fc3 | 5,000 | 100 | 2 | 90.0 ± 0.0 | 45.0 ± 7.1 |",
        "| 20 | 0.01 | kernel:fc3 | 5,000 | 100 | 1 | 90.0 | 40.0 |",
        "| 10 | 0.5 | kernel:fc3 | 5,000 | 100 | 1 | 90.0 | 20.0 |",
    ]
    with pytest.raises(ValueError, match="expected models of 'kip' sets in the records"):
        ablation.table(of_grid, trained_on="kip")


def test_variants_of_one_record_have_a_row_each_in_the_mean_of_seeds(tmp_path):
    found = []
    for seed, copies in enumerate(([1, 2], [])):
        e = experiment(seed=seed, remedies__copies=copies)
        recorder = records.Recorder(e, tmp_path / str(seed), "05_remedies")
        for title, left in (("as given", 0.1), ("hinge", 0.3 + seed / 10)):
            outcomes = [outcome("clean", 0.9), outcome("autoattack", left)]
            recorder.add(
                outcomes, model="kernel:fc3", trained_on="adv-kip", training="kernel",
                variant=title, seed=seed,
            )  # fmt: skip
        found.append(recorder.write())
    lines = ablation.table(found).splitlines()
    n = f"{e.support.n_support} | {found[0]['rows'][0]['n_test']:,} | 2 | 90.0 ± 0.0"
    assert lines[0] == "| variant | model | images | tested on | seeds | clean | autoattack |"
    assert lines[2:] == [
        f"| as given | kernel:fc3 | {n} | 10.0 ± 0.0 |",
        f"| hinge | kernel:fc3 | {n} | 35.0 ± 7.1 |",
    ]


def test_switches_one_at_a_time_are_named(tmp_path):
    """More settings than columns; what most records have goes without saying."""
    changes = [
        {}, {"adv_kip__inner_loss": "margin"}, {"adv_kip__learning_rate": 0.5},
        {"kernel__b_std": 0.5}, {"adv_kip__inner_loss": "margin", "support__clip": True},
        {"adv_kip__random_start": True}, {"support__label_scale": 2.0},
        {"kip__learning_rate": 0.25},
    ]  # fmt: skip
    found = [write(tmp_path / str(i), **change) for i, change in enumerate(changes)]
    lines = ablation.table(found).splitlines()
    assert lines[0] == "| changed | model | images | tested on | seeds | clean | pgd10 |"
    assert [line.split(" | ")[0] for line in lines[2:]] == [
        "| none", "| inner_loss margin", "| adv_kip.learning_rate 0.5", "| b_std 0.5",
        "| clip True, inner_loss margin", "| random_start True", "| label_scale 2",
        "| kip.learning_rate 0.25",
    ]  # fmt: skip


def test_tables_between_marks(tmp_path):
    found = grid(tmp_path)
    text = "a\n<!-- grid t* -->\nold\n<!-- /grid -->\nb\n<!-- grid rate t20 -->\n<!-- /grid -->\n"
    made = texts.filled(text, found)
    assert made.count("| model |") == 2
    assert "old" not in made
    assert (made.count("± 7.1"), made.count("| 20.0 |")) == (1, 1)
    assert texts.filled(made, found) == made
    with pytest.raises(ValueError, match="expected a record of none-\\*, got none"):
        texts.filled("<!-- grid none-* -->\n<!-- /grid -->", found)


def test_the_command(tmp_path):
    found = subprocess.run([sys.executable, "-m", "advkip.texts"], capture_output=True, text=True)
    assert found.returncode == 1
    assert found.stderr.startswith("usage: python -m advkip.texts")
    grid(tmp_path)
    for name, mark in (("README.md", "summary"), ("report.md", "results")):
        (tmp_path / name).write_text(f"<!-- {mark} -->\n<!-- /{mark} -->\n")
    with (tmp_path / "report.md").open("a") as file:
        file.write("<!-- grid t10* -->\n<!-- /grid -->\n")
    paths = [tmp_path / "README.md", tmp_path / "report.md", *tmp_path.glob("*/results.json")]
    texts.main(*map(str, paths))
    assert "| kernel:fc3 | adv-kip |" in paths[0].read_text()
    assert paths[1].read_text().count("ours") == 4
    assert "| kernel:fc3 | 5,000 | 100 | 2 |" in paths[1].read_text()
