"""Architectures as the paper has them; weights from the seed alone."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn

from advkip import architectures, kernels, nets, pieces

SHAPES = [(8, 8, 1), (28, 28, 1), (32, 32, 3)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "name",
    [
        "fc1-16",
        "fc3-1024",
        "fc3-64-ntk",
        "conv2-8-ntk",
        "simple-cnn",
        "alexnet",
        "vgg11",
        "fc1-16-pieces3",
        "simple-cnn-pieces2",
    ],
)
def test_logits_for_every_size(rng, name, shape):
    net = nets.build(name, shape=shape, n_classes=7, seed=0).eval()
    x = nets.to_tensor(rng.random((3, *shape)))
    assert x.shape == (3, shape[2], *shape[:2])
    with torch.no_grad():
        logits = net(x)
        assert logits.shape == (3, 7)
        torch.testing.assert_close(net(x[1:2]), logits[1:2], atol=1e-4, rtol=1e-4)


def test_images_to_tensors_and_back(rng):
    x = rng.random((4, 5, 7, 3)).astype("float32")
    tensor = nets.to_tensor(x)
    assert tensor.shape == (4, 3, 5, 7)
    assert tensor[1, 2, 3, 4] == x[1, 3, 4, 2]
    np.testing.assert_array_equal(nets.to_array(tensor), x)
    assert nets.to_tensor(x, like=torch.zeros(1, dtype=torch.float64)).dtype == torch.float64


def parameters(name, shape):
    net = nets.build(name, shape=shape, n_classes=10, seed=0)
    return sum(p.numel() for p in net.parameters())


def test_parameter_counts():
    assert parameters("fc3-1024", (28, 28, 1)) == 785 * 1024 + 2 * 1025 * 1024 + 1025 * 10
    assert parameters("fc1-32x4", (8, 8, 1)) == 4 * parameters("fc1-32", (8, 8, 1))
    conv = (9 * 3 + 1) * 64 + 2 * (9 * 64 + 1) * 64
    assert parameters("simple-cnn", (32, 32, 3)) == conv + (64 * 4 * 4 + 1) * 10
    vgg = sum(
        (9 * a + 1) * b + 2 * b
        for a, b in ((3, 64), (64, 128), (128, 256), (256, 256), (256, 512), *[(512, 512)] * 3)
    )
    assert parameters("vgg11", (32, 32, 3)) == vgg + 513 * 10
    pairs = ((3, 64), (64, 192), (192, 384), (384, 256), (256, 256))
    linear = (1024 + 1) * 4096 + 4097 * 4096 + 4097 * 10
    assert parameters("alexnet", (32, 32, 3)) == sum((9 * a + 1) * b for a, b in pairs) + linear


def test_simple_cnn_is_the_papers():
    net = nets.build("simple-cnn", shape=(32, 32, 3), n_classes=10, seed=0)
    block = [nn.Conv2d, nn.ReLU, nn.MaxPool2d]
    assert [type(layer) for layer in net] == block * 3 + [nn.Flatten, nn.Linear]
    for conv, pool in zip(net[0:9:3], net[2:9:3], strict=True):
        assert (conv.out_channels, conv.kernel_size, conv.stride) == (64, (3, 3), (1, 1))
        assert (pool.kernel_size, pool.stride) == (2, 2)


def test_weights_derive_from_the_seed_alone():
    def weights(seed):
        return nets.build("simple-cnn", shape=(8, 8, 1), n_classes=10, seed=seed)[0].weight

    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    first = weights(0)
    torch.testing.assert_close(torch.random.get_rng_state(), state)  # nothing else is disturbed
    torch.manual_seed(6)
    torch.testing.assert_close(weights(0), first)
    assert not torch.equal(weights(1), first)


@pytest.mark.parametrize(
    "name", ["fc2-16", "fc2-16-ntk", "conv2-8-ntk", "simple-cnn", "alexnet", "vgg11"]
)
def test_representation_is_what_the_last_layer_sees(rng, name):
    net = nets.build(name, shape=(8, 8, 1), n_classes=3, seed=0).eval()
    x = nets.to_tensor(rng.random((4, 8, 8, 1))).requires_grad_()
    found = nets.representation(net, x)
    last = [layer for layer in net.modules() if isinstance(layer, torch.nn.Linear)][-1]
    assert found.shape == (4, last.in_features)
    torch.testing.assert_close(last(found), getattr(net, "net", net)(x))
    assert torch.autograd.grad(found.sum(), x)[0].abs().max() > 0
    assert not last._forward_pre_hooks  # nothing stays behind


@pytest.mark.parametrize("n", [2, 3])
def test_pieces_are_those_of_the_kernel(rng, n):
    x = rng.uniform(-0.2, 1.2, (4, 5, 5, 3)).astype("float32")
    layer = architectures.Pieces(n)
    np.testing.assert_allclose(
        nets.to_array(layer(nets.to_tensor(x))), pieces.encode(x, n), atol=1e-6
    )
    weights = rng.normal(size=(4, 5, 5, 3 * n)).astype("float32")
    x[0, 0] = 1 / np.float32(n)  # where two pieces meet
    given = nets.to_tensor(x).requires_grad_()
    (layer(given) * nets.to_tensor(weights)).sum().backward()
    _, pull = jax.vjp(lambda x: pieces.encode(x, n), jnp.asarray(x))
    np.testing.assert_allclose(nets.to_array(given.grad), pull(weights)[0], atol=1e-6)


def test_networks_of_pieces():
    plain = nets.build("fc2-8", shape=(4, 4, 9), n_classes=3, seed=1)
    net = nets.build("fc2-8-pieces3", shape=(4, 4, 3), n_classes=3, seed=1)
    for ours, other in zip(net.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, other, rtol=0, atol=0)
    x = torch.rand(2, 3, 4, 4, device=nets.device())
    torch.testing.assert_close(net(x), plain(architectures.Pieces(3)(x)))
    several = nets.build("fc2-8x2-pieces3", shape=(4, 4, 3), n_classes=3, seed=1)
    assert len(nets.members(several)) == 2
    torch.testing.assert_close(several(x), sum(one(x) for one in nets.members(several)) / 2)
    assert nets.representation(net, x).shape == (2, 8)
    for name in ("fc2-8-pieces1", "fc2-8-pieces3x2", "pieces3"):
        with pytest.raises(ValueError, match="expected a network in"):
            nets.build(name, shape=(4, 4, 3), n_classes=3, seed=1)


def test_representation_without_a_linear_layer():
    with pytest.raises(ValueError, match="expected a network with a linear layer"):
        nets.representation(torch.nn.Flatten(), torch.zeros(1, 1, 8, 8))
    several = nets.build("fc1-8x2", shape=(8, 8, 1), n_classes=3, seed=0)
    with pytest.raises(ValueError, match="expected one network, got an ensemble of 2"):
        nets.representation(several, torch.zeros(1, 1, 8, 8))
    twice = torch.nn.Linear(4, 4)
    with pytest.raises(ValueError, match="expected the last linear layer to be used once"):
        nets.representation(torch.nn.Sequential(twice, twice), torch.zeros(1, 4))


def test_weights_move_less_at_a_large_scale(rng):
    """The step is the same, of a network whose features hardly change, or do."""
    x, y = rng.random((12, 4, 4, 1)), np.eye(3, dtype="float32")[np.arange(12) % 3]
    moved, steps = {}, {}
    for scale in ("0.1", "", "10"):
        net = nets.build(f"fc1-256-ntk{scale}", shape=(4, 4, 1), n_classes=3, seed=0)
        before = net.net[1].weight.detach().clone()
        loss = ((net(nets.to_tensor(x)) - torch.as_tensor(y).to(nets.device())) ** 2).sum() / 2
        loss.backward()
        with torch.no_grad():
            for weights in net.parameters():
                weights -= 0.001 * weights.grad
            moved[scale] = float((net.net[1].weight - before).norm() / before.norm())
            steps[scale] = nets.to_numpy(net(nets.to_tensor(x)))
    assert moved["0.1"] == pytest.approx(10 * moved[""], rel=0.01)
    assert moved["10"] == pytest.approx(0.1 * moved[""], rel=0.01)
    np.testing.assert_allclose(steps["10"], steps[""], rtol=0.1, atol=1e-3)
    assert np.abs(steps[""]).max() > 0.005


def test_bad_input():
    for name in ("fc0-10", "resnet18", "fc3", "cnn", "fc1-8-ntk0", "fc1-8-ntk01", "conv1-8"):
        with pytest.raises(ValueError, match="expected a network in"):
            nets.build(name, shape=(8, 8, 1), n_classes=10, seed=0)


@pytest.mark.parametrize(
    ("name", "kernel", "channels"),
    [
        ("fc2-4096-ntk", "fc2", 1),
        ("fc2-4096-ntk10", "fc2", 1),
        ("conv1-4096-ntk", "conv1", 2),
        ("conv2-1024-ntk0.5", "conv2", 1),
        ("fc2-4096-ntk-pieces2", "fc2-pieces2", 1),
    ],  # fmt: skip
)
def test_ntk_parametrisation_trains_as_the_kernel_says(rng, name, kernel, channels):
    """At a large width the network's own tangent kernel is near the closed form, and a small step
    down the squared error moves the logits on other images as that kernel predicts."""
    shape = (4, 4, channels)
    x, y = rng.random((12, *shape)).astype("float32"), np.eye(3, dtype="float32")[np.arange(12) % 3]
    x_test = rng.random((5, *shape)).astype("float32")
    net = nets.build(name, shape=shape, n_classes=3, seed=0)
    with torch.no_grad():
        assert (net(nets.to_tensor(x)) == 0).all()
    rate = 0.04 if "pieces" in name else 0.03 if "conv" in name else 0.01
    loss = ((net(nets.to_tensor(x)) - torch.as_tensor(y).to(nets.device())) ** 2).sum() / 2
    loss.backward()
    with torch.no_grad():
        for weights in net.parameters():
            weights -= rate * weights.grad
        moved = nets.to_numpy(net(nets.to_tensor(x_test)))
    values = kernels.by_name(kernel).value(jnp.asarray(x_test), jnp.asarray(x))
    expected = np.asarray(rate * values @ y)
    np.testing.assert_allclose(moved, expected, rtol=0.1, atol=0.03 * expected.max())
    assert np.abs(moved).max() > 0.07
    depth = int(re.search(r"\d", kernel)[0])
    assert len(list(net.parameters())) == 2 + 2 * depth  # those at the start are none


@pytest.mark.parametrize("levels", [255, 254, 16])
def test_images_are_the_floats_that_went_in(rng, levels):
    x = rng.integers(0, levels + 1, (300, 4, 5, 3)).astype("float32") / np.float32(levels)
    images, index = nets.Images(x), torch.as_tensor([7, 0, 299, 7])
    found = images[index.to(nets.device())]
    assert images.x.dtype == (torch.uint8 if levels == 255 else torch.float32)
    np.testing.assert_array_equal(nets.to_array(found), x[index])
    whole = nets.to_tensor(x)[index.to(nets.device())]
    assert found.dtype == whole.dtype
    assert found.stride() == whole.stride()


@pytest.mark.parametrize("name", ["fc1-16", "fc1-16x2", "fc1-16-pieces2", "simple-cnn"])
def test_features_are_outputs_of_training_alone(name):
    net = nets.build(name, shape=(8, 8, 1), n_classes=10, seed=0, n_features=5)
    x = nets.to_tensor(np.random.default_rng(0).random((3, 8, 8, 1), "float32"))
    every = [one(x) for one in nets.members(net)]
    assert [tuple(one.shape) for one in every] == [(3, 15)] * len(nets.members(net))
    logits = torch.stack(every).mean(0)[:, :10]
    np.testing.assert_array_equal(nets.to_numpy(net.eval()(x)), nets.to_numpy(logits))
