"""The verdict on models that were masked on purpose, on undefended and on honest ones."""

import copy

import pytest
import torch

from advkip import around, attacks, data, diagnose, kernels, krr, nets, training

THREAT = attacks.Threat("linf", 0.2)
N = 80
SEES_NOTHING = {"zero gradients", "large radius", "gradient-free", "transfer"}


class Masked(torch.nn.Module):
    """A network behind layers that hide its gradient."""

    def __init__(self, net, before=None, after=None):
        super().__init__()
        self.net = net
        self.before, self.after = before or (lambda x: x), after or (lambda logits: logits)
        self.eval()

    def forward(self, x):
        return self.after(self.net(self.before(x)))


class Cool(torch.nn.Module):
    """Logits at temperature 100, as in defensive distillation (Papernot et al. 2016)."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x) / 100


def jitter(x):
    """Changes an image by 0.01 and its gradient beyond recognition, anew at every pass."""
    return x + 0.01 * torch.sin(5000 * x + 6.283 * torch.rand_like(x))


@pytest.fixture(scope="module")
def trained():
    d = data.load("digits")

    def train(net, *, epochs, adversarial=0):
        recipe = training.Recipe(
            epochs=epochs, learning_rate=3e-3, threat=THREAT, step_size=0.05, batch_size=32,
            eval_every=epochs, eval_pgd_steps=2, adversarial_steps=adversarial,
        )  # fmt: skip
        watched = training.Watched(d.x_train[1000:1050], d.y_train[1000:1050])
        return training.train(
            net, d.x_train[:1000], d.y_train[:1000], recipe=recipe, watched=watched, progress=False
        ).net

    def fresh(seed):
        return nets.build("fc2-128", shape=(8, 8, 1), n_classes=10, seed=seed)

    return {
        "plain": train(fresh(0), epochs=20),
        "other": train(fresh(5), epochs=20),
        "robust": train(fresh(0), epochs=30, adversarial=7),
        "cooled": train(Cool(fresh(0)), epochs=60).net,
    }


def run(model, *, sources=None, n=N, **options):
    d = data.load("digits")
    settings = {"threat": THREAT, "step_size": 0.05, "n_steps": 20, "progress": False}
    return diagnose.diagnose(
        model, d.x_test[:n], d.y_test[:n], sources=sources, **settings | options
    )


def failed(diagnosis):
    return {check.name for check in diagnosis.checks if check.passed is False}


PLANTED = {
    "saturated logits": (lambda t: Masked(t["plain"], after=lambda z: 1e4 * z), SEES_NOTHING
                         | {"margin loss", "DLR loss", "rescaled logits", "AutoAttack"}),
    "temperature": (lambda t: t["cooled"], SEES_NOTHING | {"float64", "vanishing gradients"}),
    "quantised input": (lambda t: Masked(t["plain"], lambda x: (4 * x).round() / 4), SEES_NOTHING),
    "no gradient": (lambda t: Masked(t["plain"], lambda x: x.detach()), SEES_NOTHING),
    "noise layer": (lambda t: Masked(t["plain"], jitter), {"repeatable", "transfer"}),
    "robust, then saturated": (lambda t: Masked(t["robust"], after=lambda z: 1e4 * z),
                               SEES_NOTHING - {"transfer"}),
    "robust, then quantised": (lambda t: Masked(t["robust"], lambda x: (15 * x).round() / 15),
                               SEES_NOTHING - {"transfer"}),
}  # fmt: skip


@pytest.mark.parametrize("name", PLANTED)
def test_hidden_gradients_are_found(trained, name):
    make, expected = PLANTED[name]
    parts = ("apgd-t", "square") if name == "saturated logits" else ("square",)
    found = run(make(trained), sources={"other": trained["other"]}, parts=parts)
    assert found.verdict == "masked"
    assert found.claimed > 0.7
    assert found.strong < 0.7 * found.claimed
    assert failed(found) - {"AutoAttack"} >= expected - {"AutoAttack"}
    assert all(name in found.reasons for name in (f"failed: {f}" for f in failed(found)))


def test_an_undefended_network_hides_nothing(trained):
    found = run(trained["plain"], sources={"other": trained["other"]})
    assert (found.verdict, found.kept) == ("genuine", None)
    assert found.clean > 0.85
    assert found.claimed <= 0.05
    assert not failed(found)


def test_an_adversarially_trained_network_is_genuine(trained):
    found = run(trained["robust"], sources={"other": trained["other"]}, n=120)
    assert found.verdict == "genuine"
    assert found.claimed > 0.5
    share, low, high = found.kept
    assert 0.7 <= share < 1  # all of AutoAttack ran, and found something
    assert low < share < high
    assert set(found.broken) >= {"apgd-ce", "apgd-t", "fab-t", "square", "from other", "noise"}
    assert found.sweep[1.0] == 0
    assert list(found.sweep.values()) == sorted(found.sweep.values(), reverse=True)
    assert found.strong == pytest.approx(found.left.mean())
    assert not (found.left.sum() > found.claimed * found.n)
    # every check of the list was asked, and passed
    assert {check.name for check in found.checks} == {
        "repeatable", "order", "zero gradients", "vanishing gradients", "large radius",
        "more steps", "random starts", "margin loss", "DLR loss", "rescaled logits", "float64",
        "silent success", "noise", "transfer", "AutoAttack", "gradient-free",
    }  # fmt: skip
    assert all(check.passed for check in found.checks)


def test_the_verdict_is_deterministic(trained):
    model = Masked(trained["plain"], jitter)
    first, again = (run(model, n=20, parts=(), seed=3).to_dict() for _ in range(2))
    assert first == again


def test_a_kernel_machine(trained):
    d = data.load("digits")
    labels = data.one_hot(d.y_train[:100], 10, center=True)
    machine = krr.fit(kernels.by_name("fc2"), d.x_train[:100], labels).machine
    small = {"n": 40, "parts": ("apgd-ce",), "threat": attacks.Threat("linf", 0.1), "n_steps": 5}
    found = run(machine, sources={"net": trained["plain"]}, **small)
    assert found.claimed > 0.3
    assert "float64" in found.broken
    assert found.broken["apgd-ce"] >= found.broken["noise"]
    assert found.sweep[1.0] < 0.1
    assert found.gradients["right"] > 0


def test_l2(trained):
    found = run(trained["robust"], threat=attacks.Threat("l2", 0.5), step_size=0.1, n=40, parts=())
    assert found.claimed > 0.3
    assert list(found.sweep)[-1] == 8
    assert {c.name: c.passed for c in found.checks}["gradient-free"] is None


@pytest.mark.parametrize(
    ("counts", "failed", "verdict"),
    [
        ((0, 100, 100), [], "masked"),
        ((49, 100, 100), [], "masked"),
        ((60, 100, 100), [], "inconclusive"),
        ((60, 100, 100), ["zero gradients"], "masked"),
        ((69, 100, 100), ["large radius"], "masked"),
        ((75, 100, 100), ["large radius"], "inconclusive"),  # what does not see proves nothing
        ((60, 100, 100), ["noise"], "inconclusive"),
        ((75, 100, 100), [], "genuine"),
        ((75, 100, 100), ["noise"], "inconclusive"),
        ((3, 4, 40), [], "inconclusive"),  # 75 %, of four images
        ((1, 4, 40), [], "masked"),
        ((0, 5, 100), ["order"], "genuine"),  # nothing is claimed
    ],
)
def test_thresholds(counts, failed, verdict):
    found, reasons, kept = diagnose.judge(*counts, failed)
    assert found == verdict
    assert reasons
    if kept:
        assert kept[1] <= kept[0] <= kept[2]


def test_published_figures_fall_on_the_right_side():
    """Tables 5 to 7 and 10 of the paper, (PGD, AutoAttack) as if of 1,000 images."""
    honest = [(95.82, 88.77), (31.49, 26.18), (24.41, 18.95), (24.68, 23.85)]
    hidden = [(97.17, 0.0), (67.03, 0.0), (49.06, 0.89), (53.18, 0.27)]
    for pairs, verdict in ((honest, "genuine"), (hidden, "masked")):
        for pgd, strong in pairs:
            assert diagnose.judge(round(10 * strong), round(10 * pgd), 1000, [])[0] == verdict


def test_bad_input(trained):
    net = trained["plain"]
    with pytest.raises(ValueError, match="expected parts of"):
        run(net, parts=("autoattack",))
    with pytest.raises(ValueError, match="expected epsilon > 0"):
        run(net, threat=attacks.Threat("linf", 0.0))
    with pytest.raises(ValueError, match="expected a network in evaluation mode"):
        run(copy.deepcopy(net).train())
    with pytest.raises(ValueError, match="remove the softmax"):
        run(Masked(net, after=lambda z: z.softmax(1)))


# Networks around networks


def test_the_mean_of_passes_has_the_mean_gradient(trained):
    x = nets.to_tensor(data.load("digits").x_test[:4]).requires_grad_()
    torch.manual_seed(0)
    noisy = Masked(trained["plain"], after=lambda z: z * (1 + torch.randn(())))
    (mean,) = torch.autograd.grad(around.Mean(noisy, 400)(x).sum(), x)
    (exact,) = torch.autograd.grad(trained["plain"](x).sum(), x)
    assert torch.nn.functional.cosine_similarity(mean.flatten(), exact.flatten(), 0) > 0.999


def test_rescaling_changes_no_prediction_and_saturates_nothing(trained):
    x = nets.to_tensor(data.load("digits").x_test[:20])
    loud = Masked(trained["plain"], after=lambda z: 1e6 * z)
    logits = around.Rescaled(loud)(x)
    torch.testing.assert_close(logits.std(1), torch.ones(20))
    assert (logits.argmax(1) == trained["plain"](x).argmax(1)).all()


def test_float64_where_it_runs(trained):
    x = nets.to_tensor(data.load("digits").x_test[:2])
    assert around.in_float64(trained["plain"], x)(x.double()).dtype == torch.float64
    assert trained["plain"](x).dtype == torch.float32  # the original is as it was
    assert around.in_float64(Masked(trained["plain"], lambda x: x.float()), x) is None


@pytest.mark.parametrize("threat", [THREAT, attacks.Threat("l2", 0.5)])
@pytest.mark.parametrize("corners", [False, True])
def test_noise_keeps_to_the_ball(threat, corners):
    x = torch.full((5, 1, 8, 8), 0.5)
    noisy = around.noise(x, threat, torch.Generator().manual_seed(0), corners=corners)
    distance = attacks.distance(noisy.numpy(), x.numpy(), threat.norm)
    assert (distance <= threat.epsilon + 1e-6).all()
    assert (distance > threat.epsilon * (0.99 if corners else 0.4)).all()
