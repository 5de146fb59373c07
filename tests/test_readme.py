"""What the README tells a reader to type runs as it stands, on less data."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from advkip import data, distill, nets, run, sets
from tests.sections import SMALL_SETS, changed

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", README, re.S)
COMMANDS = re.findall(r"python -m advkip\.run (params.+)$", README, re.M)


@pytest.fixture
def here():
    """Names that the snippets take for granted: a network and test images."""
    d = data.load("digits")
    net = nets.build("fc1-32", shape=(8, 8, 1), n_classes=10, seed=0)
    return {"net": net, "x_test": d.x_test[:30], "y_test": d.y_test[:30]}


def test_they_are_found():
    assert len(PYTHON) == 4
    assert len(COMMANDS) >= 1


def test_ones_own_kernel(here):
    snippet = next(one for one in PYTHON if "stax_module" in one)
    given = '{"adv_kip": {"n_steps": 20}}'
    assert snippet.count(given) == 1
    less = '{"adv_kip": {"n_steps": 2}, "support": {"n_support": 20, "n_target": 20}}'
    exec(snippet.replace(given, less), here)
    assert isinstance(here["result"], distill.Distilled)
    assert here["result"].x_support.shape == (20, 8, 8, 1)


def test_labels_that_say_more_in_ones_own_training(here, tmp_path):
    """The network comes to answer unseen images as the machine does, in plain training."""
    snippet = next(one for one in PYTHON if "relabelled.npz" in one)
    path = re.search(r'"(reports/.*relabelled\.npz)"', snippet)[1]
    e = changed(SMALL_SETS, kip=None, networks__n_original=1000, relabelling__copies=2)
    digits = data.load("digits")
    splits = data.split(digits, e)
    teacher = sets.load(["relabelled", "adv-kip"], e, splits, digits, tmp_path)["adv-kip"]
    machine = np.asarray(sets.machine(teacher, e)(splits.x_test)).argmax(1)
    x = nets.to_tensor(splits.x_test)
    before = nets.to_numpy(here["net"](x)).argmax(1)
    exec(snippet.replace(path, str(tmp_path / "relabelled.npz")), here)
    after = nets.to_numpy(here["net"](x)).argmax(1)
    assert (before == machine).mean() < 0.4
    assert (after == machine).mean() > 0.7


def test_ones_own_network_under_attack(here, capsys):
    exec(next(one for one in PYTHON if "evaluate.evaluate" in one), here)
    attacks = ["clean", "fgsm", "pgd20", "pgd40x5", "autoattack"]
    assert [outcome.attack for outcome in here["outcomes"]] == attacks
    assert "'autoattack': " in capsys.readouterr().out


def test_is_your_robustness_real(here, capsys):
    exec(next(one for one in PYTHON if "diagnose.diagnose" in one), here)
    said = capsys.readouterr().out.splitlines()
    assert said[0] in ("genuine", "masked", "inconclusive", "nothing claimed")
    assert len(said) > 1


@pytest.mark.parametrize("command", COMMANDS)
def test_commands(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert run.main([*shlex.split(command), "--check"]) == 0
