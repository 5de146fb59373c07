"""Trajectories of adversarially trained networks: experts, gradients, resume, sets."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from advkip import (
    data,
    distill,
    evaluate,
    kernels,
    nets,
    sets,
    store,
    trajectories,
    unrolled,
    worst_case,
)
from tests.sections import SMALL_SETS, changed, experiment

SMALL = changed(
    SMALL_SETS, unrolled__n_steps=2, unrolled__eval_every=2, unrolled__checkpoint_every=1,
    unrolled__pgd_steps=2, unrolled__eval_pgd_steps=2, unrolled__net=["fc1-16-pieces2", "fc2-8"],
    unrolled__net_steps=3, unrolled__choose_by="pgd", unrolled__n_experts=2,
    unrolled__expert_epochs=3, unrolled__expert_ahead=2, networks__sets=["unrolled"],
    threat__epsilon=0.15, threat__step_size=0.05,
)  # fmt: skip
RECIPE = unrolled.Recipe(depth=2, width=7, n_pieces=2, n_steps=4, learning_rate=0.3)


def run(e, splits, **options):
    options = {"progress": False} | options
    return trajectories.Run(e, splits, kernels.of(e.kernel), "unrolled", **options)


def at(expert, epoch):
    return jax.tree.map(lambda w: w[epoch], expert)


def withstood(net, e, splits):
    x, y = splits.x_validation, splits.y_validation
    ball = {"threat": run(e, splits).objective.threat, "step_size": e.threat.step_size}
    left = worst_case.withstood(net, x, y, batch_size=200, **ball)
    return float(np.mean(left))


def test_the_gradient_is_that_of_finite_differences():
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        x, y = jnp.asarray(rng.random((9, 2, 3, 1))), jnp.asarray(rng.random((9, 4)))
        start, goal = (
            unrolled.initial(jax.random.key(k), (2, 3, 1), 4, RECIPE, x.dtype) for k in (1, 2)
        )

        def value(x, y):
            end = unrolled.descended(start, x, y, RECIPE)
            both = [np.concatenate([w.ravel() for w in jax.tree.leaves(net)])
                    for net in (start, end, goal)]  # fmt: skip
            return ((both[1] - both[2]) ** 2).sum() / ((both[0] - both[2]) ** 2).sum()

        loss, gradient = trajectories._gradient(x, y, start, goal, RECIPE)
        assert loss == pytest.approx(value(x, y), rel=1e-12)
        for _ in range(3):
            along = [jnp.asarray(rng.standard_normal(a.shape)) for a in (x, y)]
            up, down = (
                value(*(a + h * d for a, d in zip((x, y), along, strict=True)))
                for h in (1e-6, -1e-6)
            )
            slope = sum((g * d).sum() for g, d in zip(gradient, along, strict=True))
            assert float(slope) == pytest.approx((up - down) / 2e-6, rel=1e-5)


def test_a_step_of_an_expert_is_smoothed_descent():
    rng = np.random.default_rng(0)
    x, y = jnp.asarray(rng.random((9, 2, 3, 1))), jnp.asarray(rng.random((9, 4)))
    net, speed, smooth = (
        unrolled.initial(jax.random.key(k), (2, 3, 1), 4, RECIPE, x.dtype) for k in (1, 2, 3)
    )
    found = trajectories._step((net, speed, smooth), x, y, 0.2, 0.9)

    def loss(net):
        return ((net(x) - y) ** 2).sum() / 18

    for w, v, m, g, *new in zip(
        *map(jax.tree.leaves, (net, speed, smooth, jax.grad(loss)(net), *found)), strict=True
    ):
        speed = 0.9 * v + g
        expected = w - 0.2 * speed, speed, 0.9 * m + 0.1 * (w - 0.2 * speed)
        for one, other in zip(new, expected, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-12)


def test_experts_take_turns_in_the_pool(splits):
    first, second = run(SMALL, splits).experts
    assert [w.shape for w, _ in first.layers] == [(4, 128, 16), (4, 16, 10)]
    assert [w.shape for w, _ in second.layers] == [(4, 64, 8), (4, 8, 8), (4, 8, 10)]


def test_experts_are_robust(splits):
    e = changed(SMALL, unrolled__expert_epochs=40, unrolled__net="fc1-64", support__n_target=128)
    first = run(e, splits).expert(0)
    plain = run(changed(e, threat__epsilon=1e-6, threat__step_size=1e-6), splits).expert(0)
    kept = [withstood(at(net, t), e, splits) for net, t in ((first, 0), (plain, 40), (first, 40))]
    assert kept[2] > max(kept[:2]) + 0.2
    x, y = splits.x_validation, splits.y_validation
    assert (np.asarray(at(first, 40)(x)).argmax(1) == y).mean() > 0.8


def test_an_interrupted_expert_goes_on_bit_for_bit(splits, tmp_path, monkeypatch):
    monkeypatch.setattr(trajectories, "SAVE_EVERY", 0)
    straight = run(SMALL, splits).experts
    written = []

    def save(path, *args, **kwargs):
        store_save(path, *args, **kwargs)
        written.append(path.name)
        if len(written) in (2, 5):  # within the first expert, and within the second
            raise KeyboardInterrupt

    store_save = store.save
    monkeypatch.setattr(store, "save", save)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run(SMALL, splits, folder=tmp_path).experts  # noqa: B018
    found = run(SMALL, splits, folder=tmp_path).experts
    assert written == ["expert-0.npz"] * 3 + ["expert-1.npz"] * 3
    jax.tree.map(np.testing.assert_array_equal, found, straight)
    more = changed(
        SMALL, unrolled__n_experts=3, unrolled__learning_rate=0.1, unrolled__net_steps=2,
        support__n_support=20,
    )  # fmt: skip
    jax.tree.map(
        np.testing.assert_array_equal, run(more, splits, folder=tmp_path).experts[:2], straight
    )
    assert written[6:] == ["expert-2.npz"] * 3
    with pytest.raises(ValueError, match="unrolled.expert_smoothing"):
        run(changed(SMALL, unrolled__expert_smoothing=0.5), splits, folder=tmp_path).expert(0)


def test_a_finished_run_needs_no_experts(splits, tmp_path, monkeypatch):
    options = {"method": "unrolled", "checkpoint_dir": tmp_path, "progress": False}
    made = distill.distill(SMALL, splits, **options)
    for path in tmp_path.glob("expert-*.npz"):
        path.unlink()
    monkeypatch.setattr(trajectories, "_step", None)
    again = distill.distill(SMALL, splits, **options)
    np.testing.assert_array_equal(again.x_support, made.x_support)


def test_experts_see_mirrored_images_and_batches_of_the_target_size(splits):
    plain, mirrored, larger = (
        run(changed(SMALL, unrolled__n_experts=1, **options), splits).experts[0]
        for options in ({}, {"support__mirror": True}, {"support__n_target": 40})
    )
    first, other, third = (jax.tree.leaves(net)[0] for net in (plain, mirrored, larger))
    np.testing.assert_array_equal(first[0], other[0])
    for one in (other, third):
        assert np.abs(one[1:] - first[1:]).max() > 1e-3


def test_a_run_is_resumed_bit_for_bit(splits, tmp_path):
    ends = []
    for folder, steps in ((tmp_path / "whole", (2,)), (tmp_path / "parts", (1, 2))):
        for n_steps in steps:
            e = changed(SMALL, unrolled__n_steps=n_steps)
            options = {"checkpoint_dir": folder, "progress": False}
            made = distill.distill(e, splits, method="unrolled", **options)
        with np.load(folder / "distillation-unrolled.npz") as file:
            ends.append([file["/0/0"], file["/0/1"]])
    for whole, parts, initial in zip(*ends, (made.x_initial, made.y_initial), strict=True):
        assert np.abs(whole - initial).max() > 0
        np.testing.assert_array_equal(whole, parts)


def test_what_is_followed_is_drawn_from_every_expert_and_epoch(splits):
    e = changed(SMALL, unrolled__n_nets=4)
    steps = [run(e, splits).drawn(step) for step in range(2)]
    runs = run(e, splits)
    assert steps == [runs.drawn(0), runs.drawn(1)]
    assert steps[0] != steps[1]
    drawn = {pair for step in range(20) for pair in runs.drawn(step)}
    assert drawn == {(expert, epoch) for expert in (0, 1) for epoch in (0, 1)}


def test_networks_on_the_set_withstand_more(digits):
    """Plain training from first weights of its own, on a set that followed two experts."""
    e = experiment(
        support__n_support=200, support__n_target=100, dataset__n_validation=200,
        threat__epsilon=0.15, threat__step_size=0.03, unrolled__n_experts=2,
        unrolled__expert_epochs=60, unrolled__expert_ahead=20, unrolled__net="fc1-128",
        unrolled__net_learning_rate=0.2, unrolled__learning_rate=0.01,
        unrolled__label_learning_rate=0.01, unrolled__n_steps=100, unrolled__eval_every=50,
    )  # fmt: skip
    splits = data.split(digits, e)
    found = distill.distill(e, splits, method="unrolled", progress=False)
    first, _, last = found.history
    assert last["strong"] > first["strong"] + 0.12
    assert last["clean"] > 0.85
    assert last["loss"] < 0.7 * first["loss"]


@pytest.mark.parametrize("shape", [(8, 8, 1), (4, 4, 3)])
def test_a_teacher_is_the_same_network_in_pytorch(shape):
    net = unrolled.initial(jax.random.key(0), shape, 10, RECIPE, jnp.float32)
    module = trajectories.as_module(net, "fc2-7-pieces2", shape)
    x = np.random.default_rng(0).random((5, *shape)).astype("float32")
    np.testing.assert_allclose(net(x), nets.to_numpy(module(nets.to_tensor(x))), atol=1e-6)


def test_the_set_says_whom_it_followed(digits, splits, tmp_path):
    made = sets.load(["unrolled"], SMALL, splits, digits, tmp_path)["unrolled"]
    assert made.teacher == "fc1-16-pieces2, fc2-8, adversarial trajectories"
    assert sets.from_path(tmp_path / "unrolled.npz")[1].teacher == made.teacher
    (name, teacher), *others = trajectories.teachers(SMALL, splits, tmp_path)
    assert (name, len(others)) == ("fc1-16-pieces2", len(SMALL.net_seeds()) - 1)
    expert, x = at(run(SMALL, splits, folder=tmp_path).experts[0], -1), splits.x_test[:7]
    np.testing.assert_allclose(nets.to_numpy(teacher(nets.to_tensor(x))), expert(x), atol=1e-5)
    protocol = evaluate.Protocol.of(SMALL).with_attacks("pgd2")
    clean, robust = protocol(teacher, x, splits.y_test[:7], progress=False)
    assert clean.accuracy == np.mean(np.asarray(expert(x)).argmax(1) == splits.y_test[:7])
    assert robust.accuracy <= clean.accuracy
    for without in ({"unrolled__n_experts": 0}, {"networks__sets": ["original"]}):
        assert trajectories.teachers(changed(SMALL, **without), splits, tmp_path) == []


def test_bad_experts_are_refused(splits, tmp_path):
    for options in ({"unrolled__expert_ahead": 4}, {"unrolled__warmup": 3}):
        with pytest.raises(ValueError, match="expected unrolled.expert_epochs beyond"):
            changed(SMALL, **options)
    with pytest.raises(ValueError, match="expected unrolled.pgd_steps of at least 1"):
        changed(SMALL, unrolled__pgd_steps=0)
    e = changed(SMALL, unrolled__expert_learning_rate=1e12)
    options = {"method": "unrolled", "checkpoint_dir": tmp_path, "progress": False}
    with pytest.raises(distill.DivergedError, match="smaller unrolled.expert_learning_rate"):
        distill.distill(e, splits, **options)
    assert not list(tmp_path.glob("expert-*.npz"))
