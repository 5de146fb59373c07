"""Arrays of a few pairs of images that are written in place, and sums over 3x3 pixels of them.

Written with `dynamic_update_slice` into what a loop carries, an array is computed once, in one pass
over its inputs, by one core. XLA on CPUs would otherwise compute it again in each place where it is
used, or divide each small array among all cores. On other devices it costs nothing.
"""

from functools import reduce

import jax
import jax.numpy as jnp

STARTS = 5
"""XLA on CPUs gives half of what is ready to another core when it is more than 8 operations. A tile
begins with so many that do nothing, so that each of those that are side by side gets a core."""


class Store:
    """Arrays (H, W m) of a tile, m pairs, by name; what a name that begins with "box" holds has a
    border of one pixel, which stays 0."""

    def __init__(self, arrays, m):
        self.arrays, self.m = dict(arrays), m

    def put(self, name, value):
        """Writes an array; returns it unless it is for `box`."""
        start = (1, self.m) if name[:3] == "box" else (0, 0)
        self.arrays[name] = jax.lax.dynamic_update_slice(self.arrays[name], value, start)
        return None if name[:3] == "box" else self.arrays[name][:-1]

    def maximum(self, values):
        """The largest of some numbers, each kept first as an array of one number."""
        for i, value in enumerate(values):
            self.put(f"start{i}", value)
        return reduce(jnp.maximum, (self.arrays[f"start{i}"][0, 0] for i in range(len(values))))

    def box(self, name):
        """Sum over 3x3 pixels."""
        a, m = self.arrays[name], self.m
        height, width = a.shape[0] - 2, a.shape[1] - 2 * m
        parts = [a[i : i + height, j * m : j * m + width] for i in range(3) for j in range(3)]
        return sum(parts[1:], parts[0])


def stores(names, shape, m, chains, dtype):
    """Arrays for a `Store` of each chain, 0 where it matters: one more row than a tile has, or a
    border of one pixel for `box`. Only borders are read before they are written, so that one tile
    takes the arrays as another left them. Starts begin with different numbers, lest XLA makes them
    one.
    """
    height, width = shape
    plain, bordered = (height + 1, width), (height + 2, width + 2 * m)

    def zeros(name):
        return jnp.zeros({"box": bordered, "row": (2, width)}.get(name[:3], plain), dtype)

    found = []
    for chain in range(chains):
        starts = {f"start{i}": (2, 1, chain * STARTS + i) for i in range(STARTS)}
        constants = {name: jnp.full(v[:2], v[2], dtype) for name, v in starts.items()}
        found.append({name: zeros(name) for name in names} | constants)
    return found


def sum_pairwise(a):
    """Sum over the rows, shape (1, ...): a tree of sums of two, which rounds less."""
    parts = [a[i : i + 1] for i in range(len(a))]
    while len(parts) > 1:
        parts = [sum(parts[i + 1 : i + 2], parts[i]) for i in range(0, len(parts), 2)]
    return parts[0]


def box(a):
    """Sum over 3x3 pixels of (H, W, ...), zeros outside; in the order of `Store.box`, so that p
    and sigma of equal images are equal."""
    height, width = a.shape[:2]
    a = jnp.pad(a, [(1, 1), (1, 1)] + [(0, 0)] * (a.ndim - 2))
    parts = [a[i : i + height, j : j + width] for i in range(3) for j in range(3)]
    return sum(parts[1:], parts[0])
