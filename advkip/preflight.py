"""What an experiment's data must be before anything runs, and which data they are."""

import os
from pathlib import Path

import numpy as np

from advkip import data, files, inputs
from advkip.config import ATTACK_PARTS, UNTARGETED_PARTS, ignored_settings

TARGETED = ("autoattack", *(part for part in ATTACK_PARTS if part not in UNTARGETED_PARTS))
"""Attacks with losses towards each of three other classes or more."""


def check(experiment):
    """Raises ValueError or OSError unless an experiment's data are there and fit its settings.

    What would be downloaded is not looked at.
    """
    e = experiment
    if e.distilled_set and not Path(e.distilled_set).expanduser().is_file():
        raise ValueError(
            f"expected distilled_set to be a .npz file, got {e.distilled_set}, which is not there; "
            "pass another path, or leave it empty for the set of notebook 01"
        )
    if e.robust_features and not Path(e.robust_features).expanduser().exists():
        raise ValueError(
            f"expected robust_features to be a folder or a .npz, got {e.robust_features}, which is "
            "not there; pass another path, or leave it empty to make the set"
        )
    if not data.is_here(e.dataset, e.data_dir):
        return
    found = data.load(e.dataset, e.data_dir)
    # The draws look at labels alone, so images of no size will do.
    small = (np.zeros((len(y), 1, 1, 1), "float32") for y in (found.y_train, found.y_test))
    x_train, x_test = small
    splits = data.split(found._replace(x_train=x_train, x_test=x_test), e)
    data.draw_original(splits, e.n_original, seed=e.seed)
    shape = found.x_test.shape[1:]
    inputs.check_radius(e.norm, e.epsilon, shape)
    if any(name.endswith("-l2") for name in e.net_attacks):
        inputs.check_radius("l2", e.epsilon_l2, shape)
    targeted = [a for a in e.net_attacks if a.removesuffix("-l2") in TARGETED]
    networks = {"02_transfer", "03_cnns", "04_shortcomings"} & set(e.notebooks)
    if targeted and networks and found.n_classes < 4:
        raise ValueError(
            f"expected net_attacks for {found.n_classes} classes, got {targeted}, whose targeted "
            "losses need 4; pass 'apgd-ce' and 'square'"
        )
    if e.distilled_set:
        chosen = data.training_set(e.distilled_set, n_classes=found.n_classes)[1]
        data.check_fits(e.distilled_set, chosen, shape, found.n_classes)


def digests(experiment):
    """{setting: `files.digest`} of the files that an experiment's settings name and that are here.

    A result belongs to these contents, wherever the files lie. What torchvision downloads is
    checked by torchvision.
    """
    folder = experiment.data_dir or os.environ.get("ADVKIP_DATA", "")
    named = {
        "dataset": Path(folder) / f"{experiment.dataset}.npz" if folder else "",
        "distilled_set": experiment.distilled_set,
        "robust_features": experiment.robust_features,
    }
    found = {key: Path(path).expanduser() for key, path in named.items() if str(path)}
    return {key: files.digest(path) for key, path in found.items() if path.exists()}


def same_data(old, new, *notebooks):
    """Whether two results of `digests` are of one content; what is in one alone does not count.

    Nor does what one of `notebooks` does not depend on.
    """
    free = set().union(*map(ignored_settings, notebooks))
    return all(old[key] == new[key] for key in old.keys() & new.keys() - free)
