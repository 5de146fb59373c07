"""Trajectories of adversarially trained networks, and sets on which plain training follows them.

An expert is a network trained adversarially on all images: theta_0 random, then each batch is
attacked (by `inner_loss`; of `n_target` images) and takes one step of gradient descent with
momentum on the squared error. What is kept is smoothed,

    m_(i+1) = b m_i + (1 - b) theta_(i+1),      b = expert_smoothing,

once an epoch: m(0), m(1), ..., m(E). An outer step of `unrolled` then draws an expert and an epoch
t, trains plainly on the support for K steps from theta_0 = m(t) (see `unrolled`), and goes down the
gradient of

    J(S) = |theta_K - m(t + a)|^2 / |m(t) - m(t + a)|^2,      a = expert_ahead,

through these steps to the images and labels: K plain steps on the support are to lead where a
epochs of adversarial training on all images led.

Such a set imports the robustness of a teacher, as labels from an adversarially trained network do,
and is reported apart from sets that know none.

(Cazenavette et al. 2022 match trajectories of plain training; smoothed adversarial ones are those
of MAT, 2025.)
"""

import math
import time
from functools import cached_property, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch

from advkip import algorithm, data, files, kernels, nets, store, unrolled
from advkip.progress import tqdm

SAVE_EVERY = 60
"""Seconds of an expert's training between two checkpoints."""

THEIRS = (
    "expert_epochs", "expert_learning_rate", "expert_smoothing", "warmup", "pgd_steps",
    "inner_loss", "logit_scale", "random_start", "restarts", "step_rule",
)  # fmt: skip
"""Settings of `unrolled` that an expert depends on, beside its net."""


class Run(unrolled.Run):
    """One run of Algorithm 1 with trajectories in the attacked loss's place: see `algorithm.Run`.

    Args:
      folder: of expert-<k>.npz, or None. The experts are read there, or trained and left there;
        what is interrupted goes on.
      progress: shows a bar of an expert's epochs.
    """

    advice = "smaller unrolled.learning_rate, unrolled.net_learning_rate or unrolled.expert_ahead"

    def __init__(self, experiment, splits, kernel, method, *, folder=None, progress=True):
        super().__init__(experiment, splits, kernel, method)
        self.folder, self.progress = folder, progress

    @cached_property
    def experts(self) -> list[unrolled.Net]:
        """The smoothed weights of each expert: NumPy, with a first axis of E + 1 epochs."""
        return [self.expert(number) for number in range(self.settings.n_experts)]

    def expert(self, number) -> unrolled.Net:
        """One of `experts`, read or trained.

        Raises:
          FloatingPointError: its weights are not finite.
          ValueError: a file of other settings or data.
        """
        settings, dtype = self.settings, self.experiment.kernel.dtype
        stream = data.generator(self.experiment.seed, "trajectories", number)
        shape, n_classes = self.splits.x_pool.shape[1:], self.splits.n_classes
        key = jax.random.key(int(stream.integers(2**31)))
        first = unrolled.initial(key, shape, n_classes, self.recipe(number), dtype)
        still = jax.tree.map(jnp.zeros_like, first)
        kept = jax.tree.map(
            lambda w: np.zeros((settings.expert_epochs + 1, *w.shape), dtype), first
        )
        _keep(kept, 0, first)
        moving, done = (first, still, first), 0
        path, about = self.folder and Path(self.folder) / f"expert-{number}.npz", self.of(number)
        if path and path.exists():
            (moving, kept), done = store.load(path, (moving, kept), about=about)
        saved, epochs = time.monotonic(), range(settings.expert_epochs)
        bar = tqdm(epochs, desc=f"expert {number}", unit="epoch", disable=not self.progress)
        for epoch in bar:
            own = np.random.default_rng(stream.integers(2**31))  # for finished epochs, too
            if epoch < done:
                continue
            moving = self.passed(moving, number, epoch, own)
            if not all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(moving)):
                raise FloatingPointError(
                    f"expected finite weights of expert {number}, got NaN or infinity in epoch "
                    f"{epoch + 1}; pass a smaller unrolled.expert_learning_rate, and delete "
                    f"expert-{number}.npz if there is one"
                )
            _keep(kept, epoch + 1, moving[2])
            last = epoch + 1 == settings.expert_epochs
            if path and (last or time.monotonic() - saved >= SAVE_EVERY):
                store.save(path, (moving, kept), about=about, notes=epoch + 1)
                saved = time.monotonic()
        return kept

    def passed(self, moving, number, epoch, stream):
        """(theta, v, m) after an epoch of attacked images."""
        settings, support = self.settings, self.experiment.support
        order, dtype = stream.permutation(len(self.splits.x_pool)), self.experiment.kernel.dtype
        size = min(support.n_target, len(order))
        for i in range(len(order) // size):
            rows = order[i * size : (i + 1) * size]
            x, y = self.splits.x_pool[rows], self.splits.y_pool[rows]
            if support.mirror:
                x = algorithm.half_mirrored(x, stream)
            labels = support.label_scale * data.one_hot(
                y, self.splits.n_classes, center=support.center_labels, dtype=dtype
            )
            attacked = self.objective.attack(
                moving[0], jnp.asarray(x, dtype), y, grown=self.grown(epoch),
                step=(number * settings.expert_epochs + epoch) * len(order) + i,
            )  # fmt: skip
            rates = settings.expert_learning_rate, settings.expert_smoothing
            moving = _step(moving, attacked, labels, *rates)
        return moving

    def of(self, number) -> dict:
        """What an expert depends on."""
        e, support = self.experiment, self.experiment.support
        pool = self.splits.x_pool, self.splits.y_pool
        return {
            "expert": number, "net": self.settings.pool[number % len(self.recipes)],
            "seed": e.seed, "data": files.digest_of_arrays(*pool), "dtype": e.kernel.dtype,
            **e.of("threat"),
            **{f"support.{name}": getattr(support, name)
               for name in ("n_target", "mirror", "center_labels", "label_scale")},
            **{f"unrolled.{name}": getattr(self.settings, name) for name in THEIRS},
        }  # fmt: skip

    def recipe(self, number) -> unrolled.Recipe:
        """Of an expert, and of the networks that follow it: those of the pool take turns."""
        return self.recipes[number % len(self.recipes)]

    def drawn(self, step) -> list[tuple[int, int]]:
        """(expert, epoch t) of each network of an outer step."""
        settings = self.settings
        stream = data.generator(self.experiment.seed, "unrolled", step)
        experts = stream.integers(settings.n_experts, size=settings.n_nets)
        last = settings.expert_epochs - settings.expert_ahead
        epochs = stream.integers(last + 1, size=settings.n_nets)
        return list(zip(experts.tolist(), epochs.tolist(), strict=True))

    def slope(self, state) -> algorithm.Slope:
        """Distance and its gradient, the mean over the step's networks."""
        found = []
        for number, epoch in self.drawn(state.step):
            start, goal = (
                jax.tree.map(lambda w, t=t: jnp.asarray(w[t]), self.experts[number])
                for t in (epoch, epoch + self.settings.expert_ahead)
            )
            found.append(_gradient(*state.support, start, goal, self.recipe(number)))
        loss, gradient = jax.tree.map(lambda *parts: sum(parts) / len(parts), *found)
        return algorithm.Slope(float(loss), gradient)

    def judged(self, state, slope) -> unrolled.Net:
        """The pool's first network, from random weights, trained as long as a whole trajectory."""
        settings = self.settings
        spans = math.ceil(settings.expert_epochs / settings.expert_ahead)
        return self.fresh(state, self.recipes[0]._replace(n_steps=spans * settings.net_steps))


def _keep(kept, epoch, net):
    for all_epochs, weights in zip(*map(jax.tree.leaves, (kept, net)), strict=True):
        all_epochs[epoch] = weights


@jax.jit
def _step(moving, x, labels, learning_rate, smoothing):
    """(theta, v, m) after one more step on attacked images."""
    net, speed, smooth = moving
    net, speed = unrolled.descend(net, speed, x, labels, learning_rate)
    return net, speed, jax.tree.map(lambda m, w: smoothing * m + (1 - smoothing) * w, smooth, net)


def distance(net, other) -> jax.Array:
    """The squared distance of the weights of two networks of the same size."""
    parts = jax.tree.map(lambda a, b: ((a - b) ** 2).sum(), net, other)
    return jnp.stack(jax.tree.leaves(parts)).sum()


@partial(jax.jit, static_argnums=4)
def _gradient(x, y, start, goal, recipe):
    """J and its gradient in images and labels."""

    def of(support):
        return distance(unrolled.descended(start, *support, recipe), goal)

    value, gradient = jax.value_and_grad(of)((x, y))
    scale = distance(start, goal)
    return value / scale, jax.tree.map(lambda g: g / scale, gradient)


def teachers(experiment, splits, folder) -> list[tuple[str, torch.nn.Module]]:
    """(name, network) of the experts of a run, after their last epoch.

    As many as the experiment has networks of other seeds, at most; none without `n_experts`.

    Args:
      experiment, splits: as for `distill.distill`.
      folder: where the run has left them; what is not there is trained.
    """
    settings = experiment.unrolled
    if "unrolled" not in experiment.networks.sets or not (settings and settings.n_experts):
        return []
    run = Run(experiment, splits, kernels.of(experiment.kernel), "unrolled", folder=folder)
    found = []
    for number in range(min(settings.n_experts, len(experiment.net_seeds()))):
        name = settings.pool[number % len(settings.pool)]
        last = jax.tree.map(lambda w: w[-1], run.expert(number))
        found.append((name, as_module(last, name, splits.x_pool.shape[1:])))
    return found


def as_module(net, name, shape) -> torch.nn.Module:
    """A network as one of PyTorch's, of that `nets.build` name, for images (H, W, C)."""
    n_classes = net.layers[-1][0].shape[1]
    module = nets.build(name, shape=shape, n_classes=n_classes, seed=0)
    linear = [part for part in module.modules() if isinstance(part, torch.nn.Linear)]
    for number, (layer, (weights, biases)) in enumerate(zip(linear, net.layers, strict=True)):
        weights = np.array(weights, "float32").T
        if number == 0:  # channels are last here and first there
            height, width, _ = shape
            order = np.arange(weights.shape[1]).reshape(height, width, -1).transpose(2, 0, 1)
            weights = weights[:, order.ravel()]
        layer.weight.data.copy_(torch.from_numpy(weights.copy()))
        layer.bias.data.copy_(torch.from_numpy(np.array(biases, "float32")))
    return module.eval()
