"""What the hardware decides: sizes of tiles, precision, all devices at work, a factor in place.

Everything here works on CPUs, GPUs and TPUs alike, on one device or on all that JAX sees, on one
host or several (after `jax.distributed.initialize()`).
"""

import math
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

product = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
"""Matrix product in full precision: on GPUs the default rounds to 10 mantissa bits (TF32). A
correlation near 1 would be ruined by that, since the kernel depends on 1 - c; and the weights
alpha of the kernel machine are large and cancel."""

CPU_TILE_FLOATS = 2**22
"""Working floats of a tile on a CPU: 16 MiB in float32, so that it stays in the caches."""


def tile_floats():
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


def everywhere(x):
    """x as an array on all devices, each with a full copy; every host passes the same x."""
    if jax.device_count() == 1:
        return jnp.asarray(x)
    return jax.device_put(x, NamedSharding(_mesh(), PartitionSpec()))


def over_rows(function, rows, rest):
    """function(rows, rest), with the rows divided among all devices.

    Args:
      function: takes (rows, rest) and returns arrays with one row for each row, or with a leading
        axis of length 1 for a part that the caller sums over devices.
      rows: pytree of arrays with the same number of rows. They are filled up with copies of the
        first to a multiple of the number of devices, and what is returned for these is cut off.
      rest: pytree of arrays that every device sees whole.

    Returns:
      What function returns, on all devices; a part of one row a device is stacked.
    """
    n_devices = jax.device_count()
    if n_devices == 1:
        return function(rows, rest)
    n = len(jax.tree.leaves(rows)[0])
    fill = -n % n_devices
    rows = jax.tree.map(lambda a: jnp.concatenate([a, jnp.repeat(a[:1], fill, 0)]), rows)
    split, whole = PartitionSpec("rows"), PartitionSpec()
    spread = jax.shard_map(
        function, mesh=_mesh(), in_specs=(split, whole), out_specs=split, check_vma=False
    )
    gathered = jax.lax.with_sharding_constraint(
        spread(rows, rest), NamedSharding(_mesh(), PartitionSpec())
    )
    return jax.tree.map(lambda a: a[:n] if len(a) == n + fill else a, gathered)


def even_size(n, size):
    """Rows of the fewest equal parts of n that have at most `size` rows."""
    return -(-n // math.ceil(n / size))


def cholesky_in_place(a):
    """Lower Cholesky factor of a symmetric positive definite matrix, in its own memory.

    Args:
      a: shape (n, n), of which only the lower triangle is read. Inside `jax.jit` with `a`
        donated, the factor takes its place; on a CPU nothing else is allocated.

    Returns:
      The factor L, whose strict upper triangle holds what `a` held there or zeros, and whether
      the factorisation succeeded.
    """
    return jax.lax.platform_dependent(a, cpu=_lapack_cholesky, default=_jax_cholesky)


def _jax_cholesky(a):
    factor = jax.lax.linalg.cholesky(a, symmetrize_input=False)
    return factor, jnp.isfinite(factor[-1, -1])


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


def cholesky_solve(factor, y):
    """(L L^T)^-1 y for the lower factor L (n, n) and y (n, C).

    The transposes are chosen so that LAPACK's column-major view of L needs no copy of it.
    """
    solve = partial(jax.lax.linalg.triangular_solve, factor.T, left_side=True, lower=False)
    return solve(solve(y, transpose_a=True))
