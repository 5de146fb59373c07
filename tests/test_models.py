"""Networks as they come: in place, in half precision, with answers that are no logits."""

import copy
import sys

import numpy as np
import pytest
import torch

from advkip import attacks, data, evaluate, models, nets, training


@pytest.fixture(scope="module")
def digit_net():
    d = data.load("digits")
    recipe = training.Recipe(
        epochs=12, learning_rate=3e-3, threat=attacks.Threat("linf", 0.1), step_size=0.05,
        batch_size=32, eval_every=12, eval_pgd_steps=1,
    )  # fmt: skip
    watched = training.Watched(d.x_train[800:850], d.y_train[800:850])
    net = nets.build("fc1-64", shape=(8, 8, 1), n_classes=10, seed=0)
    return training.train(
        net, d.x_train[:800], d.y_train[:800], recipe=recipe, watched=watched, progress=False
    ).net


class Behind(torch.nn.Module):
    """A network between two functions."""

    def __init__(self, net, first=None, last=None):
        super().__init__()
        self.net = net
        self.first, self.last = first or (lambda x: x), last or (lambda z: z)
        self.eval()

    def forward(self, x):
        return self.last(self.net(self.first(x)))


def measure(net, attack_names=("fgsm", "pgd3"), n=30, **options):
    d = data.load("digits")
    found = evaluate.evaluate(
        net, d.x_test[:n], d.y_test[:n], threat=attacks.Threat("linf", 0.1), step_size=0.05,
        attack_names=list(attack_names), progress=False, **options,
    )  # fmt: skip
    return {one.attack: one.accuracy for one in found}


@pytest.mark.parametrize("names", [("fgsm", "pgd3"), ("square",)])
def test_a_network_that_changes_its_input_in_place_spoils_nothing(digit_net, names):
    d = data.load("digits")
    before = d.x_test[:30].copy()
    good = measure(Behind(digit_net, lambda x: (x - 0.3) / 0.4), names)
    bad = measure(Behind(digit_net, lambda x: x.sub_(0.3).div_(0.4)), names)
    assert good == bad
    np.testing.assert_array_equal(data.load("digits").x_test[:30], before)
    x = d.x_test[:30].copy()
    evaluate.evaluate(
        Behind(digit_net, lambda x: x.zero_()), x, d.y_test[:30], step_size=0.05,
        threat=attacks.Threat("linf", 0.1), attack_names=[], progress=False,
    )  # fmt: skip
    np.testing.assert_array_equal(x, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_networks_in_half_precision(digit_net, dtype, tmp_path):
    half = copy.deepcopy(digit_net).to(dtype)
    expected = measure(digit_net)
    found = measure(half, checkpoint_dir=tmp_path)
    assert found == pytest.approx(expected, abs=0.1)
    x = nets.to_tensor(data.load("digits").x_test[:3])
    assert nets.Logits(half)(x).dtype == torch.float32


def test_answers_that_depend_on_the_batch_are_refused(digit_net):
    own = torch.nn.Sequential(digit_net, torch.nn.BatchNorm1d(10, track_running_stats=False))
    with pytest.raises(ValueError, match="depends on it alone, got others in another batch"):
        measure(own.eval())
    with pytest.raises(ValueError, match="depends on it alone"):
        measure(Behind(digit_net, last=lambda z: z + z.mean(0) * torch.arange(10)))
    for n in (1, 2, 3):
        assert set(measure(digit_net, n=n)) == {"clean", "fgsm", "pgd3"}
    running = torch.nn.Sequential(digit_net, torch.nn.BatchNorm1d(10)).eval()
    assert measure(running)["clean"] == measure(digit_net)["clean"]
    noisy = Behind(digit_net, last=lambda z: z + torch.randn_like(z))
    measure(noisy)  # random for another reason, which `diagnose` finds


@pytest.mark.parametrize(
    ("last", "message"),
    [
        (lambda z: z.softmax(1), "rows that are probabilities"),
        (lambda z: z.softmax(1).half(), "rows that are probabilities"),
        (lambda z: 100 * z.softmax(1), "rows that are probabilities"),
        (lambda z: z.sigmoid(), "sigmoids or probabilities"),
        (lambda z: z.softmax(1)[:, :-1].repeat(1, 2), "sigmoids or probabilities"),
        (lambda z: z[:, :1], "one logit a class, two or more"),
        (lambda z: (z, z), "one tensor of float logits, got tuple"),
        (lambda z: {"logits": z}, "one tensor of float logits, got dict"),
        (lambda z: z.argmax(1), "one tensor of float logits, got torch.int64"),
    ],
)
def test_outputs_that_are_no_logits_are_refused(digit_net, last, message):
    with pytest.raises(ValueError, match=message):
        measure(Behind(digit_net, last=last))


def test_logits_of_every_kind_pass(digit_net):
    expected = measure(digit_net)["clean"]
    for last in (lambda z: z.log_softmax(1), lambda z: z - z.mean(1, keepdim=True), torch.relu):
        assert measure(Behind(digit_net, last=last))["clean"] == pytest.approx(expected, abs=0.1)
    with pytest.raises(FloatingPointError, match="got -inf; pass a model whose impossible"):
        measure(Behind(digit_net, last=lambda z: z.masked_fill(z < 0, -torch.inf)))


def test_in_inference_mode_and_without_gradients(digit_net):
    expected = measure(digit_net)
    with torch.inference_mode():
        assert measure(digit_net) == expected
    with torch.no_grad():
        assert measure(digit_net) == expected

    class Requires(Behind):
        def forward(self, x):
            with torch.enable_grad():
                return self.net(x.requires_grad_() if x.is_leaf else x)

    assert measure(Requires(digit_net))["clean"] == expected["clean"]


def test_square_in_l2_is_refused_where_it_would_crash(digit_net, rng):
    """Against the official code itself: `square_tiles` says where its start runs over the edge."""
    from pyautoattack.square import SquareAttack

    for shape in [(h, h) for h in range(5, 33)] + [(28, 25), (24, 32), (32, 24)]:
        x = torch.rand(1, 1, *shape)
        attack = SquareAttack(lambda x: x.flatten(1)[:, :3], norm="L2", eps=0.5, n_queries=1,
                              device="cpu")  # fmt: skip
        attack.init_hyperparam(x)
        try:
            attack.attack_single_run(x, torch.tensor([0]))
            fits = True
        except AssertionError:  # further on, of this stand-in for a network
            fits = True
        except RuntimeError:
            fits = False
        assert evaluate.square_tiles(shape) == fits, shape
    x = rng.uniform(0, 1, (2, 14, 14, 1)).astype("float32")
    net = nets.build("fc1-8", shape=(14, 14, 1), n_classes=10, seed=0).eval()
    with pytest.raises(ValueError, match="images that Square can tile .* got 14 x 14"):
        evaluate.evaluate(
            net, x, np.zeros(2, int), threat=attacks.Threat("l2", 0.5), step_size=0.1,
            attack_names=["pgd2", "autoattack"], progress=False,
        )  # fmt: skip


def test_autoattack_ends_no_debugger(digit_net):
    def trace(*arguments):
        return None

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        measure(digit_net, attack_names=["apgd-ce"])
        assert sys.gettrace() is trace
    finally:
        sys.settrace(before)


@pytest.mark.parametrize(("width", "cpu"), [(64, 100), (1200, 500)])
def test_networks_of_many_weights_get_larger_batches(width, cpu):
    """Reading the weights is what a pass over few images takes, so it is done for more of them."""
    net = nets.build(f"fc3-{width}", shape=(32, 32, 3), n_classes=10, seed=0).eval()
    expected = cpu if nets.device().type == "cpu" else 500
    assert models.judged(net).batch_size == nets.batch_size(net) == expected
    assert models.judged(net, batch_size=7).batch_size == 7
    assert models.judged(net, shape=(32, 32, 3)).batch_size == expected
    assert models.judged(net, shape=(64, 64, 3)).batch_size == expected // 4
    assert models.judged(net, shape=(4000, 4000, 3)).batch_size == 1
