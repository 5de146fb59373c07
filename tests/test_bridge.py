"""A kernel machine as a torch module: JAX's values and gradients, whatever the batch."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from advkip import attacks, bridge, data, evaluate, kernels, krr, losses, nets, torch_attacks


@pytest.fixture(scope="module")
def case():
    d = data.load("digits")
    x, labels = jnp.asarray(d.x_train[:150]), data.one_hot(d.y_train[:150], 10, center=True)
    machine = krr.fit(kernels.by_name("fc3"), x, labels).machine
    return machine, d.x_test[:70], d.y_test[:70]


@pytest.mark.parametrize("n", [1, 2, 33, 70])
def test_values_and_gradients_equal_jax(case, n):
    machine, x, y = case
    assert_equal_to_jax(machine, x[:n], y[:n], batch_size=32)


def assert_equal_to_jax(machine, x, y, **settings):
    """Logits and loss gradients through the bridge are JAX's."""
    net = bridge.KernelNet(machine, **settings)
    labels = torch.as_tensor(y).to(nets.device())
    _, gradient, logits = torch_attacks.input_gradient(net, nets.to_tensor(x), labels)
    assert gradient.dtype == torch.float32
    np.testing.assert_allclose(nets.to_numpy(logits), machine(jnp.asarray(x)), rtol=1e-4, atol=1e-5)

    def loss(x):
        return losses.cross_entropy(machine(x), jax.nn.one_hot(y, 10, dtype=x.dtype)).sum()

    expected = np.asarray(jax.grad(loss)(jnp.asarray(x)))
    scale = np.abs(expected).max()
    np.testing.assert_allclose(nets.to_array(gradient), expected, atol=1e-5 * scale)


def test_real_mnist(shared_data):
    splits = data.load("mnist", shared_data)
    x, x_test = (a[:300].astype("float32") / 255 for a in (splits.x_train, splits.x_test))
    y, y_test = (a[:300].astype("int64") for a in (splits.y_train, splits.y_test))
    machine = krr.fit(kernels.by_name("fc3"), x, data.one_hot(y, 10, center=True)).machine
    assert_equal_to_jax(machine, x_test, y_test)
    clean, pgd, strong = evaluate.evaluate(
        machine, x_test[:24], y_test[:24], threat=attacks.Threat("linf", 0.03), step_size=0.01,
        attack_names=["pgd10", "autoattack"], progress=False,
    )  # fmt: skip
    assert clean.accuracy > pgd.accuracy >= strong.accuracy > 0


def test_pgd_through_the_bridge_is_pgd_in_jax(case):
    machine, x, y = case
    threat = attacks.Threat("linf", 0.15)
    settings = {"threat": threat, "n_steps": 5, "step_size": 0.04}
    ours = attacks.pgd(machine, x, y, **settings)
    net = bridge.KernelNet(machine)
    labels = torch.as_tensor(y).to(nets.device())
    theirs = torch_attacks.pgd(net, nets.to_tensor(x), labels, **settings)
    # A gradient that is almost 0 may have either sign: a few pixels differ by whole steps.
    differ = np.abs(nets.to_array(theirs) - np.asarray(ours)) > 1e-5
    assert differ.mean() < 1e-3


def test_double_precision_machines_take_single_precision_images(case):
    machine, x, _ = case
    double = krr.fit(
        machine.kernel, jnp.asarray(machine.x_support, "float64"),
        jnp.asarray(data.one_hot(np.arange(150) % 10, 10), "float64"),
    ).machine  # fmt: skip
    net = bridge.KernelNet(double)
    images = nets.to_tensor(x[:5]).requires_grad_()
    found = net(images)
    assert found.dtype == torch.float32
    (gradient,) = torch.autograd.grad(found.sum(), images)
    assert gradient.dtype == torch.float32
    assert gradient.shape == images.shape
    np.testing.assert_allclose(found.detach(), double(jnp.asarray(x[:5], "float64")), rtol=1e-4)


def test_in_float64(case):
    machine, x, _ = case
    with jax.enable_x64(False):  # as users have it
        double = bridge.KernelNet(machine).in_float64()
        images = nets.to_tensor(x[:5]).double().requires_grad_()
        found = double(images)
        assert found.dtype == torch.float64
        (gradient,) = torch.autograd.grad(found.sum(), images)
    support, alpha = (jnp.asarray(np.asarray(a), "float64") for a in machine_arrays(machine))
    exact = krr.KernelMachine(machine.kernel, support, alpha)
    expected = exact(jnp.asarray(x[:5], "float64"))
    np.testing.assert_allclose(nets.to_numpy(found), expected, rtol=1e-11)
    slope = jax.grad(lambda x: exact(x).sum())(jnp.asarray(x[:5], "float64"))
    np.testing.assert_allclose(nets.to_array(gradient), slope, rtol=1e-9, atol=1e-12)


def machine_arrays(machine):
    return machine.x_support, machine.alpha


def test_a_machine_inside_another_module_follows_its_precision(case):
    """A normalisation in front is usual."""
    net = bridge.KernelNet(case[0])
    before = net.machine.alpha.dtype
    inside = torch.nn.Sequential(torch.nn.Identity(), net)
    double = copy.deepcopy(inside).double()
    assert double[1].machine.alpha.dtype == double[1].machine.x_support.dtype == "float64"
    assert net.machine.alpha.dtype == before  # the original is as it was
    assert copy.deepcopy(double).float()[1].machine.alpha.dtype == "float32"
    assert not inside.state_dict()
