"""Data sets as arrays in [0, 1], and class-balanced draws that never overlap.

A data set is found by name, first as `<name>.npz` in the given folder, else among the built-in
ones: `digits` (scikit-learn, embedded) and `mnist`, `fashion_mnist`, `cifar10` (torchvision,
downloaded once into a cache folder). A .npz file holds x_train, y_train, x_test, y_test;
images (N, H, W) or (N, H, W, C) with C = 1 or 3, uint8 or float in [0, 1]; integer labels
(N,) from 0, or label vectors (N, classes) such as a distilled set's. No pickle in it is loaded.
(torchvision's own CIFAR-10 files are pickles; it checks their MD5 sums before it reads them.)
"""

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from advkip import files, inputs
from advkip.config import Experiment
from advkip.settings import Kernel

KEYS = ("x_train", "y_train", "x_test", "y_test")

CACHE = Path("~/.cache/advkip")
TORCHVISION = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST", "cifar10": "CIFAR10"}
STREAMS = {
    "validation": 1, "support": 2, "test": 3, "target": 4, "weights": 5, "order": 6, "noise": 7,
    "original": 8, "watched": 9, "dropout": 10, "robust": 11, "diagnosis": 12, "inner": 13,
    "copies": 14, "relabelled": 15, "scout": 16, "unrolled": 17, "trajectories": 18,
}  # fmt: skip


class Dataset(NamedTuple):
    """Images (N, H, W, C), uint8 or float in [0, 1]; integer labels (N,)."""

    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    n_classes: int


class Splits(NamedTuple):
    """What an experiment sees. Images float in [0, 1], NHWC; integer labels (N,).

    Support, pool and validation come from the training data: the support is a part of the
    pool (target batches are drawn from all of it), and validation overlaps with neither.
    """

    x_support: np.ndarray
    y_support: np.ndarray
    x_pool: np.ndarray
    y_pool: np.ndarray
    x_validation: np.ndarray
    y_validation: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    n_classes: int


def load(name: str, folder: str | None = None) -> Dataset:
    """A data set by name.

    Args:
      name: a built-in name, or that of a file <name>.npz.
      folder: where .npz files are looked for; None means the environment variable ADVKIP_DATA.

    Returns:
      A `Dataset`.

    Raises:
      FileNotFoundError: neither a built-in name nor a file; or the folder does not exist.
      ValueError: a file with wrong keys, shapes, dtypes, ranges or labels.
      ConnectionError: a download failed.
    """
    folder = folder or os.environ.get("ADVKIP_DATA", "")
    if path := find(name, folder):
        return from_npz(path)
    if folder and not files.find(folder).is_dir():
        raise FileNotFoundError(
            f"expected dataset.folder to be a folder, got {folder}; pass the folder that holds "
            f"{name}.npz, or leave it and ADVKIP_DATA empty for the built-in data sets"
        )
    if name == "digits":
        return _digits()
    if name in TORCHVISION:
        return _torchvision(name)
    raise FileNotFoundError(
        f"expected a data set in {['digits', *TORCHVISION]} or a file {name}.npz, got {name!r} "
        f"and folder {folder or '(none)'}; pass the file's folder as dataset.folder or ADVKIP_DATA"
    )


def from_npz(path) -> Dataset:
    """A data set from a .npz file, checked; see the module's text for its keys.

    Distilled sets (`distill.save`) have label vectors, whose classes are the largest entries, and
    training images that may leave [0, 1]; they are known by their key `experiment`.

    Raises:
      ValueError: what is wrong with the file, and what was expected.
    """
    return dataset_of(path, *read(path))


def dataset_of(path, arrays, settings) -> Dataset:
    """A checked data set from what `read` returned."""
    try:
        x_train, y_train = inputs.part_of_data_set(
            arrays["x_train"], arrays["y_train"], "train", in_range=not settings
        )
        x_test, y_test = inputs.part_of_data_set(arrays["x_test"], arrays["y_test"], "test")
        strangers = sorted(set(y_test.tolist()) - set(y_train.tolist()))
        if strangers and arrays["y_train"].size == len(y_train):
            raise ValueError(
                f"expected test labels that training images have, got {strangers[:5]} in y_test "
                "alone; pass labels 0, 1, ..., C - 1 of the same classes in both"
            )
        if x_train.shape[1:] != x_test.shape[1:]:
            raise ValueError(
                f"expected train and test images of one shape, got {x_train.shape[1:]} and "
                f"{x_test.shape[1:]}; pass images of one size"
            )
        inputs.check_alike(x_train, x_test, distilled=bool(settings))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    n_classes = int(max(y_train.max() + 1, y_test.max() + 1, *arrays["y_train"].shape[1:]))
    if n_classes < 2:
        raise ValueError(f"{path}: expected two classes or more, got one; pass labels from 0")
    return Dataset(x_train, y_train, x_test, y_test, n_classes)


def find(name: str, folder: str | None = None) -> Path | None:
    """The file <name>.npz in a folder (else in ADVKIP_DATA), or None without one."""
    folder = folder or os.environ.get("ADVKIP_DATA", "")
    path = files.find(folder or ".") / f"{name}.npz"
    return path if folder and path.exists() else None


def is_here(name: str, folder: str | None = None) -> bool:
    """Whether `load` needs no download."""
    return bool(find(name, folder)) or name not in TORCHVISION


def check_fits(name, x, y, shape: tuple[int, ...], n_classes: int) -> None:
    """Raises ValueError unless a training set's images and labels are of the data set at hand.

    Args:
      name: of the set, for the message.
      x, y: its images (N, H, W, C), and label vectors (N, classes) or integers.
      shape, n_classes: of the data set.
    """
    vectors = y.ndim == 2 and y.shape[1] > 1
    own = x.shape[1:], y.shape[1] if vectors else max(n_classes, int(y.max()) + 1)
    if own != (tuple(shape), n_classes):
        raise ValueError(
            f"{name}: expected images {tuple(shape)} of {n_classes} classes as in the data set, "
            f"got {own[0]} of {own[1]}; pass a set of that kind"
        )


class TrainingSet(NamedTuple):
    """What networks are trained on; see `sets`."""

    x: np.ndarray  # images (N, H, W, C), float32; a distilled set's may leave [0, 1]
    y: np.ndarray  # label vectors (N, classes), float32
    kernel: Kernel | None = None  # that a distilled set was made with, with its settings
    teacher: str = ""  # the kernel whose machine, or the network that, labelled (see `relabel`)
    features: np.ndarray | None = None  # (N, F), what a network can be asked for beside y


def draw_original(experiment: Experiment, splits: Splits) -> TrainingSet:
    """Original images to train networks on: `networks.n_original` of the pool, with one-hot labels.

    Raises:
      ValueError: too few images.
    """
    n, index = experiment.networks.n_original, slice(None)
    if n:
        stream = generator(experiment.seed, "original")
        try:
            index = draw_balanced(splits.y_pool, n, n_classes=splits.n_classes, generator=stream)
        except ValueError as error:
            raise ValueError(
                f"networks.n_original = {n}: {error}; or pass null for all images"
            ) from None
    labels = one_hot(
        splits.y_pool[index], splits.n_classes, center=experiment.support.center_labels
    )
    return TrainingSet(splits.x_pool[index].astype("float32"), labels.astype("float32"))


def draw_test(splits: Splits, n: int | None, *, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """n test images in random order and their labels; None, or more than there are: all of them.

    Equally many of each class, unless a class has too few.
    """
    if n is None or n >= len(splits.y_test):
        return splits.x_test, splits.y_test
    stream = generator(seed, "watched")
    try:
        index = draw_balanced(splits.y_test, n, n_classes=splits.n_classes, generator=stream)
    except ValueError:
        index = stream.permutation(len(splits.y_test))[:n]
    return splits.x_test[index], splits.y_test[index]


def read(path) -> tuple[dict[str, np.ndarray], str]:
    """(arrays by KEYS, the settings of a distilled set as JSON or '')."""
    try:
        with np.load(path, allow_pickle=False) as file:
            missing = [key for key in KEYS if key not in file.files]
            if missing:
                raise ValueError(f"expected keys {list(KEYS)}, got {file.files} without {missing}")
            settings = str(file["experiment"]) if "experiment" in file.files else ""
            return {key: file[key] for key in KEYS}, settings
    except Exception as error:  # a hostile or damaged file can fail in any way
        raise ValueError(
            f"{path}: {error}; pass a .npz written by numpy.savez, with plain "
            "arrays and no Python objects"
        ) from None


def _digits():
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    x = (x.reshape(-1, 8, 8, 1) / 16).astype(np.float32)
    # The last 360 in the file's order are the test set.
    return Dataset(x[:-360], y[:-360], x[-360:], y[-360:], 10)


def _torchvision(name):
    from torchvision import datasets

    root = CACHE.expanduser()
    try:
        train, test = (
            getattr(datasets, TORCHVISION[name])(root, train=train, download=True)
            for train in (True, False)
        )
    except (OSError, RuntimeError) as error:
        raise ConnectionError(
            f"expected to download {name} into {CACHE}, got {error}; pass dataset.folder or set "
            f"ADVKIP_DATA to a folder with {name}.npz (keys {', '.join(KEYS)}) to do without"
        ) from error
    parts = [(np.asarray(d.data), np.asarray(d.targets)) for d in (train, test)]
    (x_train, y_train), (x_test, y_test) = (inputs.part_of_data_set(x, y, name) for x, y in parts)
    return Dataset(x_train, y_train, x_test, y_test, 10)


def to_float(x, dtype="float32") -> np.ndarray:
    """uint8 or float images to floats in [0, 1]."""
    return x.astype(dtype) / 255 if x.dtype == np.uint8 else x.astype(dtype)


def one_hot(y, n_classes, *, center=False, dtype="float32") -> np.ndarray:
    """One-hot labels, shape (N, C); with `center`, minus 1/C so that each row sums to 0."""
    labels = np.eye(n_classes, dtype=dtype)[y]
    return labels - labels.dtype.type(1 / n_classes) if center else labels


def draw_balanced(y, n, *, n_classes, generator) -> np.ndarray:
    """Indices of `n` labels, as equally many of each class as possible, in random order.

    Args:
      y: integer labels, shape (N,).
      n: how many; the first n % n_classes classes get one more.
      generator: a NumPy generator.

    Raises:
      ValueError: a class has too few.
    """
    counts = np.full(n_classes, n // n_classes) + (np.arange(n_classes) < n % n_classes)
    have = np.bincount(y, minlength=n_classes)
    if (have < counts).any():
        label = int((have < counts).argmax())
        raise ValueError(
            f"expected {counts[label]} images of class {label} for a balanced draw of {n}, got "
            f"{have[label]}; pass a smaller number (at most {int(have.min()) * n_classes})"
        )
    chosen = [
        generator.choice(np.flatnonzero(y == label), count, replace=False)
        for label, count in enumerate(counts)
    ]
    return generator.permutation(np.concatenate(chosen))


def generator(seed, stream, step=0) -> np.random.Generator:
    """The NumPy generator of one purpose (a key of STREAMS) and step, derived from the seed."""
    return np.random.default_rng([seed, STREAMS[stream], step])


def fingerprint(splits: Splits) -> str:
    """16 hex digits of all that a distillation sees: support, pool and validation of `Splits`.

    What is resumed belongs to these arrays, not to the name of the file that they came from.
    """
    seen = splits._asdict().items()
    return files.digest_of_arrays(*(v for k, v in seen if k != "n_classes" and "_test" not in k))


def split(dataset: Dataset, experiment: Experiment) -> Splits:
    """Draws the splits of an experiment; the same seed draws the same images.

    Returns:
      `Splits` with floats of the experiment's dtype.

    Raises:
      ValueError: too few images, naming the split and the setting that asked for them.
    """

    def draw(y, n, stream, setting):
        try:
            return draw_balanced(
                y, n, n_classes=dataset.n_classes, generator=generator(experiment.seed, stream)
            )
        except ValueError as error:
            raise ValueError(f"{setting} = {n}: {error}") from None

    y, asked = dataset.y_train, experiment.dataset
    validation = draw(y, asked.n_validation, "validation", "dataset.n_validation")
    pool = np.setdiff1d(np.arange(len(y)), validation)
    n_support = experiment.support.n_support // experiment.support.copies
    support = pool[draw(y[pool], n_support, "support", "support.n_support")]
    n_target = experiment.support.n_target
    if n_target > len(pool):
        raise ValueError(
            f"support.n_target = {n_target}: expected at most {len(pool)} images that are not "
            "held out for validation; pass a smaller n_target"
        )
    test = np.arange(len(dataset.y_test))
    if asked.n_test:
        test = draw(dataset.y_test, asked.n_test, "test", "dataset.n_test")

    def take(x, y, index):
        return to_float(x[index], experiment.kernel.dtype), y[index]

    def take_images(x, y, index):
        # Only a distilled set leaves the pixel range; what is attacked must keep to it.
        x, y = take(x, y, index)
        return np.clip(x, 0, 1), y

    x_support, y_support = take(dataset.x_train, y, support)
    x_pool, y_pool = take_images(dataset.x_train, y, pool)
    x_validation, y_validation = take_images(dataset.x_train, y, validation)
    x_test, y_test = take(dataset.x_test, dataset.y_test, test)
    return Splits(
        x_support, y_support, x_pool, y_pool, x_validation, y_validation, x_test, y_test,
        dataset.n_classes,
    )  # fmt: skip
