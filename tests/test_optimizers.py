"""Learning rates by step against their formulas; the updates of a run move by them."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from advkip import algorithm, data, distill, kernels, method_settings, optimizers
from tests.sections import experiment

N, FINAL = 8, 0.04
SHAPES = {
    "constant": lambda t: 1.0,
    "cosine": lambda t: FINAL + (1 - FINAL) * (1 + np.cos(np.pi * t)) / 2,
    "exponential": lambda t: FINAL**t,
    "linear": lambda t: 1 - (1 - FINAL) * t,
}


def rates_of(schedule, start=0.3):
    chosen = method_settings.Distillation(n_steps=N, schedule=schedule, final_rate=FINAL)
    rate = optimizers.learning_rate(start, chosen)
    return [float(rate(step) if callable(rate) else rate) for step in range(N + 3)]


@pytest.mark.parametrize("schedule", SHAPES)
def test_rates_follow_the_schedule(schedule):
    found, expected = rates_of(schedule), [0.3 * SHAPES[schedule](s / N) for s in range(N + 1)]
    np.testing.assert_allclose(found[: N + 1], expected, rtol=1e-5)  # float32 powers
    assert found[0] == pytest.approx(0.3)
    assert found[N] == pytest.approx(0.3 if schedule == "constant" else 0.3 * FINAL, rel=1e-5)
    assert found[N + 1 :] == [found[N]] * 2


@pytest.mark.parametrize("schedule", SHAPES)
def test_a_run_moves_images_and_labels_by_their_rates(schedule):
    """With sgd and slopes of one, a step is as long as the rate."""
    e = experiment(
        support__n_support=10, support__n_target=10, dataset__n_validation=10, adv_kip__n_steps=N,
        adv_kip__optimizer="sgd", adv_kip__schedule=schedule, adv_kip__final_rate=FINAL,
        adv_kip__learning_rate=0.3, adv_kip__label_learning_rate=0.7,
    )  # fmt: skip
    splits = data.split(data.load("digits"), e)
    run = algorithm.Run(e, splits, kernels.of(e.kernel), "adv-kip")
    state = run.start(tuple(np.zeros_like(a) for a in distill.initial_support(e, splits)))
    for step in range(N):
        before, state = state, run.update(state, tuple(map(jnp.ones_like, state.support)))
        for start, old, new in zip((0.3, 0.7), before.support, state.support, strict=True):
            expected = start * SHAPES[schedule](step / N)
            np.testing.assert_allclose(old - new, expected, rtol=1e-4, atol=1e-6)


def test_the_state_at_a_constant_rate_is_optaxs_own():
    """So that checkpoints of before there were schedules go on."""
    x = jnp.zeros(3)
    images, labels = optimizers.of(method_settings.Distillation(), learn_labels=True)
    plain = optax.adam(1e-2).init(x)
    assert str(images.init(x)) == str(labels.init(x)) == str(plain)
    assert optimizers.of(method_settings.Distillation(), learn_labels=False)[1] is None
