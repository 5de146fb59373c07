"""How an attack climbs: fixed steps (Madry et al. 2018), or APGD's (Croce and Hein 2020).

A rule takes `climb(x) -> (losses (n,), d sum(losses) / dx)`, starting points in the balls around
the images x, and what it needs to know of its steps, and returns attacked images. It is pure, for
use inside jit.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from advkip.threat import direction, project

MOMENTUM = 0.75
"""Share of the new step in APGD's move; the rest is the last move."""

RISING = 0.75
"""APGD halves its step where fewer of the steps since the last checkpoint than this raised the
loss."""


def fixed(climb, start, x, *, threat, n_steps, step_size) -> jax.Array:
    """x <- project(x + step_size direction(gradient)), `n_steps` times: the last point."""

    def step(_, point):
        return project(point + step_size * direction(climb(point)[1], threat.norm), x, threat)

    return jax.lax.fori_loop(0, n_steps, step, start)


def checkpoints(n_steps) -> np.ndarray:
    """For each of APGD's steps how many there are since the last checkpoint, or 0 for none.

    They are at ceil(p_j n_steps), p_0 = 0, p_1 = 0.22, p_{j+1} = p_j + max(p_j - p_{j-1} - 0.03,
    0.06).
    """
    since, p, last = np.zeros(n_steps, int), (0.0, 0.22), 0
    while (at := math.ceil(p[1] * n_steps - 1e-9)) < n_steps:
        if at > last:
            since[at], last = at - last, at
        p = p[1], p[1] + max(p[1] - p[0] - 0.03, 0.06)
    return since


def adaptive(climb, start, x, *, threat, since) -> jax.Array:
    """APGD: steps of 2 epsilon with momentum, halved for an image where they no longer raise its
    loss, from its best point on; the point of largest loss of each image.

    There are as many steps as `since`, from `checkpoints`, is long."""
    if not len(since):
        return start
    since = jnp.asarray(since)

    def of_image(values):
        return values.reshape(-1, *[1] * (x.ndim - 1))

    losses, gradient = climb(start)
    size = jnp.full(len(x), 2 * threat.epsilon, x.dtype)
    no = jnp.zeros(len(x), bool)
    state = {
        "point": start, "before": start, "gradient": gradient, "losses": losses, "size": size,
        "best": start, "best_gradient": gradient, "most": losses, "rises": jnp.zeros(len(x), int),
        "most_then": losses, "halved": no,
    }  # fmt: skip

    def check(since, s):
        few = s["rises"] < RISING * since
        stuck = ~s["halved"] & (s["most"] <= s["most_then"])
        halve = few | stuck
        back = of_image(halve)
        return s | {
            "size": jnp.where(halve, s["size"] / 2, s["size"]),
            "point": jnp.where(back, s["best"], s["point"]),
            "before": jnp.where(back, s["best"], s["before"]),
            "gradient": jnp.where(back, s["best_gradient"], s["gradient"]),
            "losses": jnp.where(halve, s["most"], s["losses"]),
            "rises": jnp.zeros_like(s["rises"]), "most_then": s["most"], "halved": halve,
        }  # fmt: skip

    def step(k, s):
        s = jax.lax.cond(since[k] > 0, lambda s: check(since[k], s), lambda s: s, s)
        ahead = s["point"] + of_image(s["size"]) * direction(s["gradient"], threat.norm)
        share = jnp.where(k > 0, MOMENTUM, 1).astype(x.dtype)
        moved = share * (project(ahead, x, threat) - s["point"])
        point = s["point"] + moved + (1 - share) * (s["point"] - s["before"])
        point = project(point, x, threat)
        losses, gradient = climb(point)
        better = losses > s["most"]
        new = of_image(better)
        return s | {
            "point": point, "before": s["point"], "gradient": gradient, "losses": losses,
            "rises": s["rises"] + (losses > s["losses"]),
            "best": jnp.where(new, point, s["best"]),
            "best_gradient": jnp.where(new, gradient, s["best_gradient"]),
            "most": jnp.maximum(losses, s["most"]),
        }  # fmt: skip

    return jax.lax.fori_loop(0, len(since), step, state)["best"]
