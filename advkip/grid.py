"""One params file, many experiments: `grid: {seed: [0, 1, 2], support.n_support: [500, 1000]}`."""

import itertools
import re
from collections.abc import Iterable
from pathlib import Path

from advkip.config import Experiment, read_params

KEY = "grid"


def experiments(path: str | Path, overrides: Iterable[str] = ()) -> list[Experiment]:
    """The experiments of a params file: one, or one for each point of its `grid`.

    A grid maps settings to lists of values; its points are named after the experiment and what
    differs, as 'mnist-seed1-n_support500'.

    Raises:
      ValueError: as `Experiment.from_file`, or a grid that is not such a mapping.
    """
    params = read_params(path, overrides)
    grid = params.pop(KEY, None)
    if grid is None:
        return [Experiment.from_file(path, overrides)]
    if (
        not isinstance(grid, dict)
        or not grid
        or not all(isinstance(values, list) and values for values in grid.values())
    ):
        raise ValueError(
            f"{path}: expected grid to map settings to lists of values, got {grid!r}; pass for "
            "example {seed: [0, 1, 2], support.n_support: [500, 1000]}"
        )  # fmt: skip
    found = []
    for values in itertools.product(*grid.values()):
        point = dict(zip(grid, values, strict=True))
        name = "-".join([params["name"], *map(_label, point, point.values())])
        found.append(Experiment.from_file(path, overrides, given={"name": name, **point}))
    return found


def _label(key, value):
    """'n_support500' of support.n_support and 500."""
    return re.sub(r"[^\w.-]", "-", f"{key.split('.')[-1]}{value}")
