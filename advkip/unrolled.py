"""Sets optimised through training itself: Algorithm 1 with a finite network in the kernel's place.

The kernel machine is a network of infinite width, trained to the end. Here it is a network of a
width, with random first weights theta_0, trained for K steps of gradient descent with momentum, on
the whole support at once,

    L(theta)    = sum_i |f(x_i) - y_i|^2 / (2 S)
    v_k         = mu v_(k-1) + dL(theta_k) / dtheta
    theta_(k+1) = theta_k - eta v_k,

and the outer step goes down the gradient of J(S) (see `objective`) through all K steps to the
images and labels, in the mean over several theta_0, drawn anew in each outer step. The networks may
come from a pool of widths and depths, and take turns. Attacks see the trained network, as they do
the machine. What a training step computes on its way is computed twice instead of kept
(rematerialised), so that memory holds the weights of K steps and the activations of one.

The support begins with drawn images, or (`unrolled.start_from`) with the set that Algorithm 1 has
made for the kernel: then the steps here adapt that set to networks of finite width. In place of the
attacked loss there may be the way that adversarially trained networks took (see `trajectories`).

(Wang et al. 2018 distil data sets by unrolled training, without attacks.)
"""

import dataclasses
import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from advkip import algorithm, data, pieces
from advkip.kernel import as_floats

MOMENTUM = 0.9

JUDGED = 2**32 - 1
"""The step, which no run reaches, whose first weights validation has."""


@partial(jax.tree_util.register_dataclass, data_fields=["layers"], meta_fields=["n_pieces"])
@dataclasses.dataclass(frozen=True)
class Net:
    """A fully connected network with ReLUs; calling it on images x (n, ...) gives logits (n, C)."""

    layers: list  # of (weights (inputs, outputs), biases (outputs,))
    n_pieces: int  # of each pixel, see `pieces`

    def __call__(self, x) -> jax.Array:
        x = as_floats(x)
        if self.n_pieces > 1:
            x = pieces.encode(x, self.n_pieces)
        x = x.reshape(len(x), -1)
        for number, (weights, biases) in enumerate(self.layers):
            x = jnp.dot(x, weights, precision="highest") + biases
            if number < len(self.layers) - 1:
                x = jax.nn.relu(x)
        return x

    def scaled(self, factor) -> "Net":
        """The network whose logits are so many times as large."""
        *hidden, last = self.layers
        return Net([*hidden, tuple(factor * part for part in last)], self.n_pieces)


class Recipe(NamedTuple):
    """How a network is trained inside an outer step."""

    depth: int
    width: int
    n_pieces: int
    n_steps: int
    learning_rate: float


def initial(key, shape, n_classes, recipe, dtype) -> Net:
    """Random weights as `torch.nn.Linear` has them: uniform in +- 1 / sqrt(inputs).

    Args:
      key: of the weights.
      shape: of an image.
      n_classes: outputs.
      recipe: a `Recipe`.
      dtype: of the weights.
    """
    inputs = recipe.n_pieces * math.prod(shape)
    sizes = [inputs, *[recipe.width] * recipe.depth, n_classes]
    layers = []
    for before, after in zip(sizes[:-1], sizes[1:], strict=True):
        key, *two = jax.random.split(key, 3)
        reach = before**-0.5
        layers.append(tuple(
            jax.random.uniform(one, size, dtype, -reach, reach)
            for one, size in zip(two, [(before, after), (after,)], strict=True)
        ))  # fmt: skip
    return Net(layers, recipe.n_pieces)


def trained(key, x, y, recipe) -> Net:
    """The network of first weights from `key`, trained on images x (S, ...) and labels y (S, C)."""
    start = initial(key, x.shape[1:], y.shape[1], recipe, x.dtype)
    return descended(start, x, y, recipe)


def descended(start, x, y, recipe) -> Net:
    """A network after the steps of a recipe on images x (S, ...) and labels y (S, C)."""

    @jax.checkpoint
    def step(state, _):
        return descend(*state, x, y, recipe.learning_rate), None

    still = jax.tree.map(jnp.zeros_like, start)
    return jax.lax.scan(step, (start, still), None, length=recipe.n_steps)[0][0]


def descend(net, speed, x, y, learning_rate) -> tuple[Net, Net]:
    """(theta, v) after one step of gradient descent with momentum on the squared error."""

    def loss(net):
        return ((net(x) - y) ** 2).sum(1).mean() / 2

    speed = jax.tree.map(lambda v, g: MOMENTUM * v + g, speed, jax.grad(loss)(net))
    return jax.tree.map(lambda w, v: w - learning_rate * v, net, speed), speed


_trained = jax.jit(trained, static_argnums=3)


@partial(jax.jit, static_argnums=(4, 5))
def _gradient(key, x, y, batch, recipe, loss):
    """Loss and its gradient in images and labels, with an `objective.Batch` held fixed."""

    def of(support):
        net = trained(key, *support, recipe)
        return (batch.weights * loss(net(batch.x), batch.labels)).sum()

    return jax.value_and_grad(of)((x, y))


class Run(algorithm.Run):
    """One run of Algorithm 1 with networks: see `algorithm.Run`."""

    advice = "smaller unrolled.learning_rate or unrolled.net_learning_rate"

    def __init__(self, experiment, splits, kernel, method):
        super().__init__(experiment, splits, kernel, method)
        settings = self.settings
        self.recipes = [
            Recipe(*sizes, settings.net_steps, settings.net_learning_rate)
            for sizes in settings.sizes
        ]

    def start(self, initial):
        return super().start(initial)._replace(origin=None)  # there is no kernel matrix

    def keys(self, step) -> list:
        """Of the first weights of an outer step."""
        stream = data.generator(self.experiment.seed, "unrolled", step)
        return [jax.random.key(k) for k in stream.integers(2**31, size=self.settings.n_nets)]

    def turns(self, step) -> list[Recipe]:
        """The recipes of an outer step; those of the pool follow one another across steps."""
        n, pool = self.settings.n_nets, self.recipes
        return [pool[k % len(pool)] for k in range(step * n, (step + 1) * n)]

    def grown(self, step) -> float:
        """The share of the radius at an outer step, in quarters."""
        warmup = self.settings.warmup
        return min(4, 4 * step // warmup + 1) / 4 if warmup else 1.0

    def slope(self, state) -> algorithm.Slope:
        """Loss and gradient of the step's target batch, the mean over networks."""
        x, y = self.target(state.step)
        found = []
        for key, recipe in zip(self.keys(state.step), self.turns(state.step), strict=True):
            net = _trained(key, *state.support, recipe)
            attacked = self.objective.attack(
                net, x, y, step=state.step, grown=self.grown(state.step)
            )
            batch = self.objective.batch(net, x, attacked, y)
            found.append(_gradient(key, *state.support, batch, recipe, self.objective.loss))
        loss, gradient = jax.tree.map(lambda *parts: sum(parts) / len(parts), *found)
        return algorithm.Slope(float(loss), gradient)

    def judged(self, state, slope) -> Net:
        """The pool's first network; its first weights are the same in all steps."""
        return self.fresh(state, self.recipes[0])

    def fresh(self, state, recipe) -> Net:
        """A network trained on the support from the first weights that validation has."""
        return _trained(self.keys(JUDGED)[0], *state.support, recipe)
