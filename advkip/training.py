"""Training of PyTorch networks, plain and adversarial (Madry et al. 2018), with a history.

What is trained on is a set of images and label vectors, a distilled one or original images. The
weights with the best robust validation accuracy are kept; test images can be watched, and choose
nothing.
"""

import copy
import dataclasses
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from advkip import data, files, inputs, nets, store, torch_attacks
from advkip.nets import derived_seed, device, to_tensor
from advkip.progress import tqdm
from advkip.recipe import Recipe as Recipe
from advkip.recipe import targets
from advkip.settings import SCORES

FAR = 20.0
"""A distilled set leaves [0, 1], but not as far: these are pixels of 0..255."""

CLEAN_MARGIN = 0.1
"""Weights are kept only if their clean accuracy is within this of the best seen. Where training
brings no robustness, robust accuracy alone would choose the weights that have learned least, since
a constant prediction is right for a tenth of the images whatever an attack does."""


FLUSH_EVERY = 25
"""Batches from one `nets.flush` to the next."""


class Trained(NamedTuple):
    """A trained network and how it came about."""

    net: nn.Module  # the weights with the best robust validation accuracy, in evaluation mode
    epoch: int  # epochs behind them
    score: float  # their robust validation accuracy
    clean: float  # their clean validation accuracy
    history: list  # dicts; see `train`
    stopped: str  # "epochs", "patience" or "diverged"
    resumed: int = 0  # epochs that a checkpoint had; all of them if nothing was trained now


class Watched(NamedTuple):
    """Images that training follows; the validation images choose, the test images do not."""

    x_validation: np.ndarray  # (V, H, W, C) in [0, 1]
    y_validation: np.ndarray  # integers (V,)
    x_test: np.ndarray | None = None
    y_test: np.ndarray | None = None


def watched(splits, n, *, seed) -> Watched:
    """n validation images and n test images of `data.Splits`, or all where there are fewer."""
    test = data.draw_test(splits, n, seed=seed)
    return Watched(splits.x_validation[:n], splits.y_validation[:n], *test)


def train(
    net, x, y, *, recipe: Recipe, watched: Watched, seed: int = 0, checkpoint_dir=None,
    label: str = "network", progress: bool = True,
) -> Trained:  # fmt: skip
    """Trains a network, without augmentation, and keeps the weights that validate best.

    Weights are chosen, and training stops, by robust validation accuracy (PGD from the image
    itself) among those whose clean accuracy is within CLEAN_MARGIN of the best so far; clean
    accuracy tells equal ones apart. The history has lines with epoch, seconds, loss (of the
    training batches), clean, fgsm, pgd and, if it chooses, strong (validation accuracies; see
    `robust_accuracies`) and, of the test images, test_clean, test_fgsm, test_pgd (Figure 3), and
    mean cross-entropy and mean input-gradient norm, split into images that are classified correctly
    and wrongly: loss_right, loss_wrong, gradient_right, gradient_wrong (Figure 2; None without such
    images). Nothing is chosen by the test images.

    Args:
      net: logits of images (n, C, H, W); trained in place.
      x: training images, shape (N, H, W, C); a distilled set may leave [0, 1].
      y: label vectors (N, classes), or integers (N,).
      recipe: a `Recipe`.
      watched: a `Watched`.
      seed: of the order of the images and of adversarial training's random starts.
      checkpoint_dir: folder of a checkpoint, written with each line of the history, and continued
        when network, images, labels, recipe (but for epochs and patience) and seed are the same;
        None for none. A line is also written at the last epoch, whatever eval_every is, and on
        interruption the state after the last whole epoch.
      label: the checkpoint's name begins with it.
      progress: shows a bar.

    Returns:
      A `Trained`.

    Raises:
      ValueError: images or labels, of training or watched, that do not fit; a checkpoint that
        cannot be read or has more epochs.
      FloatingPointError: the loss is not finite; the message says what to change.
    """
    _check_images(x, watched)
    run = _Run(net, x, y, recipe, watched, seed)
    parts = {"": watched[:2]} | ({"test_": watched[2:]} if watched.x_test is not None else {})
    seen = {key: (to_tensor(a), torch.as_tensor(b).to(device())) for key, (a, b) in parts.items()}
    path = checkpoint_dir and Path(checkpoint_dir) / f"{label}-{store.digest(run.about)}.npz"
    if path and path.exists():
        run.load(path)
        if run.epoch > recipe.epochs:
            raise ValueError(
                f"expected a checkpoint of at most {recipe.epochs} epochs, got {run.epoch} in "
                f"{path.name}; pass as many epochs or more, or delete the file"
            )

    resumed = run.epoch
    with tqdm(
        total=recipe.epochs, initial=run.epoch, disable=not progress, mininterval=1,
        desc="adversarial training" if recipe.adversarial_steps else "training", unit="epoch",
    ) as bar:  # fmt: skip
        state = path and run.state()
        try:
            while not (reason := run.finished()):
                run.advance()
                if due := run.epoch % recipe.eval_every == 0 or run.epoch == recipe.epochs:
                    run.validate(seen)
                state = path and run.state()
                if path and due:
                    run.save(path, state)
                bar.update(run.epoch - bar.n)
                if run.history:
                    line = run.history[-1]
                    bar.set_postfix_str(
                        f"loss {run.loss:.3f}, clean {line['clean']:.1%}, PGD {line['pgd']:.1%}",
                        refresh=False,
                    )
        except KeyboardInterrupt:
            if path and run.epoch:
                run.save(path, state)
            raise
    net.load_state_dict(run.best)
    score, clean = run.best_score
    return Trained(net.eval(), run.best_epoch, score, clean, run.history, reason, resumed)


def _check_images(x, watched):
    inputs.check_layout(np.shape(x), "training images")
    inputs.check_floats(x, "training images")
    largest = max(x.max(), -x.min())
    if not largest <= FAR:
        raise ValueError(
            f"expected training images near [0, 1], got values up to {largest:.4g}; pass "
            "images divided by 255 and without NaN"
        )
    for part in ("validation", "test"):
        images, y = (getattr(watched, f"{key}_{part}") for key in "xy")
        if images is not None:
            inputs.images(images, name=f"watched {part} images")
            inputs.labels(y, len(images), vectors=False, name=f"watched {part} labels")
            if np.shape(images)[1:] != np.shape(x)[1:]:
                raise ValueError(
                    f"expected watched {part} images of the training images' shape "
                    f"{np.shape(x)[1:]}, got {np.shape(images)[1:]}; pass images of one size"
                )


class _Run:
    """The state of one training."""

    def __init__(self, net, x, y, recipe, watched, seed):
        self.net, self.recipe, self.seed = net, recipe, seed
        self.images, self.y = nets.Images(x), targets(y, len(x), recipe)
        # Attacked images differ each time, and roundings to bfloat16 cancel only if f has the same.
        known = not recipe.adversarial_steps and recipe.dtype == "float32"
        self.at_start = nets.at_start(net, self.images if known else None)
        self.optimizer = self.make_optimizer(net)
        self.epoch, self.loss, self.history, self.seconds = 0, float("nan"), [], 0.0
        # A distilled set may leave the pixel range; attacks on its images then may, too.
        low, high = min(recipe.threat.low, x.min()), max(recipe.threat.high, x.max())
        self.threat = dataclasses.replace(recipe.threat, low=float(low), high=float(high))
        self.best, self.best_epoch = copy.deepcopy(net.state_dict()), 0
        self.best_score = (-1.0, -1.0)
        arrays = (x, y, *(a for a in watched if a is not None))
        self.about = {
            "net": str(net), "seed": seed, **recipe.identity(),
            "images and weights": files.digest_of_arrays(
                *arrays, *map(nets.to_numpy, net.state_dict().values())
            ),
        }  # fmt: skip

    def make_optimizer(self, net):
        recipe = self.recipe
        # One pass over weights and moments instead of ten.
        options = {"lr": recipe.learning_rate, "weight_decay": recipe.weight_decay, "fused": True}
        if recipe.optimizer == "sgd":
            return torch.optim.SGD(net.parameters(), momentum=0.9, **options)
        return torch.optim.Adam(net.parameters(), **options)

    def finished(self):
        if self.epoch >= self.recipe.epochs:
            return "epochs"
        waited = self.epoch - self.best_epoch if self.history else 0
        return "patience" if self.recipe.patience and waited >= self.recipe.patience else ""

    def advance(self):
        """One epoch, in an order that derives from the seed and the epoch's number."""
        recipe, began = self.recipe, time.perf_counter()
        rate = recipe.learning_rate * 0.1 ** sum(self.epoch >= m for m in recipe.milestones)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        order = torch.as_tensor(
            data.generator(self.seed, "order", self.epoch).permutation(len(self.y))
        )
        batches = list(order.to(device()).split(recipe.batch_size or len(order)))
        if len(batches) > 1 and len(batches[-1]) == 1:  # batch normalisation cannot have one alone
            batches[-2:] = [torch.cat(batches[-2:])]
        noise = torch.Generator().manual_seed(derived_seed(self.seed, "noise", self.epoch))
        total, rounded = 0.0, recipe.dtype == "bfloat16"
        with torch.random.fork_rng(), torch.backends.cudnn.flags(enabled=True, deterministic=True):
            torch.manual_seed(derived_seed(self.seed, "dropout", self.epoch))
            for i, index in enumerate(batches):
                x, y = self.images[index], self.y[index]
                if recipe.adversarial_steps:
                    x = self.attacked(x, y, self.grown((i + 1) / len(batches)), noise)
                self.net.train()
                with torch.autocast(device().type, torch.bfloat16, enabled=rounded):
                    every = [
                        net(x, *(logits[index] for logits in at_start))
                        for net, at_start in zip(nets.members(self.net), self.at_start, strict=True)
                    ]
                every = [logits.float() if rounded else logits for logits in every]
                loss = sum(torch_attacks.LOSSES[recipe.loss](one, y).mean() for one in every)
                self.optimizer.zero_grad()
                loss.backward()
                self.optimizer.step()
                if (self.epoch * len(batches) + i) % FLUSH_EVERY == 0:
                    nets.flush(self.optimizer)
                total = total + loss.detach() / len(every) * len(index)
        self.loss = float(total) / len(self.y)
        if not np.isfinite(self.loss):
            raise FloatingPointError(
                f"expected a finite training loss, got {self.loss} in epoch {self.epoch}; pass a "
                "smaller learning_rate"
            )
        self.epoch += 1
        self.seconds += time.perf_counter() - began

    def grown(self, part):
        """The share of the radius that is reached after `part` of this epoch."""
        warmup = self.recipe.adversarial_warmup
        return min(1.0, (self.epoch + part) / warmup) if warmup else 1.0

    def attacked(self, x, y, grown, noise):
        """A training batch under attack, with `grown` times the radius and the step size."""
        recipe = self.recipe
        threat = dataclasses.replace(self.threat, epsilon=grown * recipe.threat.epsilon)
        return torch_attacks.pgd(
            self.net.eval(), x, y, threat=threat, n_steps=recipe.adversarial_steps,
            step_size=grown * recipe.step_size, loss=recipe.loss, generator=noise,
        )  # fmt: skip

    def validate(self, parts):
        """Adds a line to the history and keeps the weights if they are the best so far."""
        self.net.eval()
        line = {"epoch": self.epoch, "seconds": round(self.seconds, 2), "loss": self.loss}
        for prefix, (x, y) in parts.items():
            with nets.deterministic():
                found = robust_accuracies(self.net, x, y, self.recipe, strong=not prefix)
            split = {k: found.pop(k) for k in list(found) if "_" in k}
            line |= {prefix + key: value for key, value in found.items()}
            if prefix:
                line |= split
        self.history.append(line)
        score = (line[SCORES[self.recipe.choose_by]], line["clean"])
        clean = max(one["clean"] for one in self.history)
        outdated = self.best_score[1] < clean - CLEAN_MARGIN
        if line["clean"] >= clean - CLEAN_MARGIN and (outdated or score > self.best_score):
            self.best_score, self.best_epoch = score, self.epoch
            self.best = copy.deepcopy(self.net.state_dict())

    def state(self):
        """(tree, notes): a copy of all that the run is; best weights are replaced, not changed."""
        notes = {k: getattr(self, k) for k in _NOTES}
        parts = {"net": self.net, "optimizer": self.optimizer}
        tree = {key: part.state_dict() for key, part in parts.items()}
        return copy.deepcopy(tree) | {"best": self.best}, copy.deepcopy(notes)

    def save(self, path, state):
        tree, notes = state
        store.save(path, tree, about=self.about, notes=notes)

    def load(self, path):
        # An optimiser has its moments from its first step on.
        net = copy.deepcopy(self.net)
        for weights in net.parameters():
            weights.grad = torch.zeros_like(weights)
        stepped = self.make_optimizer(net)
        stepped.step()
        like = {"net": net.state_dict(), "optimizer": stepped.state_dict(), "best": self.best}
        tree, notes = store.load(path, like, about=self.about)
        self.net.load_state_dict(tree["net"])
        self.optimizer.load_state_dict(tree["optimizer"])
        self.best = tree["best"]
        for key in _NOTES:
            setattr(self, key, notes[key])
        self.best_score = tuple(self.best_score)


_NOTES = ("epoch", "loss", "history", "seconds", "best_epoch", "best_score")
"""Parts of a run that are no weights or moments."""


def robust_accuracies(net, x, y, recipe: Recipe, *, strong=True) -> dict:
    """Accuracies, and loss and input-gradient norm by right and wrong, of a net on images.

    Args:
      net: in evaluation mode.
      x, y: tensors of images in [0, 1] and integers.
      recipe: whose threat, step_size, eval_pgd_steps and choose_by are used.
      strong: whether to measure the worst case, if the recipe chooses by it.

    Returns:
      A dict: clean, fgsm, pgd (the worst case of each image, as in `evaluate`), strong (of these
      and of several losses), loss_right, loss_wrong, gradient_right, gradient_wrong.
    """
    strong = strong and recipe.choose_by == "worst-case"
    parts, size = [], nets.batch_size(net, x.shape[1:])
    for a, b in zip(x.split(size), y.split(size), strict=True):
        losses, gradient, logits = torch_attacks.input_gradient(net, a, b)
        right = logits.argmax(1) == b
        ball = {"threat": recipe.threat, "step_size": recipe.step_size}
        weak = torch_attacks.fgsm(net, a, b, threat=recipe.threat)
        attacked = torch_attacks.pgd(net, a, b, n_steps=recipe.eval_pgd_steps, **ball)
        with torch.no_grad():
            fgsm = right & (net(weak).argmax(1) == b)
            pgd = fgsm & (net(attacked).argmax(1) == b)
        worst = torch_attacks.withstood(net, a, b, left=pgd, **ball) if strong else pgd
        parts.append((right, fgsm, pgd, worst, losses, gradient.flatten(1).norm(dim=1)))
    right, fgsm, pgd, worst, losses, norms = (
        torch.cat(p).cpu().numpy() for p in zip(*parts, strict=True)
    )

    def mean(values):
        return float(values.mean()) if len(values) else None

    return {
        "clean": mean(right), "fgsm": mean(fgsm), "pgd": mean(pgd),
        **({"strong": mean(worst)} if strong else {}),
        "loss_right": mean(losses[right]), "loss_wrong": mean(losses[~right]),
        "gradient_right": mean(norms[right]), "gradient_wrong": mean(norms[~right]),
    }  # fmt: skip
