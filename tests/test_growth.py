"""A support that goes on from a smaller distilled one is the same machine at first."""

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from advkip import data, distill, files, growth, kernels, krr, preflight
from tests.sections import changed, experiment

SMALL = experiment(
    kernel__name="fc2", kernel__dtype="float64", dataset__n_validation=40, dataset__n_test=50,
    support__n_support=20, support__n_target=25, adv_kip__n_steps=5, adv_kip__eval_every=5,
    adv_kip__pgd_steps=3, adv_kip__eval_pgd_steps=3, kernel__diag_reg=1e-9,
)  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(path, what was distilled, the data set)"""
    digits = data.load("digits")
    with jax.enable_x64(True):
        result = distill.distill(SMALL, data.split(digits, SMALL), progress=False)
    path = tmp_path_factory.mktemp("small") / "adv-kip.npz"
    distill.save(path, result, SMALL, digits)
    return path, result, digits


def larger(path, **more):
    return changed(SMALL, support__n_support=50, support__grown_from=str(path), **more)


def test_it_is_the_same_machine_with_more_images(made):
    path, small, digits = made
    e = larger(path)
    splits = data.split(digits, e)
    x, y = distill.starting_support(e, splits)
    np.testing.assert_array_equal(x[:20], small.x_support)
    np.testing.assert_array_equal(y[:20], small.y_support)
    np.testing.assert_array_equal(x[20:], splits.x_support[:30])
    shared = distill.starting_support(changed(e, support__true_share=0.25), splits)
    np.testing.assert_array_equal(shared[0], x)
    own = np.eye(10)[splits.y_support[:30]] - 0.1
    np.testing.assert_allclose(shared[1][20:], 0.75 * y[20:] + 0.25 * own, atol=1e-12)
    np.testing.assert_array_equal(shared[1][:20], y[:20])
    kernel = kernels.of(e.kernel)
    before = krr.fit(kernel, small.x_support, small.y_support, diag_reg=1e-9).machine
    after = krr.fit(kernel, x, y, diag_reg=1e-9).machine
    original = krr.fit(kernel, *distill.initial_support(e, splits), diag_reg=1e-9).machine
    x_test = jnp.asarray(splits.x_test)
    np.testing.assert_allclose(after(x_test), before(x_test), atol=1e-4)
    assert np.abs(original(x_test) - before(x_test)).max() > 0.1


@pytest.mark.parametrize("n", [20, 50])
def test_to_the_mirrored_kernel_it_is_the_mean_over_both_sides(made, n):
    path, small, digits = made
    e = changed(SMALL, kernel__name="fc2-mirror", support__n_support=n)
    e = changed(e, support__grown_from=str(path))
    splits = data.split(digits, e)
    x, y = distill.starting_support(e, splits)
    np.testing.assert_array_equal(x[:20], small.x_support)
    before = krr.fit(
        kernels.of(SMALL.kernel), small.x_support, small.y_support, diag_reg=1e-9
    ).machine
    after = krr.fit(kernels.of(e.kernel), x, y, diag_reg=1e-9).machine
    x_test = jnp.asarray(splits.x_test)
    mean = (before(x_test) + before(x_test[:, :, ::-1])) / 2
    np.testing.assert_allclose(after(x_test), mean, atol=1e-4)
    assert np.abs(mean - before(x_test)).max() > 0.1
    other = distill.starting_support(changed(e, kernel__W_std=1.0), splits)
    np.testing.assert_array_equal(other[1][:20], small.y_support)  # to another kernel as it is
    as_it_is = krr.fit(kernels.of(e.kernel), small.x_support, small.y_support, diag_reg=1e-9)
    assert np.abs(as_it_is.machine(x_test) - mean).max() > 0.1  # another machine


def test_algorithm_1_goes_on_from_there_and_resumes(made, tmp_path):
    path, small, digits = made
    e = larger(path)
    splits = data.split(digits, e)
    whole = distill.distill(e, splits, progress=False)
    last = small.history[-1]
    np.testing.assert_allclose(whole.history[0]["pgd"], last["pgd"], atol=0.03)
    assert whole.history[0]["pgd"] > small.history[0]["pgd"] + 0.05
    assert len(whole.x_support) == 50
    distill.distill(changed(e, adv_kip__n_steps=2), splits, progress=False, checkpoint_dir=tmp_path)
    resumed = distill.distill(e, splits, progress=False, checkpoint_dir=tmp_path)
    np.testing.assert_array_equal(resumed.x_support, whole.x_support)
    np.testing.assert_array_equal(resumed.x_initial, whole.x_initial)

    moved = tmp_path / "elsewhere.npz"  # what is in the file counts, not where it lies
    shutil.copy(path, moved)
    distill.distill(
        changed(e, support__grown_from=str(moved)), splits, progress=False, checkpoint_dir=tmp_path
    )
    with np.load(path) as arrays:
        np.savez(moved, **dict(arrays) | {"x_train": arrays["x_train"] * 0.9})
    with pytest.raises(ValueError, match="grown from .* instead of"):
        distill.distill(
            changed(e, support__grown_from=str(moved)), splits, progress=False,
            checkpoint_dir=tmp_path,
        )  # fmt: skip


def test_another_kernel_goes_on_from_what_the_sets_own_answers(made):
    path, small, digits = made
    own = larger(path)
    other = changed(own, kernel__name="fc3", kernel__diag_reg=1e-6, kernel__W_std=1.2)
    splits = data.split(digits, own)
    for mine, others in zip(
        *(distill.starting_support(e, splits) for e in (own, other)), strict=True
    ):
        np.testing.assert_array_equal(mine, others)
    as_large = changed(other, support__n_support=20)
    splits = data.split(digits, as_large)
    x, y = distill.starting_support(as_large, splits)
    np.testing.assert_array_equal(x, small.x_support)
    np.testing.assert_array_equal(y, small.y_support)
    whole = distill.distill(as_large, splits, progress=False)
    # More robust than images as drawn are under that kernel, before the first step.
    drawn = distill.distill(changed(as_large, support__grown_from=None), splits, progress=False)
    assert whole.history[0]["pgd"] > drawn.history[0]["pgd"] + 0.05


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dataset__n_validation": 50}, "dataset.n_validation 50, got 40"),
        ({"seed": 1}, "seed 1, got 0"),
        ({"support__n_support": 10}, "expected at most 10 images, got 20"),
    ],
)
def test_other_sets_are_refused(made, change, message):
    """Other validation images could be among those that the smaller set was optimised for."""
    e = changed(larger(made[0]), **change)
    with pytest.raises(ValueError, match="support.grown_from: ") as error:
        distill.starting_support(e, data.split(made[2], e))
    assert message in str(error.value)


def test_a_file_that_is_not_there_is_missed_before_anything_runs(made, tmp_path):
    e = changed(larger(made[0]), notebooks=["01_kernels"], kip=None)
    preflight.check(e)
    with pytest.raises(ValueError, match=r"grown_from: expected a set with seed 1, got 0"):
        preflight.check(changed(e, seed=1))
    lost = changed(e, support__grown_from=str(tmp_path / "x" / "adv-kip.npz"))
    with pytest.raises(ValueError, match=r"grown_from: expected a distilled set, got no file"):
        preflight.check(lost)
    preflight.check(lost, [tmp_path / "x"])
    misspelt = changed(lost, support__grown_from=str(tmp_path / "x" / "adv-kp.npz"))
    with pytest.raises(ValueError, match=r"grown_from: expected a distilled set, got no file"):
        preflight.check(misspelt, [tmp_path / "x"])
    of_a_file = {"notebooks": ["04_shortcomings"], "diagnosis__sets": [str(made[0])]}
    preflight.check(changed(lost, **of_a_file))  # which distils nothing


def test_a_record_says_what_the_support_grew_from(made):
    assert preflight.digests(larger(made[0]))["support"] == files.digest(Path(made[0]))
    assert "support" not in preflight.digests(SMALL)


def test_kip_does_not_grow_from_adv_kip(made):
    with pytest.raises(ValueError, match="method 'kip', got 'adv-kip'.*kip: null"):
        distill.distill(larger(made[0]), data.split(made[2], SMALL), method="kip", progress=False)


def test_other_files_are_refused(made, tmp_path):
    x, y = np.zeros((50, 8, 8, 1)), np.zeros((50, 10))
    with pytest.raises(ValueError, match="got no file"):
        growth.grown(tmp_path / "none.npz", x, y, larger("none"), "adv-kip")
    arrays = {key: np.load(made[0])[key] for key in data.KEYS}
    np.savez(tmp_path / "foreign.npz", **arrays)
    with pytest.raises(ValueError, match="which has none"):
        growth.grown(tmp_path / "foreign.npz", x, y, larger("none"), "adv-kip")
    for other, asked in (
        ((np.zeros((50, 9, 9, 1)), y), r"images \(9, 9, 1\) of 10 classes"),
        ((x, np.zeros((50, 7))), r"images \(8, 8, 1\) of 7 classes"),
    ):
        with pytest.raises(ValueError, match=f"grown_from: .*expected {asked}"):
            growth.grown(made[0], *other, larger(made[0]), "adv-kip")
    arrays["experiment"] = '{"kernel": "fc2", "seed": 0}'
    np.savez(tmp_path / "flat.npz", **arrays)
    with pytest.raises(ValueError, match=r"kernel.name, .*diag_reg, got none; dataset.name"):
        growth.grown(tmp_path / "flat.npz", x, y, larger("none"), "adv-kip")


def test_in_single_precision(made):
    with jax.enable_x64(False):
        e = larger(made[0], kernel__dtype="float32", support__true_share=0.1)
        x, y = distill.starting_support(e, data.split(made[2], e))
        assert x.dtype == y.dtype == "float32"
