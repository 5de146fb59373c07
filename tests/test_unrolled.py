"""Sets optimised through the training of networks: gradients, runs, resume, sets."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from advkip import (
    data,
    distill,
    kernels,
    losses,
    nets,
    objective,
    sets,
    solver,
    trajectories,
    unrolled,
)
from tests.sections import SMALL_SETS, changed, experiment

SMALL = changed(
    SMALL_SETS, unrolled__n_steps=4, unrolled__eval_every=2, unrolled__checkpoint_every=2,
    unrolled__pgd_steps=2, unrolled__eval_pgd_steps=2, unrolled__net="fc1-16-pieces2",
    unrolled__net_steps=5, unrolled__learning_rate=0.01, unrolled__choose_by="pgd",
    unrolled__n_nets=1,
)  # fmt: skip
RECIPE = unrolled.Recipe(depth=2, width=7, n_pieces=2, n_steps=6, learning_rate=0.3)


def support(dtype):
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.random((9, 2, 3, 1)), dtype), jnp.asarray(rng.random((9, 4)), dtype)


def test_training_is_that_of_pytorch():
    x, y = support("float32")
    net = unrolled.trained(jax.random.key(1), x, y, RECIPE)
    start = unrolled.initial(jax.random.key(1), x.shape[1:], 4, RECIPE, x.dtype)
    twin = trajectories.as_module(start, "fc2-7-pieces2", (2, 3, 1))
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.3, momentum=0.9)
    images, labels = nets.to_tensor(np.asarray(x)), torch.tensor(np.asarray(y))
    for _ in range(6):
        optimizer.zero_grad()
        (((twin(images) - labels) ** 2).sum(1).mean() / 2).backward()
        optimizer.step()
    np.testing.assert_allclose(net(x), nets.to_numpy(twin(images)), atol=1e-5)


def test_first_weights_are_as_wide_as_those_of_pytorch():
    net = unrolled.initial(jax.random.key(0), (8, 8, 1), 10, RECIPE._replace(width=50), jnp.float32)
    fan_in = [128, 50, 50]
    for (weights, biases), inputs in zip(net.layers, fan_in, strict=True):
        assert weights.shape[0] == inputs
        for part in (weights, biases):
            assert 0.8 * inputs**-0.5 < float(jnp.abs(part).max()) <= inputs**-0.5


def test_the_unrolled_gradient_is_that_of_finite_differences():
    with jax.enable_x64(True):
        x, y = support("float64")
        rng = np.random.default_rng(1)
        rows = jnp.asarray(rng.random((5, 2, 3, 1)))
        labels = jax.nn.one_hot(jnp.arange(5) % 4, 4, dtype=rows.dtype)
        weights, key = jnp.full(5, 0.2), jax.random.key(3)

        def value(x, y):
            net = unrolled.trained(key, x, y, RECIPE)
            return (weights * losses.cross_entropy(net(rows), labels)).sum()

        loss, gradient = unrolled._gradient(
            key, x, y, objective.Batch(rows, labels, weights), RECIPE, losses.cross_entropy
        )
        np.testing.assert_allclose(loss, value(x, y), rtol=1e-12)
        h = 1e-6
        for which, (part, slope) in enumerate(zip((x, y), gradient, strict=True)):
            way = jnp.asarray(rng.standard_normal(part.shape))
            ends = [
                value(
                    *(one + sign * h * way if i == which else one for i, one in enumerate((x, y)))
                )
                for sign in (1, -1)
            ]
            np.testing.assert_allclose(
                (ends[0] - ends[1]) / (2 * h), (slope * way).sum(), rtol=1e-6
            )


def test_a_run_that_is_cut_off_goes_on_with_the_same_bits(splits, tmp_path):
    def run(name, n_steps):
        e = changed(SMALL, unrolled__n_steps=n_steps, unrolled__keep_every=2)
        folder = tmp_path / name
        found = distill.distill(e, splits, method="unrolled", checkpoint_dir=folder, progress=False)
        losses = [line["loss"] for line in found.history]
        last = folder / f"unrolled-{n_steps}.npz"
        assert sets.from_path(last)[0] == last.stem
        return losses, *data.read(last)[:1]

    losses, last = run("whole", 4)
    run("resumed", 2)
    again, same = run("resumed", 4)
    assert again == losses
    for key in ("x_train", "y_train"):
        np.testing.assert_array_equal(same[key], last[key])
    _, before = run("short", 2)
    assert not np.array_equal(before["x_train"], last["x_train"])


def test_a_set_of_any_size(splits, tmp_path, monkeypatch):
    """Kernel machines of as many images keep a factor; there is none here."""
    monkeypatch.setattr(solver, "KEPT", 0)
    for n_steps in (2, 4):
        e = changed(SMALL, unrolled__n_steps=n_steps)
        found = distill.distill(
            e, splits, method="unrolled", checkpoint_dir=tmp_path, progress=False
        )
    assert found.history[-1]["step"] == 4


def test_networks_that_diverge_say_what_to_lower(splits):
    e = changed(SMALL, unrolled__net_learning_rate=1e12)
    with pytest.raises(
        distill.DivergedError, match="a finite loss, got nan at step 0; pass a sm.*net_l"
    ):
        distill.distill(e, splits, method="unrolled", progress=False)


def test_each_step_has_other_networks_and_validation_has_one(splits):
    e = changed(SMALL, unrolled__warmup=2, unrolled__n_nets=2)
    run = unrolled.Run(e, splits, kernels.of(e.kernel), "unrolled")
    assert [run.grown(step) for step in range(5)] == [0.25, 0.75, 1.0, 1.0, 1.0]
    first, again, other = ([str(k) for k in run.keys(step)] for step in (0, 0, 1))
    assert first == again
    assert len({*first, *other}) == 4
    state = run.start(distill.initial_support(SMALL, splits))
    one, two = (run.judged(state._replace(step=step), None) for step in (0, 3))
    np.testing.assert_array_equal(one.layers[0][0], two.layers[0][0])


def test_networks_of_a_pool_take_turns_and_the_slope_is_the_mean_of_theirs(splits):
    e = changed(SMALL, unrolled__net=["fc1-8", "fc2-16", "fc1-16-pieces2"], unrolled__n_nets=2)
    run = unrolled.Run(e, splits, kernels.of(e.kernel), "unrolled")
    sizes = [[(r.depth, r.width, r.n_pieces) for r in run.turns(step)] for step in range(3)]
    assert sizes == [[(1, 8, 1), (2, 16, 1)], [(1, 16, 2), (1, 8, 1)], [(2, 16, 1), (1, 16, 2)]]
    state = run.start(distill.initial_support(e, splits))._replace(step=1)
    both = run.slope(state)
    assert run.judged(state, both).layers[0][0].shape == (64, 8)
    x, y = run.target(1)
    alone = []
    for key, recipe in zip(run.keys(1), run.turns(1), strict=True):
        net = unrolled.trained(key, *state.support, recipe)
        attacked = run.objective.attack(net, x, y, step=1, grown=1.0)
        batch = run.objective.batch(net, x, attacked, y)
        loss = run.objective.loss
        alone.append(unrolled._gradient(key, *state.support, batch, recipe, loss)[1])
    assert float(jnp.abs(alone[0][0] - alone[1][0]).max()) > 0
    for part, *parts in zip(both.support, *alone, strict=True):
        np.testing.assert_allclose(part, sum(parts) / 2, atol=1e-5 * float(jnp.abs(part).max()))


def test_a_run_starts_from_the_set_of_the_kernel(splits, tmp_path):
    def run(e, folder=tmp_path, method="unrolled"):
        return distill.distill(e, splits, method=method, checkpoint_dir=folder, progress=False)

    e = changed(SMALL, unrolled__start_from="adv-kip", adv_kip__n_steps=3)
    found, kernels_own = run(e), run(e, method="adv-kip")
    assert kernels_own.step > 0
    for mine, its in zip(found[2:4], kernels_own[:2], strict=True):
        np.testing.assert_array_equal(mine, its)
    alone = run(SMALL, tmp_path / "alone")
    assert alone.history[0]["loss"] != found.history[0]["loss"]
    other = changed(e, adv_kip__learning_rate=0.02)
    (tmp_path / "distillation-adv-kip.npz").unlink()
    with pytest.raises(ValueError, match="started from"):
        run(other)
    with pytest.raises(ValueError, match="expected settings of adv_kip behind"):
        changed(e, adv_kip=None)


@pytest.mark.parametrize(
    ("net", "start", "named"),
    [
        ("fc1-16-pieces2", "adv-kip", "fc1-16-pieces2 from adv-kip"),
        (["fc1-8", "fc1-16-pieces2"], "original", "fc1-8, fc1-16-pieces2"),
    ],
)
def test_the_set_has_a_name_and_its_networks_are_named(net, start, named, digits, splits, tmp_path):
    e = changed(SMALL, unrolled__n_steps=2, unrolled__net=net, unrolled__start_from=start)
    made = sets.load(["unrolled"], e, splits, digits, tmp_path)["unrolled"]
    assert (made.kernel, made.teacher) == (None, named)
    name, again = sets.from_path(tmp_path / "unrolled.npz")
    assert (name, again.kernel, again.teacher) == ("unrolled", None, named)
    np.testing.assert_array_equal(again.x, made.x)
    with pytest.raises(ValueError, match=r"expected settings of \['unrolled'\]"):
        experiment(notebooks=["02_transfer"], networks__sets=["unrolled"])


def test_networks_on_the_set_withstand_more(digits):
    """Plain training by the same recipe from other first weights, the worst case of validation."""
    e = experiment(
        support__n_support=100, support__n_target=100, dataset__n_validation=100,
        threat__epsilon=0.15, threat__step_size=0.03,
        unrolled__n_steps=120, unrolled__eval_every=60, unrolled__net="fc1-64",
        unrolled__net_steps=30, unrolled__net_learning_rate=0.2, unrolled__learning_rate=0.004,
    )  # fmt: skip
    splits = data.split(digits, e)
    found = distill.distill(e, splits, method="unrolled", progress=False)
    first, *others = found.history
    for line in others:
        assert line["strong"] > first["strong"] + 0.05
        assert line["clean"] > 0.85


@pytest.mark.parametrize("net", ["simple-cnn", [], ["fc1-16", "kernel"]])
def test_networks_of_a_pool_are_fully_connected(net):
    with pytest.raises(ValueError, match=r"expected in unrolled.net a fully connected"):
        experiment(unrolled__net=net)


def test_attacks_on_networks_are_in_full_precision():
    with pytest.raises(ValueError, match="expected unrolled.attack_precision 'full'"):
        experiment(unrolled__attack_precision="bfloat16")
