"""Networks of an experiment by name: which learning rate, how many seeds; none trained twice."""

import dataclasses
from pathlib import Path
from typing import NamedTuple

import numpy as np

from advkip import data, nets, training
from advkip.config import Experiment
from advkip.recipe import Recipe
from advkip.settings import AdversarialTraining, Networks


class Search(NamedTuple):
    """Networks of one kind on one training set."""

    best: list  # a `Trained` of the chosen learning rate for each seed
    learning_rate: float
    runs: dict  # {learning rate: Trained} of the first seed


def search(
    name: str, x, y, *, recipe: Recipe, learning_rates, watched: training.Watched, seeds,
    features=None, checkpoint_dir=None, label: str = "", progress: bool = True,
) -> Search:  # fmt: skip
    """Trains a network with each learning rate, chooses on validation images, repeats for seeds.

    Args:
      name: of `nets.build`.
      x, y, watched, checkpoint_dir, label, progress: as for `train`; y label vectors (N, classes).
      recipe: a `Recipe`, whose learning rate is replaced.
      learning_rates: the grid.
      seeds: integers; the grid is run with the first, the others with the chosen rate.
      features: what networks are asked for beside y, shape (N, F); None is nothing.

    Returns:
      A `Search`. A rate is chosen as `train` chooses an epoch; one whose training diverged is kept
      as a `Trained` without a network.

    Raises:
      FloatingPointError: training diverged with every rate.
    """

    n_features = 0 if features is None else features.shape[1]
    labels = y if features is None else np.concatenate([y, features], 1)

    def run(rate, seed):
        net = nets.build(
            name, shape=x.shape[1:], n_classes=y.shape[1], seed=seed, n_features=n_features
        )
        return training.train(
            net, x, labels, recipe=dataclasses.replace(recipe, learning_rate=rate), watched=watched,
            seed=seed, checkpoint_dir=checkpoint_dir, label=label or name, progress=progress,
        )  # fmt: skip

    def try_rate(rate):
        try:
            return run(rate, seeds[0])
        except FloatingPointError:
            return training.Trained(None, 0, 0.0, 0.0, [], "diverged")

    runs = {rate: try_rate(rate) for rate in learning_rates}
    good = {rate: one for rate, one in runs.items() if one.stopped != "diverged"}
    if not good:
        raise FloatingPointError(
            f"expected a learning rate in {list(learning_rates)} with a finite loss, got none; "
            "pass smaller ones"
        )
    enough = max(one.clean for one in good.values()) - training.CLEAN_MARGIN
    best = max(
        (rate for rate in good if good[rate].clean >= enough),
        key=lambda rate: (good[rate].score, good[rate].clean),
    )
    return Search([runs[best], *(run(best, seed) for seed in seeds[1:])], best, runs)


@dataclasses.dataclass(frozen=True)
class Trainer:
    """Trains the networks of an experiment, each in a file that names network and set.

    A network that was trained before, by another notebook of the experiment, is read from there.
    """

    experiment: Experiment
    watched: training.Watched
    folder: str | Path | None = None

    def __call__(
        self, net: str, name: str, chosen: data.TrainingSet, *, adversarially: bool = False,
        section: Networks | AdversarialTraining | None = None, learning_rates=None,
        progress: bool = True,
    ) -> Search:  # fmt: skip
        """A `Search` of a network (of `nets.build`) on a set of a name.

        `section` None means the experiment's adversarial_training, fully_connected or cnns, and
        `learning_rates` None those of the section. Features of the set are asked for in plain
        training with the squared error on labels as they are.
        """
        e = self.experiment
        if section is None:
            section = e.adversarial_training if adversarially else e.section_of(net)
        if section is None:
            raise ValueError(
                "expected settings of adversarial_training, got null; pass them to train so"
            )
        how = "adversarial" if adversarially else "plain"
        takes = isinstance(section, Networks) and section.takes_features
        found = search(
            net, chosen.x, chosen.y, features=chosen.features if takes else None,
            recipe=Recipe.of(section, e), watched=self.watched,
            learning_rates=learning_rates or section.learning_rates, seeds=e.net_seeds(),
            checkpoint_dir=self.folder, label=f"network-{net}-{name}-{how}", progress=progress,
        )  # fmt: skip
        every = [*found.runs.values(), *found.best[1:]]
        read = sum(one.resumed > 0 and one.resumed == one.history[-1]["epoch"] for one in every)
        print(f"{net} on {name}, {how} training: {len(every)} networks, {read} found trained")
        return found
