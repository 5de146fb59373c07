"""What Algorithm 1 raises and lowers: the inner maximum (Eq. 8), the outer minimum (Eq. 7).

With the machine f of the support S and a target batch (x_i, y_i) of T images, the attack finds
x_i' in the ball around x_i, and the support goes down the gradient of

    J(S) = (1 - c) sum_i w_i l(f(x_i'), y_i)  +  c mean_i l(f(x_i), y_i)
           +  p mean_i |d l(f(x_i), y_i) / d x_i|_*

in which x_i' and w_i are constants. The paper has w_i = 1/T, c = p = 0, and l the cross-entropy.

    l       outer_loss, with hinge_margin b: see `losses`; logits are scaled by logit_scale in
            cross-entropies
    w_i     softmax_i(hard_weight m_i), m_i the attacked image's margin over the standard deviation
            of all: images that the attack has in its grip count more
    c       clean_weight
    p       gradient_penalty, of either sign: > 0 flattens the loss around images, < 0 keeps PGD a
            slope to follow. |.|_* is dual to the threat's norm (l_1 for l_inf, l_2 for l_2), as
            then epsilon |.|_* is how far the loss can rise to first order. With d_i the step of
            unit length up the slope, |g|_* = <g, d_i>, and so, d_i held fixed, is its derivative
            (Danskin): two rows x_i +- h d_i with the weights +- p / (2 h T) are all it takes
    attack  inner_loss; random_start, restarts, step_rule: see `attacks.pgd`. 'targeted' pushes each
            image to a class of its own, drawn anew; 'mixture' gives a third of the batch to the
            cross-entropy, the margin and targets each
    f       the machine of S = (x_s, y_s) with the ridge and the kernel of `kernel`; with
            `kernel.name` fc1-mirror it averages over an image and its mirror image
    (x, y)  drawn anew each step; support.mirror mirrors half of the x_i
    S       at the start n_support / copies drawn images, each `copies` times, all but the first
            with noise (copy_noise) and, with support.mirror, every second one mirrored;
            y_s = label_scale times the class's vector. support.clip takes x_s back to the pixel
            range after each step; steps follow the optimizer and schedule
"""

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from advkip import attacks, data, kernels, krr, losses
from advkip.method_settings import MIXTURE
from advkip.threat import Threat, direction

REACH = 0.1
"""h of the gradient penalty, as a share of the radius."""


class Batch(NamedTuple):
    """Rows whose weighted losses sum to J."""

    x: jax.Array  # (n, ...)
    labels: jax.Array  # (n, C)
    weights: jax.Array  # (n,)


class OuterLoss(NamedTuple):
    """The loss of each image, of logits times `scale`."""

    name: str
    scale: float
    asked: float  # margin of the hinge losses

    def __call__(self, logits, labels):
        loss = losses.OUTER[self.name]
        options = {"asked": self.asked} if "hinge" in self.name else {}
        return loss(self.scale * logits, labels, **options)


class Objective:
    """J of an experiment's method, and the attack inside it."""

    def __init__(self, experiment, method, kernel, *, n_classes, batch_size):
        self.settings = experiment.distillation(method)
        self.experiment, self.n_classes, self.batch_size = experiment, n_classes, batch_size
        self.threat = Threat(experiment.threat.norm, experiment.threat.epsilon)
        self.attacked = kernels.rounded(kernel, self.settings.attack_precision)
        name = self.settings.outer_loss
        self.loss = OuterLoss(name, self._scale(name), self.settings.hinge_margin)

    def labels(self, y, loss) -> np.ndarray:
        """Labels (n, C) as a loss wants them: one-hot; for mse centred like the support's."""
        center = self.experiment.support.center_labels and loss == "mse"
        return data.one_hot(y, self.n_classes, center=center, dtype=self.experiment.kernel.dtype)

    def _scale(self, loss):
        return self.settings.logit_scale if loss == "cross-entropy" else 1.0

    def attack(self, machine, x, y, *, step, grown=1.0) -> jax.Array:
        """The inner maximum for images x (T, ...) with integers y, at an outer step.

        The machine is a `krr.KernelMachine` or an `unrolled.Net`; `grown` is the share of the
        radius, and of the step size.
        """
        e = self.settings
        if not e.pgd_steps:
            return x
        names = MIXTURE if e.inner_loss == "mixture" else (e.inner_loss,)
        stream = data.generator(self.experiment.seed, "inner", step)
        aim = (y + stream.integers(1, self.n_classes, len(y))) % self.n_classes
        key = jax.random.key(int(stream.integers(2**31))) if e.random_start else None
        found = x
        for i, name in enumerate(names):
            part = slice(i, None, len(names))
            rows = (x[part], self.labels(y[part], name), aim[part], np.arange(len(y))[part])
            attack = partial(self._attack_rows, machine, name, key, grown)
            attacked = attacks.in_batches(attack, *rows, batch_size=self.batch_size)
            found = attacked if len(names) == 1 else found.at[part].set(attacked)
        return found

    def _attack_rows(self, machine, name, key, grown, x, labels, aim, index):
        e, threat, scale = self.settings, self.experiment.threat, self._scale(name)
        if isinstance(machine, krr.KernelMachine):
            scaled = krr.KernelMachine(self.attacked, machine.x_support, machine.alpha * scale)
        else:
            scaled = machine.scaled(scale)
        ball = dataclasses.replace(self.threat, epsilon=grown * threat.epsilon)
        return attacks.pgd(
            scaled, x, labels, threat=ball, n_steps=e.pgd_steps, loss=name,
            # One step is FGSM: it goes to the border of the ball.
            step_size=grown * (threat.epsilon if e.pgd_steps == 1 else threat.step_size),
            n_restarts=e.restarts, rule=e.step_rule, aim=aim if name == "targeted" else None,
            key=None if key is None else jax.random.fold_in(key, int(index[0])),
        )  # fmt: skip

    def batch(self, machine, x, attacked, y) -> Batch:
        """The rows of J for images x, attacked ones, and integers y."""
        e = self.settings
        labels, uniform = self.labels(y, e.outer_loss), jnp.full(len(y), 1 / len(y), x.dtype)
        parts = []
        if e.clean_weight < 1:
            weights = self._hardness(machine, attacked, labels) if e.hard_weight else uniform
            parts.append((attacked, (1 - e.clean_weight) * weights))
        if e.clean_weight:
            parts.append((x, e.clean_weight * uniform))
        if e.gradient_penalty:
            h = REACH * self.threat.epsilon
            up = attacks.in_batches(
                partial(_slope, machine, self.loss, self.threat.norm), x, labels,
                batch_size=self.batch_size,
            )  # fmt: skip
            weights = e.gradient_penalty / (2 * h) * uniform
            parts += [(x + h * up, weights), (x - h * up, -weights)]
        rows, weights = (jnp.concatenate(part) for part in zip(*parts, strict=True))
        return Batch(rows, jnp.concatenate([labels] * len(parts)), weights)

    def _hardness(self, machine, attacked, labels):
        logits = attacks.predict(machine, attacked, batch_size=self.batch_size)
        margins = losses.margin(logits, labels)
        return jax.nn.softmax(self.settings.hard_weight * margins / (margins.std() + 1e-12))


@partial(jax.jit, static_argnums=(1, 2))
def _slope(machine, loss, norm, x, labels):
    """The step of unit length up the loss of each image."""
    slope = jax.grad(lambda x: loss(machine(x), labels).sum())(x)
    return direction(jnp.where(jnp.isfinite(slope), slope, 0), norm)
