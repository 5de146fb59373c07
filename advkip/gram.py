"""K_SS tile by tile: sizes of tiles, the lower triangle, its ridge, rows of it."""

from functools import partial

import jax
import jax.numpy as jnp

from advkip.devices import even_size, everywhere, jit, over_rows, tile_floats


def lower_gram(kernel, x, *, block_size=0) -> jax.Array:
    """K(x, x), shape (S, S), of which only the lower triangle is filled, tile by tile.

    The diagonal comes from `kernel.diagonal`, which is exact where k(x, x) would round.
    """
    n = len(x)
    size = even_size(n, block_size or square_tile(kernel))
    k = everywhere(jnp.zeros((n, n), x.dtype))
    for row in range(-(-n // size)):
        k = _fill_row(kernel, size, k, x, row)
    return _fill_diagonal(kernel, k, x)


@partial(jit, static_argnums=(0, 1), donate_argnums=2)
def _fill_row(kernel, size, k, x, row):
    """Tiles 0 to `row` of a row of tiles; one at the end is moved back to fit."""
    start = jnp.minimum(row * size, len(x) - size)
    rows = rows_from(x, start, size)

    def fill(column, k):
        column = jnp.minimum(column * size, len(x) - size)
        tile = over_rows(kernel.value, rows, rows_from(x, column, size))
        return jax.lax.dynamic_update_slice(k, tile, (start, column))

    return jax.lax.fori_loop(0, row + 1, fill, k)


@partial(jax.jit, static_argnums=0, donate_argnums=1)
def _fill_diagonal(kernel, k, x):
    index = jnp.arange(len(x))
    return k.at[index, index].set(kernel.diagonal(x))


@partial(jax.jit, donate_argnums=0)
def add_ridge(k_ss, diag_reg) -> tuple[jax.Array, jax.Array]:
    """(K_SS + r I in its place, r) with r = diag_reg times the mean diagonal."""
    index = jnp.arange(len(k_ss))
    ridge = diag_reg * jnp.diagonal(k_ss).mean()
    return k_ss.at[index, index].add(ridge), ridge


def rows_from(x, start, size) -> jax.Array:
    """`size` rows of x from a traced start."""
    return jax.lax.dynamic_slice_in_dim(x, start, size)


def add_rows(x, rows, start) -> jax.Array:
    """x with rows added from a traced start on."""
    rows = rows_from(x, start, len(rows)) + rows
    return jax.lax.dynamic_update_slice_in_dim(x, rows, start, 0)


def rows_of_tile(kernel, n_columns) -> int:
    """Rows of a tile with `n_columns` columns that hold `devices.tile_floats` working floats.

    At least 256, since a product of few rows spends its time reading the other factor.
    """
    return max(256, tile_floats() // (kernel.floats_per_pair * n_columns))


def square_tile(kernel) -> int:
    """Rows, and columns, of a square tile that holds `devices.tile_floats` working floats."""
    return int((tile_floats() / kernel.floats_per_pair) ** 0.5)
