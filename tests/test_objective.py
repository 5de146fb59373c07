"""Every switch of Algorithm 1: the objective and its gradient against plain autodiff."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from advkip import algorithm, attacks, data, distill, kernels, krr, losses, objective
from advkip.threat import Threat
from tests.sections import changed, experiment

SMALL = experiment(
    support__n_support=30, support__n_target=24, dataset__n_validation=40, dataset__n_test=50,
    adv_kip__n_steps=4, adv_kip__eval_every=2, adv_kip__pgd_steps=3, adv_kip__eval_pgd_steps=3,
    kernel__name="fc2", kernel__dtype="float64", kernel__diag_reg=1e-3,
)  # fmt: skip


@pytest.fixture(scope="module")
def digits():
    return data.load("digits")


class Case:
    """An objective with a support and a target batch of its own."""

    def __init__(self, digits, **switches):
        self.e = changed(SMALL, **{f"adv_kip__{key}": value for key, value in switches.items()})
        splits = data.split(digits, self.e)
        self.run = algorithm.Run(self.e, splits, kernels.of(self.e.kernel), "adv-kip")
        self.objective = self.run.objective
        self.support = distill.initial_support(self.e, splits)
        self.fitted = krr.fit(self.run.kernel, *self.support, diag_reg=1e-3)
        x, self.y = self.run.target(0)
        # Away from images of the support, where the kernel has a cusp that autodiff falls into.
        self.x = jnp.clip(x + 0.05, 0.01, 0.99)
        noise = np.random.default_rng(0).uniform(-0.1, 0.1, self.x.shape)
        self.attacked = jnp.clip(self.x + noise, 0, 1)

    def found(self):
        """(J, dJ/dX_S, dJ/dY_S) as Algorithm 1 has them."""
        batch = self.objective.batch(self.fitted.machine, self.x, self.attacked, self.y)
        gradient = krr.support_gradient(
            self.fitted, batch.x, batch.labels, loss=self.objective.loss, weights=batch.weights
        )
        return gradient.loss, gradient.x_support, gradient.y_support

    def expected(self, of_machine):
        """The same of a function of a logit function, differentiated through the solve."""
        kernel = kernels.by_name("fc2")

        def total(x_s, y_s):
            k_ss = kernel(x_s, x_s)
            k_ss = k_ss.at[jnp.diag_indices(len(x_s))].set(kernel.diagonal(x_s))
            ridge = 1e-3 * jnp.trace(k_ss) / len(x_s)
            alpha = jnp.linalg.solve(k_ss + ridge * jnp.eye(len(x_s)), y_s)
            return of_machine(lambda x: kernel.value(x, x_s) @ alpha)

        return jax.jit(jax.value_and_grad(total, (0, 1)))(*map(jnp.asarray, self.support))

    def check(self, of_machine, tolerance=1e-6):
        value, slopes = self.expected(of_machine)
        loss, *found = self.found()
        np.testing.assert_allclose(loss, value, rtol=tolerance)
        for ours, slope in zip(found, slopes, strict=True):
            assert np.linalg.norm(ours - slope) < tolerance * np.linalg.norm(slope)


@pytest.mark.parametrize("name", ["cross-entropy", "mse", "hinge", "squared-hinge"])
def test_outer_losses(digits, name):
    case = Case(digits, outer_loss=name, hinge_margin=0.3, logit_scale=2.0)
    labels = jnp.eye(10)[case.y] - (0.1 if name == "mse" else 0)

    def plain(f):
        z = f(case.attacked)
        if name == "cross-entropy":
            return -(labels * jax.nn.log_softmax(2 * z)).sum(1).mean()
        if name == "mse":
            return ((z - labels) ** 2).sum(1).mean() / 2
        right = z[jnp.arange(len(z)), case.y]
        short = jnp.maximum(0, 0.3 + jnp.where(labels > 0, -jnp.inf, z).max(1) - right)
        return (short if name == "hinge" else short**2 / 2).mean()

    case.check(plain)


def test_clean_share_and_hard_images(digits):
    case = Case(digits, clean_weight=0.3, hard_weight=1.5)
    labels = jnp.eye(10)[case.y]
    margins = losses.margin(case.fitted.machine(case.attacked), labels)
    hard = jax.nn.softmax(1.5 * margins / margins.std())

    def plain(f):
        clean, robust = (losses.cross_entropy(f(x), labels) for x in (case.x, case.attacked))
        return 0.3 * clean.mean() + 0.7 * (hard * robust).sum()

    case.check(plain)
    assert hard.max() > 3 * hard.min()


def test_clean_share_of_one_forgets_the_attack(digits):
    case = Case(digits, clean_weight=1.0)
    case.check(lambda f: losses.cross_entropy(f(case.x), jnp.eye(10)[case.y]).mean())


@pytest.mark.parametrize(("norm", "penalty"), [("linf", 0.05), ("l2", -0.02)])
def test_gradient_penalty_in_the_dual_norm(digits, norm, penalty, monkeypatch):
    """Of autodiff through autodiff; the difference quotient's error falls with the square of h."""
    monkeypatch.setattr(objective, "REACH", 1e-3)
    case = Case(digits, gradient_penalty=penalty)
    case.objective.threat = Threat(norm, 0.3)
    labels = jnp.eye(10)[case.y]

    def plain(f):
        slopes = jax.grad(lambda x: losses.cross_entropy(f(x), labels).sum())(case.x)
        flat = slopes.reshape(len(slopes), -1)
        sizes = jnp.abs(flat).sum(1) if norm == "linf" else jnp.sqrt((flat**2).sum(1))
        return losses.cross_entropy(f(case.attacked), labels).mean() + penalty * sizes.mean()

    case.check(plain, tolerance=1e-4)
    without = case.expected(lambda f: losses.cross_entropy(f(case.attacked), labels).mean())
    assert abs(case.found()[0] - without[0]) > 0.003


@pytest.mark.parametrize("loss", ["margin", "dlr", "targeted", "mixture", "mse"])
def test_inner_losses_are_raised(digits, loss):
    """Each image's own loss is, after the attack, above what it was."""
    case = Case(digits, inner_loss=loss, pgd_steps=5)
    attacked = case.objective.attack(case.fitted.machine, case.x, case.y, step=0)
    assert attacks.distance(attacked, case.x, "linf").max() <= case.e.threat.epsilon + 1e-12
    stream = data.generator(case.e.seed, "inner", 0)
    aim = (case.y + stream.integers(1, 10, len(case.y))) % 10
    labels, machine = jnp.eye(10)[case.y], case.fitted.machine
    names = ("cross-entropy", "margin", "targeted") if loss == "mixture" else (loss,)
    for i, name in enumerate(names):
        part = slice(i, None, len(names))
        chosen = losses.towards(aim[part]) if name == "targeted" else losses.LOSSES[name]
        target = labels[part] - (0.1 if name == "mse" else 0)
        before, after = (chosen(machine(x[part]), target) for x in (case.x, attacked))
        assert (after > before).all()
        alone = attacks.pgd(
            machine, case.x[part], target, threat=Threat("linf", case.e.threat.epsilon), n_steps=5,
            step_size=case.e.threat.step_size, loss=name,
            aim=aim[part] if name == "targeted" else None,
        )  # fmt: skip
        np.testing.assert_allclose(attacked[part], alone, atol=1e-12)


def test_random_starts_restarts_and_apgd(digits):
    def raised(**switches):
        case = Case(digits, pgd_steps=2, **switches)
        machine = case.fitted.machine
        found = [case.objective.attack(machine, case.x, case.y, step=step) for step in (0, 0, 1)]
        loss = losses.cross_entropy(machine(found[0]), jnp.eye(10)[case.y])
        return found, loss

    (first, again, later), one = raised(random_start=True)
    np.testing.assert_array_equal(first, again)
    assert (np.asarray(first) != later).mean() > 0.1
    assert raised(random_start=True, restarts=6)[1].mean() > one.mean()
    assert raised(step_rule="apgd")[1].mean() != raised()[1].mean()


def test_no_batch_draws_the_same_noise(digits):
    case = Case(digits, random_start=True, pgd_steps=1)
    case.objective.batch_size = 12
    x = jnp.full((24, 8, 8, 1), 0.5)
    found = case.objective.attack(case.fitted.machine, x, np.zeros(24, int), step=0)
    assert (np.asarray(found[:12]) != found[12:]).mean() > 0.1


def test_copies_mirror_and_label_scale(digits):
    e = changed(
        SMALL, support__copies=3, support__copy_noise=0.1, support__mirror=True,
        support__label_scale=2.0,
    )  # fmt: skip
    splits = data.split(digits, e)
    x, y = distill.initial_support(e, splits)
    assert (len(splits.x_support), x.shape) == (10, (30, 8, 8, 1))
    assert sorted(splits.y_support) == list(range(10))  # one of each class
    np.testing.assert_array_equal(x[:10], splits.x_support)
    for copy, original in ((x[10:20], x[:10, :, ::-1]), (x[20:], x[:10])):
        moved = np.abs(copy - original).max((1, 2, 3))
        assert (moved.min() > 0.05, moved.max() <= 0.1) == (True, True)
    np.testing.assert_allclose(y, np.tile(2 * (np.eye(10)[splits.y_support] - 0.1), (3, 1)))
    assert (x.min(), x.max()) == (0, 1)


def test_mirrored_target_images(digits):
    plain, mirrored = (Case(digits).e, changed(SMALL, support__mirror=True))
    runs = [
        algorithm.Run(e, data.split(digits, e), kernels.of(e.kernel), "adv-kip")
        for e in (plain, mirrored)
    ]
    (x, y), (x_m, y_m) = (run.target(0) for run in runs)
    np.testing.assert_array_equal(y, y_m)
    same, flipped = ((np.asarray(x_m) == other).all((1, 2, 3)) for other in (x, x[:, :, ::-1]))
    assert (same | flipped).all()
    assert 0.2 < same.mean() < 0.8


def test_switches_at_their_defaults_are_not_named(digits):
    """A checkpoint of before there was a choice goes on."""
    about = Case(digits).run.about
    assert not [key for key in about if key.split(".")[-1] in ("copies", "clean_weight", "mirror")]
    assert Case(digits, clean_weight=0.5).run.about["adv_kip.clean_weight"] == 0.5


def test_support_is_chosen_by_the_worst_case(digits):
    e = changed(
        SMALL, adv_kip__choose_by="worst-case", adv_kip__n_steps=6, adv_kip__learning_rate=0.02,
    )  # fmt: skip
    history = distill.distill(e, data.split(digits, e), progress=False)
    best = max(history.history, key=lambda line: line["strong"])
    assert history.step == best["step"]
    assert all(line["strong"] <= line["clean"] for line in history.history)
    assert history.history[-1]["strong"] > history.history[0]["strong"]
