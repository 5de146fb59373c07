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

import advkip
from advkip import attacks, data, files, gram, kernels, krr, optimizers, store
from advkip.config import MACHINE, Experiment
from advkip.progress import tqdm
from advkip.settings import Method

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


def distill(
    experiment: Experiment, splits: data.Splits, *, method: Method = "adv-kip", kernel=None,
    checkpoint_dir=None, progress: bool = True,
) -> Distilled:  # fmt: skip
    """Optimises a support set with Algorithm 1, or with KIP.

    Args:
      experiment: its sections seed, kernel, support, threat, and `adv_kip` or `kip` are used.
      splits: `data.Splits`.
      method: 'adv-kip' or 'kip'.
      kernel: see `kernels`; None means the experiment's.
      checkpoint_dir: folder of distillation-<method>.npz, or None. It is continued; it is written
        every `checkpoint_every` steps, on interruption and at the end.
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
    initial = initial_support(experiment, splits)
    run = Run(experiment, splits, kernel, method)
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

    begun, saved = state, state.step
    with tqdm(
        total=n_steps, initial=state.step, disable=not progress, mininterval=1, desc=method,
        unit="step",
    ) as bar:  # fmt: skip
        try:
            while not (reason := run.finished(state)):
                state = run.advance(state)
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
    if path and state is not begun:
        run.save(path, state)
    return _result(state, initial, reason, run.about)


def initial_support(experiment: Experiment, splits: data.Splits) -> tuple[np.ndarray, np.ndarray]:
    """(X_S, Y_S) as drawn from the training data: float images, (centred) one-hot labels."""
    y = data.one_hot(
        splits.y_support, splits.n_classes, center=experiment.support.center_labels,
        dtype=experiment.kernel.dtype,
    )  # fmt: skip
    return splits.x_support, y


class Run:
    """One run of Algorithm 1: `start`, then `advance` until `finished` says why it is over."""

    def __init__(self, experiment, splits, kernel, method):
        settings = experiment.distillation(method)
        if settings is None:
            raise ValueError(
                f"expected settings of the method {method!r}, got null; pass them in the section "
                f"{method.replace('-', '_')}"
            )
        self.experiment, self.settings, self.method = experiment, settings, method
        self.splits, self.kernel = splits, kernel
        self.attacked = kernels.rounded(kernel, settings.attack_precision)
        self.threat = attacks.Threat(experiment.threat.norm, experiment.threat.epsilon)
        self.optimizers = optimizers.of(settings, learn_labels=experiment.support.learn_labels)
        x = jnp.asarray(splits.x_support[:2])
        section = method.replace("-", "_")
        free = ("dataset.n_test", *(f"{section}.{name}" for name in settings.may_differ))
        self.about = experiment.of(*MACHINE, section, without=free) | {
            "method": method, "data": data.fingerprint(splits),
            "kernel values": [f"{float(v):.3g}" for v in kernel.value(x, x).ravel()],
        }  # fmt: skip
        self.batch_size = experiment.kernel.block_size or gram.rows_of_tile(
            kernel, experiment.support.n_support
        )

    def save(self, path, state):
        """Writes the state to a file that `load` reads."""
        tree = (state.support, state.optimizer_states, state.best)
        keys = ("step", "best_step", "best_score", "history", "seconds")
        notes = {key: getattr(state, key) for key in keys}
        store.save(path, tree, about=self.about, notes=notes)

    def load(self, path, state):
        """The state in a file, whose leaves are those of `state`."""
        tree = (state.support, state.optimizer_states, state.best)
        (support, states, best), notes = store.load(path, tree, about=self.about)
        notes["history"] = tuple(notes["history"])
        return state._replace(support=support, optimizer_states=states, best=best, **notes)

    def start(self, initial):
        support = tuple(jnp.asarray(a) for a in initial)
        states = tuple(o and o.init(a) for o, a in zip(self.optimizers, support, strict=True))
        return _State(0, support, states, support, 0, -1.0, (), 0.0)

    def finished(self, state):
        """Why the run is over, or ''. The last step is only looked at: it has a history line."""
        e, history = self.settings, state.history
        if history and history[-1]["step"] == e.n_steps:
            return "n_steps"
        if e.patience and history and history[-1]["step"] - state.best_step >= e.patience:
            return "patience"
        return ""

    def advance(self, state):
        """One outer step: history line when due, inner maximum, outer gradient, update."""
        e, began = self.settings, time.perf_counter()
        diag_reg, block_size = self.experiment.kernel.diag_reg, self.experiment.kernel.block_size
        fitted = krr.fit(self.kernel, *state.support, diag_reg=diag_reg, block_size=block_size)
        x_target, y_target = self.target(state.step)
        x_target = self.attack(fitted.machine, x_target, y_target)
        gradient = krr.support_gradient(
            fitted, x_target, self.labels(y_target, e.outer_loss), diag_reg=diag_reg,
            loss=_OuterLoss(e.outer_loss, self.scale(e.outer_loss)), block_size=block_size,
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
            state = self.validate(state, fitted.machine, loss)
        if not (last or self.finished(state)):
            state = self.update(state, (gradient.x_support, gradient.y_support))
        jax.block_until_ready(state.support)
        return state._replace(seconds=state.seconds + time.perf_counter() - began)

    def target(self, step):
        """The target batch (X_T, labels) of a step, drawn from the pool."""
        generator = data.generator(self.experiment.seed, "target", step)
        index = generator.choice(
            len(self.splits.x_pool), self.experiment.support.n_target, replace=False, shuffle=False
        )
        return jnp.asarray(self.splits.x_pool[index]), self.splits.y_pool[index]

    def labels(self, y, loss):
        """Labels (n, C) as the loss wants them: one-hot; for mse centred like the support's."""
        center = self.experiment.support.center_labels and loss == "mse"
        dtype = self.experiment.kernel.dtype
        return data.one_hot(y, self.splits.n_classes, center=center, dtype=dtype)

    def scale(self, loss):
        return self.settings.logit_scale if loss == "cross-entropy" else 1.0

    def attack(self, machine, x, y):
        """The inner maximum, Eq. 8, from the images themselves."""
        e, threat = self.settings, self.experiment.threat
        scaled = krr.KernelMachine(
            self.attacked, machine.x_support, machine.alpha * self.scale(e.inner_loss)
        )
        if not e.pgd_steps:
            return x
        # One step is FGSM: it goes to the border of the ball.
        step_size = threat.epsilon if e.pgd_steps == 1 else threat.step_size
        return attacks.in_batches(
            partial(
                attacks.pgd, scaled, threat=self.threat, n_steps=e.pgd_steps,
                step_size=step_size, loss=e.inner_loss,
            ),
            x, self.labels(y, e.inner_loss), batch_size=self.batch_size,
        )  # fmt: skip

    def validate(self, state, machine, loss):
        """Adds a line to the history and keeps the support if it is the best so far."""
        e, x, y = self.settings, self.splits.x_validation, self.splits.y_validation
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
                    n_steps=e.eval_pgd_steps, step_size=self.experiment.threat.step_size,
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
        if self.experiment.support.clip:
            new[0] = jnp.clip(new[0], self.threat.low, self.threat.high)
        if not all(jnp.isfinite(value).all() for value in new):
            raise FloatingPointError(
                f"expected a finite support, got NaN or infinity after step {state.step}; pass "
                "a smaller learning_rate, a larger diag_reg or dtype 'float64'"
            )
        return state._replace(
            step=state.step + 1, support=tuple(new), optimizer_states=tuple(states)
        )


class _OuterLoss(NamedTuple):
    """The loss of each image, of logits times `scale`."""

    name: str
    scale: float

    def __call__(self, logits, labels):
        return attacks.LOSSES[self.name](self.scale * logits, labels)


def _result(state, initial, reason, about):
    best, history = map(np.asarray, state.best), list(state.history)
    return Distilled(*best, *initial, state.best_step, history, reason, about)


def save(path, distilled: Distilled, experiment: Experiment, dataset: data.Dataset) -> None:
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
