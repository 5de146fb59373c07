"""Algorithm 1 of the paper (adversarial KIP), and KIP, which is the same with no inner maximum.

Every outer step factorises K_SS once, attacks a new target batch (Eq. 8), and moves the support
along the exact gradient (Eq. 7; see `krr`). A run writes checkpoints and continues from them bit
for bit: target batches derive from the seed and the step's number, not from a running state.
"""

import json
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import advkip
from advkip import attacks, checkpoint, data, kernels, krr

DIVERGED = 100
"""A run stops when its loss exceeds this many times the larger of 1 and its first loss."""


class Distilled(NamedTuple):
    """A distilled set and how it came about. Images NHWC, labels (S, C)."""

    x_support: np.ndarray  # the support with the best robust validation accuracy
    y_support: np.ndarray
    x_initial: np.ndarray  # the support as drawn
    y_initial: np.ndarray
    step: int  # outer steps behind x_support
    history: list  # dicts: step, loss, clean, fgsm, pgd, gradient_norm, seconds
    stopped: str  # "n_steps" or "patience"
    data: str = ""  # `data.fingerprint` of the splits


class DivergedError(FloatingPointError):
    """A run cannot go on: its loss diverged, a gradient is NaN, or K_SS is not positive definite.

    The message says what to change; `distilled` holds the best support before that, which is
    also written beside the checkpoint as kept-*.npz.
    """

    def __init__(self, message, distilled):
        super().__init__(message)
        self.distilled = distilled


class _State(NamedTuple):
    """Everything that a run is, after `step` updates."""

    step: int
    support: tuple  # (x, y)
    optimizer_states: tuple
    best: tuple  # (x, y)
    best_step: int
    best_score: float
    history: tuple
    seconds: float


def distill(experiment, splits, *, kernel=None, checkpoint_dir=None, progress=True):
    """Optimises a support set with Algorithm 1; `pgd_steps=0` is KIP.

    Args:
      experiment: a `config.Experiment`; "Support and target" to "Outer minimum" are used here.
      splits: `data.Splits`.
      kernel: see `kernels`; None means the experiment's.
      checkpoint_dir: folder of checkpoints, or None. A checkpoint of the same settings in it is
        continued; it is written every `checkpoint_every` steps, on interruption and at the end.
      progress: shows a bar with loss, clean and robust validation accuracy.

    Returns:
      A `Distilled`.

    Raises:
      DivergedError: the loss or its gradient is not finite, the loss is too large, or K_SS is not
        positive definite (see `krr.fit`); it holds the best support so far.
      ValueError: float64 without `kernels.set_precision`, or a checkpoint beyond n_steps.
    """
    if kernel is None:
        kernel = kernels.by_name(experiment.kernel, W_std=experiment.W_std, b_std=experiment.b_std)
    if experiment.dtype == "float64" and not jax.config.jax_enable_x64:
        raise ValueError(
            "expected JAX in double precision for dtype 'float64', got single; "
            "call kernels.set_precision('float64') at the start of the program"
        )
    initial = initial_support(experiment, splits)
    run = _Run(experiment, splits, kernel)
    path = checkpoint_dir and Path(checkpoint_dir) / f"checkpoint-{experiment.fingerprint()}.npz"
    state = run.start(initial)
    if path and path.exists():
        state = checkpoint.load(path, state, run)
        if state.step > experiment.n_steps:
            raise ValueError(
                f"expected a checkpoint of at most {experiment.n_steps} steps, got {state.step} "
                f"in {path.name}; pass n_steps >= {state.step}, or delete the file"
            )

    saved = state.step
    with tqdm(
        total=experiment.n_steps, initial=state.step, disable=not progress, mininterval=1,
        desc="adv-KIP" if experiment.pgd_steps else "KIP", unit="step",
    ) as bar:  # fmt: skip
        try:
            while not (reason := run.finished(state)):
                state = run.advance(state)
                bar.update(state.step - bar.n)
                bar.set_postfix_str(_summary(state.history[-1]), refresh=False)
                if path and state.step - saved >= experiment.checkpoint_every:
                    checkpoint.save(path, state, run)
                    saved = state.step
        except (FloatingPointError, KeyboardInterrupt) as error:
            if path:
                checkpoint.save(path, state, run)
            if isinstance(error, KeyboardInterrupt):
                raise
            kept = _result(state, initial, "diverged", run.data)
            if path:
                file = path.with_name(path.name.replace("checkpoint", "kept"))
                checkpoint.write(file, x_support=kept.x_support, y_support=kept.y_support)
            raise DivergedError(str(error), kept) from error
    if path:
        checkpoint.save(path, state, run)
    return _result(state, initial, reason, run.data)


def initial_support(experiment, splits):
    """(X_S, Y_S) as drawn from the training data: float images, (centred) one-hot labels."""
    y = data.one_hot(
        splits.y_support, splits.n_classes, center=experiment.center_labels, dtype=experiment.dtype
    )
    return splits.x_support, y


class _Run:
    """What stays the same from step to step of one run."""

    def __init__(self, experiment, splits, kernel):
        self.experiment, self.splits, self.kernel = experiment, splits, kernel
        self.threat = attacks.Threat(experiment.norm, experiment.epsilon)
        make = getattr(optax, experiment.optimizer)
        self.optimizers = (
            make(experiment.learning_rate),
            make(experiment.label_learning_rate) if experiment.learn_labels else None,
        )
        x = jnp.asarray(splits.x_support[:2])
        self.probe = [float(v) for v in kernel.value(x, x).ravel()]
        self.data = data.fingerprint(splits)
        self.batch_size = experiment.block_size or krr.rows_of_tile(kernel, experiment.n_support)

    def start(self, initial):
        support = tuple(jnp.asarray(a) for a in initial)
        states = tuple(o and o.init(a) for o, a in zip(self.optimizers, support, strict=True))
        return _State(0, support, states, support, 0, -1.0, (), 0.0)

    def finished(self, state):
        """Why the run is over, or ''. The last step is only looked at: it has a history line."""
        e, history = self.experiment, state.history
        if history and history[-1]["step"] == e.n_steps:
            return "n_steps"
        if e.patience and history and history[-1]["step"] - state.best_step >= e.patience:
            return "patience"
        return ""

    def advance(self, state):
        """One outer step: history line when due, inner maximum, outer gradient, update."""
        e, began = self.experiment, time.perf_counter()
        fitted = krr.fit(self.kernel, *state.support, diag_reg=e.diag_reg, block_size=e.block_size)
        x_target, y_target = self.target(state.step)
        x_target = self.attack(fitted.machine, x_target, y_target)
        gradient = krr.support_gradient(
            fitted, x_target, self.labels(y_target, e.outer_loss), diag_reg=e.diag_reg,
            loss=_OuterLoss(e.outer_loss, _scale(e, e.outer_loss)), block_size=e.block_size,
        )  # fmt: skip
        loss = float(gradient.loss)
        first = state.history[0]["loss"] if state.history else loss
        if not loss <= DIVERGED * max(1.0, first):
            raise FloatingPointError(
                f"expected a finite loss near {first:.3g}, got {loss:.3g} at step {state.step}; "
                "pass a smaller learning_rate or a larger diag_reg (the best support so far is "
                "kept in the error's `distilled` and in the checkpoint)"
            )

        last = state.step == e.n_steps
        seen = state.history and state.history[-1]["step"] == state.step
        if (state.step % e.eval_every == 0 or last) and not seen:
            state = self.look(state, fitted.machine, loss)
        if not (last or self.finished(state)):
            state = self.update(state, (gradient.x_support, gradient.y_support))
        jax.block_until_ready(state.support)
        return state._replace(seconds=state.seconds + time.perf_counter() - began)

    def target(self, step):
        """The target batch (X_T, labels) of a step, drawn from the pool."""
        generator = data.generator(self.experiment.seed, "target", step)
        index = generator.choice(
            len(self.splits.x_pool), self.experiment.n_target, replace=False, shuffle=False
        )
        return jnp.asarray(self.splits.x_pool[index]), self.splits.y_pool[index]

    def labels(self, y, loss):
        """Labels (n, C) as the loss wants them: one-hot; for mse centred like the support's."""
        center = self.experiment.center_labels and loss == "mse"
        return data.one_hot(y, self.splits.n_classes, center=center, dtype=self.experiment.dtype)

    def attack(self, machine, x, y):
        """The inner maximum, Eq. 8, from the images themselves."""
        e = self.experiment
        scaled = krr.KernelMachine(
            machine.kernel, machine.x_support, machine.alpha * _scale(e, e.inner_loss)
        )
        if not e.pgd_steps:
            return x
        # One step is FGSM: it goes to the border of the ball.
        step_size = e.epsilon if e.pgd_steps == 1 else e.step_size
        return attacks.in_batches(
            partial(
                attacks.pgd, scaled, threat=self.threat, n_steps=e.pgd_steps,
                step_size=step_size, loss=e.inner_loss,
            ),
            x, self.labels(y, e.inner_loss), batch_size=self.batch_size,
        )  # fmt: skip

    def look(self, state, machine, loss):
        """Adds a line to the history and keeps the support if it is the best so far."""
        e, x, y = self.experiment, self.splits.x_validation, self.splits.y_validation
        labels = self.labels(y, "cross-entropy")

        def accuracy(attack):
            attacked = attacks.in_batches(attack, x, labels, batch_size=self.batch_size)
            logits = attacks.predict(machine, attacked, batch_size=self.batch_size)
            return int((logits.argmax(1) == y).sum()) / len(y)

        norms = attacks.in_batches(
            partial(attacks.input_gradient_norm, machine), x, labels, batch_size=self.batch_size
        )
        line = {
            "step": state.step,
            "loss": loss,
            "clean": accuracy(lambda x, y: jnp.asarray(x)),
            "fgsm": accuracy(partial(attacks.fgsm, machine, threat=self.threat)),
            "pgd": accuracy(
                partial(
                    attacks.pgd, machine, threat=self.threat,
                    n_steps=e.eval_pgd_steps, step_size=e.step_size,
                )
            ),
            "gradient_norm": float(norms.mean()),
            "seconds": round(state.seconds, 2),
        }  # fmt: skip
        state = state._replace(history=(*state.history, line))
        score = line["pgd"] if e.pgd_steps else line["clean"]
        if score > state.best_score:
            return state._replace(best=state.support, best_step=state.step, best_score=score)
        return state

    def update(self, state, gradient):
        new, states = [], []
        for value, slope, optimizer, memory in zip(
            state.support, gradient, self.optimizers, state.optimizer_states, strict=True
        ):
            if optimizer is not None:
                changes, memory = optimizer.update(slope, memory, value)
                value = optax.apply_updates(value, changes)
            new.append(value)
            states.append(memory)
        if self.experiment.clip_support:
            new[0] = jnp.clip(new[0], self.threat.low, self.threat.high)
        if not all(jnp.isfinite(value).all() for value in new):
            raise FloatingPointError(
                f"expected a finite support, got NaN or infinity after step {state.step}; pass "
                "a smaller learning_rate, a larger diag_reg or dtype 'float64'"
            )
        return state._replace(
            step=state.step + 1, support=tuple(new), optimizer_states=tuple(states)
        )


def _scale(experiment, loss):
    return experiment.logit_scale if loss == "cross-entropy" else 1.0


class _OuterLoss(NamedTuple):
    """The loss of each image, of logits times `scale`."""

    name: str
    scale: float

    def __call__(self, logits, labels):
        return attacks.LOSSES[self.name](self.scale * logits, labels)


def _summary(line):
    return f"loss {line['loss']:.3f}, clean {line['clean']:.1%}, PGD {line['pgd']:.1%}"


def _result(state, initial, reason, data_seen):
    return Distilled(
        *(np.asarray(a) for a in state.best), *initial, state.best_step, list(state.history),
        reason, data_seen,
    )  # fmt: skip


def save(path, distilled, experiment, dataset):
    """Writes a distilled set as .npz, with its settings inside; `data.from_npz` reads it.

    Keys: x_train and y_train are the distilled images and label vectors, x_test and y_test the
    data set's own test images; `experiment` is the settings as JSON.
    """
    checkpoint.write(
        Path(path), x_train=distilled.x_support, y_train=distilled.y_support,
        x_test=dataset.x_test, y_test=dataset.y_test, step=distilled.step,
        experiment=json.dumps(experiment.to_dict()), version=advkip.__version__,
        data=distilled.data,
    )  # fmt: skip


def training_sets(experiment, splits, dataset, folder, names=None):
    """What networks are trained on: `names`, or what `net_sets` asks if that is None.

    'distilled' or 'adv-kip' is the experiment's `distilled_set` if it names a file, else
    `<folder>/adv-kip.npz`, and 'kip' is `<folder>/kip.npz`, as notebook 01 leaves them there; a set
    is distilled now if it is not there with the same settings. 'original' is a draw of `n_original`
    training images.

    Args:
      experiment, splits: as for `distill`.
      dataset: the `data.Dataset` behind the splits.
      folder: of checkpoints, adv-kip.npz and kip.npz.
      names: of the sets, in order.

    Returns:
      {name: `data.TrainingSet`}; 'distilled' becomes 'adv-kip', 'kip' or the file's name.

    Raises:
      ValueError: a file that is not such a set, or whose images or classes do not fit the splits.
    """
    sets = {}
    for wanted in experiment.net_sets if names is None else names:
        if wanted == "original":
            sets[wanted] = data.draw_original(
                splits, experiment.n_original, seed=experiment.seed, center=experiment.center_labels
            )
            continue
        kip = wanted == "kip"
        settings = experiment.as_kip().replace(distilled_set="") if kip else experiment
        name, chosen = _distilled_set(settings, splits, dataset, folder)
        sets[name if wanted == "distilled" else wanted] = chosen
    return sets


def machine(chosen, experiment):
    """The kernel machine of a training set, Eq. 4.

    A set that a kernel made is fitted as it was made, with its own kernel, W_std, b_std and ridge,
    which stand in its file; any other with the experiment's, on its first n_support images.

    Args:
      chosen: a `data.TrainingSet`.
      experiment: an `Experiment`.

    Returns:
      A `krr.KernelMachine` of the experiment's dtype.

    Raises:
      ValueError, FloatingPointError: as `krr.fit`.
    """
    made = chosen.settings or {key: getattr(experiment, key) for key in data.KERNEL_SETTINGS}
    kernel = kernels.by_name(made["kernel"], W_std=made["W_std"], b_std=made["b_std"])
    n = None if chosen.settings else experiment.n_support
    support = (part[:n].astype(experiment.dtype) for part in (chosen.x, chosen.y))
    return krr.fit(
        kernel, *support, diag_reg=made["diag_reg"], block_size=experiment.block_size
    ).machine


def _distilled_set(experiment, splits, dataset, folder):
    file = "adv-kip.npz" if experiment.pgd_steps else "kip.npz"
    path = Path(experiment.distilled_set or Path(folder) / file)
    if not experiment.distilled_set and not _is_of(path, experiment, splits):
        save(path, distill(experiment, splits, checkpoint_dir=folder), experiment, dataset)
    name, chosen = data.training_set(
        path, n_classes=splits.n_classes, center=experiment.center_labels
    )
    data.check_fits(path, chosen, splits.x_test.shape[1:], splits.n_classes)
    return name, chosen


def _is_of(path, experiment, splits):
    """Whether a file holds what `distill` gives for this experiment and data."""
    if not path.exists():
        return False
    with np.load(path, allow_pickle=False) as file:
        settings = json.loads(str(file["experiment"])) if "experiment" in file.files else {}
        seen = str(file["data"]) if "data" in file.files else ""
    keys = (*experiment.distillation(), "n_steps")
    same = all(settings.get(k) == experiment.to_dict()[k] for k in keys)
    return same and seen == data.fingerprint(splits)
