"""Sets that grow by images on which a network errs and a machine answers."""

import numpy as np
import pytest
import torch

from advkip import aggregate, inputs, nets, relabel, sets, training
from advkip.attacks import Threat
from advkip.recipe import Recipe
from tests.sections import SMALL_SETS, changed

SMALL = changed(
    SMALL_SETS, kip=None, relabelling__copies=3, relabelling__scout="fc1-16",
    relabelling__rounds=2, fully_connected__epochs=2, fully_connected__eval_every=1,
)  # fmt: skip


def load(e, splits, digits, folder):
    return sets.load(["noisy", "relabelled", "adv-kip"], e, splits, digits, folder)


def check_attacked(first, made):
    """Those behind the first are within the ball around these, and not next to them."""
    bases = np.concatenate([first.x[0::2], first.x[1::2]])
    moved = np.abs(made.x[len(first.x) :] - bases)
    assert moved.max() <= SMALL.threat.epsilon + 0.5 / 255 + 1e-6
    assert moved.mean() > SMALL.threat.epsilon / 4


def test_attacked_images_follow_with_the_machines_own_answers(digits, splits, tmp_path):
    x = np.round(splits.x_pool * 255).astype("float32") / np.float32(255)
    splits = splits._replace(x_pool=x)
    found = load(SMALL, splits, digits, tmp_path)
    first, made = found["noisy"], found["relabelled"]
    n = len(first.x)
    assert made.x.shape == (2 * n, 8, 8, 1)
    assert made.teacher == "fc2 + attacked"
    assert made.x.dtype == made.y.dtype == np.float32
    np.testing.assert_array_equal(made.x[:n], first.x)
    check_attacked(first, made)
    assert inputs.as_eight_bit(made.x) is not None
    answers = np.asarray(sets.machine(found["adv-kip"], SMALL)(made.x))
    np.testing.assert_allclose(made.y / made.y.std(), answers / answers.std(), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(made.y[:n].std(), first.y.std(), rtol=1e-5)  # one scale for all
    name, again = sets.from_path(tmp_path / "relabelled.npz")
    np.testing.assert_array_equal(again.x, made.x)
    assert (name, again.teacher) == ("relabelled", "fc2 + attacked")


def test_without_a_teacher_attacked_images_keep_their_classes(digits, splits, tmp_path):
    """The control: what the attacked images alone are worth."""
    e = changed(SMALL, relabelling__teacher="classes")
    found = load(e, splits, digits, tmp_path)
    first, made = found["noisy"], found["relabelled"]
    n = len(first.x)
    assert (len(made.x), made.teacher) == (2 * n, "classes + attacked")
    np.testing.assert_array_equal(made.x[:n], first.x)
    np.testing.assert_array_equal(made.y, np.concatenate([first.y, first.y[0::2], first.y[1::2]]))
    check_attacked(first, made)


def test_no_rounds_change_nothing(digits, splits, tmp_path):
    e = changed(SMALL, relabelling__rounds=0)
    found = load(e, splits, digits, tmp_path)
    assert len(found["relabelled"].x) == len(found["noisy"].x)
    assert found["relabelled"].teacher == "fc2"
    assert not list(tmp_path.glob("scout-*"))


def test_more_rounds_than_images_are_refused(digits, splits, tmp_path):
    e = changed(SMALL, relabelling__rounds=10_000)
    with pytest.raises(ValueError, match="expected relabelling.rounds of at most"):
        load(e, splits, digits, tmp_path)
    assert not list(tmp_path.glob("scout-*"))


def test_attacked_images_have_features_too(digits, splits, tmp_path):
    e = changed(SMALL, relabelling__shift=2)
    found = load(e, splits, digits, tmp_path)
    made, machine = found["relabelled"], sets.machine(found["adv-kip"], e)
    assert made.features.shape == (len(made.x), 40)
    scale = made.y.std() / np.asarray(machine(made.x)).std()
    right = relabel.moved(made.x, 2)[0]
    np.testing.assert_allclose(
        made.features[:, :10], scale * np.asarray(machine(right)), rtol=1e-3, atol=1e-4
    )
    again = load(e, splits, digits, tmp_path)["relabelled"]  # attacks from their files
    np.testing.assert_array_equal(again.features, made.features)


def test_each_scout_has_seen_the_attacks_on_those_before_and_is_none_of_the_reported(
    digits, splits, tmp_path, monkeypatch
):
    seen, train = [], training.train

    def spy(net, x, y, **options):
        first = nets.to_numpy(next(net.parameters())).copy()
        seen.append((len(x), options["seed"], first))
        return train(net, x, y, **options)

    monkeypatch.setattr(training, "train", spy)
    n = len(load(SMALL, splits, digits, tmp_path)["noisy"].x)
    assert [size for size, *_ in seen] == [n, n + n // 2]
    seeds = [seed for _, seed, _ in seen]
    assert len({*seeds, *SMALL.net_seeds()}) == 3
    assert not np.array_equal(seen[0][2], seen[1][2])


def test_what_was_attacked_is_read_again_and_anything_else_is_not(
    digits, splits, tmp_path, monkeypatch
):
    made = load(SMALL, splits, digits, tmp_path)["relabelled"]
    attacked = aggregate.attacked

    def never(*_, **__):
        raise AssertionError("attacked again")

    monkeypatch.setattr(aggregate, "attacked", never)
    again = load(SMALL, splits, digits, tmp_path)["relabelled"]
    np.testing.assert_array_equal(again.x, made.x)
    np.testing.assert_array_equal(again.y, made.y)
    with pytest.raises(AssertionError, match="attacked again"):
        load(changed(SMALL, threat__epsilon=0.15), splits, digits, tmp_path / "other")
    monkeypatch.setattr(aggregate, "attacked", attacked)
    whole = load(SMALL, splits, digits, tmp_path / "whole")["relabelled"]
    np.testing.assert_array_equal(whole.x, made.x)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_attack_goes_towards_one_of_the_next_classes(dtype):
    """Of a linear network the best that a ball allows is known: a step of epsilon by the sign of
    the difference of two rows of weights, in every pixel."""
    torch.manual_seed(0)  # of some weights two differences have the same signs
    linear = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 10)).eval()
    linear.to(nets.device())
    x = np.full((60, 4, 4, 1), 0.5, "float32")
    y = np.tile(np.linspace(1, 0, 10, dtype="float32"), (60, 1))  # class 0, then 1, 2, ...
    ball = {"threat": Threat("linf", 0.1), "step_size": 0.025}
    recipe = Recipe(epochs=1, learning_rate=1e-3, dtype=dtype, **ball)
    found = aggregate.attacked(linear, x, y, recipe=recipe, seed=3)
    weights = nets.to_numpy(linear[1].weight)
    signs = np.sign(weights[1 : 1 + aggregate.RIVALS] - weights[0]).reshape(-1, 4, 4, 1)
    best = 0.5 + 0.1 * signs  # (rivals, ...)
    errors = np.abs(found[:, None] - best[None]).reshape(60, aggregate.RIVALS, -1).mean(2)
    # A difference that bfloat16 rounds to 0 has no sign.
    assert errors.min(1).max() < (1e-6 if dtype == "float32" else 0.02)
    reached = errors.argmin(1)
    assert set(reached) == set(range(aggregate.RIVALS))
    np.testing.assert_array_equal(aggregate.attacked(linear, x, y, recipe=recipe, seed=3), found)
    assert (aggregate.attacked(linear, x, y, recipe=recipe, seed=4) != found).any()
    classes = np.eye(10, dtype="float32")[np.full(60, 7)]  # the others are equal; ranked by logits
    found = aggregate.attacked(linear, x, classes, recipe=recipe, seed=3)
    ranked = nets.to_numpy(linear(nets.to_tensor(x[:1])))[0].argsort()[::-1]
    rivals = [one for one in ranked if one != 7][: aggregate.RIVALS]
    best_of = 0.5 + 0.1 * np.sign(weights[rivals] - weights[7]).reshape(-1, 4, 4, 1)
    errors = np.abs(found[:, None] - best_of[None]).reshape(60, len(rivals), -1).mean(2)
    assert errors.min(1).max() < (1e-6 if dtype == "float32" else 0.02)
    assert len(set(errors.argmin(1))) == len(rivals)
    two = aggregate.attacked(linear, x, y[:, :2], recipe=recipe, seed=3)  # there is one rival
    np.testing.assert_allclose(two, np.broadcast_to(best[0], two.shape), atol=1e-6)
