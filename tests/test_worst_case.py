"""The worst case of several losses, on kernel machines and their twins in PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from advkip import attacks, bridge, kernels, krr, torch_attacks, worst_case
from advkip.attacks import Threat

THREAT = Threat("linf", 0.22)
BALL = {"threat": THREAT, "step_size": 0.1}


@pytest.fixture
def machine(rng):
    centres = rng.uniform(0, 1, (4, 4, 4, 1))
    y = rng.integers(0, 4, 60)
    x = np.clip(centres[y] + rng.normal(0, 0.2, (60, 4, 4, 1)), 0, 1)
    fitted = krr.fit(kernels.by_name("fc2"), jnp.asarray(x), jnp.eye(4)[y], diag_reg=1e-2)
    return fitted.machine, x, y


def test_is_the_worst_of_its_attacks(machine, monkeypatch):
    """Image by image, whatever is left out because it is broken already."""
    model, x, y = machine
    monkeypatch.setattr(worst_case, "GROUP", 16)
    found = worst_case.withstood(model, x, y, batch_size=25, n_steps=8, **BALL)
    logits = model(jnp.asarray(x))
    expected = np.asarray(logits.argmax(1) == y)
    order = worst_case.rivals(logits, y)
    options = BALL | {"n_steps": 8}
    for loss, aim in [
        ("cross-entropy", None), ("margin", None), *(("targeted", order[:, i]) for i in range(3))
    ]:  # fmt: skip
        attacked = attacks.pgd(model, jnp.asarray(x), y, loss=loss, aim=aim, **options)
        expected = expected & np.asarray(model(attacked).argmax(1) == y)
    np.testing.assert_array_equal(found, expected)
    assert 0.1 < found.mean() < 0.9


def test_twin_in_pytorch(machine):
    model, x, y = machine
    net = bridge.KernelNet(model).double()
    tensors = torch.as_tensor(x).permute(0, 3, 1, 2), torch.as_tensor(y)
    ours = worst_case.withstood(model, x, y, batch_size=100, **BALL)
    theirs = torch_attacks.withstood(net, *tensors, **BALL)
    assert (ours == theirs.numpy()).mean() > 0.98  # rounding may tip one image
    some = torch.arange(60) % 2 == 0
    half = torch_attacks.withstood(net, *tensors, left=some & theirs, **BALL)
    np.testing.assert_array_equal(half.numpy(), (some & theirs).numpy())


def test_sees_through_a_saturated_cross_entropy(machine):
    """Logits times 1e6: the cross-entropy's gradient is 0 in float32, the margin's is not."""
    model, x, y = machine
    with jax.enable_x64(False):
        x = np.asarray(x, "float32")
        model = jax.tree.map(lambda a: jnp.asarray(a, "float32"), model)
        steep = krr.KernelMachine(model.kernel, model.x_support, 1e6 * model.alpha)
        found = worst_case.withstood(steep, x, y, batch_size=100, **BALL)
        plain = worst_case.withstood(model, x, y, batch_size=100, **BALL)
        pgd = attacks.pgd(steep, jnp.asarray(x), y, n_steps=40, **BALL)
        by_pgd = np.asarray((steep(pgd).argmax(1) == y) & (steep(jnp.asarray(x)).argmax(1) == y))
    assert by_pgd.mean() > found.mean() + 0.2
    assert abs(found.mean() - plain.mean()) < 0.05


def test_nothing_to_attack_and_two_classes(rng):
    def logits(x):
        first = x.reshape(len(x), -1)[:, :1]
        return jnp.concatenate([first, 1 - first], 1)

    x = rng.uniform(0.8, 1, (5, 2, 2, 1))
    wrong = worst_case.withstood(logits, x, np.ones(5, int), batch_size=5, **BALL)
    right = worst_case.withstood(logits, x, np.zeros(5, int), batch_size=5, **BALL)
    assert (wrong.any(), right.all()) == (False, True)
    assert worst_case.plans(2) == [("cross-entropy", 0), ("margin", 0), ("targeted", 0)]
