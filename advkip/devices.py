"""What the hardware decides: sizes of tiles, precision, all devices at work, a factor in place.

Everything here works on CPUs, GPUs and TPUs alike, on one device or on all that JAX sees, on one
host or several (after `jax.distributed.initialize()`).
"""

import math
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.multihost_utils import broadcast_one_to_all
from jax.sharding import Mesh, NamedSharding, PartitionSpec

product = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
"""Matrix product in full precision: on GPUs the default rounds to 10 mantissa bits (TF32). A
correlation near 1 would be ruined by that, since the kernel depends on 1 - c; and the weights
alpha of the kernel machine are large and cancel."""

MANTISSA_BITS = {"tfloat32": 10, "bfloat16": 7}
"""Of the formats with float32's exponent whose products tensor cores sum in float32."""


def rounded_product(a, b, precision) -> jax.Array:
    """Matrix product of factors that are rounded to a shorter format, summed in float32.

    Which factors are multiplied does not depend on the device; on NVIDIA's, tensor cores do it.

    Args:
      a, b: float32, shapes (n, k) and (k, m).
      precision: 'full' is `product`; or a format of `MANTISSA_BITS`.
    """
    if precision == "full":
        return product(a, b)
    bits = MANTISSA_BITS[precision]
    a, b = (jax.lax.reduce_precision(part, exponent_bits=8, mantissa_bits=bits) for part in (a, b))
    short = partial(_short_product, "bfloat16" if precision == "bfloat16" else "float32")
    return jax.lax.platform_dependent(a, b, cuda=short, default=product)


def _short_product(dtype, a, b):
    """In `dtype`, where float32 may be multiplied as TF32: the default on NVIDIA's devices."""
    a, b, default = a.astype(dtype), b.astype(dtype), jax.lax.Precision.DEFAULT
    return jnp.matmul(a, b, precision=default, preferred_element_type="float32")


jit = partial(jax.jit, compiler_options={"xla_cpu_prefer_vector_width": "512"})
"""jax.jit for outermost functions with long elementwise loops: on a CPU with AVX-512 these fill its
registers, where XLA's default is half of each (a step of Algorithm 1 takes 5 % less). No other
device looks at the option, and no result depends on it beyond rounding."""

CPU_TILE_FLOATS = 2**22
"""Working floats of a tile on a CPU: 16 MiB in float32, so that it stays in the caches."""


def tile_floats() -> int:
    """Working floats of one tile: what caches hold on a CPU, elsewhere 1/128 of the memory.

    1/128 of the bytes is 1/32 of the memory in float32, small against K_SS and still far more
    than it takes to keep an accelerator busy.
    """
    device = jax.local_devices()[0]
    limit = (device.memory_stats() or {}).get("bytes_limit", 0) if device.platform != "cpu" else 0
    return limit // 128 or CPU_TILE_FLOATS


@cache
def _mesh():
    return Mesh(np.array(jax.devices()), ("rows",))


def everywhere(x) -> Any:
    """x as an array on all devices, each with a full copy; every host passes the same x."""
    if jax.device_count() == 1:
        return jnp.asarray(x)
    if not isinstance(x, jax.Array):  # `device_put` may share the caller's memory
        x = np.array(x)
    return jax.device_put(x, NamedSharding(_mesh(), PartitionSpec()))


def operand(x) -> Any:
    """x for a compiled function: an array on all devices, or of one device NumPy's own.

    A compiled function takes NumPy's arrays itself, several times as fast as `jnp.asarray`.
    """
    return x if jax.device_count() == 1 and isinstance(x, np.ndarray) else everywhere(x)


def zeros_everywhere(shape, dtype) -> jax.Array:
    """Zeros on all devices, as `everywhere`."""
    if jax.device_count() == 1:
        return jnp.zeros(shape, dtype)
    return jnp.zeros(shape, dtype, device=NamedSharding(_mesh(), PartitionSpec()))


def agreed(x) -> np.ndarray:
    """What the first of several hosts has, where others may differ in rounding."""
    x = np.asarray(x)
    return x if jax.process_count() == 1 else np.asarray(broadcast_one_to_all(x))


def over_rows(function, rows, rest) -> Any:
    """function(rows, rest), with the rows divided among all devices.

    Args:
      function: takes (rows, rest) and returns arrays with one row for each row, or with a leading
        axis of length 1 for a part that the caller sums over devices.
      rows: pytree of arrays with the same number of rows. They are filled up with zeros to a
        multiple of the number of devices; rows that are returned for these are cut off, and a
        summed part must not change by a row of zeros.
      rest: pytree of arrays that every device sees whole.

    Returns:
      What function returns, on all devices; a part of one row a device is stacked.
    """
    n_devices = jax.device_count()
    if n_devices == 1:
        return function(rows, rest)
    n = len(jax.tree.leaves(rows)[0])
    fill = -n % n_devices
    rows = jax.tree.map(lambda a: jnp.pad(a, [(0, fill)] + [(0, 0)] * (a.ndim - 1)), rows)
    split, whole = PartitionSpec("rows"), PartitionSpec()
    spread = jax.shard_map(
        function, mesh=_mesh(), in_specs=(split, whole), out_specs=split, check_vma=False
    )
    gathered = jax.lax.with_sharding_constraint(
        spread(rows, rest), NamedSharding(_mesh(), PartitionSpec())
    )
    return jax.tree.map(lambda a: a[:n] if len(a) == n + fill else a, gathered)


def even_size(n, size) -> int:
    """Rows of the fewest equal parts of n that have at most `size` rows."""
    return -(-n // math.ceil(n / size))


CHOLESKY_DIRECT, CHOLESKY_BLOCK = 20_000, 5000
"""Matrices of more rows than the first are factorised in blocks of at most the second: OpenBLAS
crashes in potrf when the matrix exceeds 2 GiB (23,000 rows in float32)."""


def cholesky_in_place(a) -> tuple[jax.Array, bool]:
    """Lower Cholesky factor of a symmetric positive definite matrix, in its own memory.

    Args:
      a: shape (n, n), of which only the lower triangle is read. It is donated: the factor takes
        its place, and `a` cannot be used any more. On a CPU nothing else is allocated up to
        n = CHOLESKY_DIRECT, and a few blocks beyond.

    Returns:
      The factor L, with the strict upper triangle of `a` as it was, and whether all went well.
    """
    n = len(a)
    size = n if n <= CHOLESKY_DIRECT else even_size(n, CHOLESKY_BLOCK)
    blocks = [(i, min(size, n - i)) for i in range(0, n, size)]
    success = True
    for k, block in enumerate(blocks):
        a, positive = _factorise_block(a, *block)
        success &= bool(positive)
        for i in blocks[k + 1 :]:
            a = _solve_block(a, *i, *block)
        for j, column in enumerate(blocks[k + 1 :], k + 1):
            for i in blocks[j:]:
                a = _update_block(a, *i, *column, *block)
    return a, success


@partial(jax.jit, static_argnums=2, donate_argnums=0)
def _factorise_block(a, k, size):
    """L_kk of A_kk."""
    if size == len(a):
        return jax.lax.platform_dependent(a, cpu=_lapack_cholesky, default=_jax_cholesky)
    block = jax.lax.dynamic_slice(a, (k, k), (size, size))
    factor, success = jax.lax.platform_dependent(block, cpu=_lapack_cholesky, default=_jax_cholesky)
    return jax.lax.dynamic_update_slice(a, factor, (k, k)), success


@partial(jax.jit, static_argnums=(2, 4), donate_argnums=0)
def _solve_block(a, i, rows, k, size):
    """L_ik = A_ik L_kk^-T."""
    factor = jax.lax.dynamic_slice(a, (k, k), (size, size))
    block = jax.lax.dynamic_slice(a, (i, k), (rows, size))
    block = jax.lax.linalg.triangular_solve(factor, block, lower=True, transpose_a=True)
    return jax.lax.dynamic_update_slice(a, block, (i, k))


@partial(jax.jit, static_argnums=(2, 4, 6), donate_argnums=0)
def _update_block(a, i, rows, j, columns, k, size):
    """A_ij - L_ik L_jk^T."""
    left = jax.lax.dynamic_slice(a, (i, k), (rows, size))
    right = jax.lax.dynamic_slice(a, (j, k), (columns, size))
    block = jax.lax.dynamic_slice(a, (i, j), (rows, columns))
    lower = i + jnp.arange(rows)[:, None] >= j + jnp.arange(columns)
    block = jnp.where(lower, block - product(left, right.T), block)
    return jax.lax.dynamic_update_slice(a, block, (i, j))


def _jax_cholesky(a):
    factor = jax.lax.linalg.cholesky(a, symmetrize_input=False)
    return jnp.where(jnp.tri(len(a), dtype=bool), factor, a), jnp.isfinite(factor[-1, -1])


def _lapack_cholesky(a):
    """LAPACK's potrf on the row-major array itself.

    JAX's own lowering turns the matrix into LAPACK's column-major order and back, and fills the
    other triangle with zeros, for which it needs more time and two more arrays of n x n. Read by
    columns, a row-major lower triangle is the upper one, and A = U^T U with U = L^T.
    """
    from jaxlib import lapack

    call = jax.ffi.ffi_call(
        lapack.prepare_lapack_call("potrf_ffi", a.dtype),
        (jax.ShapeDtypeStruct(a.shape, a.dtype), jax.ShapeDtypeStruct((), np.int32)),
        input_output_aliases={0: 0},
    )
    factor, info = call(a, uplo=np.uint8(ord("U")))
    return factor, info == 0


def cholesky_solve(factor, y) -> jax.Array:
    """(L L^T)^-1 y for the lower factor L (n, n) and y (n, C)."""
    return half_solve(factor, half_solve(factor, y), transposed=True)


def half_solve(factor, y, *, transposed=False) -> jax.Array:
    """L^-1 y, or L^-T y, for the lower factor L (n, n), whose upper triangle is not read.

    The transposes are chosen so that LAPACK's column-major view of L needs no copy of it.
    """
    return jax.lax.linalg.triangular_solve(
        factor.T, y, left_side=True, lower=False, transpose_a=not transposed
    )
