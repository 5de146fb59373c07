"""Worst case of each image, on machines and networks; attacks that leave the ball are caught."""

import numpy as np
import pytest
import torch

from advkip import (
    attacks,
    data,
    distill,
    evaluate,
    hard_label,
    kernels,
    krr,
    nets,
    torch_attacks,
    training,
)
from tests.sections import experiment

THREAT = attacks.Threat("linf", 0.15)
ATTACKS = ["fgsm", "pgd5", "pgd20"]


@pytest.fixture(scope="module")
def case():
    e = experiment(support__n_support=100, dataset__n_test=120)
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


def test_a_radius_of_zero_changes_nothing(case):
    outcomes = measure(case, threat=attacks.Threat("linf", 0.0), step_size=0.0)
    assert len({o.accuracy for o in outcomes}) == 1


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
    for name in ("cw", "pgd", "pgd0", "pgd10x0", "apgd", "autoattack-linf"):
        with pytest.raises(ValueError, match=f"expected attacks 'fgsm', .* got '{name}'"):
            measure(case, attack_names=[name])
    with pytest.raises(ValueError, match="expected one integer label an image"):
        measure((machine, x, y[:-1]))
    with pytest.raises(ValueError, match="pass argmax of one-hot labels"):
        measure((machine, x, np.eye(10)[y]))
    with pytest.raises(ValueError, match="without standardisation"):
        measure((machine, 2 * x - 1, y))
    broken = krr.KernelMachine(machine.kernel, machine.x_support, machine.alpha * np.nan)
    with pytest.raises(FloatingPointError, match="expected finite logits on clean images"):
        measure((broken, x, y))


# Networks


@pytest.fixture(scope="module")
def net_case():
    """A network trained for robustness, so that attacks have something to do, and test images."""
    d = data.load("digits")
    recipe = training.Recipe(
        epochs=8, learning_rate=3e-3, threat=THREAT, step_size=0.05, batch_size=32, eval_every=8,
        eval_pgd_steps=2, adversarial_steps=3,
    )  # fmt: skip
    net = nets.build("fc2-128", shape=(8, 8, 1), n_classes=10, seed=0)
    watched = training.Watched(d.x_train[800:850], d.y_train[800:850])
    training.train(
        net, d.x_train[:800], d.y_train[:800], recipe=recipe, watched=watched, progress=False
    )
    return net, d.x_test[:60], d.y_test[:60]


L2 = {"threat_l2": attacks.Threat("l2", 0.8), "step_size_l2": 0.2}


def test_attacks_on_a_network_accumulate_in_each_ball(net_case):
    names = ["fgsm", "pgd10", "pgd10x3", "fgsm-l2", "pgd10-l2"]
    outcomes = measure(net_case, attack_names=names, keep=2, **L2)
    assert [o.attack for o in outcomes] == ["clean", *names]
    clean, fgsm, pgd, restarts, fgsm_l2, pgd_l2 = outcomes
    assert clean.accuracy > 0.8
    assert clean.accuracy > fgsm.accuracy >= pgd.accuracy >= restarts.accuracy > 0
    assert clean.accuracy > fgsm_l2.accuracy >= pgd_l2.accuracy
    assert not (pgd_l2.robust & ~fgsm_l2.robust).any()
    assert (pgd_l2.norm, pgd_l2.epsilon) == ("l2", 0.8)
    assert pgd_l2.x_attacked.shape == (2, 8, 8, 1)
    net, x, y = net_case
    with torch.no_grad():
        expected = (net(nets.to_tensor(x)).argmax(1).numpy() == y).mean()
    assert clean.accuracy == pytest.approx(expected)
    again = measure(net_case, attack_names=names, **L2)
    assert [o.accuracy for o in again] == [o.accuracy for o in outcomes]  # seeds are fixed
    parts = measure(net_case, attack_names=names[:2], batch_size=7)
    assert [o.accuracy for o in parts] == [o.accuracy for o in outcomes[:3]]


def test_autoattack_is_the_official_one(net_case):
    from pyautoattack import AutoAttack

    net, x, y = net_case[0], net_case[1][:24], net_case[2][:24]
    official = AutoAttack(net, norm="Linf", eps=THREAT.epsilon, seed=3, version="standard")
    official.verbose = False
    images = nets.to_tensor(x)
    attacked, labels = official.run_standard_evaluation(images, torch.as_tensor(y), batch_size=24)
    names = ["pgd10", "autoattack"]
    outcomes = measure((net, x, y), attack_names=names, seed=3, keep=24, batch_size=24)
    np.testing.assert_allclose(outcomes[2].x_attacked, nets.to_array(attacked), atol=1e-6)
    np.testing.assert_array_equal(outcomes[2].right, labels.numpy() == y)
    clean, pgd, auto = (o.accuracy for o in outcomes)
    assert 0 < auto <= pgd < clean
    (only,) = measure((net, x, y), attack_names=["apgd-ce"], seed=3)[1:]
    assert only.attack == "apgd-ce"
    assert only.accuracy >= auto


class Viewed(torch.nn.Module):
    """A linear network of the kind that needs its images to be contiguous."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(8 * 8 * 3, 10)

    def forward(self, x):
        return self.layer(x.view(len(x), -1))


@pytest.mark.parametrize("name", ["simple-cnn", "viewed"])
def test_autoattack_on_colour_images(name, rng):
    """Networks whose gradient has its channels last in memory, and those that `view` images."""
    torch.manual_seed(0)
    net = Viewed() if name == "viewed" else nets.build(name, shape=(8, 8, 3), n_classes=10, seed=0)
    x = rng.random((6, 8, 8, 3)).astype("float32")
    y = net.eval()(nets.to_tensor(x)).argmax(1).numpy()
    small = {"threat": attacks.Threat("linf", 1e-3), "step_size": 5e-4}
    clean, pgd, auto = measure((net, x, y), attack_names=["pgd5", "autoattack"], **small)
    assert 0 < auto.accuracy <= pgd.accuracy <= clean.accuracy == 1  # so every part of it ran


def test_autoattack_on_a_kernel_machine_and_in_the_l2_ball(case):
    machine, x, y = case
    outcomes = measure(
        (machine, x[:12], y[:12]), attack_names=["pgd10", "apgd-ce", "pgd10-l2", "apgd-ce-l2"], **L2
    )
    clean, pgd, apgd, pgd_l2, apgd_l2 = (o.accuracy_alone for o in outcomes)
    one_image = 1 / 12  # of another random start
    assert apgd <= pgd + one_image < clean
    assert apgd_l2 <= pgd_l2 + one_image < clean
    assert outcomes[4].norm == "l2"


class Detached(torch.nn.Module):
    """The identity, with a gradient of 0."""

    def forward(self, x):
        return x.detach() + 0 * x


def test_an_evaluation_continues_where_it_was_cut_off(net_case, tmp_path, monkeypatch):
    names = ["fgsm", "pgd5", "pgd10x2"]
    whole = measure(net_case, attack_names=names, batch_size=20)
    plain, calls = torch_attacks.pgd, []

    def cut_off(*arguments, **options):
        calls.append(options["n_steps"])
        if len(calls) == 5:  # in the second batch of the second attack
            raise KeyboardInterrupt
        return plain(*arguments, **options)

    monkeypatch.setattr(torch_attacks, "pgd", cut_off)
    settings = {"attack_names": names, "batch_size": 20, "checkpoint_dir": tmp_path}
    with pytest.raises(KeyboardInterrupt):
        measure(net_case, **settings)
    calls[:] = [0] * 5
    resumed = measure(net_case, **settings)
    assert calls[5:] == [5, 5, 10, 10, 10]
    for one, other in zip(resumed, whole, strict=True):
        np.testing.assert_array_equal(one.robust, other.robust)
    calls[:] = [0] * 5
    measure(net_case, **settings)
    assert len(calls) == 5
    # Another model, other images or another radius are other evaluations.
    measure(net_case, **{**settings, "threat": attacks.Threat("linf", 0.1)})
    assert len(calls) == 5 + 9
    # A model that gives the same logits and other gradients is another model.
    masked = torch.nn.Sequential(Detached(), net_case[0]).eval()
    found = measure((masked, *net_case[1:]), **settings)
    assert found[-1].accuracy > whole[-1].accuracy
    # So is one that only other images than these tell apart: rounding to the pixels they have.
    fine, coarse = (torch.nn.Sequential(Rounded(k), net_case[0]).eval() for k in (240, 16))
    assert (fine(nets.to_tensor(net_case[1])) == coarse(nets.to_tensor(net_case[1]))).all()
    accuracies = [measure((net, *net_case[1:]), **settings)[-1].accuracy for net in (fine, coarse)]
    assert accuracies[0] != accuracies[1]
    for path in tmp_path.glob("attacks-*.npz"):
        path.write_bytes(b"damaged")
    with pytest.raises(ValueError, match="expected a checkpoint in"):
        measure(net_case, **settings)


def test_planted_faults_of_network_attacks_are_caught(net_case, monkeypatch):
    """A radius that is too large; restarts that keep the last instead of the worst."""
    plain = torch_attacks.pgd

    def too_far(net, x, y, *, threat, **options):
        return plain(net, x, y, threat=attacks.Threat("linf", 2 * threat.epsilon), **options)

    monkeypatch.setattr(torch_attacks, "pgd", too_far)
    with pytest.raises(FloatingPointError, match="expected pgd5 to stay within 0.15"):
        measure(net_case, attack_names=["pgd5"])

    def last(net, x, y, *, n_restarts, generator, **options):
        for _ in range(n_restarts):
            found = plain(net, x, y, generator=generator, **options)
        return found

    def keeps_the_worst(pgd):
        net, x, y = net_case[0], nets.to_tensor(net_case[1]), torch.as_tensor(net_case[2])

        def losses(n_restarts):
            generator = torch.Generator().manual_seed(0)
            attacked = pgd(
                net, x, y, threat=THREAT, n_steps=1, step_size=0.1, n_restarts=n_restarts,
                generator=generator,
            )  # fmt: skip
            logits = net(attacked).detach()
            return logits.argmax(1) != y, torch_attacks.cross_entropy(logits, y)

        (few, few_losses), (many, many_losses) = losses(2), losses(6)
        return bool((many >= few).all() and (many_losses >= few_losses)[many == few].all())

    assert keeps_the_worst(plain)
    assert not keeps_the_worst(last)


def test_a_radius_that_is_too_small_is_seen_against_the_closed_form():
    """On a linear model accuracy under attack is known: margins beyond epsilon |w|_1 survive."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(10, 16, generator=generator)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 10, bias=False)).eval()
    with torch.no_grad():
        net[1].weight.copy_(w)
    x = 0.5 + 0.6 * (torch.rand(200, 4, 4, 1, generator=generator) - 0.5)
    y = net(x).argmax(1)
    threat = attacks.Threat("linf", 0.05)
    z = net(x).detach()
    gaps = (w[y][:, None] - w[None]).abs().sum(2) * threat.epsilon  # the largest change of a margin
    margins = z.gather(1, y[:, None]) - z
    margins[torch.arange(200), y] = 1.0
    expected = float((margins > gaps).all(1).float().mean())

    def measured(radius):
        outcomes = evaluate.evaluate(
            net, x.numpy(), y.numpy(), threat=attacks.Threat("linf", radius), step_size=radius / 4,
            attack_names=["pgd40x3", "apgd-t"], progress=False,
        )  # fmt: skip
        return outcomes[-1].accuracy

    assert 0.05 < expected < 0.95
    assert measured(threat.epsilon) == pytest.approx(expected, abs=0.011)
    assert measured(threat.epsilon / 4) > expected + 0.05  # planted: standardised pixels


def test_networks_and_labels_of_other_dtypes(net_case):
    net, x, y = net_case
    names = {"attack_names": ["fgsm", "pgd5", "autoattack"]}
    expected = measure(net_case, **names)
    double = nets.build("fc2-128", shape=(8, 8, 1), n_classes=10, seed=0).double().eval()
    double.load_state_dict(net.state_dict())
    found = measure((double, x.astype("float64"), y.astype("int16")), **names)
    for one, other in zip(found, expected, strict=True):
        assert one.accuracy == pytest.approx(other.accuracy, abs=0.02)  # one image of 60


def test_the_order_of_accuracies_is_checked(net_case):
    outcomes = measure(net_case, attack_names=["fgsm", "pgd10"])
    evaluate.check_order(outcomes)
    wrong = [*outcomes[:2], outcomes[2]._replace(accuracy=outcomes[1].accuracy + 0.01)]
    with pytest.raises(ValueError, match="take the worst case per image"):
        evaluate.check_order(wrong)
    flipped = outcomes[2]._replace(robust=~outcomes[1].robust, accuracy=0.0)
    with pytest.raises(ValueError, match="expected accuracy under pgd10 to be at most"):
        evaluate.check_order([*outcomes[:2], flipped])


class Rounded(torch.nn.Module):
    """Pixels rounded to n levels, with the gradient of pixels that are not."""

    def __init__(self, n):
        super().__init__()
        self.rounded = lambda x: x + ((n * x).round() / n - x).detach()

    def forward(self, x):
        return self.rounded(x)


class InPlace(torch.nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x.sub_(0.1))


class ByDLPack(torch.nn.Module):
    def forward(self, x):
        return torch.from_numpy(np.from_dlpack(x).reshape(len(x), -1)[:, :10].copy())


def test_the_gradient_of_networks_as_they_come(net_case):
    """One that changes its input in place has one; one that leaves PyTorch has none to see."""
    net, x, _ = net_case
    moved = evaluate.judged(InPlace(net).eval()).gradient(x[:4])
    np.testing.assert_allclose(moved, evaluate.judged(net).gradient(x[:4] - 0.1), rtol=1e-5)
    assert evaluate.judged(ByDLPack().eval()).gradient(x[:4]).size == 0


class Constant(torch.nn.Module):
    """Given logits, whatever the image."""

    def __init__(self, logits):
        super().__init__()
        self.register_buffer("row", torch.as_tensor(logits, dtype=torch.float32))
        self.eval()

    def forward(self, x):
        return self.row.expand(len(x), -1) + 0 * x.flatten(1).sum(1, keepdim=True)


def test_pytorchs_default_dtype_changes_nothing(net_case):
    net, x, y = net_case
    few = net, x[:6], y[:6]
    names = ["pgd3", "apgd-ce", "square"]
    expected = [one.right.tolist() for one in measure(few, attack_names=names)]
    torch.set_default_dtype(torch.float64)
    try:
        assert [one.right.tolist() for one in measure(few, attack_names=names)] == expected
        assert torch.get_default_dtype() == torch.float64
        copy = hard_label.imitate(net, nets.to_tensor(x[:6]), THREAT, seed=0)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {weights.dtype for weights in copy.parameters()} == {torch.float32}


def test_refused_models_and_numbers(net_case):
    net, x, y = net_case
    with pytest.raises(ValueError, match="call net.eval()"):
        measure((nets.build("simple-cnn", shape=(8, 8, 1), n_classes=10, seed=0), x, y))
    with pytest.raises(ValueError, match="remove the softmax"):
        measure((torch.nn.Sequential(net, torch.nn.Softmax(1)).eval(), x, y))
    with pytest.raises(ValueError, match=r"expected a krr.KernelMachine or a torch.nn.Module"):
        measure((lambda x: x, x, y))
    with pytest.raises(ValueError, match=r"pass 8/255 for what is sometimes written 8"):
        measure(net_case, threat=attacks.Threat("linf", 8.0))
    with pytest.raises(ValueError, match="expected an l2 radius of at most 8.0"):
        measure(net_case, threat=attacks.Threat("l2", 128.0))
    with pytest.raises(ValueError, match="expected attacks of one l2 ball, got 'pgd5-l2'"):
        measure(net_case, threat=L2["threat_l2"], attack_names=["pgd5-l2"], **L2)
    with pytest.raises(ValueError, match=r"expected a step size in \[0, 0.3\] for 'pgd5'"):
        measure(net_case, attack_names=["pgd5"], step_size=2.0)
    with pytest.raises(ValueError, match="expected threat_l2 for 'pgd5-l2'"):
        measure(net_case, attack_names=["pgd5-l2"])
    with pytest.raises(ValueError, match="expected step_size_l2 for 'pgd5-l2'"):
        measure(net_case, attack_names=["pgd5-l2"], threat_l2=L2["threat_l2"])
    with pytest.raises(ValueError, match="without standardisation and without NaN"):
        measure((net, np.where(x > 0.9, np.nan, x), y))
    with pytest.raises(FloatingPointError, match="expected finite logits on clean images"):
        measure((Constant([0.0, float("nan"), *[0.0] * 8]), x, y))
    with pytest.raises(ValueError, match=r"expected logits \(n, classes\) for labels 0 to 9"):
        measure((Constant([1.0, 2.0, 3.0]), x, y))
    with pytest.raises(ValueError, match="expected 4 classes or more for 'autoattack'"):
        measure((Constant([1.0, 2.0, 3.0]), x, y % 3), attack_names=["autoattack"])
    with pytest.raises(ValueError, match=r"expected step_size for 'pgd5', got None"):
        measure(net_case, attack_names=["pgd5"], step_size=None)
    with pytest.raises(ValueError, match=r"expected a list of attack_names, got 'pgd5'; pass"):
        measure(net_case, attack_names="pgd5")
    for size in (0, 1):
        flat = torch.nn.Sequential(net, torch.nn.Softmax(1)).eval()
        with pytest.raises(ValueError, match="expected logits, got rows that are probabilities"):
            measure((flat, x, y), batch_size=size)
    wide = attacks.Threat("linf", 0.1, 0.0, 2.0)
    with pytest.raises(ValueError, match=r"expected pixels in the range \[0, 1\], got a threat in"):
        measure(net_case, threat=wide, attack_names=["square"])
    wide = attacks.Threat("l2", 0.1, 0.0, 2.0)
    with pytest.raises(ValueError, match=r"expected pixels in the range \[0, 1\], got a threat in"):
        measure(net_case, threat_l2=wide, attack_names=["fgsm-l2"])
