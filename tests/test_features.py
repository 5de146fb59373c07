"""The robust-feature data set: hostile and malformed files; inversion of representations."""

import os
import pickle

import numpy as np
import pytest
import torch

from advkip import attacks, data, features, nets, training


def write(folder, images=None, labels=None):
    images = [torch.rand(4, 3, 32, 32) for _ in range(2)] if images is None else images
    labels = [torch.arange(4), torch.tensor([9, 8, 7, 6])] if labels is None else labels
    torch.save(images, folder / features.IMAGES)
    torch.save(labels, folder / features.LABELS)
    return images, labels


@pytest.mark.parametrize("legacy", [False, True])
def test_published_layout(tmp_path, legacy):
    images, labels = write(tmp_path)
    if legacy:  # what PyTorch wrote when the set was published
        for name, parts in ((features.IMAGES, images), (features.LABELS, labels)):
            torch.save(parts, tmp_path / name, _use_new_zipfile_serialization=False)
    x, y = features.load(tmp_path)
    assert x.shape == (8, 32, 32, 3)
    np.testing.assert_array_equal(x[5], images[1][1].permute(1, 2, 0))
    np.testing.assert_array_equal(y.argmax(1), [0, 1, 2, 3, 9, 8, 7, 6])


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("raw", [False, True])
def test_a_hostile_file_runs_nothing(tmp_path, raw):
    trap = tmp_path / "ran"
    write(tmp_path)
    if raw:
        (tmp_path / features.IMAGES).write_bytes(pickle.dumps([Hostile(trap)]))
    else:
        torch.save([torch.rand(4, 3, 32, 32), Hostile(trap)], tmp_path / features.IMAGES)
    with pytest.raises(ValueError, match="expected a list of tensors"):
        features.load(tmp_path)
    assert not trap.exists()


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        ([torch.rand(4, 32, 32)], None, "expected float images"),
        ([torch.zeros(8, 3, 32, 32, dtype=torch.uint8)], None, "expected float images"),
        ([torch.rand(8, 3, 32, 32) * 4 - 2], None, "without standardisation"),
        ([torch.full((8, 3, 32, 32), torch.nan)], None, "without standardisation"),
        (None, [torch.arange(7)], "expected 8 integers from 0 to 9"),
        (None, [torch.arange(8) + 5], "expected 8 integers from 0 to 9"),
        (None, [torch.rand(8)], "expected 8 integers from 0 to 9"),
        ({"a": torch.rand(4, 3, 32, 32)}, None, "expected a list of tensors"),
        ([], None, "expected a list of tensors"),
        ([torch.zeros(0, 3, 32, 32)], None, "expected a list of tensors"),
        ([torch.zeros(8, 3, 32, 32).to_sparse()], None, "expected a list of tensors"),
        (None, [torch.ones(8, dtype=torch.bool)], "expected 8 integers from 0 to 9"),
        ([[1, "a"]], None, "expected a list of tensors"),
        ([torch.zeros(1, 1, 1, 1).expand(8, 3, 32, 32)], None, "expected a list of tensors"),
        ([torch.zeros(8, 3, 32, 32).to(torch.float8_e5m2)], None, "expected a list of tensors"),
        ([torch.zeros(8, 3, 32, 32, device="meta")], None, "expected a list of tensors"),
        (None, [torch.zeros(8, dtype=torch.complex64)], "expected a list of tensors"),
        (None, [torch.zeros(8, dtype=torch.uint16)], "expected a list of tensors"),
    ],
)
def test_malformed_files(tmp_path, images, labels, message):
    write(tmp_path, images, labels)
    with pytest.raises(ValueError, match=message):
        features.load(tmp_path)


def test_missing_and_damaged_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="pass a folder with CIFAR_ims and CIFAR_lab"):
        features.load(tmp_path)
    write(tmp_path)
    path = tmp_path / features.IMAGES
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="expected a list of tensors"):
        features.load(tmp_path)


@pytest.fixture(scope="module")
def robust():
    d = data.load("digits")
    recipe = training.Recipe(
        epochs=15, learning_rate=3e-3, threat=attacks.Threat("linf", 0.15), step_size=0.05,
        batch_size=32, eval_every=15, eval_pgd_steps=2, adversarial_steps=3,
    )  # fmt: skip
    net = nets.build("fc2-128", shape=(8, 8, 1), n_classes=10, seed=0)
    watched = training.Watched(d.x_train[800:850], d.y_train[800:850])
    training.train(
        net, d.x_train[:800], d.y_train[:800], recipe=recipe, watched=watched, progress=False
    )
    return net, d.x_train[:60], data.one_hot(d.y_train[:60], 10)


SETTINGS = {"n": 40, "steps": 60, "step_size": 0.1, "noise": 0.0, "seed": 0, "progress": False}


def test_inversion(robust):
    net, x, y = robust
    made = features.generate(*robust, **SETTINGS, batch_size=16)
    assert made.x.shape == (40, 8, 8, 1)
    assert made.x.min() >= 0
    assert made.x.max() <= 1
    # Represented as the originals are, and read so ...
    assert np.median(made.distance) < 0.2
    read = net(nets.to_tensor(made.x)).argmax(1).numpy()
    assert (read == net(nets.to_tensor(made.x_original)).argmax(1).numpy()).mean() > 0.9
    np.testing.assert_array_equal(made.y, y[:40])
    # ... but made of other images, which were not read so.
    assert (net(nets.to_tensor(made.x_start)).argmax(1).numpy() == y[:40].argmax(1)).mean() < 0.4
    assert sorted(map(bytes, made.x_start)) == sorted(map(bytes, made.x_original))
    assert not (made.x_start == made.x_original).all((1, 2, 3)).any()
    # Batches change nothing but rounding; the seed does.
    np.testing.assert_allclose(features.generate(*robust, **SETTINGS).x, made.x, atol=1e-3)
    noisy = features.generate(*robust, **SETTINGS | {"noise": 0.5})
    assert noisy.x_start.min() >= 0
    assert noisy.x_start.max() <= 1
    between = noisy.x_start - made.x_start / 2
    assert 0 <= between.min() < 0.1 < 0.4 < between.max() <= 0.5
    other = features.generate(*robust, **SETTINGS | {"seed": 1, "steps": 1})
    assert np.abs(other.x_start - made.x_start).max() > 0.5


def test_inversion_is_not_made_twice(robust, tmp_path, monkeypatch):
    made = features.generate(*robust, **SETTINGS, checkpoint_dir=tmp_path)
    monkeypatch.setattr(features, "_invert", None)
    again = features.generate(*robust, **SETTINGS, checkpoint_dir=tmp_path)
    for a, b in zip(made, again, strict=True):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(TypeError):  # other settings: made anew
        features.generate(*robust, **SETTINGS | {"steps": 2}, checkpoint_dir=tmp_path)
    (path,) = tmp_path.glob("inverted-*.npz")
    for damage in (lambda: path.write_bytes(b"damaged"), lambda: np.savez(path, x_train=made.x)):
        damage()
        with pytest.raises(ValueError, match="expected a checkpoint"):
            features.generate(*robust, **SETTINGS, checkpoint_dir=tmp_path)


class Shifted(torch.nn.Module):
    def __init__(self, net, mean):
        super().__init__()
        self.net, self.mean = net, mean
        self.eval()

    def forward(self, x):
        return self.net(x - self.mean)


def test_networks_that_differ_in_no_weight_share_no_features(robust, tmp_path):
    made = [
        features.generate(
            Shifted(robust[0], mean), *robust[1:], **SETTINGS | {"steps": 3},
            checkpoint_dir=tmp_path,
        ).x
        for mean in (0.0, 0.2)
    ]  # fmt: skip
    assert np.abs(made[0] - made[1]).max() > 0.01


def test_bad_input(robust):
    net, x, y = robust
    for settings in ({"n": 61}, {"n": 0}, {"steps": 0}, {"step_size": 0.0}, {"noise": 2.0}):
        with pytest.raises(ValueError, match="expected n in"):
            features.generate(*robust, **SETTINGS | settings)
    with pytest.raises(ValueError, match="expected n in"):
        features.generate(net, x, y.argmax(1), **SETTINGS)
    with pytest.raises(ValueError, match="expected a network in evaluation mode"):
        features.generate(
            nets.build("fc1-8", shape=(8, 8, 1), n_classes=10, seed=0), x, y, **SETTINGS
        )
    partly = torch.nn.Sequential(torch.nn.Dropout(), net).eval()
    partly[0].train()
    with pytest.raises(ValueError, match="expected a network in evaluation mode"):
        features.generate(partly, x, y, **SETTINGS)
