"""Data sets as arrays in [0, 1], and class-balanced draws that never overlap.

A data set is found by name, first as `<name>.npz` in the given folder, else among the built-in
ones: `digits` (scikit-learn, embedded) and `mnist`, `fashion_mnist`, `cifar10` (torchvision,
downloaded once into a cache folder). A .npz file holds x_train, y_train, x_test, y_test;
images (N, H, W) or (N, H, W, C) with C = 1 or 3, uint8 or float in [0, 1]; integer labels
(N,) from 0, or label vectors (N, classes) such as a distilled set's. No pickle in it is loaded.
(torchvision's own CIFAR-10 files are pickles; it checks their MD5 sums before it reads them.)
"""

import hashlib
import json
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from advkip import inputs

KEYS = ("x_train", "y_train", "x_test", "y_test")

CACHE = Path("~/.cache/advkip")
TORCHVISION = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST", "cifar10": "CIFAR10"}
STREAMS = {
    "validation": 1, "support": 2, "test": 3, "target": 4, "weights": 5,
    "order": 6, "noise": 7, "original": 8, "watched": 9, "dropout": 10, "robust": 11,
    "diagnosis": 12,
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


def load(name, folder=""):
    """A data set by name.

    Args:
      name: a built-in name, or that of a file <name>.npz.
      folder: where .npz files are looked for; "" means the environment variable ADVKIP_DATA.

    Returns:
      A `Dataset`.

    Raises:
      FileNotFoundError: neither a built-in name nor a file; or the folder does not exist.
      ValueError: a file with wrong keys, shapes, dtypes, ranges or labels.
      ConnectionError: a download failed.
    """
    folder = folder or os.environ.get("ADVKIP_DATA", "")
    if folder:
        path = Path(folder).expanduser()
        if not path.is_dir():
            raise FileNotFoundError(
                f"expected data_dir to be a folder, got {folder}; pass the folder that holds "
                f"{name}.npz, or leave data_dir and ADVKIP_DATA empty for the built-in data sets"
            )
        if (path / f"{name}.npz").exists():
            return from_npz(path / f"{name}.npz")
    if name == "digits":
        return _digits()
    if name in TORCHVISION:
        return _torchvision(name)
    raise FileNotFoundError(
        f"expected a data set in {['digits', *TORCHVISION]} or a file {name}.npz, got {name!r} "
        f"and folder {folder or '(none)'}; pass data_dir or set ADVKIP_DATA to the file's folder"
    )


def from_npz(path):
    """A data set from a .npz file, checked; see the module's text for its keys.

    Distilled sets (`distill.save`) have label vectors, whose classes are the largest entries, and
    training images that may leave [0, 1]; they are known by their key `experiment`.

    Raises:
      ValueError: what is wrong with the file, and what was expected.
    """
    return _dataset(path, *_read(path))


def _dataset(path, arrays, settings):
    """A checked data set from what `_read` returned."""
    try:
        x_train, y_train = inputs.part_of_data_set(
            arrays["x_train"], arrays["y_train"], "train", in_range=not settings
        )
        x_test, y_test = inputs.part_of_data_set(arrays["x_test"], arrays["y_test"], "test")
        strangers = sorted(set(y_test.tolist()) - set(y_train.tolist()))
        if strangers and arrays["y_train"].ndim == 1:
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
    n_classes = int(max(y_train.max(), y_test.max())) + 1
    if n_classes < 2:
        raise ValueError(f"{path}: expected two classes or more, got one; pass labels from 0")
    return Dataset(x_train, y_train, x_test, y_test, n_classes)


KERNEL_SETTINGS = ("kernel", "W_std", "b_std", "diag_reg")
"""Settings of an experiment that a kernel machine depends on besides its images and labels."""


def is_here(name, folder=""):
    """Whether `load` needs no download."""
    folder = folder or os.environ.get("ADVKIP_DATA", "")
    there = bool(folder) and (Path(folder).expanduser() / f"{name}.npz").exists()
    return there or name not in TORCHVISION


def check_fits(path, chosen, shape, n_classes):
    """Raises ValueError unless a `TrainingSet` has images and classes of the data set at hand."""
    own = chosen.x.shape[1:], chosen.y.shape[1]
    if own != (shape, n_classes):
        raise ValueError(
            f"{path}: expected images {shape} of {n_classes} classes as in the data set, got "
            f"{own[0]} of {own[1]}; pass a set of that kind"
        )


class TrainingSet(NamedTuple):
    """What networks are trained on."""

    x: np.ndarray  # images (N, H, W, C), float32; a distilled set's may leave [0, 1]
    y: np.ndarray  # label vectors (N, classes), float32
    settings: dict | None = None  # KERNEL_SETTINGS that a distilled set was made with

    @property
    def kernel(self):
        """The name of the kernel that a distilled set was made with, or ''."""
        return self.settings["kernel"] if self.settings else ""


def training_set(path, *, n_classes=0, center=False):
    """(name, `TrainingSet`) of any .npz of this module's layout.

    The name is 'adv-kip' or 'kip' for a file of `distill.save`, whose label vectors are kept as
    they are; else the file's own, and integer labels become one-hot.

    Args:
      path: the file.
      n_classes: of integer labels; 0 means the largest label plus one.
      center: see `one_hot`.

    Raises:
      ValueError: as `from_npz`.
    """
    arrays, settings = _read(path)
    dataset = _dataset(path, arrays, settings)
    labels = arrays["y_train"]
    if not (labels.ndim == 2 and labels.shape[1] > 1):
        classes = max(n_classes, dataset.n_classes)
        labels = one_hot(dataset.y_train, classes, center=center)
    try:
        settings = json.loads(settings)
        name = "adv-kip" if settings["pgd_steps"] else "kip"
        made = {key: settings[key] for key in KERNEL_SETTINGS}
    except (ValueError, KeyError, TypeError):  # not written by `distill.save`
        name, made = Path(path).stem, None
    return name, TrainingSet(to_float(dataset.x_train), labels.astype("float32"), made)


def draw_original(splits, n, *, seed, center=False):
    """Original images to train networks on: n from the pool, equally many of each class; 0: all.

    Returns:
      A `TrainingSet` with one-hot labels (see `one_hot`).

    Raises:
      ValueError: too few images.
    """
    index = slice(None)
    if n:
        try:
            index = draw_balanced(
                splits.y_pool, n, n_classes=splits.n_classes, generator=generator(seed, "original")
            )
        except ValueError as error:
            raise ValueError(f"n_original = {n}: {error}; or pass 0 for all images") from None
    labels = one_hot(splits.y_pool[index], splits.n_classes, center=center)
    return TrainingSet(splits.x_pool[index].astype("float32"), labels.astype("float32"))


def draw_test(splits, n, *, seed):
    """n test images in random order and their labels; 0, or more than there are: all of them.

    Equally many of each class, unless a class has too few.
    """
    if not 0 < n < len(splits.y_test):
        return splits.x_test, splits.y_test
    stream = generator(seed, "watched")
    try:
        index = draw_balanced(splits.y_test, n, n_classes=splits.n_classes, generator=stream)
    except ValueError:
        index = stream.permutation(len(splits.y_test))[:n]
    return splits.x_test[index], splits.y_test[index]


def _read(path):
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
            f"expected to download {name} into {CACHE}, got {error}; pass data_dir or set "
            f"ADVKIP_DATA to a folder with {name}.npz (keys {', '.join(KEYS)}) to do without"
        ) from error
    parts = [(np.asarray(d.data), np.asarray(d.targets)) for d in (train, test)]
    (x_train, y_train), (x_test, y_test) = (inputs.part_of_data_set(x, y, name) for x, y in parts)
    return Dataset(x_train, y_train, x_test, y_test, 10)


def to_float(x, dtype="float32"):
    """uint8 or float images to floats in [0, 1]."""
    return x.astype(dtype) / 255 if x.dtype == np.uint8 else x.astype(dtype)


def one_hot(y, n_classes, *, center=False, dtype="float32"):
    """One-hot labels, shape (N, C); with `center`, minus 1/C so that each row sums to 0."""
    labels = np.eye(n_classes, dtype=dtype)[y]
    return labels - labels.dtype.type(1 / n_classes) if center else labels


def draw_balanced(y, n, *, n_classes, generator):
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


def generator(seed, stream, step=0):
    """The NumPy generator of one purpose (a key of STREAMS) and step, derived from the seed."""
    return np.random.default_rng([seed, STREAMS[stream], step])


def fingerprint(splits):
    """16 hex digits of all that a distillation sees: support, pool and validation of `Splits`.

    What is resumed belongs to these arrays, not to the name of the file that they came from.
    """
    found = hashlib.sha256()
    for name, array in splits._asdict().items():
        if name != "n_classes" and not name.endswith("_test"):
            found.update(f"{name} {array.dtype} {array.shape}".encode())
            found.update(np.ascontiguousarray(array))
    return found.hexdigest()[:16]


def split(dataset, experiment):
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

    y = dataset.y_train
    validation = draw(y, experiment.n_validation, "validation", "n_validation")
    pool = np.setdiff1d(np.arange(len(y)), validation)
    support = pool[draw(y[pool], experiment.n_support, "support", "n_support")]
    if experiment.n_target > len(pool):
        raise ValueError(
            f"n_target = {experiment.n_target}: expected at most {len(pool)} images that are not "
            "held out for validation; pass a smaller n_target"
        )
    test = np.arange(len(dataset.y_test))
    if experiment.n_test:
        test = draw(dataset.y_test, experiment.n_test, "test", "n_test")

    def take(x, y, index):
        return to_float(x[index], experiment.dtype), y[index]

    def take_images(x, y, index):
        # Only a distilled set leaves the pixel range; what is attacked must keep to it.
        x, y = take(x, y, index)
        return np.clip(x, 0, 1), y

    return Splits(
        *take(dataset.x_train, y, support),
        *take_images(dataset.x_train, y, pool),
        *take_images(dataset.x_train, y, validation),
        *take(dataset.x_test, dataset.y_test, test),
        dataset.n_classes,
    )
