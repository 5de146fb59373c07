"""Algorithm 1 of the paper (adversarial KIP), and KIP, which is the same with no inner maximum.

Every outer step solves for the kernel machine (or trains networks, see `unrolled`), attacks a new
target batch (Eq. 8), and moves the support along the exact gradient (Eq. 7; see `algorithm` and
`krr`). A run writes checkpoints and continues from them bit for bit.
"""

import json
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

import advkip
from advkip import algorithm, data, files, growth, kernels, trajectories, unrolled
from advkip.config import Experiment
from advkip.progress import tqdm
from advkip.settings import Method


class Distilled(NamedTuple):
    """A distilled set and how it came about. Images NHWC, labels (S, C)."""

    x_support: np.ndarray  # the support with the best robust validation accuracy
    y_support: np.ndarray
    x_initial: np.ndarray  # the support at the start
    y_initial: np.ndarray
    step: int  # outer steps behind x_support
    history: list  # dicts: step, loss, clean, fgsm, pgd, gradient_norm, seconds
    stopped: str  # "n_steps", "patience" or "diverged"
    about: dict  # what the set belongs to: settings, kernel, data


class DivergedError(FloatingPointError):
    """A run cannot go on: its loss diverged, a gradient is NaN, or K_SS is not positive definite.

    The message says what to change; `distilled` holds the best support before that, which is
    also written beside the checkpoint as kept-*.npz.
    """

    def __init__(self, message, distilled):
        super().__init__(message)
        self.distilled = distilled


def distill(
    experiment: Experiment, splits: data.Splits, *, method: Method = "adv-kip", kernel=None,
    checkpoint_dir=None, progress: bool = True,
) -> Distilled:  # fmt: skip
    """Optimises a support set with Algorithm 1, or with KIP.

    Args:
      experiment: its sections seed, kernel, support, threat, and that of the method are used.
      splits: `data.Splits`.
      method: 'adv-kip', 'kip', or 'unrolled', with networks in the kernel's place.
      kernel: see `kernels`; None means the experiment's.
      checkpoint_dir: folder of distillation-<method>.npz, or None. It is continued; it is written
        every `checkpoint_every` steps, on interruption and at the end. The supports of every
        `keep_every` steps are left there, too, as <method>-<step>.npz, and what they follow as
        expert-<k>.npz (see `trajectories`).
      progress: shows a bar with loss, clean and robust validation accuracy.

    Raises:
      DivergedError: the loss or its gradient is not finite, the loss is too large, or K_SS is not
        positive definite (see `krr.fit`); it holds the best support so far.
      ValueError: float64 without `kernels.set_precision`, a method without settings, or a
        checkpoint of something else (see `store.load`) or beyond n_steps.
    """
    if kernel is None:
        kernel = kernels.of(experiment.kernel)
    if experiment.kernel.dtype == "float64" and not jax.config.read("jax_enable_x64"):
        raise ValueError(
            "expected JAX in double precision for dtype 'float64', got single; "
            "call kernels.set_precision('float64') at the start of the program"
        )
    run = _run(experiment, splits, kernel, method, checkpoint_dir, progress)
    if method == "unrolled" and run.settings.start_from == "adv-kip":
        before = distill(
            experiment, splits, kernel=kernel, checkpoint_dir=checkpoint_dir, progress=progress
        )
        initial = before.x_support, before.y_support
        run.about["started from"] = files.digest_of_arrays(*initial)
    else:
        initial = starting_support(experiment, splits, method)
    path = checkpoint_dir and Path(checkpoint_dir) / f"distillation-{method}.npz"
    state = run.start(initial)
    n_steps = run.settings.n_steps
    if path and path.exists():
        state = run.load(path, state)
        if state.step > n_steps:
            raise ValueError(
                f"expected a checkpoint of at most {n_steps} steps, got {state.step} in "
                f"{path.name}; pass n_steps >= {state.step}, or delete the file"
            )

    advanced, saved = False, state.step
    with tqdm(
        total=n_steps, initial=state.step, disable=not progress, mininterval=1, desc=method,
        unit="step",
    ) as bar:  # fmt: skip
        try:
            while not (reason := run.finished(state)):
                before, state, advanced = state.step, run.advance(state), True
                every = run.settings.keep_every
                if path and every and state.step > before and state.step % every == 0:
                    _keep(path.with_name(f"{method}-{state.step}.npz"), state, run)
                bar.update(state.step - bar.n)
                line = state.history[-1]
                text = f"loss {line['loss']:.3f}, clean {line['clean']:.1%}, PGD {line['pgd']:.1%}"
                bar.set_postfix_str(text, refresh=False)
                if path and state.step - saved >= run.settings.checkpoint_every:
                    run.save(path, state)
                    saved = state.step
        except (FloatingPointError, KeyboardInterrupt) as error:
            if path:
                run.save(path, state)
            if isinstance(error, KeyboardInterrupt):
                raise
            kept = _result(state, initial, "diverged", run.about)
            if path:
                with files.replacing(path.with_name(f"kept-{method}.npz")) as file:
                    np.savez(file, x_support=kept.x_support, y_support=kept.y_support)
            raise DivergedError(str(error), kept) from error
    if path and advanced:
        run.save(path, state)
    return _result(state, initial, reason, run.about)


def _run(experiment, splits, kernel, method, folder, progress) -> algorithm.Run:
    """The run of a method."""
    settings, parts = experiment.distillation(method), (experiment, splits, kernel, method)
    if method != "unrolled":
        return algorithm.Run(*parts)
    if settings and settings.n_experts:
        return trajectories.Run(*parts, folder=folder, progress=progress)
    return unrolled.Run(*parts)


def initial_support(experiment: Experiment, splits: data.Splits) -> tuple[np.ndarray, np.ndarray]:
    """(X_S, Y_S) as drawn from the training data: float images, (centred) one-hot labels.

    Of `support.copies`, the first has the images as they are; noise and mirror are of the others.
    """
    support, x, y = experiment.support, splits.x_support, splits.y_support
    stream, copies = data.generator(experiment.seed, "copies"), [x]
    for i in range(1, support.copies):
        copy = kernels.mirror(x) if support.mirror and i % 2 else x
        noise = stream.uniform(-1, 1, x.shape) * support.copy_noise
        copies.append(np.clip(copy + noise, 0, 1).astype(x.dtype))
    labels = support.label_scale * data.one_hot(
        y, splits.n_classes, center=support.center_labels, dtype=experiment.kernel.dtype
    )
    return np.concatenate(copies), np.tile(labels, (support.copies, 1))


def starting_support(
    experiment: Experiment, splits: data.Splits, method: Method = "adv-kip"
) -> tuple[np.ndarray, np.ndarray]:
    """(X_S, Y_S) at step 0: as drawn, or grown from a smaller set.

    Raises:
      ValueError, FloatingPointError: as `growth.grown`.
    """
    drawn = initial_support(experiment, splits)
    path = experiment.support.grown_from
    return drawn if path is None else growth.grown(path, *drawn, experiment, method)


def _result(state, initial, reason, about):
    best, history = map(np.asarray, state.best), list(state.history)
    return Distilled(*best, *initial, state.best_step, history, reason, about)


def _keep(path, state, run):
    """Writes the support of a state like a distilled set, with one test image for form."""
    if jax.process_index():  # of several hosts the first writes
        return
    support = _result(
        state._replace(best=state.support, best_step=state.step), (None, None), "", run.about
    )
    form = run.splits._replace(x_test=run.splits.x_test[:1], y_test=run.splits.y_test[:1])
    save(path, support, run.experiment, form)


def stored(path, arrays) -> str | None:
    """The settings in an .npz that holds these arrays, by data.KEYS; None without such a file."""
    try:
        found, settings = data.read(path)
    except ValueError:  # none, or a damaged one
        return None
    same = (np.array_equal(found[key], one) for key, one in zip(data.KEYS, arrays, strict=True))
    return settings if all(same) else None


def save(
    path, distilled: Distilled, experiment: Experiment, dataset: data.Dataset | data.Splits
) -> None:
    """Writes a distilled set as .npz, with its settings inside; `sets.from_path` reads it.

    x_train, y_train are distilled images and label vectors; x_test, y_test the data set's own.
    """
    with files.replacing(path) as file:
        np.savez(
            file, x_train=distilled.x_support, y_train=distilled.y_support,
            x_test=dataset.x_test, y_test=dataset.y_test, step=distilled.step,
            version=advkip.__version__,
            experiment=json.dumps(experiment.to_dict() | {"method": distilled.about["method"]}),
        )  # fmt: skip
