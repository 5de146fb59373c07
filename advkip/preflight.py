"""What an experiment's data must be before anything runs, and which data they are."""

import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from advkip import data, files, growth, inputs
from advkip.attack_names import Attack
from advkip.config import Experiment, sections
from advkip.settings import PUBLISHED, SETS, TEACHERS, is_path


def check(experiment: Experiment, to_come: Iterable[Path] = ()) -> None:
    """Raises ValueError or OSError unless an experiment's data are there and fit its settings.

    What would be downloaded is not looked at, nor sets in folders `to_come`, which other
    experiments will have filled by then.
    """
    e, folders = experiment, set(to_come)
    paths = [name for name in _paths(e) if not _comes(name, folders)]
    grown_from = e.support.grown_from
    if grown_from and _distils(e) and not _comes(grown_from, folders):
        growth.fingerprint(grown_from)
        for method in e.methods if "01_kernels" in e.notebooks else ():
            growth.read_same("support.grown_from", grown_from, e, method)
    for name in paths:
        if not files.find(name).exists():
            raise ValueError(
                f"expected sets of {list(SETS)} or a path, got {name!r}, which is not there; "
                "pass one of these names, an .npz, or a folder with the published robust features"
            )
    if not data.is_here(e.dataset.name, e.dataset.folder):
        return
    found = data.load(e.dataset.name, e.dataset.folder)
    # The draws look at labels alone, so images of no size will do.
    small = (np.zeros((len(y), 1, 1, 1), "float32") for y in (found.y_train, found.y_test))
    x_train, x_test = small
    light = found._replace(x_train=x_train, x_test=x_test)
    splits = data.split(light, e)
    data.draw_original(e, splits)
    if "05_remedies" in e.notebooks:
        for one in e.variants().values():
            data.split(light, one)
    shape, attacks = found.x_test.shape[1:], list(map(Attack.parse, e.evaluation.attacks))
    inputs.check_radius(e.threat.norm, e.threat.epsilon, shape)
    if any(attack.l2 for attack in attacks):
        inputs.check_radius("l2", e.threat_l2.epsilon, shape)
    targeted = [attack.name for attack in attacks if attack.targeted]
    networks = {"02_transfer", "03_cnns", "04_shortcomings", "05_remedies"} & set(e.notebooks)
    if targeted and networks and found.n_classes < 4:
        raise ValueError(
            f"expected evaluation.attacks for {found.n_classes} classes, got {targeted}, whose "
            "targeted losses need 4; pass 'apgd-ce' and 'square'"
        )
    for name in paths:
        if files.find(name).is_file():
            arrays, settings = data.read(files.find(name))
            x = data.dataset_of(name, arrays, settings).x_train
            data.check_fits(name, x, arrays["y_train"], shape, found.n_classes)
        elif missing := [one for one in PUBLISHED if not (files.find(name) / one).exists()]:
            raise ValueError(
                f"expected the published robust features in {name}, got a folder without "
                f"{missing}; pass the folder of these files"
            )


def _comes(path, folders):
    """Whether a path is that of a set as runs in those folders leave it."""
    own = r"((adv-kip|kip|unrolled)(-\d+)?|relabelled|robust-features)\.npz"
    return Path(path).parent in folders and bool(re.fullmatch(own, Path(path).name))


def _distils(experiment):
    """Whether a notebook of an experiment makes a set that begins with `support.grown_from`."""
    asked, teacher = set(_asked(experiment)), experiment.relabelling.teacher
    made = {"adv-kip", "kip", "unrolled", *(() if teacher else ("relabelled",))}
    return bool({"01_kernels", "05_remedies"} & set(experiment.notebooks) or made & asked)


def _asked(experiment):
    """The sets of an experiment's notebooks."""
    asked = dict.fromkeys(("02_transfer", "03_cnns"), experiment.networks.sets)
    asked["04_shortcomings"] = experiment.diagnosis.sets
    return [name for one in experiment.notebooks for name in asked.get(one, ())]


def _paths(experiment):
    """The paths among the sets of an experiment's notebooks, and of a teacher of theirs."""
    names = _asked(experiment)
    paths = [name for name in names if is_path(name)]
    teacher = experiment.relabelling.teacher
    if "relabelled" in names and teacher and teacher not in TEACHERS:
        paths.append(teacher)
    return list(dict.fromkeys(paths))


def digests(experiment: Experiment) -> dict[str, str]:
    """{section or path: `files.digest`} of the files that an experiment names and that are here.

    A result belongs to these contents, wherever the files lie. What torchvision downloads is
    checked by torchvision.
    """
    found = {name: files.find(name) for name in _paths(experiment)}
    if path := data.find(experiment.dataset.name, experiment.dataset.folder):
        found["dataset"] = path
    if experiment.support.grown_from:
        found["support"] = files.find(experiment.support.grown_from)
    return {key: files.digest(path) for key, path in found.items() if path.exists()}


def same_data(old: dict, new: dict, notebook: str) -> bool:
    """Whether two results of `digests` are of one content, as far as a notebook depends on it.

    What is in one alone does not count.
    """
    read = sections(notebook)
    shared = old.keys() & new.keys()
    if "networks" not in read:
        shared &= {*read}
    return all(old[key] == new[key] for key in shared)
