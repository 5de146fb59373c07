"""Training sets by name, the files they come from, and the machines they make."""

import json

import numpy as np
import pytest
import torch

from advkip import algorithm, data, distill, features, kernels, krr, nets, sets
from tests.sections import SMALL_SETS as SMALL
from tests.sections import changed


def test_sets_by_name(digits, splits, tmp_path):
    found = sets.load(("original", "kip", "adv-kip"), SMALL, splits, digits, tmp_path)
    assert list(found) == ["original", "kip", "adv-kip"]
    assert found["original"].x.shape == (40, 8, 8, 1)
    assert found["original"].kernel is None
    for method in ("kip", "adv-kip"):
        expected = distill.distill(SMALL, splits, method=method, progress=False)
        np.testing.assert_allclose(found[method].x, expected.x_support, rtol=1e-6)
        np.testing.assert_allclose(found[method].y, expected.y_support, rtol=1e-6)
        assert found[method].kernel == SMALL.kernel
    assert (found["kip"].x != found["adv-kip"].x).any()


def test_a_set_that_is_there_is_not_made_again(digits, splits, tmp_path, monkeypatch):
    first = sets.load(["adv-kip"], SMALL, splits, digits, tmp_path)["adv-kip"]

    def again(self, state):
        raise AssertionError("expected no new step")

    monkeypatch.setattr(algorithm.Run, "advance", again)
    same = sets.load(["adv-kip"], SMALL, splits, digits, tmp_path)["adv-kip"]
    np.testing.assert_array_equal(first.x, same.x)
    name, from_file = next(
        iter(sets.load([str(tmp_path / "adv-kip.npz")], SMALL, splits, digits, "no").items())
    )
    assert name == "adv-kip"
    np.testing.assert_array_equal(first.x, from_file.x)
    with pytest.raises(AssertionError, match="expected no new step"):
        sets.load(["kip"], SMALL, splits, digits, tmp_path)
    with pytest.raises(ValueError, match="got adv_kip.learning_rate 0.01 instead of 0.5"):
        sets.load(["adv-kip"], changed(SMALL, adv_kip__learning_rate=0.5), splits, digits, tmp_path)
    with pytest.raises(ValueError, match="of different names, got 'adv-kip' twice"):
        sets.load(["adv-kip", str(tmp_path / "adv-kip.npz")], SMALL, splits, digits, tmp_path)


def test_files_that_are_right_are_not_written_again(digits, splits, tmp_path):
    def times():
        return {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}

    def load(dataset=digits):
        sets.load(["adv-kip"], SMALL, splits, dataset, tmp_path)
        return times()

    first = load()
    assert set(first) == {"adv-kip.npz", "distillation-adv-kip.npz"}
    assert load() == first
    mended = digits._replace(x_test=digits.x_test**2)
    (kept, written) = ("distillation-adv-kip.npz", "adv-kip.npz")
    assert load(mended)[kept] == first[kept]
    np.testing.assert_array_equal(data.read(tmp_path / written)[0]["x_test"], mended.x_test)
    (tmp_path / written).write_bytes(b"damaged")
    assert load()[written] != first[written]
    (tmp_path / written).unlink()
    assert set(load()) == set(first)


def test_a_set_of_mended_data_is_made_again(digits, splits, tmp_path):
    first = sets.load(["adv-kip"], SMALL, splits, digits, tmp_path)["adv-kip"]
    mended = splits._replace(x_pool=splits.x_pool**2)
    with pytest.raises(ValueError, match="got data '"):
        sets.load(["adv-kip"], SMALL, mended, digits, tmp_path)
    (tmp_path / "distillation-adv-kip.npz").unlink()
    other = sets.load(["adv-kip"], SMALL, mended, digits, tmp_path)["adv-kip"]
    assert (first.x != other.x).any()


def test_a_set_of_other_images_is_refused(digits, splits, tmp_path, rng):
    x, y = rng.random((20, 10, 10)), np.arange(20) % 10
    np.savez(tmp_path / "other.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    with pytest.raises(ValueError, match=r"expected images \(8, 8, 1\) of 10 classes"):
        sets.load([str(tmp_path / "other.npz")], SMALL, splits, digits, tmp_path)


def test_a_set_is_fitted_with_the_kernel_it_was_made_with(digits, splits, tmp_path):
    """Another depth, W_std, b_std or ridge is another machine."""
    made = SMALL.replace(kernel={"name": "fc1", "W_std": 1.1, "b_std": 0.5, "diag_reg": 1e-3})
    result = distill.distill(made, splits, progress=False)
    path = tmp_path / "foreign.npz"
    distill.save(path, result, made, digits)
    own = changed(SMALL, support__n_support=20)
    (chosen,) = sets.load([str(path)], own, splits, digits, tmp_path).values()
    machine = sets.machine(chosen, own)
    assert chosen.kernel == made.kernel
    assert machine.kernel == kernels.by_name("fc1", W_std=1.1, b_std=0.5)
    expected = krr.fit(machine.kernel, result.x_support, result.y_support, diag_reg=1e-3).machine
    np.testing.assert_array_equal(machine.alpha, expected.alpha)  # of all images, in their order
    # Of images that no kernel made: the experiment's kernel, on as many as it distils.
    machine = sets.machine(data.draw_original(own, splits), own)
    assert machine.kernel == kernels.by_name("fc2")
    assert len(machine.x_support) == 20


def test_a_set_of_the_flat_settings_before_sections(digits, splits, tmp_path):
    result = distill.distill(SMALL, splits, progress=False)
    flat = {"kernel": "fc1", "W_std": 1.1, "b_std": 0.5, "diag_reg": 1e-3, "dtype": "float32"}
    for pgd_steps, name in ((0, "kip"), (3, "adv-kip")):
        np.savez(
            tmp_path / "old.npz", x_train=result.x_support, y_train=result.y_support,
            x_test=digits.x_test, y_test=digits.y_test,
            experiment=json.dumps(flat | {"pgd_steps": pgd_steps}),
        )  # fmt: skip
        found, chosen = sets.from_path(tmp_path / "old.npz")
        assert found == name
        assert chosen.kernel == SMALL.kernel.replace(
            name="fc1", W_std=1.1, b_std=0.5, diag_reg=1e-3
        )


def test_files_keep_label_vectors(tmp_path, rng):
    x, vectors = rng.normal(size=(30, 8, 8, 1)), rng.normal(size=(30, 4)).astype("float32")
    vectors[:, 3] += 9  # 3 is the largest label
    test = {"x_test": rng.random((5, 8, 8)), "y_test": np.arange(5) % 4}
    np.savez(tmp_path / "d.npz", x_train=x, y_train=vectors, experiment="{}", **test)
    name, found = sets.from_path(tmp_path / "d.npz")
    assert (name, found.kernel) == ("d", None)
    np.testing.assert_array_equal(found.y, vectors)
    np.testing.assert_allclose(found.x, x, atol=1e-6)
    assert (found.x.dtype, found.y.dtype) == (np.float32, np.float32)
    x = rng.integers(0, 256, (30, 8, 8)).astype("uint8")
    test = {"x_test": x[:4], "y_test": np.arange(4)}
    np.savez(tmp_path / "i.npz", x_train=x, y_train=np.arange(30) % 4, **test)
    name, found = sets.from_path(tmp_path / "i.npz", n_classes=6, center=True)
    assert name == "i"
    np.testing.assert_allclose(found.x[..., 0], x / 255, atol=1e-6)
    np.testing.assert_allclose(found.y, np.eye(6)[np.arange(30) % 4] - 1 / 6, atol=1e-6)
    with pytest.raises(ValueError, match="pass a .npz written by numpy.savez"):
        sets.from_path(tmp_path / "missing.npz")


def test_original_images():
    e = changed(SMALL, dataset__n_validation=200, networks__n_original=300)
    splits = data.split(data.load("digits"), e)
    x, y, kernel, teacher, features = data.draw_original(e, splits)
    assert (kernel, teacher, features) == (None, "", None)
    assert (x.shape, y.shape) == ((300, 8, 8, 1), (300, 10))
    np.testing.assert_allclose(y.sum(0), 30 - 300 / 10, atol=1e-4)  # centred
    assert ((y > 0).sum(0) == 30).all()
    validation = {image.tobytes() for image in splits.x_validation}
    assert not validation & {image.tobytes() for image in x}
    every = data.draw_original(changed(e, networks__n_original=None), splits)
    assert len(every.x) == len(splits.x_pool)
    with pytest.raises(ValueError, match="n_original = 5000: .* or pass null for all images"):
        data.draw_original(changed(e, networks__n_original=5000), splits)


def test_robust_features_are_a_set_like_any_other(digits, splits, tmp_path):
    net = nets.build("fc1-16", shape=(8, 8, 1), n_classes=10, seed=0).eval()
    e = SMALL.replace(robust_features={"n_steps": 2, "n_images": 12})
    original = data.draw_original(e, splits)
    made = sets.invert(net, original, e, tmp_path)
    assert len(made.x) == 12
    found = sets.load([str(tmp_path / "robust-features.npz")], e, splits, digits, tmp_path)
    np.testing.assert_array_equal(found["robust-features"].x, made.x)
    np.testing.assert_array_equal(found["robust-features"].y, made.y)


def test_a_folder_of_published_robust_features(digits, splits, tmp_path):
    torch.save([torch.as_tensor(splits.x_pool[:40]).movedim(3, 1)], tmp_path / features.IMAGES)
    torch.save([torch.as_tensor(splits.y_pool[:40])], tmp_path / features.LABELS)
    found = sets.load([str(tmp_path)], SMALL, splits, digits, tmp_path)
    assert list(found) == [sets.ROBUST_FEATURES]
    np.testing.assert_allclose(found[sets.ROBUST_FEATURES].x, splits.x_pool[:40], atol=1e-6)


def test_a_sample_of_a_set_is_a_set(digits, splits, tmp_path):
    e = changed(SMALL, support__n_support=60)
    result = distill.distill(e, data.split(digits, e), progress=False)
    distill.save(tmp_path / "adv-kip.npz", result, e, digits)
    sets.sample(tmp_path / "adv-kip.npz", tmp_path / "sample.npz", per_class=3)
    name, small = sets.from_path(tmp_path / "sample.npz")
    assert name == "adv-kip"
    assert small.kernel == e.kernel
    classes = small.y.argmax(1)
    assert np.bincount(classes).tolist() == [3] * 10
    for x, y in zip(small.x, small.y, strict=True):
        distances = np.abs(result.x_support - x).max((1, 2, 3))
        nearest = distances.argmin()
        assert distances[nearest] < 1e-3  # float16
        np.testing.assert_allclose(y, result.y_support[nearest], atol=1e-3)
    with pytest.raises(ValueError, match="expected 60 images a class, got"):
        sets.sample(tmp_path / "adv-kip.npz", tmp_path / "s.npz", per_class=60)
    np.savez(tmp_path / "plain.npz", x_train=digits.x_train, y_train=digits.y_train,
             x_test=digits.x_test, y_test=digits.y_test)  # fmt: skip
    with pytest.raises(ValueError, match="expected a file of distill.save, got"):
        sets.sample(tmp_path / "plain.npz", tmp_path / "s.npz", per_class=3)


def test_a_set_is_found_by_its_name_alone():
    found = {"mine": "set", "original": "images"}
    assert sets.one_of(found, "mine") == "set"
    for name in ("mine.npz", "kip"):
        with pytest.raises(ValueError, match=r"adversarial_training.sets among \['mine', 'orig"):
            sets.one_of(found, name)
