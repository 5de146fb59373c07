"""Plain and adversarial training on digits: it learns, repeats, resumes, and keeps the best."""

import dataclasses

import numpy as np
import pytest
import torch

from advkip import data, nets, torch_attacks, training
from advkip.attacks import Threat

RECIPE = training.Recipe(
    epochs=6, learning_rate=3e-3, threat=Threat("linf", 0.15), step_size=0.05, batch_size=32,
    eval_every=2, eval_pgd_steps=5,
)  # fmt: skip


@pytest.fixture(scope="module")
def digits():
    d = data.load("digits")
    return {
        "x": d.x_train[:400], "y": data.one_hot(d.y_train[:400], 10),
        "watched": training.Watched(
            d.x_train[400:500], d.y_train[400:500], d.x_test[:80], d.y_test[:80]
        ),
    }  # fmt: skip


def run(digits, *, name="fc1-64", seed=0, recipe=RECIPE, checkpoint_dir=None, **changes):
    net = nets.build(name, shape=(8, 8, 1), n_classes=10, seed=seed)
    given = {**digits, **{k: v for k, v in changes.items() if k in digits}}
    recipe = dataclasses.replace(recipe, **{k: v for k, v in changes.items() if k not in digits})
    return training.train(
        net, given["x"], given["y"], recipe=recipe, seed=seed, watched=given["watched"],
        checkpoint_dir=checkpoint_dir, progress=False,
    )  # fmt: skip


def weights(result):
    return torch.cat([p.detach().flatten() for p in result.net.parameters()])


@pytest.mark.parametrize(
    ("name", "loss", "target"),
    [
        ("fc2-64", "mse", "labels"), ("simple-cnn", "cross-entropy", "argmax"),
        ("fc2-64", "cross-entropy", "softmax"), ("fc2-64", "mse", "argmax"),
    ],
)  # fmt: skip
def test_overfits_a_tiny_set(digits, name, loss, target):
    x, y = digits["x"][:20], digits["y"][:20] * 8
    result = run(
        digits, name=name, x=x, y=y, loss=loss, target=target, epochs=150, eval_every=150,
        batch_size=0,
    )  # fmt: skip
    with torch.no_grad():
        logits = result.net(nets.to_tensor(x))
    assert (logits.argmax(1).numpy() == y.argmax(1)).all()
    if loss == "mse":  # the label vectors themselves are fitted
        wanted = y if target == "labels" else y / 8
        np.testing.assert_allclose(logits, wanted, atol=0.5)
    elif target == "softmax":
        expected = torch.as_tensor(y).softmax(1)
        torch.testing.assert_close(logits.softmax(1), expected, atol=0.05, rtol=0)


def test_numbers_that_slow_a_cpu_down_become_0(digits):
    net = nets.build("fc1-4", shape=(2, 2, 1), n_classes=3, seed=0)
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.ones(1, 1, 2, 2)).sum().backward()
    optimizer.step()
    values = torch.tensor([1e-20, 1e-31, -1e-39, -2.0])
    for part in (net[1].bias, optimizer.state[net[1].bias]["exp_avg"]):
        with torch.no_grad():
            part.copy_(values)
    nets.flush(optimizer)
    for part in (net[1].bias, optimizer.state[net[1].bias]["exp_avg"]):
        torch.testing.assert_close(part.detach(), torch.tensor([1e-20, 0, 0, -2.0]), rtol=0, atol=0)

    net = nets.build("fc1-64", shape=(8, 8, 1), n_classes=10, seed=0)
    with torch.no_grad():
        net[1].weight.fill_(1e-39)
    recipe = dataclasses.replace(RECIPE, optimizer="sgd", learning_rate=1e-12, epochs=1)
    trained = training.train(net, **digits, recipe=recipe, progress=False).net
    size = trained[1].weight.detach().abs()
    assert size.max() > 0
    assert not ((size > 0) & (size < torch.finfo(torch.float32).tiny)).any()


@pytest.mark.parametrize(("optimizer", "rate"), [("adam", 3e-3), ("sgd", 0.1)])
def test_the_networks_of_an_ensemble_are_trained_each_by_itself(digits, optimizer, rate):
    options = {"epochs": 3, "eval_every": 3, "optimizer": optimizer, "learning_rate": rate}
    together = run(digits, name="fc1-16x3", **options)
    drawn = nets.build("fc1-16x3", shape=(8, 8, 1), n_classes=10, seed=0)
    x = nets.to_tensor(digits["watched"].x_test)
    alone = []
    for net, trained in zip(drawn.members, together.net.members, strict=True):
        recipe = dataclasses.replace(RECIPE, **options)
        result = training.train(
            net, digits["x"], digits["y"], recipe=recipe, watched=digits["watched"], progress=False
        )  # fmt: skip
        alone.append(result.net(x))
        torch.testing.assert_close(trained(x), alone[-1])
    assert (alone[0] - alone[1]).abs().max() > 0.1
    torch.testing.assert_close(together.net(x), sum(alone) / 3)
    np.testing.assert_allclose(together.history[-1]["clean"], together.clean)


def test_adversarial_training_beats_plain_training_under_pgd(digits):
    plain = run(digits, name="simple-cnn", epochs=16, eval_every=4)
    robust = run(digits, name="simple-cnn", epochs=16, eval_every=4, adversarial_steps=5)
    assert plain.history[-1]["clean"] > 0.8
    assert robust.score > plain.score + 0.15
    assert robust.history[-1]["test_pgd"] > plain.history[-1]["test_pgd"] + 0.15


def test_warmup_grows_the_radius_to_the_threats(digits, monkeypatch):
    seen, plain = [], torch_attacks.pgd

    def pgd(net, x, y, *, threat, step_size, generator=None, **options):
        if generator is not None:
            seen.append((threat.epsilon, step_size))
        return plain(net, x, y, threat=threat, step_size=step_size, generator=generator, **options)

    monkeypatch.setattr(torch_attacks, "pgd", pgd)
    run(digits, epochs=3, eval_every=3, adversarial_steps=1, adversarial_warmup=2)
    radii = np.array(seen)[:, 0]
    assert len(radii) == 3 * 13
    np.testing.assert_allclose(radii[:26], 0.15 * np.arange(1, 27) / 26, rtol=1e-6)
    assert (radii[26:] == 0.15).all()
    np.testing.assert_allclose(np.array(seen)[:, 1] / radii, 0.05 / 0.15)


def test_adversarial_training_stays_in_the_ball_of_images_beyond_the_pixel_range(
    digits, monkeypatch
):
    """Distilled images leave [0, 1]; clipping them would train on other images."""
    x = 2 * digits["x"] - 0.5
    far, plain = [], torch_attacks.pgd

    def pgd(net, x, y, *, generator=None, **options):
        moved = plain(net, x, y, generator=generator, **options)
        if generator is not None:
            far.append(((moved - x).abs().max().item(), moved.min().item(), moved.max().item()))
        return moved

    monkeypatch.setattr(torch_attacks, "pgd", pgd)
    run(digits, x=x, epochs=1, adversarial_steps=2)
    distance, low, high = np.array(far).T
    np.testing.assert_allclose(distance, 0.15, atol=1e-6)
    assert (low.min(), high.max()) == (-0.5, 1.5)


def test_history(digits):
    result = run(digits)
    assert [line["epoch"] for line in result.history] == [2, 4, 6]
    for line in result.history:
        assert line["clean"] >= line["fgsm"] >= line["pgd"] >= 0
        assert line["test_clean"] >= line["test_fgsm"] >= line["test_pgd"] >= 0
        assert line["loss_wrong"] > line["loss_right"] > 0
        assert line["gradient_wrong"] > 0
        assert line["gradient_right"] > 0
    assert result.history[-1]["loss"] < result.history[0]["loss"]


def test_the_best_weights_are_kept(digits):
    result = run(digits, epochs=12, eval_every=1)
    clean = max(line["clean"] for line in result.history)
    near = [line for line in result.history if line["clean"] >= clean - training.CLEAN_MARGIN]
    best = max(near, key=lambda line: (line["pgd"], line["clean"]))
    assert (result.epoch, result.score) == (best["epoch"], best["pgd"])
    x = nets.to_tensor(digits["watched"].x_validation)
    y = torch.as_tensor(digits["watched"].y_validation)
    found = training.robust_accuracies(result.net, x, y, RECIPE)
    assert (found["clean"], found["pgd"]) == (best["clean"], best["pgd"])
    assert not result.net.training


def test_weights_that_have_learned_nothing_are_not_kept(digits, monkeypatch):
    """Planted: a constant prediction that no attack changes, before a real, undefended network."""
    lines = iter([(0.2, 0.2), (0.85, 0.05), (0.9, 0.1), (0.7, 0.3), (0.95, 0.0)])

    def accuracies(*arguments, strong):
        clean, pgd = next(lines)
        return {"clean": clean, "fgsm": pgd, "pgd": pgd}

    monkeypatch.setattr(training, "robust_accuracies", accuracies)
    watched = training.Watched(digits["x"][:5], digits["y"][:5].argmax(1))
    result = run(digits, epochs=5, eval_every=1, watched=watched)
    assert (result.epoch, result.score, result.clean) == (3, 0.1, 0.9)


def test_the_worst_case_chooses_where_it_is_asked_to(digits, monkeypatch):
    """Planted: PGD prefers the second epoch, the worst case of several losses the first."""
    lines = iter([(0.3, 0.2), (0.6, 0.1)])

    def accuracies(*arguments, strong):
        pgd, worst = next(lines)
        return {"clean": 0.9, "fgsm": pgd, "pgd": pgd, "strong": worst}

    monkeypatch.setattr(training, "robust_accuracies", accuracies)
    watched = training.Watched(digits["x"][:5], digits["y"][:5].argmax(1))
    result = run(digits, epochs=2, eval_every=1, watched=watched, choose_by="worst-case")
    assert (result.epoch, result.score) == (1, 0.2)


def test_the_worst_case_is_below_pgd_and_of_validation_alone(digits):
    watched = training.Watched(*2 * (digits["x"][:40], digits["y"][:40].argmax(1)))
    plain, worst = (
        run(digits, epochs=3, eval_every=3, watched=watched, choose_by=choose_by).history[-1]
        for choose_by in ("pgd", "worst-case")
    )
    assert worst["strong"] <= worst["pgd"] == plain["pgd"] > 0
    assert set(worst) - set(plain) == {"strong"}


def test_patience_stops(digits):
    result = run(digits, epochs=500, eval_every=1, patience=3, learning_rate=1e-7)
    assert result.stopped == "patience"
    assert result.history[-1]["epoch"] == result.epoch + 3


def test_patience_begins_with_the_first_line_of_the_history(digits):
    """Else weights that nothing has judged, those of the start, would be the best."""
    result = run(digits, epochs=60, eval_every=10, patience=5, learning_rate=1e-7)
    assert result.stopped == "patience"
    assert result.history[0]["epoch"] == result.epoch == 10
    assert len(result.history) == 1


def test_same_seed_same_weights(digits):
    first = weights(run(digits, adversarial_steps=2))
    assert torch.equal(weights(run(digits, adversarial_steps=2)), first)
    assert not torch.equal(weights(run(digits, adversarial_steps=2, seed=1)), first)


def test_dropout_derives_from_the_seed(digits):
    settings = {"name": "alexnet", "x": digits["x"][:32], "y": digits["y"][:32], "epochs": 1}
    torch.manual_seed(1)
    first = run(digits, eval_every=1, **settings).history[0]["loss"]
    torch.manual_seed(2)
    assert run(digits, eval_every=1, **settings).history[0]["loss"] == first


@pytest.mark.parametrize("name", ["fc1-64", "vgg11"])
def test_resumed_equals_uninterrupted(digits, tmp_path, name):
    settings = {"name": name, "adversarial_steps": 1, "milestones": (3,), "optimizer": "sgd"}
    if name == "vgg11":
        settings |= {"x": digits["x"][:16], "y": digits["y"][:16], "epochs": 3, "eval_every": 1}
    whole = run(digits, **settings)
    run(digits, checkpoint_dir=tmp_path, **{**settings, "epochs": 2})
    resumed = run(digits, checkpoint_dir=tmp_path, **settings)
    assert torch.equal(weights(resumed), weights(whole))
    assert [{**line, "seconds": 0} for line in resumed.history] == [
        {**line, "seconds": 0} for line in whole.history
    ]


def test_a_finished_training_is_not_repeated_and_another_one_is(digits, tmp_path, monkeypatch):
    first = run(digits, checkpoint_dir=tmp_path, epochs=2)
    watched = training.Watched(digits["x"][:50], digits["y"][:50].argmax(1))
    others = (
        {"learning_rate": 1e-3}, {"seed": 1}, {"x": digits["x"] * 0.5}, {"name": "fc1-32"},
        {"watched": watched},
    )  # fmt: skip
    for change in others:
        run(digits, checkpoint_dir=tmp_path, epochs=2, **change)
    assert len(list(tmp_path.glob("network-*.npz"))) == 1 + len(others)

    def trained_again(self):
        raise AssertionError("expected no further epoch")

    monkeypatch.setattr(training._Run, "advance", trained_again)
    again = run(digits, checkpoint_dir=tmp_path, epochs=2)
    assert torch.equal(weights(again), weights(first))
    assert again.history == first.history
    with pytest.raises(ValueError, match="expected a checkpoint of at most 1 epochs, got 2"):
        run(digits, checkpoint_dir=tmp_path, epochs=1)


def test_a_damaged_checkpoint_is_refused(digits, tmp_path):
    run(digits, checkpoint_dir=tmp_path, epochs=2)
    (path,) = tmp_path.glob("*.npz")
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match="expected a checkpoint in .* delete the file"):
        run(digits, checkpoint_dir=tmp_path)


def test_milestones_divide_the_learning_rate(digits):
    slow = run(digits, milestones=(2,), epochs=4, eval_every=2)
    fast = run(digits, epochs=4, eval_every=2)
    assert slow.history[0]["loss"] == fast.history[0]["loss"]
    assert slow.history[1]["loss"] > fast.history[1]["loss"]


def test_bad_input(digits):
    with pytest.raises(ValueError, match="expected target 'labels', 'softmax' or 'argmax'"):
        run(digits, target="hard")
    with pytest.raises(ValueError, match="expected loss 'cross-entropy' or 'mse'"):
        run(digits, loss="hinge")
    with pytest.raises(ValueError, match="expected target 'softmax' or 'argmax' with cross-entr"):
        run(digits, target="labels")
    with pytest.raises(ValueError, match="expected y of 400 integers or label vectors"):
        run(digits, y=digits["y"][:-1])
    with pytest.raises(ValueError, match=r"pass data.one_hot\(y, n_classes\)"):
        run(digits, y=digits["y"].argmax(1), loss="mse", target="labels")
    with pytest.raises(FloatingPointError, match="pass a smaller learning_rate"):
        run(digits, learning_rate=1e30, optimizer="sgd", loss="mse", target="labels")


def test_batch_normalisation_meets_no_batch_of_one(rng):
    x, y = rng.uniform(0, 1, (9, 8, 8, 1)).astype("float32"), np.arange(9) % 3
    net = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(64, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 3)
    )
    recipe = training.Recipe(epochs=1, learning_rate=1e-3, threat=Threat("linf", 0.1),
                             step_size=0.05, batch_size=4, eval_pgd_steps=1)  # fmt: skip
    found = training.train(net, x, y, recipe=recipe, watched=training.Watched(x, y), progress=False)
    assert np.isfinite(found.history[-1]["loss"])


def test_an_interrupted_training_loses_no_whole_epoch(rng, tmp_path, monkeypatch):
    x, y = rng.uniform(0, 1, (40, 8, 8, 1)).astype("float32"), np.arange(40) % 3
    recipe = training.Recipe(epochs=6, learning_rate=1e-3, threat=Threat("linf", 0.1),
                             step_size=0.05, batch_size=8, eval_every=6,
                             eval_pgd_steps=1)  # fmt: skip

    def run(**options):
        net = nets.build("fc1-8", shape=(8, 8, 1), n_classes=3, seed=0)
        return training.train(net, x, y, recipe=recipe, watched=training.Watched(x, y),
                              progress=False, **options)  # fmt: skip

    expected, advance, ran = run(), training._Run.advance, []

    def cut_off(self):
        ran.append(self.epoch)
        if ran == [0, 1, 2, 3]:
            with torch.no_grad():  # in the middle of an epoch
                next(self.net.parameters()).add_(1.0)
            raise KeyboardInterrupt
        advance(self)

    monkeypatch.setattr(training._Run, "advance", cut_off)
    with pytest.raises(KeyboardInterrupt):
        run(checkpoint_dir=tmp_path)
    ran.clear()
    found = run(checkpoint_dir=tmp_path)
    assert ran == [3, 4, 5]
    for a, b in zip(found.net.parameters(), expected.net.parameters(), strict=True):
        assert (a == b).all()


@pytest.mark.parametrize(
    "change", [{}, {"batch_size": None}, {"adversarial_steps": 1}, {"dtype": "bfloat16"}]
)
def test_what_a_lazy_network_takes_off_is_made_once(digits, monkeypatch, change):
    """f_0 of the training images never changes, but attacked ones do, and in bfloat16 f and f_0
    are rounded alike."""
    options = {"name": "fc2-32-ntk", "optimizer": "sgd", "learning_rate": 1.0, "loss": "mse"}
    options |= {"target": "labels", "epochs": 10} | change
    made, build = [], nets.build

    def counted(*args, **kwargs):
        net = build(*args, **kwargs)
        net.initial.register_forward_hook(
            lambda initial, given, _: made.extend(given if initial.training else ())
        )
        return net

    monkeypatch.setattr(nets, "build", counted)
    found = run(digits, **options)
    once = "dtype" not in change and "adversarial_steps" not in change
    assert sum(map(len, made)) == len(digits["x"]) * (1 if once else 10)
    monkeypatch.setattr(nets, "at_start", lambda net, _: [()])
    plain = run(digits, **options)
    assert plain.history[-1]["clean"] > 0.5
    # Weights are about 1, and as many steps as there are round in float32.
    np.testing.assert_allclose(weights(found), weights(plain), atol=1e-5)


@pytest.mark.parametrize("adversarial_steps", [0, 2])
def test_training_in_bfloat16(digits, adversarial_steps):
    """Its passes are rounded to 8 bits; weights are not, their step is that of float32, nearly."""
    settings = {"name": "simple-cnn", "adversarial_steps": adversarial_steps}
    once = {"optimizer": "sgd", "learning_rate": 0.1, "batch_size": None}
    once |= {"epochs": 1, "eval_every": 1}
    exact, rounded, again = (
        run(digits, **settings, **once, dtype=dtype)
        for dtype in ("float32", "bfloat16", "bfloat16")
    )
    assert {p.dtype for p in rounded.net.parameters()} == {torch.float32}
    drawn = nets.build("simple-cnn", shape=(8, 8, 1), n_classes=10, seed=0)
    step = weights(exact) - weights(exact._replace(net=drawn))
    assert 1e-4 < (weights(rounded) - weights(exact)).norm() / step.norm() < 0.1
    torch.testing.assert_close(weights(rounded), weights(again), rtol=0, atol=0)
    assert run(digits, **settings, dtype="bfloat16").history[-1]["clean"] > 0.6


def test_a_precision_that_is_not_there():
    with pytest.raises(ValueError, match="expected dtype 'float32' or 'bfloat16', got 'float16'"):
        dataclasses.replace(RECIPE, dtype="float16")


def test_float32_states_of_before_there_was_a_choice_go_on():
    assert "dtype" not in RECIPE.identity()
    assert dataclasses.replace(RECIPE, dtype="bfloat16").identity()["dtype"] == "bfloat16"
