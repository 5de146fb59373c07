"""One params file, many experiments: `grid: {seed: [0, 1, 2], support.n_support: [500, 1000]}`."""

import itertools
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from advkip.config import Experiment, by_path, file_name, read_params

KEY = "grid"


def experiments(path: str | Path, overrides: Iterable[str] = ()) -> list[Experiment]:
    """The experiments of a params file: one, or one for each point of its `grid`.

    A grid maps settings to lists of values, or a word of your own to variants, each a name and the
    settings that it changes together:

        grid:
          seed: [0, 1, 2]
          switch:
            paper: {}
            hinge: {adv_kip.inner_loss: margin, adv_kip.outer_loss: hinge}

    Points are named after the experiment and what differs, as 'mnist-seed1-hinge'.

    Raises:
      ValueError: as `Experiment.from_file`, a grid that is not such a mapping, points of one name,
        a setting that two directions change, or one of the grid's in `overrides`.
    """
    params = read_params(path, overrides)
    grid = params.pop(KEY, None)
    if grid is None:
        return [Experiment.from_file(path, overrides)]
    if not isinstance(grid, dict) or not grid or not all(map(_is_axis, grid.values())):
        raise ValueError(
            f"{path}: expected grid to map settings to lists of values, or a word to named "
            f"settings, got {grid!r}; pass for example {{seed: [0, 1, 2], switch: {{paper: {{}}, "
            "margin: {adv_kip.inner_loss: margin}}}"
        )  # fmt: skip
    axes = list(itertools.starmap(_axis, grid.items()))
    own = {path for axis in axes for _, settings in axis for path, _ in by_path(settings)}
    asked = [one.partition("=")[0].strip() for one in overrides]
    if taken := [key for key in asked if any(_overlap(key, path) for path in own)]:
        raise ValueError(
            f"{path}: expected --set of other settings than those of the grid, got {taken}; pass "
            "their values to the grid, as --set grid.seed=[7], or change them in the file"
        )
    found = []
    for point in itertools.product(*axes):
        name = "-".join([params["name"], *(label for label, _ in point)])
        keys = [path for _, settings in point for path, _ in by_path(settings)]
        if twice := {key for key in keys if keys.count(key) > 1 or key == "name"}:
            raise ValueError(
                f"{path}: expected each setting in one direction of the grid, and no name, got "
                f"{sorted(twice)} in {name}; pass it in one"
            )
        given = {key: value for _, settings in point for key, value in by_path(settings)}
        found.append(Experiment.from_file(path, overrides, given={"name": name, **given}))
    if twice := [name for name, n in Counter(one.name for one in found).items() if n > 1]:
        raise ValueError(
            f"{path}: expected a name for each point of the grid, got {twice[0]!r} twice; pass "
            "other names, or a value once"
        )
    return found


def _overlap(one, other):
    """Whether two settings are the same, or one the section of the other."""
    return one == other or one.startswith(f"{other}.") or other.startswith(f"{one}.")


def _is_axis(values):
    if isinstance(values, dict):
        return bool(values) and all(isinstance(one, dict) for one in values.values())
    return isinstance(values, list) and bool(values)


def _axis(key, values):
    """(label, {setting: value}) of each point along a direction of the grid."""
    if isinstance(values, dict):
        return [(file_name(name), settings) for name, settings in values.items()]
    return [(file_name(f"{key.split('.')[-1]}{value}"), {key: value}) for value in values]
