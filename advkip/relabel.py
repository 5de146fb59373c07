"""Original images with what a robust kernel machine answers to them: labels that say more.

A class leaves a network free to tell it by whatever does, and most of that is not robust. The
answers f(x) of a distilled kernel machine (Eq. 4), C numbers an image, say how much of each class
*the machine* sees there, by features that withstand attacks. A network that reproduces them on
enough images has learned the machine's function rather than the classes, and with it some of the
robustness. It is distillation (Hinton et al. 2015) from a teacher that is robust because of its
data: Algorithm 1 attacks the kernel machine and nothing else, and training on the answers is plain.
With adversarially trained networks as teachers, ARD (Goldblum et al. 2020) and RRM (USENIX Security
2022) found that robustness is passed on so.

Images alone do not say what the machine is between and around them. Copies say more, as the machine
answers to them, too. Where the attack's ball is large, those with noise: each pixel is changed by
as much as the attack may change it, up or down at random. Where it is small, mixtures of two images
(Zhang et al. 2018, mixup), which need no class of their own here. The control has the same images
and copies, with classes as labels, those of two images mixed as they are.

An image can say more than C numbers, too: with `relabelling.shift` it has features, what the
machine answers to the image moved to the left, to the right, up and down. A network is asked for
all of them while it is trained, at the image itself. (RRM takes a network's own features.)
"""

import json
from typing import Any

import numpy as np
import torch

import advkip
from advkip import algorithm, attacks, data, distill, files, gram, inputs, nets
from advkip.config import Experiment
from advkip.data import TrainingSet

RELABELLED, NOISY = "relabelled", "noisy"

FEATURES = " + features"
"""What the teacher's name ends with in tables, where the set has them."""


def noisy(original: TrainingSet, experiment: Experiment) -> TrainingSet:
    """A set, and after it copies of it: with noise on the images and the same labels, or mixtures.

    With `relabelling.kind` 'noise' each pixel of a copy is changed by `relabelling.noise`, up or
    down at random, and clipped to [0, 1]. As far as the threat allows is epsilon in each pixel
    (l_inf), or a change of length epsilon (l2). With 'mixup' an image of a copy is u times one and
    1 - u times another image, u uniform in [0, 1], and so is its label. With `relabelling.mirror`
    half of the images of each copy are mirrored before that. Of 8-bit images the copies are 8-bit
    images, too.

    Args:
      original: images (N, H, W, C) in [0, 1] and label vectors (N, C).
      experiment: whose `relabelling`, threat and seed are used.

    Returns:
      `relabelling.copies` times as many images.
    """
    settings, eight_bit = experiment.relabelling, inputs.as_eight_bit(original.x) is not None
    x, y = [original.x], [original.y]
    for copy in range(1, settings.copies):
        generator = data.generator(experiment.seed, "relabelled", copy)
        change = _with_noise if settings.kind == "noise" else _mixed
        base = original.x
        if settings.mirror:
            base = algorithm.half_mirrored(base, generator)
        more, labels = change(base, original.y, experiment, generator)
        x.append(rounded(more) if eight_bit else more)
        y.append(labels)
    return TrainingSet(np.concatenate(x), np.concatenate(y))


def _with_noise(x, y, experiment, generator):
    noise, threat = experiment.relabelling.noise, experiment.threat
    if noise is None:
        noise = threat.epsilon / np.sqrt(1 if threat.norm == "linf" else x[0].size)
    signs = 2 * generator.integers(0, 2, x.shape, dtype="int8") - 1
    return np.clip(x + np.float32(noise) * signs, 0, 1), y


def _mixed(x, y, experiment, generator):
    share, other = generator.random(len(x), "float32"), generator.permutation(len(x))
    mix = lambda a, u: u * a + (1 - u) * a[other]  # noqa: E731
    return mix(x, share[:, None, None, None]), mix(y, share[:, None])


def rounded(x) -> np.ndarray:
    """Images in [0, 1] as those of 8 bits that are next to them."""
    return data.to_float(np.round(x * 255).astype("uint8"))


MOVES = ((0, 1), (0, -1), (1, 0), (-1, 0))
"""Of an image: rows down and columns to the right."""


def moved(x, pixels) -> list[np.ndarray]:
    """Images (N, H, W, C), moved by so many pixels in each of MOVES; the border is repeated."""
    _, height, width, _ = x.shape
    wide = np.pad(x, ((0, 0), (pixels, pixels), (pixels, pixels), (0, 0)), mode="edge")
    return [wide[:, (1 - i) * pixels :, (1 - j) * pixels :][:, :height, :width] for i, j in MOVES]


def features(answer, x, pixels) -> np.ndarray:
    """What `answer` says to images moved by so many pixels, shape (N, 4 C); (N, 0) for 0 pixels."""
    found = [answer(one) for one in moved(x, pixels)] if pixels else [np.empty((len(x), 0))]
    return np.concatenate(found, 1).astype("float32")


def answers(model, x, *, batch_size: int = 0) -> np.ndarray:
    """What a `krr.KernelMachine`, or a network, answers to images (N, H, W, C), shape (N, C).

    `batch_size` is the number of images at a time; 0 chooses.
    """
    if isinstance(model, torch.nn.Module):
        size = batch_size or nets.batch_size(model, x.shape[1:])
        with torch.no_grad(), nets.deterministic():
            parts = [model(nets.to_tensor(x[i : i + size])) for i in range(0, len(x), size)]
        return np.concatenate([*map(nets.to_numpy, parts)])
    rows = batch_size or gram.rows_of_tile(model.kernel, len(model.x_support))
    return np.asarray(attacks.predict(model, x, batch_size=rows))


def relabelled(original: TrainingSet, answers, *, teacher: str) -> TrainingSet:
    """The images of a set with a teacher's answers in place of their labels.

    The answers are multiplied by one number, so that the labels have the standard deviation of
    those they replace: the same recipe then suits both.

    Args:
      original: images (N, H, W, C) and label vectors (N, C).
      answers: of the teacher to these images, shape (N, C).
      teacher: what tables call it.

    Raises:
      ValueError: answers that are all the same, or of another shape.
    """
    if answers.shape != original.y.shape or not answers.std() > 0:
        raise ValueError(
            f"expected answers {original.y.shape} that differ, got {answers.shape} of standard "
            f"deviation {answers.std():.3g}; pass those of a teacher of the same classes"
        )
    y = answers * (original.y.std() / answers.std())
    return TrainingSet(original.x, y.astype("float32"), teacher=teacher)


def read(path) -> np.ndarray | None:
    """The features (N, F) in a file of `save`, or None."""
    with np.load(path, allow_pickle=False) as file:
        return file["features_train"] if "features_train" in file.files else None


def save(path, made: TrainingSet, experiment: Experiment, dataset: data.Dataset) -> None:
    """Leaves a relabelled set as .npz in `data`'s layout, for any training script.

    x_train (uint8 where that loses nothing) are the images, y_train the label vectors, and
    features_train the features (N, F) where there are any; x_test and y_test the data set's own;
    `experiment`, with the kernel of a machine that labelled, and the teacher's name, says what the
    set was made with. `sets.from_path` reads it. A file that holds the same is left alone.
    """
    x = inputs.as_eight_bit(made.x)
    x = made.x if x is None else x
    settings = json.dumps(experiment.to_dict() | {"method": RELABELLED, "teacher": made.teacher})
    if distill.stored(path, (x, made.y, dataset.x_test, dataset.y_test)) == settings:
        return
    extra: dict[str, Any] = {}
    if made.features is not None:
        extra["features_train"] = made.features
    with files.replacing(path) as file:
        np.savez(
            file, x_train=x, y_train=made.y, x_test=dataset.x_test, y_test=dataset.y_test,
            version=advkip.__version__, experiment=settings, **extra,
        )  # fmt: skip
