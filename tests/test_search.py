"""The learning rate that validation chooses; networks by name that are not trained twice."""

import dataclasses

import numpy as np
import pytest
import torch

from advkip import data, search, training
from tests.sections import experiment
from tests.test_training import RECIPE, digits, weights

__all__ = ["digits"]  # a fixture


def test_search_chooses_on_validation_and_repeats_for_seeds(digits):
    found = search.search(
        "fc1-64", digits["x"], digits["y"], recipe=dataclasses.replace(RECIPE, epochs=4),
        learning_rates=[1e-6, 3e-3, 1e20], watched=digits["watched"], seeds=[4, 5],
        progress=False,
    )  # fmt: skip
    assert found.learning_rate == 3e-3  # 1e-6 has learned nothing
    assert list(found.runs) == [1e-6, 3e-3, 1e20]
    assert found.runs[1e20].stopped == "diverged"
    assert found.runs[3e-3] is found.best[0]
    assert len(found.best) == 2
    assert not torch.equal(weights(found.best[0]), weights(found.best[1]))


def test_search_without_a_rate_that_works(digits):
    with pytest.raises(FloatingPointError, match="with a finite loss, got none"):
        search.search(
            "fc1-64", digits["x"], digits["y"], recipe=RECIPE, learning_rates=[1e20],
            watched=digits["watched"], seeds=[0], progress=False,
        )  # fmt: skip


def test_a_network_of_one_notebook_is_found_by_the_next(tmp_path, monkeypatch, capsys):
    e = experiment(
        dataset__n_validation=40, networks__n_original=60, networks__n_watch=20,
        networks__pgd_steps=2, fully_connected__epochs=2, fully_connected__learning_rates=[1e-3],
        adversarial_training__epochs=1, adversarial_training__pgd_steps=1,
    )  # fmt: skip
    splits = data.split(data.load("digits"), e)
    original = data.draw_original(e, splits)
    watched = training.watched(splits, 20, seed=0)
    train = search.Trainer(e, watched, tmp_path)
    plain = train("fc1-16", "original", original, progress=False)
    robust = train("fc1-16", "original", original, adversarially=True, progress=False)
    assert (plain.best[0].resumed, robust.best[0].resumed) == (0, 0)
    names = sorted(path.name.rsplit("-", 1)[0] for path in tmp_path.iterdir())
    assert names == ["network-fc1-16-original-adversarial", "network-fc1-16-original-plain"]

    def again(self):
        raise AssertionError("expected no epoch")

    assert "original, plain training: 1 networks, 0 found trained" in capsys.readouterr().out
    monkeypatch.setattr(training._Run, "advance", again)
    for first, how in ((plain, False), (robust, True)):
        found = search.Trainer(e, watched, tmp_path)(
            "fc1-16", "original", original, adversarially=how, progress=False
        )
        assert found.best[0].resumed == (1 if how else 2)
        assert torch.equal(weights(found.best[0]), weights(first.best[0]))
    assert "original, plain training: 1 networks, 1 found trained" in capsys.readouterr().out
    other = original._replace(x=np.ascontiguousarray(original.x[::-1]))
    with pytest.raises(AssertionError, match="expected no epoch"):
        train("fc1-16", "original", other, progress=False)
