"""K_SS tile by tile: sizes of tiles, its triangles, its ridge, products with it, rows of it."""

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp

from advkip.devices import even_size, jit, over_rows, product, tile_floats

Triangle = Literal["lower", "both", "upper"]


def fill_gram(kernel, k, x, *, triangle: Triangle = "lower", block_size=0) -> jax.Array:
    """K(x, x) without its diagonal, tile by tile, in the memory of k (S, S), which is donated.

    Args:
      kernel: see `kernel.Kernel`.
      k: any array (S, S) of the dtype of x.
      x: images, shape (S, ...).
      triangle: 'lower' fills the lower triangle (the upper one is not specified), 'both' both, and
        'upper' the strict upper triangle, with all else left as it was.
      block_size: rows and columns of a tile; 0 chooses.
    """
    size = even_size(len(x), block_size or square_tile(kernel))
    for row in range(-(-len(x) // size)):
        k = _fill_row(kernel, size, triangle, k, x, row)
    return k


@partial(jit, static_argnums=(0, 1, 2), donate_argnums=3)
def _fill_row(kernel, size, triangle, k, x, row):
    """Tiles 0 to `row` of a row of tiles; one at the end is moved back to fit."""
    start = jnp.minimum(row * size, len(x) - size)
    rows = rows_from(x, start, size)

    def fill(column, k):
        column = jnp.minimum(column * size, len(x) - size)
        tile = over_rows(kernel.value, rows, rows_from(x, column, size))
        if triangle != "upper":
            k = jax.lax.dynamic_update_slice(k, tile, (start, column))
        if triangle != "lower":
            tile = tile.T
        if triangle == "upper":
            above = column + jnp.arange(size)[:, None] < start + jnp.arange(size)
            old = jax.lax.dynamic_slice(k, (column, start), (size, size))
            tile = jnp.where(above, tile, old)
        if triangle != "lower":
            k = jax.lax.dynamic_update_slice(k, tile, (column, start))
        return k

    return jax.lax.fori_loop(0, row + 1, fill, k)


@partial(jax.jit, static_argnums=(0, 2))
def ridged_diagonal(kernel, x, diag_reg) -> tuple[jax.Array, jax.Array]:
    """The diagonal of K_SS + r I, and r = diag_reg times the mean diagonal of K_SS.

    It comes from `kernel.diagonal`, which is exact where k(x, x) would round.
    """
    diagonal = kernel.diagonal(x)
    ridge = diag_reg * diagonal.mean()
    return diagonal + ridge, ridge


@partial(jax.jit, donate_argnums=0)
def set_diagonal(k, diagonal) -> jax.Array:
    """k with another diagonal, in its memory."""
    index = jnp.arange(len(k))
    return k.at[index, index].set(diagonal)


def symmetric_product(k, diagonal, v) -> jax.Array:
    """A v for the symmetric A (S, S) of which k holds the strict upper triangle; v (S, C)."""
    size = even_size(len(k), max(1, int(tile_floats() ** 0.5) // 2))
    return _symmetric_product(size, k, diagonal, v)


@partial(jit, static_argnums=0)
def _symmetric_product(size, k, diagonal, v):
    """A tile serves its own rows and, transposed, those of its mirror image. The last row and
    column of tiles are moved back to fit; what they share with those before is left out."""
    n = len(k)
    tiles = -(-n // size)

    def multiply_row(row, result):
        i = jnp.minimum(row * size, n - size)
        v_i, index_i = rows_from(v, i, size), i + jnp.arange(size)[:, None]

        def multiply(column, sums):
            result, to_i = sums
            j = jnp.minimum(column * size, n - size)
            index_j = j + jnp.arange(size)
            own = (index_i >= row * size) & (index_j >= column * size) & (index_i < index_j)
            tile = jnp.where(own, jax.lax.dynamic_slice(k, (i, j), (size, size)), 0)
            result = add_rows(result, product(tile.T, v_i), j)
            return result, to_i + product(tile, rows_from(v, j, size))

        result, to_i = jax.lax.fori_loop(row, tiles, multiply, (result, jnp.zeros_like(v_i)))
        return add_rows(result, to_i, i)

    return jax.lax.fori_loop(0, tiles, multiply_row, diagonal[:, None] * v)


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
