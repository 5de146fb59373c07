"""Aggregated static attacks: a set that also says what a robust machine answers where networks err.

A network that has learned a machine's answers to images, and to copies of them, still errs around
them in directions of its own, and an attack on it looks for just those. So let a network of the
same training tell where: a *scout* is trained plainly on the set so far and attacked, and the
attacked images are added, labelled with what the machine answers to *them*; then the next scout
(Ross et al. 2011, DAgger, aggregate data sets so). What comes out is a data set like any other. The
networks that are reported have other first weights, see it from the beginning, and nobody attacks
them in training.
"""

from pathlib import Path

import numpy as np
import torch

from advkip import files, inputs, nets, relabel, store, torch_attacks, training
from advkip.attack_names import ATTACKED
from advkip.config import Experiment
from advkip.data import TrainingSet
from advkip.recipe import Recipe

STEPS = 10
"""Of the attack on a scout."""

RIVALS = 5
"""Each image is pushed to one of this many classes that its label has next, drawn at random."""


def aggregated(
    first: TrainingSet, answer, experiment: Experiment, watched: training.Watched, folder=None
) -> TrainingSet:
    """A set, and after it attacked copies of its images, each copied once, in `rounds` rounds.

    In round r of R = `relabelling.rounds` the scout is trained on all that is there, and the images
    r, r + R, r + 2 R, ... of the first set are attacked.

    Args:
      first: images (N, H, W, C) with labels (N, C) and perhaps features.
      answer: labels and features (n, C + F) of images (n, H, W, C); None: an attacked image has
        those of the image that it was.
      experiment: whose `relabelling`, threat and seed are used, and its section of the scout's kind
        for the recipe.
      watched: the validation images that choose a scout's epoch.
      folder: of checkpoints; None for none.

    Returns:
      2 N images and labels; with `rounds` 0 the first set as it is.

    Raises:
      ValueError: more rounds than images.
      FloatingPointError: as `training.train`.
    """
    settings = experiment.relabelling
    recipe = Recipe.of(experiment.section_of(settings.scout), experiment)
    n, classes = len(first.x), first.y.shape[1]
    if settings.rounds > n:
        raise ValueError(
            f"expected relabelling.rounds of at most {n}, the number of images, got "
            f"{settings.rounds}; pass fewer"
        )
    asked = first.y if first.features is None else np.concatenate([first.y, first.features], 1)
    x, y = (
        np.concatenate([a, np.empty_like(a)]) if settings.rounds else a for a in (first.x, asked)
    )
    for number in range(settings.rounds):
        seed = nets.derived_seed(experiment.seed, "scout", number)
        net = nets.build(
            settings.scout, shape=x.shape[1:], n_classes=classes, seed=seed,
            n_features=y.shape[1] - classes,
        )  # fmt: skip
        scout = training.train(
            net, x[:n], y[:n], recipe=recipe, watched=watched, seed=seed, checkpoint_dir=folder,
            label=f"scout-{number}",
        ).net  # fmt: skip
        share = slice(number, None, settings.rounds)
        more, labels = _stored(
            scout, first.x[share], asked[share], classes, answer, recipe, seed, folder, number
        )
        new = slice(n, n + len(more))
        x[new], y[new] = more, labels
        n = new.stop
    named = first.teacher + ATTACKED * bool(settings.rounds)
    features = None if first.features is None else y[:, classes:]
    return first._replace(x=x, y=y[:, :classes], teacher=named, features=features)


def _stored(scout, x, y, classes, answer, recipe, seed, folder, number):
    """Attacked images and what the machine says to them, from the folder if they are there."""
    weights = map(nets.to_numpy, scout.state_dict().values())
    about = {
        "images and weights": files.digest_of_arrays(x, y, *weights), "seed": seed,
        **recipe.identity(),
    }  # fmt: skip
    path = folder and Path(folder) / f"attacked-{number}-{store.digest(about)}.npz"
    if path and path.exists():
        return store.load(path, (x, y), about=about)[0]
    found = attacked(scout, x, y[:, :classes], recipe=recipe, seed=seed)
    found = found if inputs.as_eight_bit(x) is None else relabel.rounded(found)
    labels = answer(found).astype(y.dtype) if answer else y
    if path:
        store.save(path, (found, labels), about=about)
    return found, labels


def attacked(net, x, y, *, recipe: Recipe, seed) -> np.ndarray:
    """Images (n, H, W, C), pushed from the class of their largest label towards one of the next.

    Of equal labels those that the network finds likelier come first. PGD from a random start in the
    ball of the recipe's threat, on the difference of two logits (`torch_attacks.towards`), in the
    recipe's precision.

    Args:
      net: in evaluation mode.
      x, y: images (n, H, W, C) in [0, 1] and label vectors (n, C).
      recipe: whose threat, step_size and dtype are used.
      seed: of the starts and of the classes.
    """
    generator = torch.Generator().manual_seed(seed)
    logits = relabel.answers(net, x)[:, : y.shape[1]]
    order = torch.as_tensor(np.lexsort((-logits, -y)))  # by labels, then by logits
    rank = torch.randint(1, min(RIVALS + 1, y.shape[1]), (len(y), 1), generator=generator)
    top, aim = order[:, 0], order.gather(1, rank)[:, 0]
    size, parts = nets.batch_size(net, x.shape[1:]), []
    for start in range(0, len(x), size):
        rows = slice(start, start + size)
        own, others = (classes[rows].to(nets.device()) for classes in (top, aim))
        with torch.autocast(nets.device().type, torch.bfloat16, enabled=recipe.dtype == "bfloat16"):
            found = torch_attacks.pgd(
                net, nets.to_tensor(x[rows]), own, threat=recipe.threat, n_steps=STEPS,
                step_size=recipe.step_size, loss=torch_attacks.towards(others),
                generator=generator,
            )  # fmt: skip
        parts.append(nets.to_array(found))
    return np.concatenate(parts)
