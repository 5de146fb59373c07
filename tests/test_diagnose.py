"""The verdict on models that were masked on purpose, on undefended and on honest ones."""

import copy
import functools

import numpy as np
import pytest
import torch

from advkip import (
    attacks,
    bridge,
    data,
    diagnose,
    hard_label,
    kernels,
    krr,
    nets,
    probes,
    training,
    verdict,
)

THREAT = attacks.Threat("linf", 0.2)
N = 40


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
        "cnn": train(nets.build("simple-cnn", shape=(8, 8, 1), n_classes=10, seed=0), epochs=8),
        "cooled": train(Cool(fresh(0)), epochs=60).net,
    }


def run(model, *, sources=None, n=N, **options):
    d = data.load("digits")
    settings = {"threat": THREAT, "step_size": 0.05, "n_steps": 20, "progress": False}
    return diagnose.diagnose(
        model, d.x_test[:n], d.y_test[:n], sources=sources, **settings | options
    )


@pytest.fixture(scope="module")
def kept_by_robust(trained):
    """What all attacks leave of the adversarially trained network in a ball."""
    return functools.cache(lambda threat=THREAT: run(trained["robust"], threat=threat).strong)


def failed(diagnosis):
    return {check.name for check in diagnosis.checks if check.passed is False}


class Borrowed(torch.autograd.Function):
    """The logits of one network with the gradient of another."""

    @staticmethod
    def forward(context, x, net, other):
        context.save_for_backward(x)
        context.other = other
        return net(x)

    @staticmethod
    def backward(context, g):
        (x,) = context.saved_tensors
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return torch.autograd.grad(context.other(x), x, -g)[0], None, None


class Misleading(torch.nn.Module):
    def __init__(self, net, other):
        super().__init__()
        self.net, self.other = net, other
        self.eval()

    def forward(self, x):
        return Borrowed.apply(x, self.net, self.other)


def in_numpy(x):
    return torch.from_numpy(x.cpu().numpy())


NO_GRADIENT = {"zero gradients", "large radius", "gradient-free"}
PLANTED = {
    "saturated logits": (lambda t: Masked(t["plain"], after=lambda z: 1e4 * z), {
        "zero gradients", "large radius", "no rounding", "margin loss", "DLR loss",
        "rescaled logits", "AutoAttack"}),
    "temperature": (lambda t: t["cooled"], {
        "zero gradients", "vanishing gradients", "large radius", "no rounding", "float64",
        "margin loss"}),
    "quantised input": (lambda t: Masked(t["plain"], lambda x: (4 * x).round() / 4), NO_GRADIENT),
    "no gradient": (lambda t: Masked(t["plain"], lambda x: x.detach()), NO_GRADIENT),
    "another framework": (lambda t: Masked(t["plain"], in_numpy), NO_GRADIENT),
    "noise layer": (lambda t: Masked(t["plain"], jitter), {"gradient-free", "transfer"}),
    "misleading gradient": (lambda t: Misleading(t["plain"], t["other"]), {
        "true gradients", "large radius", "gradient-free"}),
    "robust, then saturated": (lambda t: Masked(t["robust"], after=lambda z: 1e4 * z), {
        "zero gradients", "large radius"}),
    "robust, then quantised": (lambda t: Masked(t["robust"], lambda x: (15 * x).round() / 15),
                               NO_GRADIENT),
}  # fmt: skip


@pytest.mark.parametrize("name", PLANTED)
def test_hidden_gradients_are_found(trained, name):
    make, expected = PLANTED[name]
    parts = ("apgd-t", "square") if name == "saturated logits" else ("square",)
    found = run(make(trained), sources={"other": trained["other"]}, parts=parts)
    assert found.verdict == "masked"
    assert found.claimed > 0.7
    assert found.strong < 0.7 * found.claimed
    assert failed(found) >= expected
    assert {f"failed: {name}" for name in failed(found)} <= set(found.reasons)
    assert found.reasons[-1] == "gradients are hidden from PGD"


class Votes(torch.nn.Module):
    """Hard votes of networks, and a little of another network, which has the only gradient."""

    def __init__(self, voters, other, share):
        super().__init__()
        self.voters, self.other, self.share = torch.nn.ModuleList(voters), other, share
        self.eval()

    def forward(self, x):
        votes = sum(
            torch.nn.functional.one_hot(net(x).argmax(1), 10).float() for net in self.voters
        )
        return votes + self.share * self.other(x)


class HardLabel(torch.nn.Module):
    """One network's label, with the gradient of another, far from anything, behind it."""

    def __init__(self, net, other):
        super().__init__()
        self.net, self.other = net, other
        self.eval()

    def forward(self, x):
        label = torch.nn.functional.one_hot(self.net(x).argmax(1), 10).float()
        return 10 * label + 1e-3 * self.other(x)


@pytest.mark.parametrize("kind", ["votes", "hard label"])
def test_models_that_lead_every_gradient_astray(trained, kind):
    """AutoAttack follows the path beside the answers; the answers themselves give them away."""
    untrained = nets.build("fc2-128", shape=(8, 8, 1), n_classes=10, seed=9).eval()
    voters = [trained["plain"], trained["other"], trained["cooled"]]
    model = {
        "votes": lambda: Votes(voters, untrained, 1e-3),
        "hard label": lambda: HardLabel(trained["plain"], untrained),
    }[kind]()
    found = run(model, threat=attacks.Threat("linf", 0.15), step_size=0.04, n=60)
    assert found.verdict == "masked"
    assert found.claimed > 0.7
    assert max(found.broken[name] for name in ("apgd-ce", "apgd-t", "fab-t", "square")) < 0.35
    assert found.broken["from imitation"] > 0.35
    assert {"transfer", "labels alone"} & failed(found)
    assert found.strong < 0.5 * found.claimed


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_rays_see_answers_alone(trained, norm):
    """What they find is in the ball and wrong; in a large ball they find all, as labels suffice."""
    d = data.load("digits")
    x, y = nets.to_tensor(d.x_test[:30]), torch.as_tensor(d.y_test[:30])
    right = trained["plain"](x).argmax(1) == y
    x, y = x[right], y[right]
    hard = Masked(
        trained["plain"], after=lambda z: torch.nn.functional.one_hot(z.argmax(1), 10).float()
    )
    shares = []
    for radius in {"linf": (0.02, 0.15, 0.9), "l2": (0.1, 1.5, 8.0)}[norm]:
        threat = attacks.Threat(norm, radius)
        found = hard_label.rays(hard, x, y, threat, seed=0)
        assert (found == hard_label.rays(hard, x, y, threat, seed=0)).all()
        shares.append(found.double().mean().item())
    assert shares == sorted(shares)
    assert shares[0] < 0.2
    assert shares[1] > shares[0]
    assert shares[2] > 0.9
    assert not hard_label.rays(hard, x[:0], y[:0], threat, seed=0).any()


class Stubborn(torch.nn.Module):
    """Fails on copying and in float64 with exceptions of its own, and checks its pixels' range."""

    class Own(Exception):
        pass

    def __init__(self, net):
        super().__init__()
        self.net = net
        self.eval()

    def __deepcopy__(self, memory):
        raise Stubborn.Own

    def forward(self, x):
        if x.min() < 0 or x.max() > 1:
            raise Stubborn.Own
        return self.net(x)


def test_what_a_network_refuses_is_not_asked(trained):
    found = run(Stubborn(trained["plain"]), n=20, n_steps=5, parts=())
    asked = {check.name: check.value for check in found.checks}
    assert asked["true gradients"] is None
    assert found.verdict in verdict.VERDICTS
    with torch.inference_mode():
        assert run(Stubborn(trained["plain"]), n=20, n_steps=5, parts=()).claimed == found.claimed
    x = nets.to_tensor(data.load("digits").x_test[:10]).double()  # black pixels are at the edge
    plain = probes.in_float64(trained["plain"], x)
    y = torch.as_tensor(data.load("digits").y_test[:10])
    ranged = Masked(plain, lambda x: x if x.min() >= 0 and x.max() <= 1 else 1 / 0)
    assert not probes.false_gradient(ranged, x, y).any()


def test_a_convolutional_network_in_an_l2_ball(trained):
    settings = {"threat": attacks.Threat("l2", 1.5), "step_size": 0.3, "parts": ("apgd-t",)}
    plain = run(trained["cnn"], n=40, **settings)
    assert plain.clean > 0.8
    assert (plain.verdict, plain.kept) == ("nothing claimed", None)
    found = run(Masked(trained["cnn"], after=lambda z: 1e4 * z), n=40, **settings)
    assert found.verdict == "masked"
    assert found.claimed > plain.claimed + 0.5
    assert failed(found) >= {"zero gradients", "no rounding", "margin loss"}


def test_what_withstands_gradients_falls_to_images_of_another_model(trained):
    """Where Square, which finds most of them, has not been before."""
    found = run(Masked(trained["plain"], jitter), sources={"other": trained["other"]}, parts=())
    assert found.verdict == "masked"
    assert found.broken["from other"] > 0.9
    assert "transfer" in failed(found)


class Coarse(torch.nn.Module):
    """A gradient on images of 16 grey values alone, as digits are: FGSM has one, PGD's second step
    has none."""

    def __init__(self, net):
        super().__init__()
        self.net = net
        self.eval()

    def forward(self, x):
        clean = ((16 * x - (16 * x).round()).abs() < 1e-4).flatten(1).all(1)
        return self.net(torch.where(clean.view(-1, 1, 1, 1), x, x.detach()))


def test_what_fgsm_breaks_and_pgd_does_not_is_no_empty_claim(trained):
    found = run(Coarse(trained["plain"]), parts=(), threat=attacks.Threat("linf", 0.3),
                step_size=0.02)  # fmt: skip
    assert found.claimed <= 0.05
    assert found.verdict == "masked"
    assert {"order", "large radius"} <= failed(found)
    assert "failed: order" in found.reasons
    assert found.kept is None


def test_what_rounding_hides_is_found_without_it(trained):
    """Logits times 10 and 1e4: a part of the gradient goes, then all; the same images fall."""
    undefended = run(trained["plain"], parts=())
    found = [run(Masked(trained["plain"], after=lambda z, k=k: k * z), parts=()) for k in (10, 1e4)]
    for one in found:
        assert one.claimed > undefended.claimed + 0.3
        assert "no rounding" in failed(one)
        assert one.claimed * (1 - one.broken["no rounding"]) <= undefended.claimed + 0.1
    assert found[0].rounded["partly"] > found[0].rounded["wholly"] + 0.3
    assert found[1].rounded["wholly"] > 0.9
    assert undefended.rounded["wholly"] == 0


def test_an_undefended_network_hides_nothing(trained):
    found = run(trained["plain"], sources={"other": trained["other"]})
    assert (found.verdict, found.kept) == ("nothing claimed", None)
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
    assert found.strong == pytest.approx(found.robust.mean())
    assert found.broken["no rounding"] <= 0.05
    assert found.rounded == {"partly": 0, "wholly": 0}
    assert found.withstood.mean() == pytest.approx(found.claimed)
    assert found.right.mean() == pytest.approx(found.clean)
    assert (found.right >= found.withstood).all()
    # every check of the list was asked, and passed
    assert {check.name for check in found.checks} == {
        "repeatable", "order", "zero gradients", "vanishing gradients", "true gradients",
        "large radius", "more steps", "random starts", "margin loss", "DLR loss",
        "rescaled logits", "no rounding", "float64", "silent success", "noise", "transfer",
        "AutoAttack", "gradient-free", "labels alone",
    }  # fmt: skip
    assert all(check.passed for check in found.checks)


def exported(net):
    free = {0: torch.export.Dim("n")}
    return torch.export.export(net, (torch.zeros(2, 1, 8, 8),), dynamic_shapes=(free,)).module()


@pytest.mark.parametrize(
    "kind",
    [
        exported,
        lambda net: torch.jit.freeze(torch.jit.script(net)),
        # Pixels rounded to 8 bits, with the gradient beside it.
        lambda net: Masked(net, before=lambda x: x + ((255 * x).round() / 255 - x).detach()),
    ],
    ids=["exported", "frozen", "8 bits"],
)
def test_a_robust_network_in_another_form_is_genuine(trained, kept_by_robust, kind):
    found = run(kind(trained["robust"]))
    assert found.verdict == "genuine", found.reasons
    assert found.strong == kept_by_robust()


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (lambda net: Masked(net, after=lambda z: 1000 * z), {}),
        (lambda net: net, {"step_size": 0.01, "n_steps": 5}),  # stops a fifth of the way
    ],
    ids=["logits times 1,000", "short steps"],
)
def test_what_a_robust_network_keeps_is_said_where_its_claim_is_too_high(
    trained, kept_by_robust, kind, settings
):
    threat = attacks.Threat("linf", 0.235)
    found = run(kind(trained["robust"]), threat=threat, **settings)
    kept = kept_by_robust(threat)
    assert found.claimed > kept / verdict.GENUINE
    assert found.strong == pytest.approx(kept, abs=0.03)
    (reason,) = (one for one in found.reasons if "is too high" in one)
    assert f"the claim, {found.claimed:.0%}, is too high; the model keeps" in reason


def test_a_little_noise_makes_no_robust_network_masked(trained):
    noisy = Masked(trained["robust"], lambda x: x + 0.002 * torch.randn_like(x))
    found = run(noisy, parts=("square",), n=50, n_steps=10)
    assert {c.name: c.value for c in found.checks}["repeatable"] == 1
    assert not failed(found)
    assert found.kept[0] >= 0.8
    assert {c.name: c.value for c in found.checks}["no rounding"] is None


def test_a_weak_claim_is_told_from_a_hidden_gradient(trained):
    """A regression's outputs: cross-entropy finds less than the margin; its gradients are there."""
    d = data.load("digits")
    labels = data.one_hot(d.y_train[:100], 10, center=True)
    machine = krr.fit(kernels.by_name("fc2"), d.x_train[:100], labels).machine
    settings = {"threat": attacks.Threat("linf", 0.15), "n_steps": 10}
    found = run(machine, sources={"net": trained["plain"]}, n=60, parts=(), **settings)
    assert found.claimed > 0.2
    assert found.broken["margin loss"] > found.broken["more steps"]
    assert not failed(found) & {"zero gradients", "true gradients", "large radius"}
    assert "gradients are hidden from PGD" not in found.reasons
    assert found.sweep[1.0] < 0.1
    assert found.gradients["right"] > 0
    assert "float64" in found.broken
    sure = found.log_odds[found.right]
    assert sure.max() < 3
    assert (sure < 0).any()  # right with a softmax below 1/2
    assert {c.name: c.value for c in found.checks}["no rounding"] == 0


def test_the_verdict_is_deterministic(trained, tmp_path):
    model = Masked(trained["plain"], jitter)
    settings = {"n": 20, "parts": ("apgd-ce",), "seed": 3}
    first = run(model, **settings).to_dict()
    assert run(model, **settings).to_dict() == first
    for _ in range(2):  # nothing that is kept of a random model shifts what is drawn
        assert run(model, **settings, checkpoint_dir=tmp_path).to_dict() == first


class Switch(torch.nn.Module):
    """One of two networks, for a whole batch."""

    def __init__(self, *nets):
        super().__init__()
        self.nets = torch.nn.ModuleList(nets)
        self.eval()

    def forward(self, x):
        return self.nets[torch.randint(2, ())](x)


def test_randomness_of_whole_batches_is_seen(trained):
    for seed in range(5):
        found = run(Switch(trained["plain"], trained["other"]), n=20, n_steps=2, parts=(),
                    seed=seed)  # fmt: skip
        (repeatable,) = (check for check in found.checks if check.name == "repeatable")
        assert repeatable.value == 1


def test_the_verdict_is_deterministic_whatever_draws(trained, tmp_path):
    """NumPy's generator in the model; a random source behind attacks that are read back."""
    before = np.random.get_state()[1].copy()
    noisy = Masked(
        trained["plain"], lambda x: x + 0.1 * torch.tensor(np.random.rand(*x.shape)).float()
    )
    first, again = (run(noisy, n=20, n_steps=5, parts=()).to_dict() for _ in range(2))
    assert first == again
    assert (np.random.get_state()[1] == before).all()
    source = {"jittered": Masked(trained["other"], jitter)}
    settings = {"n": 40, "parts": ("apgd-ce",), "checkpoint_dir": tmp_path, "sources": source}
    first, again = (run(trained["robust"], **settings).to_dict() for _ in range(2))
    assert first == again


def test_models_that_differ_in_their_gradient_share_no_checkpoint(trained, tmp_path):
    """Straight-through and hard rounding: the same logits."""
    through = Masked(trained["plain"], lambda x: x + ((4 * x).round() / 4 - x).detach())
    hard = Masked(trained["plain"], lambda x: (4 * x).round() / 4)
    settings = {"n": 30, "parts": (), "checkpoint_dir": tmp_path}
    claims = [run(model, **settings).claimed for model in (through, hard)]
    assert claims[0] < 0.5 < claims[1]


def test_without_autoattack_nothing_is_genuine(trained):
    found = run(trained["robust"], parts=())
    assert found.verdict == "inconclusive"
    assert "not asked: AutoAttack, gradient-free" in found.reasons


def test_a_part_of_autoattack_is_not_autoattack(trained):
    found = run(trained["robust"], parts=("apgd-ce", "square"))
    assert found.verdict == "inconclusive"
    (check,) = (check for check in found.checks if check.name == "AutoAttack")
    assert (check.value, check.passed) == (None, None)
    assert "(only apgd-ce)" in check.text


class NoGradientInTheDark(torch.nn.Module):
    """Its gradient is NaN at black pixels."""

    def __init__(self, net):
        super().__init__()
        self.net = net
        self.eval()

    def forward(self, x):
        return self.net(torch.where(x > 0, x.sqrt(), 0 * x) ** 2)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_gradients_that_are_not_finite_are_none(trained, norm):
    threat = attacks.Threat(norm, {"linf": 0.2, "l2": 1.0}[norm])
    found = run(NoGradientInTheDark(trained["plain"]), threat=threat, n=40, parts=())
    assert "zero gradients" in failed(found)
    assert np.isfinite(list(found.gradients.values())).all()
    assert found.claimed > run(trained["plain"], threat=threat, n=40, parts=()).claimed


def test_float64_networks(trained):
    double = copy.deepcopy(trained["robust"]).double()
    found = run(double, n=30, parts=("apgd-ce", "fab-t", "square"))
    assert set(found.broken) >= {"apgd-ce", "fab-t", "square", "float64"}
    assert not failed(found)


def test_l2_and_other_labels_and_sources(trained):
    d = data.load("digits")
    found = diagnose.diagnose(
        trained["robust"], d.x_test[:40], d.y_test[:40].astype("uint8"), parts=(),
        threat=attacks.Threat("l2", 0.5), step_size=0.1, n_steps=10, progress=False, batch_size=7,
        sources={"precise": copy.deepcopy(trained["plain"]).double()},
    )  # fmt: skip
    assert found.claimed > 0.3
    assert list(found.sweep)[-1] == 8
    assert "from precise" in found.broken
    assert not failed(found)


def test_three_classes():
    """AutoAttack's targeted parts want four; the others run."""
    d = data.load("digits")
    few = d.y_train < 3
    net = nets.build("fc1-64", shape=(8, 8, 1), n_classes=3, seed=0)
    recipe = training.Recipe(epochs=10, learning_rate=3e-3, threat=THREAT, step_size=0.05,
                             eval_every=10, eval_pgd_steps=2)  # fmt: skip
    watched = training.Watched(d.x_train[few][:20], d.y_train[few][:20])
    training.train(net, d.x_train[few], d.y_train[few], recipe=recipe, watched=watched,
                   progress=False)  # fmt: skip
    test = d.y_test < 3
    found = diagnose.diagnose(
        Masked(net, lambda x: (4 * x).round() / 4), d.x_test[test][:60], d.y_test[test][:60],
        threat=attacks.Threat("linf", 0.4), step_size=0.1, n_steps=10, progress=False,
    )  # fmt: skip
    assert set(found.broken) >= {"apgd-ce", "square"}
    assert "fab-t" not in found.broken
    assert found.verdict == "masked"


def asked_and_passed(*names):
    return [verdict.Check(name, 0.0, 0.1, True, "") for name in names]


def checks(*failed, unasked=()):
    return [verdict.Check(name, 0.5, 0.1, False, "") for name in failed] + [
        verdict.Check(name, None, 0.1, None, "") for name in unasked
    ]


@pytest.mark.parametrize(
    ("counts", "found", "expected"),
    [
        ((0, 100, 100), checks(), "masked"),
        ((49, 100, 100), checks(), "masked"),
        ((60, 100, 100), checks(), "inconclusive"),
        ((60, 100, 100), checks("zero gradients"), "masked"),
        ((60, 100, 100), checks("no rounding"), "masked"),
        ((69, 100, 100), checks("large radius"), "masked"),
        ((12, 18, 100), checks("large radius"), "masked"),
        ((7, 10, 100), checks("large radius"), "inconclusive"),
        ((75, 100, 100), checks("large radius"), "inconclusive"),  # what is blind proves nothing
        ((60, 100, 100), checks("noise"), "inconclusive"),
        ((75, 100, 100), checks(), "genuine"),
        ((75, 100, 100), checks("noise"), "inconclusive"),
        ((75, 100, 100), checks(unasked=["transfer"]), "inconclusive"),
        ((75, 100, 100), checks(unasked=["labels alone"]), "inconclusive"),
        ((60, 100, 100), checks("labels alone"), "masked"),
        ((75, 100, 100), checks("labels alone"), "inconclusive"),
        ((75, 100, 100), checks(unasked=["gradient-free"]), "inconclusive"),
        ((10, 12, 40), checks(), "genuine"),
        ((9, 9, 40), checks(), "inconclusive"),  # too few
        ((0, 9, 40), checks("zero gradients"), "inconclusive"),
        ((0, 5, 100), checks(), "nothing claimed"),
        ((0, 5, 100), checks("zero gradients"), "nothing claimed"),
        ((0, 5, 100), checks("order"), "masked"),  # but by PGD alone
        ((0, 5, 100), checks("large radius"), "masked"),
    ],
)
def test_thresholds(counts, found, expected):
    others = set(verdict.NEEDED) - {check.name for check in found}
    name, reasons, kept = verdict.judge(*counts, found + asked_and_passed(*others))
    assert name == expected
    assert reasons
    if kept:
        assert kept[1] <= kept[0] <= kept[2]


class Bright(torch.nn.Module):
    """Class 1 from a mean of 0.95 on."""

    def forward(self, x):
        mean = x.flatten(1).mean(1)
        return torch.stack([0.95 - mean, mean - 0.95], 1)


def test_the_ball_is_large_once_it_holds_a_grey_image():
    x, y = np.full((12, 4, 4, 1), 0.1, "float32"), np.zeros(12, int)
    found = diagnose.diagnose(
        Bright().eval(), x, y, threat=THREAT, step_size=0.05, n_steps=5, parts=(), progress=False
    )
    assert found.sweep[0.8] == 1
    assert found.sweep[1.0] == 0
    (large,) = (check for check in found.checks if check.name == "large radius")
    assert large.value == 1
    assert "radius 0.8" in large.text


def test_a_constant_network_is_not_robust(trained):
    net = copy.deepcopy(trained["plain"])
    last = [layer for layer in net.modules() if isinstance(layer, torch.nn.Linear)][-1]
    with torch.no_grad():
        last.weight.zero_()
        last.bias.copy_(2.0 * (torch.arange(10) == 3))
    found = run(net, parts=("apgd-ce", "square"))
    assert found.claimed == found.strong == found.clean > 0.05  # more than counts as nothing
    assert found.verdict == "inconclusive"
    assert any("constant answer" in reason for reason in found.reasons)
    asked = asked_and_passed(*verdict.NEEDED)
    assert verdict.judge(90, 100, 100, asked)[0] == "genuine"
    assert verdict.judge(90, 100, 100, asked, constant=True)[0] == "inconclusive"
    assert verdict.judge(90, 100, 100, asked[:1])[0] == "inconclusive"
    assert verdict.judge(0, 100, 100, checks(), constant=True)[0] == "masked"


class Favoured(torch.nn.Module):
    """One answer unless the image is clearly another: nothing but that answer withstands."""

    def __init__(self, net, label, by):
        super().__init__()
        self.net, self.bias = net, by * torch.nn.functional.one_hot(torch.tensor(label), 10)
        self.eval()

    def forward(self, x):
        return self.net(x) + self.bias


def test_nearly_constant_networks_are_not_robust(trained):
    d = data.load("digits")
    order = np.argsort(d.y_test != 3, kind="stable")[:100]  # all the threes, and others
    net = Favoured(trained["plain"], 3, 40.0)
    settings = {"threat": attacks.Threat("linf", 0.1), "step_size": 0.02, "n_steps": 10}
    found = diagnose.diagnose(net, d.x_test[order], d.y_test[order], progress=False, **settings)
    left = d.y_test[order][found.robust]
    assert found.right.sum() > (d.y_test[order] == 3).sum()
    assert found.strong > 0.1
    assert (left == 3).mean() > 0.9
    assert found.verdict == "inconclusive"
    assert any("constant answer" in reason for reason in found.reasons)


@pytest.mark.parametrize(
    ("found", "cause"),
    [
        (checks("zero gradients"), "gradients are hidden from PGD"),
        (checks("transfer"), "gradients are hidden from PGD"),
        (checks("margin loss"), "gradients are there; PGD with"),
        (
            checks("margin loss", unasked=["true gradients"]),
            "or gradients are hidden in a way that",
        ),
    ],
)
def test_the_cause_is_only_said_where_it_was_asked(found, cause):
    assert cause in verdict.judge(10, 100, 100, found)[1][-1]


def test_one_image_of_few_condemns_nobody():
    assert verdict.check("noise", 1, 15, 0.05, "").passed
    assert not verdict.check("noise", 15, 100, 0.05, "").passed
    assert verdict.check("noise", 5, 100, 0.05, "").passed
    assert verdict.check("noise", None, 100, 0.05, "").passed is None
    assert verdict.check("noise", 0, 0, 0.05, "").passed is None


def test_published_figures_fall_on_the_right_side():
    """Tables 5 to 7 and 10 of the paper, (PGD, AutoAttack) as if of 1,000 images."""
    asked = asked_and_passed(*verdict.NEEDED)
    honest = [(95.82, 88.77), (31.49, 26.18), (24.41, 18.95), (24.68, 23.85)]
    hidden = [(97.17, 0.0), (67.03, 0.0), (49.06, 0.89), (53.18, 0.27)]
    for pairs, expected in ((honest, "genuine"), (hidden, "masked")):
        for pgd, strong in pairs:
            counts = round(10 * strong), round(10 * pgd), 1000
            assert verdict.judge(*counts, asked)[0] == expected


def test_bad_input(trained):
    net = trained["plain"]
    with pytest.raises(ValueError, match="expected parts of"):
        run(net, parts=("autoattack",))
    with pytest.raises(ValueError, match="expected epsilon > 0"):
        run(net, threat=attacks.Threat("linf", 0.0))
    with pytest.raises(ValueError, match=r"expected pixels in the range \[0, 1\]"):
        run(net, threat=attacks.Threat("linf", 0.2, low=-1.0))
    with pytest.raises(ValueError, match="expected a network in evaluation mode"):
        run(copy.deepcopy(net).train())
    with pytest.raises(ValueError, match="remove the softmax"):
        run(Masked(net, after=lambda z: z.softmax(1)))


# Networks around networks


def test_the_mean_of_passes_has_the_mean_gradient(trained):
    x = nets.to_tensor(data.load("digits").x_test[:4]).requires_grad_()
    torch.manual_seed(0)
    noisy = Masked(trained["plain"], after=lambda z: z * (1 + torch.randn_like(z)))
    (exact,) = torch.autograd.grad(trained["plain"](x).sum(), x)

    def error(draws):
        (found,) = torch.autograd.grad(probes.Mean(noisy, draws)(x).sum(), x)
        return ((found - exact).norm() / exact.norm()).item()

    assert error(1) > 0.3
    assert error(900) < 3 * error(1) / 30  # as 1 / sqrt(draws)


def test_rescaling_changes_no_prediction_and_saturates_nothing(trained):
    x = nets.to_tensor(data.load("digits").x_test[:20])
    loud = Masked(trained["plain"], after=lambda z: 1e6 * z)
    logits = probes.Rescaled(loud)(x)
    torch.testing.assert_close(logits.std(1), torch.ones(20))
    assert (logits.argmax(1) == trained["plain"](x).argmax(1)).all()
    equal = probes.Rescaled(Masked(trained["plain"], after=lambda z: 0 * z + 5))
    assert (equal(x) == 5).all()  # nothing to rescale


def test_float64_where_it_runs(trained):
    x = nets.to_tensor(data.load("digits").x_test[:2])
    assert probes.in_float64(trained["plain"], x)(x.double()).dtype == torch.float64
    assert trained["plain"](x).dtype == torch.float32  # the original is as it was
    assert probes.in_float64(Masked(trained["plain"], lambda x: x.float()), x) is None


def test_false_gradients(trained):
    """Those of networks and machines are true, in float64; a borrowed one and a rounded one not."""
    d = data.load("digits")
    x, y = nets.to_tensor(d.x_test[:40]).double(), torch.as_tensor(d.y_test[:40])
    plain = probes.in_float64(trained["plain"], x)
    labels = data.one_hot(d.y_train[:50], 10)
    machine = krr.fit(kernels.by_name("fc2"), d.x_train[:50], labels).machine
    through = Masked(plain, lambda x: x + ((4 * x).round() / 4 - x).detach())
    other = probes.in_float64(trained["other"], x)
    cases = {plain: 0, bridge.KernelNet(machine).in_float64(): 0, through: 1,
             Misleading(plain, other): 1, probes.WithoutGradient(plain): 0}  # fmt: skip
    for net, expected in cases.items():
        found = probes.false_gradient(net, x, y).double().mean()
        assert found == pytest.approx(expected, abs=0.1)
    # Logits of thousands, a cross-entropy of 0: what is saturated is not false.
    loud = Masked(plain, after=lambda z: 1e3 * z)
    assert not probes.false_gradient(loud, x, y).any()


@pytest.mark.parametrize("threat", [THREAT, attacks.Threat("l2", 0.5)])
@pytest.mark.parametrize("far", [False, True])
def test_noise_keeps_to_the_ball(threat, far):
    x = torch.full((50, 1, 8, 8), 0.5)
    noisy = probes.noise(x, threat, torch.Generator().manual_seed(0), far=far)
    distance = attacks.distance(noisy.numpy(), x.numpy(), threat.norm)
    assert (distance <= threat.epsilon + 1e-6).all()
    assert (distance > threat.epsilon * (0.99 if far else 0.8)).all()
    # In all directions: of 50 points a pixel's mean is within some standard deviations of 0.
    assert (noisy - x).mean(0).abs().max() < threat.epsilon * {"linf": 0.7, "l2": 0.1}[threat.norm]


def test_square_in_l2_is_not_asked_where_it_cannot_run(rng):
    net = nets.build("fc1-8", shape=(14, 14, 1), n_classes=10, seed=0).eval()
    x = rng.uniform(0, 1, (12, 14, 14, 1)).astype("float32")
    y = net(nets.to_tensor(x)).argmax(1).numpy()
    found = diagnose.diagnose(
        net, x, y, threat=attacks.Threat("l2", 0.05), step_size=0.02, n_steps=3, progress=False,
        parts=("apgd-ce", "square"),
    )  # fmt: skip
    assert found.claimed > 0.2
    asked = {check.name: check.value for check in found.checks}
    assert asked["gradient-free"] is None
    assert found.verdict == "inconclusive"
