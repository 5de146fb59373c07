"""The door for images and labels, and that every public function asks it."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from advkip import (
    attacks,
    bridge,
    data,
    evaluate,
    inputs,
    kernels,
    krr,
    nets,
    torch_attacks,
    training,
)

THREAT = attacks.Threat("linf", 0.1)
GREY, COLOUR = (3, 8, 8, 1), (3, 8, 8, 3)


@pytest.mark.parametrize("shape", [GREY, COLOUR])
@pytest.mark.parametrize("make", [np.asarray, jnp.asarray, torch.as_tensor])
def test_images_as_they_should_be(shape, make):
    inputs.images(make(np.full(shape, 0.5, "float32")))
    inputs.images(make(np.ones(shape, "float32") + 5e-7))  # rounding


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (np.zeros((3, 8, 8), "float32"), r"pass x\[..., None\]"),
        (np.zeros((3, 64), "float32"), "four axes"),
        (np.zeros((3, 1, 8, 8), "float32"), r"pass numpy.moveaxis\(x, 1, 3\)"),
        (np.zeros((3, 3, 8, 8), "float32"), "the channels come last"),
        (np.zeros((3, 8, 8, 4), "float32"), "pass grey or colour"),
        (np.zeros(GREY, "uint8"), r"got uint8; pass data.to_float\(x\)"),
        (np.zeros(GREY, "int64"), "got int64; pass float32 or float64"),
        (np.zeros(GREY, bool), "got bool"),
        (np.zeros(GREY, "float16"), "got float16"),
        (np.full(GREY, 255, "float32"), r"got \[255, 255\]"),
        (np.full(GREY, np.nan, "float32"), "without NaN"),
        (np.zeros((0, 8, 8, 1), "float32"), "got none"),
    ],
)
def test_images_that_mean_something_else(x, message):
    with pytest.raises(ValueError, match=message):
        inputs.images(x)


def test_labels():
    np.testing.assert_array_equal(inputs.labels(np.array([2, 0], "uint8"), 2), [2, 0])
    assert inputs.labels([1, 0], 2).dtype == "int64"
    assert inputs.labels(np.eye(3), 3).shape == (3, 3)
    for y, options, message in (
        (np.zeros((2, 1), int), {}, "one label an image, got shape"),
        (np.zeros((2, 1)), {}, "one label an image, got shape"),
        (np.zeros(2), {}, "got shape .2,. of float64"),
        (np.zeros(2, bool), {}, "of bool"),
        (np.zeros(3, int), {}, "expected y of 2 integers"),
        (np.eye(2), {"vectors": False}, "pass argmax of one-hot labels"),
        (np.array([0, -1]), {}, "from 0 to C - 1, got -1"),
        (np.array([0, 4]), {"n_classes": 4}, "from 0 to 3, got 0 to 4"),
        (np.full((2, 3), np.inf), {}, "expected finite label vectors"),
        (np.eye(2), {"n_classes": 3}, "of 3 classes, got 2"),
    ):
        with pytest.raises(ValueError, match=message):
            inputs.labels(y, 2, **options)


@pytest.fixture(scope="module")
def machine():
    d = data.load("digits")
    labels = data.one_hot(d.y_train[:60], 10, center=True)
    return krr.fit(kernels.by_name("fc2"), d.x_train[:60], labels).machine


def column_callers(machine):
    d = data.load("digits")
    x, net = d.x_test[:4], nets.build("fc1-8", shape=(8, 8, 1), n_classes=10, seed=0).eval()
    recipe = training.Recipe(epochs=1, learning_rate=1e-3, threat=THREAT, step_size=0.05)
    watched = training.Watched(d.x_test[:4], d.y_test[:4])
    steps = {"threat": THREAT, "n_steps": 1, "step_size": 0.05}
    return {
        "pgd": lambda y: attacks.pgd(machine, x, y, **steps),
        "fgsm": lambda y: attacks.fgsm(machine, x, y, threat=THREAT),
        "gradient": lambda y: attacks.input_gradient_norm(machine, x, y),
        "torch pgd": lambda y: torch_attacks.pgd(
            net, nets.to_tensor(x), torch.as_tensor(y), **steps
        ),
        "train": lambda y: training.train(
            net, x, y, recipe=recipe, watched=watched, progress=False
        ),
        "evaluate": lambda y: evaluate.evaluate(
            net, x, y, threat=THREAT, step_size=0.05, attack_names=[], progress=False
        ),
    }


@pytest.mark.parametrize("name", ["pgd", "fgsm", "gradient", "torch pgd", "train", "evaluate"])
def test_a_column_of_labels_is_refused_everywhere(machine, name):
    with pytest.raises(ValueError, match="label an image"):
        column_callers(machine)[name](data.load("digits").y_test[:4, None])


def test_images_of_another_layout_are_refused_everywhere(machine, rng):
    d = data.load("digits")
    first = np.moveaxis(np.repeat(d.x_test[:4], 3, 3), 3, 1)
    net = nets.build("fc1-8", shape=(8, 8, 3), n_classes=10, seed=0)
    recipe = training.Recipe(epochs=1, learning_rate=1e-3, threat=THREAT, step_size=0.05)
    steps = {"threat": THREAT, "n_steps": 1, "step_size": 0.05}
    last = np.moveaxis(first, 1, 3)

    def train(x, watched):
        watched = training.Watched(watched, d.y_test[:4])
        training.train(net, x, d.y_test[:4], recipe=recipe, watched=watched, progress=False)

    for call in (
        lambda: attacks.pgd(machine, first, d.y_test[:4], **steps),
        lambda: evaluate.evaluate(
            net.eval(), first, d.y_test[:4], threat=THREAT, step_size=0.05, attack_names=[]
        ),
        lambda: train(first, last),
        lambda: train(last, first),
    ):
        with pytest.raises(ValueError, match="the channels come last"):
            call()
    with pytest.raises(ValueError, match=r"expected images \(n, 8, 8, 1\), like the support"):
        machine(last)
    with pytest.raises(ValueError, match="channels first"):
        bridge.KernelNet(machine)(torch.zeros(2, 3, 8, 8))
    # What is right as it stands is taken: images channels last, whose shape says so.
    x = d.x_test[:4].astype("float64")
    net = bridge.KernelNet(machine)
    torch.testing.assert_close(net(torch.tensor(x)), net(nets.to_tensor(x).double()))


def test_pixels_of_255_do_not_choose_epochs_or_train():
    d = data.load("digits")
    recipe = training.Recipe(epochs=1, learning_rate=1e-3, threat=THREAT, step_size=0.05)
    for x, watched, message in (
        (d.x_train[:20], 255 * d.x_test[:9], "in watched validation images"),
        (255 * d.x_train[:20], d.x_test[:9], "expected training images near"),
        (d.x_train[:20].astype("uint8"), d.x_test[:9], "got uint8"),
        (d.x_train[:20], d.x_test[:9, :4], "of the training images' shape"),
    ):
        net = nets.build("fc1-8", shape=(8, 8, 1), n_classes=10, seed=0)
        with pytest.raises(ValueError, match=message):
            training.train(net, x, d.y_train[:20], recipe=recipe, progress=False,
                           watched=training.Watched(watched, d.y_test[:9]))  # fmt: skip


@pytest.mark.parametrize("name", ["fc1", "fc3", "conv2"])
def test_integers_do_not_wrap_in_kernels(name, rng):
    x8, s8 = (rng.integers(0, 256, (3, 8, 8, 1), "uint8") for _ in range(2))
    kernel = kernels.by_name(name)
    wide = [jnp.asarray(a, "float64") for a in (x8, s8)]
    np.testing.assert_allclose(kernel(x8, s8), kernel(*wide), rtol=1e-6)
    np.testing.assert_allclose(kernel.diagonal(x8), kernel.diagonal(wide[0]), rtol=1e-6)
    np.testing.assert_allclose(kernel.value_and_pullback(x8, s8)[0], kernel(*wide), rtol=1e-6)


def test_uint8_images_are_those_of_a_data_set_to_a_machine(machine):
    x8 = (255 * data.load("digits").x_test[:20]).round().astype("uint8")
    expected = attacks.predict(machine, data.to_float(x8), batch_size=20)
    np.testing.assert_allclose(attacks.predict(machine, x8, batch_size=20), expected, atol=1e-5)
    with pytest.raises(ValueError, match="expected images of float32 or float64, got int64"):
        machine(x8.astype("int64"))


def test_eight_bit_images_are_known(monkeypatch):
    monkeypatch.setattr(inputs, "ROWS", 40)
    levels = np.arange(256, dtype="uint8").reshape(64, 2, 2, 1)
    x = data.to_float(levels)
    np.testing.assert_array_equal(inputs.as_eight_bit(x), levels)
    for value in (np.nextafter(x[50, 0, 0, 0], np.float32(2)), 2, -1 / 255, np.nan):
        other = x.copy()
        other[50, 0, 0, 0] = value
        assert inputs.as_eight_bit(other) is None
