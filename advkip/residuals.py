"""Whether a float32 solution of (K_SS + r I) alpha = Y solves it, seen in float64."""

import jax
import jax.numpy as jnp
import numpy as np

from advkip.devices import even_size

RESIDUAL = 0.01
"""Largest residual of a float32 solve, relative to the largest label, that is let through."""

STEEP, STEEPEST = 50, 1e5
"""Coefficients relative to labels over the mean of k(x, x). With the largest of them below STEEP
float32 kernels, which are wrong by 2e-4 at worst (arccos near 1), leave a residual of RESIDUAL at
most, so it need not be computed. With a Euclidean norm above STEEPEST even their usual rounding,
1e-7, would be seen in every prediction."""

ROWS = 16
"""Rows of the system in which a residual is computed: those of the largest |alpha_i|."""


def residual(machine, ridge, y) -> float:
    """Largest |(K_SS + r I) alpha - Y| / max |Y| in the rows of the largest coefficients.

    Where float32 takes the kernel of two near-identical images for another, it solves another
    system, and its own residual is small. In float64 it shows in the rows of just these images, as
    they have large coefficients of either sign. A coefficient is as large as what it adds to the
    function, |alpha_i| k(x_i, x_i)^1/2. 0 in float64, or where none is large.
    """
    kernel, x, alpha = (getattr(machine, key) for key in ("kernel", "x_support", "alpha"))
    if x.dtype != np.float32:
        return 0.0
    scale, norms = max(float(jnp.abs(y).max()), 1e-30), np.asarray(_diagonal(kernel, x))
    size = np.abs(np.asarray(alpha)).max(1) * np.sqrt(norms / norms.mean())
    unit = scale / norms.mean()
    if size.max() < STEEP * unit:
        return 0.0
    if (size**2).sum() > (STEEPEST * unit) ** 2:
        return float("inf")
    rows = np.argsort(-size, kind="stable")[:ROWS]
    with jax.enable_x64(True):
        x, weights = np.asarray(x), np.asarray(alpha, "float64")
        own = x[rows].astype("float64")
        sums = np.asarray(y, "float64")[rows] - float(ridge) * weights[rows]
        diagonal = np.asarray(_diagonal(kernel, own))[:, None]
        size = even_size(len(x), 4096)
        for start in range(0, len(x), size):
            columns = np.arange(start, min(start + size, len(x)))
            k = np.asarray(_values(kernel, own, x[columns].astype("float64")))
            sums -= np.where(rows[:, None] == columns, diagonal, k) @ weights[columns]
    return float(np.abs(sums).max()) / scale


_values = jax.jit(lambda kernel, x, s: kernel.value(x, s), static_argnums=0)
_diagonal = jax.jit(lambda kernel, x: kernel.diagonal(x), static_argnums=0)
