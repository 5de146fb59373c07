"""A support that goes on from a distilled one: of fewer images, or of another kernel.

Robust accuracy asks for outer steps, clean accuracy for images, and an outer step's time grows with
the square of their number at least. So take most steps with fewer images, and let the support
grow: to the distilled images (X, Y) come further ones, as drawn, each labelled with what the
distilled kernel machine f answers to it. As f(x) = K_xX (K_XX + r I)^-1 Y is the interpolation of
(X, Y) with the least norm in the kernel's space, and agrees with the further pairs already, Eq. 4
of all of them is f again, but for the ridge. Algorithm 1 goes on from there. With another kernel
than the one that made (X, Y), Eq. 4 is another machine from the start, so that a kernel of many
layers can go on from the set of a cheaper one.

To the mirrored kernel of the one that made (X, Y) there is a better way: with f' the mean of f over
an image and its mirror image, f' = K'_xX (K_XX + r I)^-1 Y, K' being the mirrored kernel. So
(X, f'(X)) makes f' with K', again but for the ridge, and X stands for its mirror images, too. (By
convexity the robust cross-entropy of f' is no larger than that of f, on average over both sides.)
"""

import json

import jax.numpy as jnp
import numpy as np

from advkip import attacks, data, files, gram, kernels, krr
from advkip.config import Experiment
from advkip.settings import Kernel, Method

OF_A_MACHINE = ("name", "W_std", "b_std", "diag_reg")
"""Settings of the kernel that Eq. 4 depends on."""


def grown(path, x, y, experiment: Experiment, method: Method) -> tuple[np.ndarray, np.ndarray]:
    """(X_S, Y_S): a distilled set, then images x with the labels of its own kernel machine.

    `support.true_share` mixes their own labels into those. What the small set had no room for,
    clean accuracy, is then there from the start, at the price of robustness, which comes back.

    Args:
      path: a file of `distill.save`, of any kernel, and of the same data set, validation images
        and seed: other validation images could be what it was optimised for.
      x, y: the support as drawn, shapes (S, ...) and (S, C); the first fill what is missing.
      experiment: of the larger support, or one as large.
      method: 'adv-kip' or 'kip', also of the file.

    Raises:
      ValueError: another file, other images or classes, another split or method, or more images;
        FloatingPointError: as `krr.fit`.
    """
    arrays, settings = read_same("support.grown_from", path, experiment, method)
    own = experiment.kernel
    x_small, y_small = (arrays[key].astype(own.dtype) for key in ("x_train", "y_train"))
    data.check_fits(f"support.grown_from: {path}", x_small, y_small, x.shape[1:], y.shape[1])
    if len(x_small) > len(x):
        raise ValueError(
            f"support.grown_from: expected at most {len(x)} images, got {len(x_small)} in "
            f"{path}; pass a larger support.n_support"
        )
    n_more, share = len(x) - len(x_small), experiment.support.true_share
    its = Kernel(**{name: settings["kernel"][name] for name in OF_A_MACHINE})
    same = (own.W_std, own.b_std) == (its.W_std, its.b_std)
    mirrored = own.name == f"{its.name}-mirror" and same
    if not n_more and not mirrored:
        return x_small, y_small
    kernel = kernels.of(its)
    machine = krr.fit(
        kernel, x_small, y_small, diag_reg=its.diag_reg, block_size=own.block_size or 0
    ).machine
    batch_size = own.block_size or gram.rows_of_tile(kernel, len(x_small))

    def answers(images):
        sides = (images, kernels.mirror(images)) if mirrored else (images,)
        found = [attacks.predict(machine, jnp.asarray(a), batch_size=batch_size) for a in sides]
        return np.mean(found, 0).astype(own.dtype)

    if mirrored:
        y_small = answers(x_small)
    more = x[:n_more]
    labels = ((1 - share) * answers(more) + share * y[:n_more]).astype(own.dtype)
    return np.concatenate([x_small, more]), np.concatenate([y_small, labels])


def fingerprint(path) -> str:
    """16 hex digits of what a support grows from: of the set in that file, not of its path.

    Raises:
      ValueError: no such file, or not a set.
    """
    arrays, _ = _read("support.grown_from", path)
    return files.digest_of_arrays(*(arrays[key] for key in ("x_train", "y_train")))


def read_same(
    setting: str, path, experiment: Experiment, method: Method
) -> tuple[dict[str, np.ndarray], dict]:
    """(arrays, settings) of a distilled set of an experiment's own split, seed and method.

    Args:
      setting: that names the file, for messages.
      path: of the file.
      experiment, method: that want to use it.

    Raises:
      ValueError: no such file, no distilled set, one without its kernel or of another split.
    """
    arrays, settings = _read(setting, path)
    if not settings:
        raise ValueError(
            f"{setting}: expected a distilled set with its settings, got {path}, which has none; "
            "pass an adv-kip.npz of a run"
        )
    found = json.loads(settings)
    _check_same(setting, found, experiment, method)
    return arrays, found


def _read(setting, path):
    found = files.find(path)
    if not found.exists():
        raise ValueError(f"{setting}: expected a distilled set, got no file {path}")
    return data.read(found)


def _check_same(setting, settings, experiment, method):
    """Raises ValueError for a set without its kernel, or of another split, seed or method."""
    own, other = experiment.to_dict(), []
    its = {key: settings.get(key) for key in ("kernel", "dataset")}
    its = {key: found if isinstance(found, dict) else {} for key, found in its.items()}
    # Settings were flat before there were sections.
    if missing := [f"kernel.{name}" for name in OF_A_MACHINE if name not in its["kernel"]]:
        other.append(f"{', '.join(missing)}, got none")
    for name in ("name", "n_validation"):
        mine, found = own["dataset"][name], its["dataset"].get(name)
        if found != mine:
            other.append(f"dataset.{name} {mine!r}, got {found!r}")
    for name, mine in (("seed", own["seed"]), ("method", method)):
        if settings.get(name) != mine:
            other.append(f"{name} {mine!r}, got {settings.get(name)!r}")
    if other:
        raise ValueError(
            f"{setting}: expected a set with {'; '.join(other)}; pass one of this data set, "
            "validation images, seed and method, or change them here (kip: null)"
        )
