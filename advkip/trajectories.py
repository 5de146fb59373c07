"""Trajectories of adversarially trained networks, and sets on which plain training follows them.

An expert is a network trained adversarially on all images: theta_0 random, then each batch is
attacked and takes one step of gradient descent with momentum on the squared error. What is kept is
smoothed,

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
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch

from advkip import algorithm, data, kernels, nets, store, unrolled
from advkip.progress import tqdm

BATCH_SIZE = 128
"""Images in a step of an expert."""


class Run(unrolled.Run):
    """One run of Algorithm 1 with trajectories in the attacked loss's place: see `algorithm.Run`.

    Args:
      folder: of expert-<k>.npz, or None. The experts are read there, or trained and left there
        after each epoch.
      progress: shows a bar of the experts' epochs.
    """

    def __init__(self, experiment, splits, kernel, method, *, folder=None, progress=True):
        super().__init__(experiment, splits, kernel, method)
        self.experts = [self.expert(k, folder, progress) for k in range(self.settings.n_experts)]

    def expert(self, number, folder, progress) -> unrolled.Net:
        """The smoothed weights of an expert, each with a first axis of E + 1 epochs."""
        settings, support = self.settings, self.experiment.support
        stream = data.generator(self.experiment.seed, "trajectories", number)
        x, y, dtype = self.splits.x_pool, self.splits.y_pool, self.experiment.kernel.dtype
        labels = support.label_scale * data.one_hot(
            y, self.splits.n_classes, center=support.center_labels, dtype=dtype
        )
        first = unrolled.initial(
            jax.random.key(int(stream.integers(2**31))), x.shape[1:], self.splits.n_classes,
            self.recipe(number), dtype,
        )  # fmt: skip
        still = jax.tree.map(jnp.zeros_like, first)
        kept = jax.tree.map(
            lambda w: jnp.zeros((settings.expert_epochs + 1, *w.shape), w.dtype).at[0].set(w), first
        )
        state, done = ((first, still, first), kept), 0
        path = folder and Path(folder) / f"expert-{number}.npz"
        about = self.about | {"expert": number}
        if path and path.exists():
            state, done = store.load(path, state, about=about)
        size = min(BATCH_SIZE, len(x))
        epochs = range(settings.expert_epochs)
        for epoch in tqdm(epochs, desc=f"expert {number}", unit="epoch", disable=not progress):
            order = stream.permutation(len(x))  # drawn of finished epochs, too
            if epoch < done:
                continue
            moving, kept = state
            for i in range(len(x) // size):
                rows = order[i * size : (i + 1) * size]
                attacked = self.objective.attack(
                    moving[0], jnp.asarray(x[rows], dtype), y[rows],
                    step=(number * settings.expert_epochs + epoch) * len(x) + i,
                    grown=self.grown(epoch),
                )  # fmt: skip
                rates = settings.expert_learning_rate, settings.expert_smoothing
                moving = _step(moving, attacked, labels[rows], *rates)
            kept = jax.tree.map(lambda all, one, t=epoch: all.at[t + 1].set(one), kept, moving[2])
            state = moving, kept
            if path:
                store.save(path, state, about=about, notes=epoch + 1)
        if not all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(state)):
            raise FloatingPointError(
                f"expected experts of finite weights, got NaN or infinity in number {number}; pass "
                "a smaller unrolled.expert_learning_rate"
            )
        return state[1]

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
                jax.tree.map(lambda w, t=t: w[t], self.experts[number])
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
      folder: where the run has left them.
    """
    settings = experiment.unrolled
    if not (settings and settings.n_experts):
        return []
    kernel = kernels.of(experiment.kernel)
    run = Run(experiment, splits, kernel, "unrolled", folder=folder, progress=False)
    found = []
    for number, expert in enumerate(run.experts[: len(experiment.net_seeds())]):
        name = settings.pool[number % len(settings.pool)]
        last = jax.tree.map(lambda w: w[-1], expert)
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
    return module
