"""Block conjugate gradients: what they solve and learn, and when they give up."""

from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest

from advkip import krylov, solver
from advkip.devices import product

N, OUTLIERS = 200, np.array([1e-3, 0.05, 8.0, 30.0])


def problem(rng, dtype="float64", outliers=OUTLIERS, spread=0.05):
    """An operator whose L^-1 A L^-T has these eigenvalues, and others in 1 +- spread; the others'
    eigenvectors; A."""
    factor = np.tril(rng.normal(size=(N, N)) / N) + np.eye(N)
    vectors = np.linalg.qr(rng.normal(size=(N, N)))[0]
    values = 1 + spread * rng.uniform(-1, 1, N)
    values[: len(outliers)] = outliers
    a = factor @ (vectors * values) @ vectors.T @ factor.T
    a, inverse = (jnp.asarray(v, dtype) for v in ((a + a.T) / 2, np.linalg.inv(factor)))

    def error(r, x):
        return solver._ratio(jnp.linalg.norm(r, axis=0), jnp.trace(a) * jnp.linalg.norm(x, axis=0))

    operator = krylov.Operator(
        partial(product, a), partial(product, inverse), partial(product, inverse.T), error
    )
    return operator, vectors[:, : len(outliers)], a


def solve(operator, b, start=None, directions=None, tolerance=1e-13, limit=100):
    directions = directions or krylov.no_directions(N, b.dtype)
    return krylov.solve(operator, b, start, tolerance=tolerance, limit=limit, directions=directions)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-14), ("float32", 1e-8)])
def test_solves_with_dependent_columns_and_one_of_zeros(rng, dtype, tolerance):
    """Centred labels have columns that sum to 0."""
    operator, _, a = problem(rng, dtype)
    b = rng.normal(size=(N, 4))
    b = np.concatenate([b, -b.sum(1, keepdims=True), np.zeros((N, 1))], 1)
    found, iterations, _ = solve(operator, jnp.asarray(b, dtype), tolerance=tolerance)
    expected = np.linalg.solve(np.asarray(a, "float64"), b)
    assert np.linalg.norm(found - expected) < 1e6 * tolerance * np.linalg.norm(expected)
    assert not np.asarray(found)[:, -1].any()
    assert 2 <= iterations <= 15
    again, iterations, _ = solve(operator, jnp.asarray(b, dtype), found, tolerance=2 * tolerance)
    assert again is not None
    assert iterations <= 2


def test_learns_where_the_preconditioner_is_wrong(rng):
    operator, vectors, _ = problem(rng)
    first, second = (jnp.asarray(rng.normal(size=(N, 2))) for _ in range(2))
    directions = solve(operator, first)[2]
    p, theta = np.asarray(directions.p), np.asarray(directions.theta)
    used = np.linalg.norm(p, axis=0) > 0
    np.testing.assert_allclose(p[:, used].T @ p[:, used], np.eye(used.sum()), atol=1e-8)
    np.testing.assert_allclose(np.sort(theta[used])[[0, 1, -2, -1]], OUTLIERS, rtol=1e-6)
    for value, vector in zip(OUTLIERS, vectors.T, strict=True):
        nearest = np.argmin(np.abs(np.log(theta / value)))
        assert abs(p[:, nearest] @ vector) > 1 - 1e-6
    image = operator.half(operator.multiply(operator.other_half(directions.p)))
    np.testing.assert_allclose(directions.images, image, atol=1e-8)
    _, n_plain, _ = solve(operator, second)
    found, n_taught, _ = solve(operator, second, directions=directions)
    assert n_taught <= n_plain - 3
    assert float(operator.error(second - operator.multiply(found), found).max()) <= 1e-13


def test_directions_of_an_earlier_system_serve_the_next(rng):
    operator, vectors, a = problem(rng)
    b = jnp.asarray(rng.normal(size=(N, 2)))
    directions = solve(operator, b)[2]
    change = rng.normal(size=(N, N)) * 0.01 / N
    a = a + jnp.asarray(change + change.T)
    moved = operator._replace(multiply=lambda v: a @ v)
    renewed = krylov.carried_over(directions.p, moved)
    found, taught, _ = solve(moved, b, directions=renewed)
    np.testing.assert_allclose(a @ found, b, atol=1e-6)
    assert taught < solve(moved, b)[1]
    image = moved.half(moved.multiply(moved.other_half(renewed.p)))
    np.testing.assert_allclose(renewed.images, image, atol=1e-8)


def test_gives_up_early_where_it_does_not_converge(rng):
    """An A far from its preconditioner, and one that is not positive definite."""
    b = jnp.asarray(rng.normal(size=(N, 2)), "float32")
    operator, *_ = problem(rng, "float32", np.geomspace(1e-7, 1e7, N), 0)
    found, iterations, kept = solve(operator, b, tolerance=1e-10, limit=1000)
    assert found is None
    assert iterations < 200
    assert not np.asarray(kept.p).any()
    for wrong in (-1.0, np.nan):
        operator, *_ = problem(rng, "float32", np.array([wrong]))
        found, iterations, _ = solve(operator, b, tolerance=1e-12, limit=1000)
        assert found is None
        assert iterations < 100


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_slow_convergence_is_no_stagnation(rng, dtype):
    """Eigenvalues all over 1 +- 0.98: more than a dozen iterations, and few restarts."""
    operator, *_ = problem(rng, dtype, (), spread=0.98)
    products = []

    def multiply(v):
        products.append(v)
        return operator.multiply(v)

    b = jnp.asarray(rng.normal(size=(N, 2)), dtype)
    tolerance = {"float32": 1e-8, "float64": 1e-14}[dtype]
    found, iterations, _ = solve(operator._replace(multiply=multiply), b, tolerance=tolerance)
    assert found is not None
    assert 12 < iterations < 100  # all there are in exact arithmetic
    assert len(products) - iterations <= 4  # each restart computes the true residual


def test_limit(rng):
    operator, *_ = problem(rng)
    found, iterations, _ = solve(operator, jnp.asarray(rng.normal(size=(N, 2))), limit=3)
    assert found is None
    assert iterations == 3
