"""FGSM and PGD on torch networks: against closed forms, the JAX twins and cleverhans."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from cleverhans.torch.attacks.fast_gradient_method import fast_gradient_method
from cleverhans.torch.attacks.projected_gradient_descent import projected_gradient_descent

from advkip import attacks, nets, torch_attacks

LINF, L2 = attacks.Threat("linf", 0.1), attacks.Threat("l2", 0.7)


@pytest.fixture
def case():
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = torch.nn.Sequential(
            torch.nn.Flatten(), torch.nn.Linear(48, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4)
        ).eval()
    x = torch.rand(20, 3, 4, 4, generator=generator)
    return net, x, net(x).argmax(1).detach()


def linear_case(dtype=torch.float32):
    """Two classes, logits (0, w x): the margin of class 0 is -w x."""
    generator = torch.Generator().manual_seed(1)
    w = torch.randn(12, generator=generator, dtype=dtype)
    x = 0.5 + 0.02 * torch.randn(6, 3, 2, 2, generator=generator, dtype=dtype)

    def net(x):
        score = x.flatten(1) @ w
        return torch.stack([torch.zeros_like(score), score], 1)

    return net, w, x, torch.zeros(6, dtype=torch.long)


def test_an_l2_ball_of_many_pixels_is_kept():
    """A sum of 150,528 squares in float32 would be off by more than `evaluate.TOLERANCE`."""
    generator = torch.Generator().manual_seed(0)
    x = 0.4 + 0.2 * torch.rand(2, 3, 224, 224, generator=generator)
    w = torch.randn(3 * 224 * 224, generator=generator)

    def net(x):
        score = x.flatten(1) @ w
        return torch.stack([torch.zeros_like(score), score], 1)

    y, threat = torch.zeros(2, dtype=torch.int32), attacks.Threat("l2", 3.0)
    moved = torch_attacks.fgsm(net, x, y, threat=threat, loss="margin") - x
    assert (moved.double().flatten(1).norm(dim=1) - 3).abs().max() < 3e-6


def test_images_and_classes_that_do_not_fit():
    net, _, x, y = linear_case()
    run = {"threat": LINF, "n_steps": 1, "step_size": 0.1}
    for bad in (3 * x, x - 1, x.where(x > 0.5, torch.nan)):
        with pytest.raises(ValueError, match=r"expected pixels in \[0.0, 1.0\], got \["):
            torch_attacks.pgd(net, bad, y, **run)
    with pytest.raises(ValueError, match="expected logits of 3 classes for 'dlr', got 2"):
        torch_attacks.pgd(net, x, y, loss="dlr", **run)
    with pytest.raises(ValueError, match="expected answers with a gradient in the images"):
        torch_attacks.pgd(lambda x: net(x).detach(), x, y, **run)
    layer = torch.nn.Linear(12, 2)
    with pytest.raises(ValueError, match="expected answers with a gradient in the images"):
        torch_attacks.pgd(lambda x: layer(x.detach().flatten(1)), x, y, **run)


def test_linear_model_reaches_the_closed_form():
    """Away from the pixel range's border the optimum is epsilon sign(w), or epsilon w / |w|."""
    net, w, x, y = linear_case()
    shaped = w.view(1, 3, 2, 2)
    best = {"linf": 0.1 * shaped.sign(), "l2": 0.3 * shaped / w.norm()}
    for threat in (LINF, attacks.Threat("l2", 0.3)):
        # From a random start on the sphere the angle to w shrinks by about a fifth each step.
        for n_steps, restarts, seed in ((5, 1, None), (60, 1, 2), (60, 3, 2)):
            found = torch_attacks.pgd(
                net, x, y, threat=threat, n_steps=n_steps, step_size=threat.epsilon / 4,
                n_restarts=restarts,
                generator=None if seed is None else torch.Generator().manual_seed(seed),
            )  # fmt: skip
            torch.testing.assert_close(found - x, best[threat.norm].expand_as(x), atol=1e-4, rtol=0)
    torch.testing.assert_close(
        torch_attacks.fgsm(net, x, y, threat=LINF), x + best["linf"], atol=1e-6, rtol=0
    )


@pytest.mark.parametrize("threat", [LINF, L2], ids=["linf", "l2"])
def test_equal_to_cleverhans(case, threat):
    net, x, y = case
    norm = np.inf if threat.norm == "linf" else 2
    ours = torch_attacks.fgsm(net, x, y, threat=threat)
    theirs = fast_gradient_method(
        net, x, threat.epsilon, norm, clip_min=0, clip_max=1, y=y, sanity_checks=False
    )
    torch.testing.assert_close(ours, theirs.detach(), atol=1e-5, rtol=0)
    if threat.norm == "l2":
        # Theirs clips to the range before it projects onto the ball, so keep away from the range.
        x, threat = 0.4 + 0.2 * x, attacks.Threat("l2", 0.3)
    ours = torch_attacks.pgd(net, x, y, threat=threat, n_steps=8, step_size=threat.epsilon / 3)
    theirs = projected_gradient_descent(
        net, x, threat.epsilon, threat.epsilon / 3, 8, norm, clip_min=0, clip_max=1, y=y,
        rand_init=False, sanity_checks=False,
    )  # fmt: skip
    torch.testing.assert_close(ours, theirs.detach(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("threat", [LINF, L2], ids=["linf", "l2"])
@pytest.mark.parametrize("loss", ["cross-entropy", "mse"])
def test_equal_to_the_jax_twin(threat, loss):
    net, w, x, _ = linear_case(torch.float64)
    y = torch.tensor([[0.7, 0.3]] * 6, dtype=torch.float64)

    def twin(x):  # its images have the channels last
        score = jnp.moveaxis(x, 3, 1).reshape(len(x), -1) @ jnp.asarray(w)
        return jnp.stack([0 * score, score], 1)

    settings = {"threat": threat, "n_steps": 5, "step_size": threat.epsilon / 3, "loss": loss}
    ours = torch_attacks.pgd(net, x, y, **settings)
    expected = attacks.pgd(twin, np.moveaxis(x.numpy(), 1, 3), np.asarray(y), **settings)
    np.testing.assert_allclose(nets.to_array(ours), expected, atol=1e-12)


@pytest.mark.parametrize("threat", [LINF, L2], ids=["linf", "l2"])
def test_stays_in_the_ball_and_the_range(case, threat):
    net, x, y = case
    generator = torch.Generator().manual_seed(3)
    attacked = torch_attacks.pgd(
        net, x, y, threat=threat, n_steps=6, step_size=threat.epsilon, n_restarts=2,
        generator=generator,
    )  # fmt: skip
    assert torch_attacks.distance(attacked, x, threat.norm).max() <= threat.epsilon + 1e-6
    assert attacked.min() >= 0
    assert attacked.max() <= 1
    assert not attacked.requires_grad
    same = torch_attacks.pgd(
        net, x, y, threat=attacks.Threat(threat.norm, 0.0), n_steps=3, step_size=0.1
    )
    torch.testing.assert_close(same, x)


def test_restarts_keep_the_worst_and_not_the_last(case):
    net, x, _ = case
    y = torch.arange(20) % 4
    settings = {"threat": LINF, "n_steps": 2, "step_size": 0.03}

    def losses(n_restarts):
        attacked = torch_attacks.pgd(
            net, x, y, n_restarts=n_restarts, generator=torch.Generator().manual_seed(4), **settings
        )
        logits = net(attacked).detach()
        return logits.argmax(1) != y, torch_attacks.cross_entropy(logits, y)

    before = losses(2)
    for n_restarts in (4, 8):
        wrong, value = losses(n_restarts)  # the first restarts are the same
        assert (wrong >= before[0]).all()
        assert (value >= before[1])[wrong == before[0]].all()
        before = wrong, value


def test_margin_and_dlr():
    logits = torch.tensor([[5.0, 1.0, 3.0, 0.0], [0.0, 2.0, -1.0, -6.0]])
    y = torch.tensor([0, 3])
    torch.testing.assert_close(torch_attacks.margin(logits, y), torch.tensor([-2.0, 8.0]))
    # over the gap from the largest to the third: 5 - 1 and 2 - (-1)
    torch.testing.assert_close(torch_attacks.dlr(logits, y), torch.tensor([-2 / 4, 8 / 3]))
    torch.testing.assert_close(torch_attacks.dlr(1e3 * logits, y), torch_attacks.dlr(logits, y))


def test_log_odds_are_the_cross_entropy_without_rounding():
    logits = torch.tensor([[5.0, 1.0, 3.0, 0.0], [0.0, 2.0, -1.0, -6.0]], dtype=torch.float64)
    y = torch.tensor([0, 3])
    p = logits.softmax(1)[torch.arange(2), y]
    odds = torch_attacks.log_odds(logits, y)
    torch.testing.assert_close(odds, ((1 - p) / p).log())
    torch.testing.assert_close(torch_attacks.cross_entropy(logits, y), odds.exp().log1p())

    def directions(logits, dtype):
        z = logits.to(dtype).requires_grad_()
        for loss in (torch_attacks.cross_entropy, torch_attacks.log_odds):
            (gradient,) = torch.autograd.grad(loss(z, y).sum(), z)
            yield gradient.double() / gradient.double().norm(dim=1, keepdim=True)

    for one in directions(logits, torch.float64):
        torch.testing.assert_close(one, next(directions(logits, torch.float64)))
    for gap, right in ((15, True), (18, False), (100, False)):
        z = torch.zeros(2, 4).scatter(1, y[:, None], gap + torch.tensor(3.0).log().item())
        rounded, exact = directions(z, torch.float32)
        torch.testing.assert_close(exact[0], torch.tensor([-3, 1.0, 1, 1]).double() / 12**0.5)
        assert (rounded[0, 0] != 0) == right  # beyond -ROUNDED the right class has no share
        assert (rounded[0, 1:] > 0).all()
    z = torch.zeros(2, 4).scatter(1, y[:, None], 105.0).requires_grad_()
    (lost,) = torch.autograd.grad(torch_attacks.cross_entropy(z, y).sum(), z)
    assert (lost == 0).all()
    assert 16 < torch_attacks.ROUNDED < 18 < 100 < torch_attacks.LOST < 105


def test_saturated_logits_stop_cross_entropy_and_not_the_margin(case):
    net, x, _ = case
    with torch.no_grad():
        y = net(x).argmax(1)
    right = torch.ones(20, dtype=torch.bool)

    def loud(x):
        return 1e6 * net(x)

    for loss, wrong in (("cross-entropy", False), ("margin", True), ("dlr", True)):
        attacked = torch_attacks.pgd(
            loud, x, y, threat=attacks.Threat("linf", 0.5), n_steps=10, step_size=0.1, loss=loss
        )
        still = net(attacked).argmax(1) == y
        assert (still.float().mean() < 0.2) if wrong else torch.equal(still, right)


def test_ascent_ends_where_pgd_ends(case):
    net, x, y = case
    points = list(torch_attacks.ascent(net, x, x, y, LINF, 4, 0.03))
    assert len(points) == 4
    expected = torch_attacks.pgd(net, x, y, threat=LINF, n_steps=4, step_size=0.03)
    torch.testing.assert_close(points[-1], expected)
    assert (points[0] - x).abs().max() <= 0.03 + 1e-6


def test_bad_input(case):
    net, x, y = case
    with pytest.raises(ValueError, match="expected n_steps >= 0"):
        torch_attacks.pgd(net, x, y, threat=LINF, n_steps=-1, step_size=0.1)
    with pytest.raises(ValueError, match="expected loss in"):
        torch_attacks.pgd(net, x, y, threat=LINF, n_steps=1, step_size=0.1, loss="hinge")
    with pytest.raises(ValueError, match="expected a generator for random restarts"):
        torch_attacks.pgd(net, x, y, threat=LINF, n_steps=1, step_size=0.1, n_restarts=2)
