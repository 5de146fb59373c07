"""Every training set by its name, with the kernel that it was made for.

original          a draw of training images
adv-kip, kip      what `distill` makes of the experiment, or has made of it in the folder before
unrolled          the same with networks in the kernel's place (`unrolled`)
noisy             'original' and copies of it, with noise or mixed (`relabel`)
relabelled        the same images, labelled by the machine of `relabelling.teacher` or of 'adv-kip',
                  or by an adversarially trained network, robust because of its training; for
                  comparison by the machine of 'original' images, or still with their 'classes';
                  with `relabelling.rounds` also attacked ones (`aggregate`)
robust-features   made with an adversarially trained network (`invert`)
a path            an .npz of `data`'s layout, as another experiment's adv-kip.npz; or a folder with
                  the published robust features (`features.load`)
"""

import json
import re
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np

from advkip import (
    aggregate,
    data,
    distill,
    features,
    files,
    growth,
    kernels,
    krr,
    relabel,
    search,
    training,
)
from advkip.config import Experiment
from advkip.data import TrainingSet
from advkip.method_settings import Unrolled
from advkip.relabel import NOISY, RELABELLED
from advkip.settings import ADVERSARIAL, CLASSES, ORIGINAL, Kernel, Method, is_path

ROBUST_FEATURES, UNROLLED = "robust-features", "unrolled"


def load(
    names: Iterable[str], experiment: Experiment, splits: data.Splits, dataset: data.Dataset, folder
) -> dict[str, TrainingSet]:
    """Training sets by name, but for robust features to be made (`invert`).

    Args:
      names: see the module's text.
      experiment, splits: as for `distill.distill`.
      dataset: the `data.Dataset` behind the splits.
      folder: of checkpoints; a set that is distilled or relabelled is also left there, as
        <name>.npz.

    Returns:
      {name: `TrainingSet`}; a path becomes what is in it: 'adv-kip', 'kip', 'robust-features' or
      the file's own name.

    Raises:
      ValueError: a file that is not such a set, whose images or classes do not fit the splits, or
        whose name another set has; FileNotFoundError.
    """
    found = {}
    names = sorted(names, key=RELABELLED.__eq__)  # the last, when its teacher is there
    for name in (one for one in names if one != ROBUST_FEATURES):
        if is_path(name):
            name, chosen = from_path(name, n_classes=splits.n_classes, **_center(experiment))
            data.check_fits(name, *chosen[:2], splits.x_test.shape[1:], splits.n_classes)
        elif name == ORIGINAL:
            chosen = data.draw_original(experiment, splits)
        elif name == NOISY:
            chosen = noisy(experiment, splits)
        elif name == RELABELLED:
            teacher = _teacher(found.get("adv-kip"), experiment, splits, dataset, folder)
            chosen = relabelled(teacher, experiment, splits, folder)
            own = experiment.replace(kernel=teacher.kernel.to_dict())
            relabel.save(Path(folder) / f"{name}.npz", chosen, own, dataset)
        else:
            chosen = _distilled(cast(Method, name), experiment, splits, dataset, folder)
        if name in found:
            raise ValueError(f"expected sets of different names, got {name!r} twice; pass one")
        found[name] = chosen
    return found


def one_of(found: dict[str, TrainingSet], name: str) -> TrainingSet:
    """The set of that name.

    Raises:
      ValueError: none, as for a path, whose set has a name of its own (see `load`).
    """
    if name not in found:
        raise ValueError(
            f"expected adversarial_training.sets among {sorted(found)}, got {name!r}; pass names "
            "of these, not paths"
        )
    return found[name]


def noisy(experiment: Experiment, splits: data.Splits) -> TrainingSet:
    """The set 'noisy' of an experiment (see `relabel.noisy`)."""
    return relabel.noisy(data.draw_original(experiment, splits), experiment)


class Teacher(NamedTuple):
    """Who labels the set 'relabelled'."""

    name: str  # what tables call it
    kernel: Kernel  # of its machine; of a network the experiment's
    answer: Callable | None  # label vectors (n, C) of images (n, H, W, C); None: their own


def relabelled(
    teacher: Teacher, experiment: Experiment, splits: data.Splits, folder=None
) -> TrainingSet:
    """The set 'relabelled' of an experiment, labelled by a teacher.

    `folder` is that of the checkpoints of `relabelling.rounds`.

    Raises:
      ValueError, FloatingPointError: as `relabel.relabelled` and `training.train`.
    """
    chosen, shift = noisy(experiment, splits), experiment.relabelling.shift
    n = experiment.networks.n_watch
    watched = training.Watched(splits.x_validation[:n], splits.y_validation[:n])
    if teacher.answer is None:
        named = chosen._replace(teacher=teacher.name)
        return aggregate.aggregated(named, None, experiment, watched, folder)
    found = teacher.answer(chosen.x)
    made = relabel.relabelled(chosen, found, teacher=teacher.name)
    scale = made.y.std() / found.std()

    def features(x):
        return scale * relabel.features(teacher.answer, x, shift)

    def answer(x):
        return np.concatenate([scale * teacher.answer(x), features(x)], 1)

    if shift:
        named = made.teacher + relabel.FEATURES
        made = made._replace(features=features(chosen.x), teacher=named)
    return aggregate.aggregated(made, answer, experiment, watched, folder)


def _teacher(distilled, experiment, splits, dataset, folder) -> Teacher:
    """That of `relabelling.teacher`; without, the machine of 'adv-kip', `distilled` before or now.

    Raises:
      ValueError, FloatingPointError: as `machine` and `training.train`, or a file that does not do.
    """
    path, rows = experiment.relabelling.teacher, experiment.kernel.block_size or 0
    if path == ADVERSARIAL:
        return _adversarially_trained(experiment, splits, folder)
    if path == CLASSES:
        return Teacher(CLASSES, experiment.kernel, None)
    if path == ORIGINAL:
        its = TrainingSet(*distill.initial_support(experiment, splits), experiment.kernel)
    elif path is not None:
        its = _named(path, experiment, splits)
    else:
        its = distilled or _distilled("adv-kip", experiment, splits, dataset, folder)
    kernel = its.kernel or experiment.kernel
    name = f"{ORIGINAL} {kernel.name}" if path == ORIGINAL else kernel.name
    answer = partial(relabel.answers, machine(its, experiment), batch_size=rows)
    return Teacher(name, kernel, answer)


def _adversarially_trained(experiment, splits, folder) -> Teacher:
    """The network that notebook 04 has: the first of `adversarial_training`, on original images, of
    the first seed.

    If networks of its kind are trained on the set, the first of them begins with the same weights.

    Raises:
      ValueError: settings without such a network; FloatingPointError: as `training.train`.
    """
    at = experiment.adversarial_training
    if not (at and at.nets):
        raise ValueError(
            f"expected adversarial_training with nets, of which the first answers, got {at}; pass "
            "them, or another relabelling.teacher"
        )
    watched = training.watched(splits, experiment.networks.n_watch, seed=experiment.seed)
    train, (net, *_) = search.Trainer(experiment, watched, folder), at.nets
    found = train(net, "original", data.draw_original(experiment, splits), adversarially=True)
    answer = partial(relabel.answers, found.best[0].net)
    return Teacher(f"{ADVERSARIAL} {net}", experiment.kernel, answer)


def _named(path, experiment, splits) -> TrainingSet:
    """The set that `relabelling.teacher` names."""
    arrays, settings = growth.read_same("relabelling.teacher", path, experiment, "adv-kip")
    x, y = (arrays[f"{key}_train"].astype("float32") for key in "xy")
    data.check_fits(path, x, y, splits.x_test.shape[1:], splits.n_classes)
    return TrainingSet(x, y, Kernel.from_params(settings["kernel"]))


def _distilled(method: Method, experiment, splits, dataset, folder):
    result = distill.distill(experiment, splits, method=method, checkpoint_dir=folder)
    path = Path(folder) / f"{method}.npz"
    if not _holds(path, result, experiment, dataset):
        distill.save(path, result, experiment, dataset)
    x, y = (a.astype("float32") for a in (result.x_support, result.y_support))
    if method == UNROLLED:
        return TrainingSet(x, y, teacher=experiment.unrolled.teacher)
    return TrainingSet(x, y, experiment.kernel)


def invert(net, chosen: TrainingSet, experiment: Experiment, folder) -> features.Inverted:
    """The robust features of a training set, made with an adversarially trained network.

    They are also left in the folder, as robust-features.npz in `data`'s layout.
    """
    settings = experiment.robust_features
    made = features.generate(
        net, chosen.x, chosen.y,
        n=min(settings.n_images or experiment.support.n_support, len(chosen.x)),
        steps=settings.n_steps, step_size=settings.step_size, noise=settings.noise,
        seed=experiment.seed, checkpoint_dir=folder,
    )  # fmt: skip
    with files.replacing(Path(folder) / f"{ROBUST_FEATURES}.npz") as file:
        x_test, y_test = made.x_original[:1], made.y[:1]  # for form
        np.savez(file, x_train=made.x, y_train=made.y, x_test=x_test, y_test=y_test)
    return made


def from_path(path, *, n_classes: int = 0, center: bool = False) -> tuple[str, TrainingSet]:
    """(name, `TrainingSet`) of an .npz, or of a folder with the published robust features.

    The name is 'adv-kip' or 'kip' for a file of `distill.save`, whose label vectors are kept as
    they are, with the step behind it for 'adv-kip-100.npz', and 'relabelled' for one of
    `relabel.save`; else the file's own, and integer labels become one-hot.

    Args:
      path: the file or folder.
      n_classes: of integer labels; 0 means the largest label plus one.
      center: see `data.one_hot`.

    Raises:
      ValueError: as `data.from_npz` or `features.load`.
    """
    path = files.find(path)
    if path.is_dir():
        x, y = features.load(path, n_classes=n_classes or 10, center=center)
        return ROBUST_FEATURES, TrainingSet(x, y)
    arrays, settings = data.read(path)
    dataset = data.dataset_of(path, arrays, settings)
    labels = arrays["y_train"]
    if not (labels.ndim == 2 and labels.shape[1] > 1):
        classes = max(n_classes, dataset.n_classes)
        labels = data.one_hot(dataset.y_train, classes, center=center)
    method, kernel = _made_with(settings)
    parts = data.to_float(dataset.x_train), labels.astype("float32")
    if method == RELABELLED and kernel:
        teacher = json.loads(settings).get("teacher", kernel.name)
        return RELABELLED, TrainingSet(*parts, teacher=teacher, features=relabel.read(path))
    of_step = method and re.fullmatch(rf"{method}-\d+", path.stem)
    name = path.stem if of_step or not method else method
    if method == UNROLLED:
        teacher = Unrolled.from_params(json.loads(settings)[UNROLLED]).teacher
        return name, TrainingSet(*parts, teacher=teacher)
    return name, TrainingSet(*parts, kernel)


def kept(folder, method: Method, steps: list[int]) -> dict[int, TrainingSet]:
    """{step: `TrainingSet`} of the supports that `keep_every` left in a run's folder.

    Args:
      folder: of the run.
      method: 'adv-kip', 'kip' or 'unrolled'.
      steps: those wanted; one that has no file is left out.
    """
    paths = {step: Path(folder) / f"{method}-{step}.npz" for step in steps}
    return {step: from_path(path)[1] for step, path in paths.items() if path.exists()}


def sample(path, to, *, per_class: int) -> None:
    """Writes the first images of each class of a distilled set, in float16, as a set of its own.

    A set of the paper's size is too large to pass on; a sample of it trains networks. (A kernel
    machine wants the whole: its labels were learned together.)

    Raises:
      ValueError: as `data.from_npz`, no distilled set, or fewer images of a class.
    """
    arrays, settings = data.read(files.find(path))
    if not settings:
        raise ValueError(f"expected a file of distill.save, got {path}; pass an adv-kip.npz")
    classes = arrays["y_train"].argmax(1)
    index = [np.flatnonzero(classes == c)[:per_class] for c in range(arrays["y_train"].shape[1])]
    if (fewest := min(map(len, index))) < per_class:
        raise ValueError(f"expected {per_class} images a class, got {fewest}; pass that or fewer")
    chosen = np.sort(np.concatenate(index))
    parts = {key: arrays[f"{key}_train"][chosen].astype("float16") for key in ("x", "y")}
    with files.replacing(to) as file:
        np.savez(
            file, x_train=parts["x"], y_train=parts["y"], x_test=arrays["x_test"][:1],
            y_test=arrays["y_test"][:1], experiment=settings,
        )  # fmt: skip


def _made_with(settings):
    """(method, kernel) of a file of `distill.save` or `relabel.save`, also of the flat settings
    before sections."""
    try:
        found = json.loads(settings)
        if isinstance(found["kernel"], str):
            method = "adv-kip" if found["pgd_steps"] else "kip"
            found["kernel"] = {"name": found["kernel"]} | {
                key: found[key] for key in ("W_std", "b_std", "diag_reg", "dtype")
            }
        else:
            method = found["method"]
        return method, Kernel.from_params(found["kernel"])
    except (ValueError, KeyError, TypeError):  # not written by `distill.save`
        return None, None


def _holds(path, distilled, experiment, dataset):
    """Whether a file is already what `distill.save` would write, as far as it is read."""
    new = (distilled.x_support, distilled.y_support, dataset.x_test, dataset.y_test)
    settings = distill.stored(path, new)
    return settings is not None and _made_with(settings) == (
        distilled.about["method"], experiment.kernel,
    )  # fmt: skip


def machine(chosen: TrainingSet, experiment: Experiment) -> krr.KernelMachine:
    """The kernel machine of a training set, Eq. 4, of the experiment's dtype.

    A set that a kernel made is fitted as it was made, with its own kernel, W_std, b_std and ridge;
    any other with the experiment's, on its first n_support images.

    Raises:
      ValueError, FloatingPointError: as `krr.fit`.
    """
    made, own = chosen.kernel or experiment.kernel, experiment.kernel
    n = None if chosen.kernel else experiment.support.n_support
    support = (part[:n].astype(own.dtype) for part in (chosen.x, chosen.y))
    return krr.fit(
        kernels.of(made), *support, diag_reg=made.diag_reg, block_size=own.block_size
    ).machine


def _center(experiment):
    return {"center": experiment.support.center_labels}
