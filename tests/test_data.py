"""Loading, draws that never overlap, and one clear error for each kind of bad file."""

import numpy as np
import pytest

from advkip import data
from tests.sections import changed, experiment


def arrays(rng, n=40, shape=(6, 5), classes=4):
    """A small grey uint8 data set."""

    def part(n):
        return rng.integers(0, 256, (n, *shape)).astype("uint8"), np.arange(n) % classes

    (x_train, y_train), (x_test, y_test) = part(n), part(n // 2)
    return {"x_train": x_train, "y_train": y_train, "x_test": x_test, "y_test": y_test}


def write(folder, name="mine", **content):
    np.savez(folder / f"{name}.npz", **content)
    return folder


def test_digits_are_embedded():
    digits = data.load("digits")
    assert digits.x_train.shape == (1437, 8, 8, 1)
    assert digits.x_test.shape == (360, 8, 8, 1)
    assert digits.x_train.min() == 0
    assert digits.x_train.max() == 1
    assert digits.n_classes == 10


@pytest.mark.parametrize("shape", [(6, 5), (6, 5, 1), (6, 5, 3)])
@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_npz_of_grey_or_rgb(tmp_path, rng, shape, dtype):
    content = arrays(rng, shape=shape)
    if dtype == "float32":
        content |= {k: (content[k] / 255).astype(dtype) for k in ("x_train", "x_test")}
    loaded = data.load("mine", write(tmp_path, **content))
    assert loaded.x_train.shape == (40, 6, 5, shape[2] if len(shape) == 3 else 1)
    assert loaded.n_classes == 4
    x = data.to_float(loaded.x_train)
    assert x.dtype == "float32"
    np.testing.assert_allclose(x.ravel(), data.to_float(content["x_train"]).ravel())
    assert 0 <= x.min() <= x.max() <= 1


def test_file_comes_before_built_in_and_environment_names_the_folder(tmp_path, rng, monkeypatch):
    write(tmp_path, "digits", **arrays(rng))
    monkeypatch.setenv("ADVKIP_DATA", str(tmp_path))
    assert data.load("digits").n_classes == 4
    monkeypatch.setenv("ADVKIP_DATA", "")
    assert data.load("digits").n_classes == 10


def test_label_columns_and_label_vectors(tmp_path, rng):
    content = arrays(rng)
    column = content | {"y_train": content["y_train"][:, None]}
    vectors = content | {"y_train": np.eye(4)[content["y_train"]] - 0.25}
    for given in (column, vectors):
        loaded = data.load("mine", write(tmp_path, **given))
        np.testing.assert_array_equal(loaded.y_train, content["y_train"])
    wide = content | {"y_train": np.eye(6)[content["y_train"]]}  # two classes without an image
    assert data.load("mine", write(tmp_path, **wide)).n_classes == 6
    strange = content["y_test"].copy()
    strange[0] = 7
    for labels in (content["y_train"], column["y_train"]):
        with pytest.raises(ValueError, match=r"got \[7\] in y_test alone"):
            data.load("mine", write(tmp_path, **content | {"y_train": labels, "y_test": strange}))
    vectors["y_train"][3, 1] = np.nan
    with pytest.raises(ValueError, match="expected finite label vectors y_train, got NaN"):
        data.load("mine", write(tmp_path, **vectors))


def test_splits_never_overlap_and_are_balanced(tmp_path, rng):
    content = arrays(rng, n=400)
    # Each image carries its own number, so that overlaps can be seen.
    for key in ("x_train", "x_test"):
        number = np.arange(len(content[key]))
        content[key][:, 0, 0], content[key][:, 0, 1] = number // 256, number % 256
    dataset = data.load("mine", write(tmp_path, **content))
    e = experiment(
        dataset__name="mine",
        support__n_support=42,
        dataset__n_validation=81,
        support__n_target=100,
        dataset__n_test=30,
    )
    splits = data.split(dataset, e)

    def numbers(x):
        x = np.rint(255 * x).astype(int)
        return set(256 * x[:, 0, 0, 0] + x[:, 0, 1, 0])

    support, pool, validation = map(numbers, (splits.x_support, splits.x_pool, splits.x_validation))
    assert (len(support), len(pool), len(validation)) == (42, 319, 81)
    assert support < pool
    assert not pool & validation
    assert len(numbers(splits.x_test)) == 30
    assert np.ptp(np.bincount(splits.y_support)) <= 1
    assert np.ptp(np.bincount(splits.y_validation)) <= 1
    again, other = data.split(dataset, e), data.split(dataset, changed(e, seed=1))
    np.testing.assert_array_equal(splits.x_support, again.x_support)
    assert support != numbers(other.x_support)
    assert len(data.split(dataset, changed(e, dataset__n_test=None)).x_test) == 200
    assert data.split(dataset, changed(e, kernel__dtype="float64")).x_support.dtype == "float64"


def test_generators_differ_between_streams_and_steps():
    draws = {
        tuple(data.generator(*key).integers(0, 1000, 4))
        for key in ((0, "target", 0), (0, "target", 1), (0, "support", 0), (1, "target", 0))
    }
    assert len(draws) == 4


def test_one_hot():
    np.testing.assert_array_equal(data.one_hot(np.array([1, 0]), 2), [[0, 1], [1, 0]])
    centred = data.one_hot(np.arange(10), 10, center=True)
    np.testing.assert_allclose(centred.sum(1), 0, atol=1e-6)
    assert centred.dtype == "float32"


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"y_test": None}, r"without \['y_test'\]"),
        ({"x_train": np.zeros((40, 30), "uint8")}, "expected x_train of shape"),
        ({"x_train": np.zeros((40, 6, 5, 4), "uint8")}, "expected x_train of shape"),
        ({"x_train": np.zeros((0, 6, 5), "uint8")}, "expected x_train of shape"),
        ({"x_test": np.zeros((20, 7, 5), "uint8")}, "train and test images of one shape"),
        ({"x_train": np.zeros((40, 6, 5), "int64")}, "as uint8 or float, got int64"),
        ({"x_train": np.full((40, 6, 5), 255.0)}, r"expected float x_train in \[0, 1\]"),
        ({"x_train": np.full((40, 6, 5), np.nan)}, r"expected float x_train in \[0, 1\]"),
        ({"x_train": np.full((40, 6, 5), -0.5)}, "not standardised"),
        ({"y_train": np.zeros(39, int)}, "expected y_train to be 40 integers"),
        ({"y_train": np.zeros(40)}, "got shape .* of float64"),
        ({"y_train": np.arange(40) - 1}, "expected labels y_train from 0, got -1"),
        ({"y_train": np.zeros(40, int), "y_test": np.zeros(20, int)}, "two classes or more"),
        ({"x_train": np.array([{}] * 40)}, "no Python objects"),
    ],
)
def test_bad_files(tmp_path, rng, change, match):
    content = {k: v for k, v in (arrays(rng) | change).items() if v is not None}
    write(tmp_path, **content)
    with pytest.raises(ValueError, match=match) as error:
        data.load("mine", tmp_path)
    assert "mine.npz" in str(error.value)


def test_not_a_npz(tmp_path):
    (tmp_path / "mine.npz").write_bytes(b"PK not a zip file")
    with pytest.raises(ValueError, match="pass a .npz written by numpy.savez"):
        data.load("mine", tmp_path)


def test_damaged_files(tmp_path, rng):
    write(tmp_path, **arrays(rng))
    path = tmp_path / "mine.npz"
    whole = path.read_bytes()
    for content in (whole[:200], whole[:300] + b"?" * 50 + whole[350:]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="pass a .npz written by numpy.savez"):
            data.load("mine", tmp_path)
    with open(path, "wb") as file:
        np.save(file, np.zeros(3))  # a .npy under the wrong name
    with pytest.raises(ValueError, match="pass a .npz written by numpy.savez"):
        data.load("mine", tmp_path)


def test_images_to_attack_keep_to_the_pixel_range_and_the_support_does_not(tmp_path, rng):
    content = arrays(rng)
    x = content["x_train"] / 255 * 1.5 - 0.25
    write(tmp_path, **content | {"x_train": x, "experiment": "{}"})
    e = experiment(
        dataset__name="mine",
        support__n_support=20,
        dataset__n_validation=8,
        support__n_target=20,
        dataset__n_test=8,
    )
    splits = data.split(data.load("mine", tmp_path), e)
    assert splits.x_support.min() < 0
    for images in (splits.x_pool, splits.x_validation):
        assert 0 <= images.min() <= images.max() <= 1


def test_no_file_no_folder_no_network(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="pass the file"):
        data.load("imagenet", tmp_path)
    with pytest.raises(FileNotFoundError, match="expected dataset.folder to be a folder"):
        data.load("mnist", tmp_path / "nowhere")

    def offline(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.delenv("ADVKIP_DATA", raising=False)
    monkeypatch.setattr("torchvision.datasets.MNIST", offline)
    with pytest.raises(ConnectionError, match="folder with mnist.npz"):
        data.load("mnist")


def test_torchvision_data_sets(tmp_path, monkeypatch):
    """Through torchvision's own reader, from files in its format that need no download."""
    import gzip
    import struct

    folder = tmp_path / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for part, n in (("train", 30), ("t10k", 20)):
        images = np.arange(n * 28 * 28, dtype="uint8").reshape(n, 28, 28)
        labels = (np.arange(n) % 10).astype("uint8")
        header = struct.pack(">IIII", 2051, n, 28, 28), struct.pack(">II", 2049, n)
        for name, head, body in (
            (f"{part}-images-idx3-ubyte", header[0], images),
            (f"{part}-labels-idx1-ubyte", header[1], labels),
        ):
            (folder / name).write_bytes(head + body.tobytes())
            (folder / f"{name}.gz").write_bytes(gzip.compress(head + body.tobytes()))
    monkeypatch.delenv("ADVKIP_DATA", raising=False)
    monkeypatch.setattr(data, "CACHE", tmp_path)
    mnist = data.load("mnist")
    assert mnist.x_train.shape == (30, 28, 28, 1)
    assert mnist.x_test.dtype == np.uint8
    assert mnist.n_classes == 10


def test_too_few_images(tmp_path, rng):
    dataset = data.load("mine", write(tmp_path, **arrays(rng)))
    e = experiment(
        dataset__name="mine",
        support__n_support=20,
        dataset__n_validation=8,
        support__n_target=20,
        dataset__n_test=8,
    )
    for change, match in (
        ({"support": {"n_support": 40}}, "n_support = 40: expected 10 images of class 0 .* got 8"),
        ({"dataset": {"n_validation": 100}}, "n_validation = 100: expected 25"),
        ({"dataset": {"n_test": 21}}, "n_test = 21: expected 6 images of class 0"),
        ({"support": {"n_target": 33}}, "n_target = 33: expected at most 32"),
    ):
        with pytest.raises(ValueError, match=match):
            data.split(dataset, e.replace(**change))


def test_real_mnist(shared_data):
    mnist = data.load("mnist", shared_data)
    assert mnist.x_train.shape == (60000, 28, 28, 1)
    e = experiment(
        dataset__name="mnist",
        support__n_support=1000,
        dataset__n_validation=1000,
        support__n_target=10,
    )
    splits = data.split(mnist, e)
    assert splits.x_test.shape == (10000, 28, 28, 1)
    assert splits.x_pool.shape == (59000, 28, 28, 1)


def test_draws_of_test_images():
    e = experiment(dataset__n_validation=200)
    splits = data.split(data.load("digits"), e)
    x, y = data.draw_test(splits, 50, seed=0)
    assert (np.bincount(y) == 5).all()
    assert {image.tobytes() for image in x} <= {image.tobytes() for image in splits.x_test}
    np.testing.assert_array_equal(data.draw_test(splits, 50, seed=0)[0], x)
    assert not np.array_equal(data.draw_test(splits, 50, seed=1)[0], x)
    for n in (None, 10_000):
        assert data.draw_test(splits, n, seed=0)[0] is splits.x_test
    rare = splits._replace(y_test=np.where(np.arange(len(splits.y_test)) < 3, 1, 0))
    assert len(data.draw_test(rare, 50, seed=0)[0]) == 50


def npz(folder, **changes):
    """A file of 12 images a class of three classes, with changes."""
    rng = np.random.default_rng(0)
    arrays = {
        "x_train": rng.integers(0, 256, (36, 8, 8), "uint8"), "y_train": np.arange(36) % 3,
        "x_test": rng.integers(0, 256, (9, 8, 8), "uint8"), "y_test": np.arange(9) % 3,
    }  # fmt: skip
    arrays |= {key: change(arrays[key]) for key, change in changes.items()}
    np.savez(folder / "own.npz", **arrays)
    return folder / "own.npz"


def both(change):
    return {"x_train": change, "x_test": change}


@pytest.mark.parametrize(
    ("changes", "advice"),
    [
        (both(lambda x: x > 127), r"got bool; pass x.astype\('float32'\)"),
        (
            both(lambda x: (x > 127).astype("uint8")),
            r"largest pixel of 1; pass x.astype\('float32'",
        ),
        (both(lambda x: (x > 127).astype("int64")), r"got int64; pass x.astype\('float32'\)"),
        (both(lambda x: x // 15 % 17), r"largest pixel of 16; pass \(x / 16\).astype"),
        (both(lambda x: (x // 15 % 17).astype("int32")), r"got int32; pass \(x / 16\)"),
        (both(lambda x: 257 * x.astype("uint16")), r"got uint16; pass \(x / 65535\)"),
        (both(lambda x: x.astype("int64")), r"got int64; pass \(x / 255\)"),
        ({"x_train": lambda x: x / 255}, "of one kind, got float64 and uint8"),
        ({"x_train": lambda x: x / 255, "x_test": lambda x: x / 255**2}, "of one scale"),
        ({"y_train": lambda y: y + 1, "y_test": lambda y: y + 1}, "none of .0.; pass y - 1"),
        ({"y_train": lambda y: 2 * y, "y_test": lambda y: 2 * y}, r"got none of \[1, 3\]"),
        ({"y_test": lambda y: y + 1}, r"labels that training images have, got \[3\] in y_test"),
    ],
)
def test_numbers_that_mean_something_else_are_refused(tmp_path, changes, advice):
    assert data.from_npz(npz(tmp_path)).n_classes == 3
    with pytest.raises(ValueError, match=advice):
        data.from_npz(npz(tmp_path, **changes))
