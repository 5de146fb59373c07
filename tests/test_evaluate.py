"""Worst case of each image; attacks that leave the ball are caught."""

import numpy as np
import pytest

from advkip import attacks, data, distill, evaluate, kernels, krr
from advkip.config import Experiment

THREAT = attacks.Threat("linf", 0.15)
ATTACKS = ["fgsm", "pgd5", "pgd20"]


@pytest.fixture(scope="module")
def case():
    e = Experiment(n_support=100, n_test=120)
    splits = data.split(data.load("digits"), e)
    fitted = krr.fit(kernels.by_name("fc3"), *distill.initial_support(e, splits))
    return fitted.machine, splits.x_test, splits.y_test


def measure(case, **options):
    settings = {"threat": THREAT, "attack_names": ATTACKS, "step_size": 0.04, "progress": False}
    return evaluate.evaluate(*case, **{**settings, **options})


def test_accuracy_never_rises_as_attacks_accumulate(case):
    outcomes = measure(case, keep=3)
    assert [o.attack for o in outcomes] == ["clean", *ATTACKS]
    assert outcomes[0].accuracy > 0.8
    assert outcomes[-1].accuracy < outcomes[0].accuracy - 0.3
    for before, after in zip(outcomes, outcomes[1:], strict=False):
        assert after.accuracy <= before.accuracy
        assert not (after.robust & ~before.robust).any()
        assert after.accuracy <= after.accuracy_alone
        assert after.x_attacked.shape == (3, 8, 8, 1)
    assert [o.epsilon for o in outcomes] == [0.0, 0.15, 0.15, 0.15]


def test_clean_accuracy_is_plain_accuracy(case):
    machine, x, y = case
    assert measure(case)[0].accuracy == pytest.approx(float((machine(x).argmax(1) == y).mean()))


def test_batch_size_never_changes_the_result(case):
    whole, parts = measure(case), measure(case, batch_size=7)
    assert [o.accuracy for o in whole] == [o.accuracy for o in parts]


def test_l2_has_its_own_names(case):
    outcomes = measure(case, threat=attacks.Threat("l2", 1.0), step_size=0.2)
    assert [o.attack for o in outcomes] == ["clean", "fgsm-l2", "pgd5-l2", "pgd20-l2"]
    assert outcomes[-1].norm == "l2"


def test_everything_is_fooled_in_a_large_ball(case):
    assert measure(case, threat=attacks.Threat("linf", 0.6), step_size=0.1)[-1].accuracy < 0.02


def test_a_weaker_attack_that_finds_more_is_not_lost(case, monkeypatch):
    """Planted: PGD does nothing. Its worst case is then FGSM's, not the clean accuracy."""
    monkeypatch.setattr(attacks, "pgd", lambda machine, x, y, **_: x)
    fgsm = measure(case, attack_names=["pgd5"])
    assert fgsm[-1].accuracy == fgsm[0].accuracy
    monkeypatch.undo()
    outcomes = measure(case, attack_names=["pgd20", "fgsm"])
    assert outcomes[-1].accuracy <= outcomes[1].accuracy < outcomes[-1].accuracy_alone


def test_an_attack_that_leaves_the_ball_is_caught(case, monkeypatch):
    """Planted: a radius that is too large, and pixels outside the range."""
    monkeypatch.setattr(attacks, "pgd", lambda machine, x, y, **_: np.clip(x + 0.2, 0, 1))
    with pytest.raises(FloatingPointError, match="expected pgd5 to stay within 0.15"):
        measure(case, attack_names=["pgd5"])
    monkeypatch.setattr(attacks, "pgd", lambda machine, x, y, **_: x + 0.1)
    with pytest.raises(ValueError, match="expected pixels in"):
        measure(case, attack_names=["pgd5"])


def test_bad_input(case):
    machine, x, y = case
    with pytest.raises(ValueError, match="expected attacks 'fgsm' or 'pgd10', got 'cw'"):
        measure(case, attack_names=["cw"])
    with pytest.raises(ValueError, match="expected one integer label an image"):
        measure((machine, x, y[:-1]))
    with pytest.raises(ValueError, match="pass argmax of one-hot labels"):
        measure((machine, x, np.eye(10)[y]))
    with pytest.raises(ValueError, match="without standardisation"):
        measure((machine, 2 * x - 1, y))
    broken = krr.KernelMachine(machine.kernel, machine.x_support, machine.alpha * np.nan)
    with pytest.raises(FloatingPointError, match="expected finite logits under clean"):
        measure((broken, x, y))
