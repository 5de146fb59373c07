"""Algorithm 1 of the paper, an outer step at a time: the state of a run and what changes it.

Target batches derive from the seed and the step's number, not from a running state, and a factor
that goes on serving is made anew of what the state says (see `krr.Origin`), so that a state that
was saved goes on bit for bit.
"""

import time
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from advkip import attacks, data, gram, growth, kernels, krr, optimizers, store, worst_case
from advkip.config import MACHINE
from advkip.objective import Objective
from advkip.settings import SCORES

DIVERGED = 100
"""A run stops when its loss exceeds this many times the larger of 1 and its first loss."""


class State(NamedTuple):
    """Everything that a run is, after `step` updates."""

    step: int
    support: tuple  # (x, y)
    optimizer_states: tuple
    best: tuple  # (x, y)
    best_step: int
    best_score: float
    history: tuple
    seconds: float
    origin: krr.Origin | None  # of the factor that goes on serving; None: too few images for that


class Slope(NamedTuple):
    """Which way the support goes."""

    loss: float
    support: tuple  # dJ/dX_S, dJ/dY_S
    fitted: krr.Fit | None = None  # of the support, with the factor that its solves left


class Run:
    """One run of Algorithm 1: `start`, then `advance` until `finished` says why it is over."""

    advice = "smaller learning_rate or a larger diag_reg"

    def __init__(self, experiment, splits, kernel, method):
        settings = experiment.distillation(method)
        if settings is None:
            raise ValueError(
                f"expected settings of the method {method!r}, got null; pass them in the section "
                f"{method.replace('-', '_')}"
            )
        self.experiment, self.settings, self.method = experiment, settings, method
        self.splits, self.kernel = splits, kernel
        self.live = None, None  # an origin and the `krr.Fit` that has it
        self.optimizers = optimizers.of(settings, learn_labels=experiment.support.learn_labels)
        x = jnp.asarray(splits.x_support[:2])
        section = method.replace("-", "_")
        free = [f"{section}.{name}" for name in settings.may_differ]
        support = experiment.support
        free += ["dataset.n_test", *(f"support.{name}" for name in support.may_differ)]
        free.append("support.grown_from")  # its content counts, wherever the file lies
        self.about = experiment.of(*MACHINE, section, without=free) | {
            "method": method, "data": data.fingerprint(splits),
            "kernel values": [f"{float(v):.3g}" for v in kernel.value(x, x).ravel()],
        }  # fmt: skip
        if support.grown_from:
            self.about["grown from"] = growth.fingerprint(support.grown_from)
        self.batch_size = experiment.kernel.block_size or gram.rows_of_tile(
            kernel, support.n_support
        )
        self.objective = Objective(
            experiment, method, kernel, n_classes=splits.n_classes, batch_size=self.batch_size
        )

    def save(self, path, state):
        """Writes the state to a file that `load` reads."""
        tree = self.arrays(state)
        keys = ("step", "best_step", "best_score", "history", "seconds")
        notes = {key: getattr(state, key) for key in keys}
        store.save(path, tree, about=self.about, notes=notes)

    def load(self, path, state):
        """The state in a file, whose leaves are those of `state`."""
        tree, notes = store.load(path, self.arrays(state), about=self.about)
        notes["history"] = tuple(notes["history"])
        support, states, best, *origin = tree
        return state._replace(
            support=support, optimizer_states=states, best=best,
            origin=krr.Origin(*origin[0]) if origin else None, **notes,
        )  # fmt: skip

    def arrays(self, state):
        """What of a state is saved as a tree."""
        tree = (state.support, state.optimizer_states, state.best)
        return tree if state.origin is None else (*tree, tuple(state.origin))

    def start(self, initial):
        support = tuple(jnp.asarray(a) for a in initial)
        states = tuple(o and o.init(a) for o, a in zip(self.optimizers, support, strict=True))
        return State(0, support, states, support, 0, -1.0, (), 0.0, krr.no_origin(*support))

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
        slope = self.slope(state)
        loss = slope.loss
        first = state.history[0]["loss"] if state.history else loss
        if not loss <= DIVERGED * max(1.0, first):
            near = f" near {first:.3g}" if state.history else ""
            raise FloatingPointError(
                f"expected a finite loss{near}, got {loss:.3g} at step {state.step}; pass a "
                f"{self.advice} (the best support so far is kept in the error's `distilled` and in "
                "the checkpoint)"
            )

        last = state.step == e.n_steps
        seen = state.history and state.history[-1]["step"] == state.step
        if (state.step % e.eval_every == 0 or last) and not seen:
            state = self.validate(state, self.judged(state, slope), loss)
        if not (last or self.finished(state)):
            state = self.update(state, slope.support)
            if state.origin is not None:
                state = state._replace(origin=krr.origin(slope.fitted, state.origin))
                self.live = state.origin, slope.fitted
        jax.block_until_ready(state.support)
        return state._replace(seconds=state.seconds + time.perf_counter() - began)

    def slope(self, state) -> Slope:
        """Loss and gradient of a step: inner maximum, outer gradient."""
        fitted = self.fit(state)
        x, y = self.target(state.step)
        attacked = self.objective.attack(fitted.machine, x, y, step=state.step)
        batch = self.objective.batch(fitted.machine, x, attacked, y)
        found = krr.support_gradient(
            fitted, batch.x, batch.labels, loss=self.objective.loss, weights=batch.weights
        )
        return Slope(float(found.loss), (found.x_support, found.y_support), found.fitted)

    def judged(self, state, slope):
        """The model that is validated."""
        return slope.fitted.machine

    def fit(self, state):
        """The support's machine, with the factor of an earlier step where that serves."""
        section = self.experiment.kernel
        options = {"diag_reg": section.diag_reg, "block_size": section.block_size or 0}
        (origin, fitted), self.live = self.live, (None, None)  # whose memory is taken over
        if origin is state.origin is not None:
            return krr.refit(fitted, *state.support)
        del fitted  # of another state, before there is a second array of its size
        if state.origin is None or state.origin.age < 0:
            return krr.fit(self.kernel, *state.support, keep=state.origin is not None, **options)
        return krr.refit(krr.restore(state.origin, self.kernel, **options), *state.support)

    def target(self, step):
        """The target batch (X_T, labels) of a step, drawn from the pool."""
        generator = data.generator(self.experiment.seed, "target", step)
        index = generator.choice(
            len(self.splits.x_pool), self.experiment.support.n_target, replace=False, shuffle=False
        )
        x, y = self.splits.x_pool[index], self.splits.y_pool[index]
        if self.experiment.support.mirror:
            x = half_mirrored(x, generator)
        return jnp.asarray(x), y

    def validate(self, state, machine, loss):
        """Adds a line to the history and keeps the support if it is the best so far."""
        e, x, y = self.settings, self.splits.x_validation, self.splits.y_validation
        labels = self.objective.labels(y, "cross-entropy")
        ball = {"threat": self.objective.threat, "step_size": self.experiment.threat.step_size}

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
            "fgsm": accuracy(partial(attacks.fgsm, machine, threat=ball["threat"])),
            "pgd": accuracy(partial(attacks.pgd, machine, n_steps=e.eval_pgd_steps, **ball)),
            "gradient_norm": float(norms.mean()),
            "seconds": round(state.seconds, 2),
        }  # fmt: skip
        if e.choose_by == "worst-case":
            left = worst_case.withstood(machine, x, y, batch_size=self.batch_size, **ball)
            line["strong"] = float(left.mean())
        state = state._replace(history=(*state.history, line))
        score = line[SCORES[e.choose_by] if e.pgd_steps else "clean"]
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
            new[0] = jnp.clip(new[0], self.objective.threat.low, self.objective.threat.high)
        if not all(jnp.isfinite(value).all() for value in new):
            raise FloatingPointError(
                f"expected a finite support, got NaN or infinity after step {state.step}; pass "
                "a smaller learning_rate, a larger diag_reg or dtype 'float64'"
            )
        return state._replace(
            step=state.step + 1, support=tuple(new), optimizer_states=tuple(states)
        )


def half_mirrored(x, generator) -> np.ndarray:
    """Images (n, H, W, C), each of them mirrored or not, at random."""
    return np.where(generator.random((len(x), 1, 1, 1)) < 0.5, x, kernels.mirror(x))
