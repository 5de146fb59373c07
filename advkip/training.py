"""Training of PyTorch networks, plain and adversarial (Madry et al. 2018), with a history.

What is trained on is a set of images and label vectors, a distilled one or original images. The
weights with the best robust validation accuracy are kept; test images can be watched, and choose
nothing.
"""

import copy
import dataclasses
import hashlib
import json
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from advkip import data, files, inputs, nets, torch_attacks
from advkip.nets import derived_seed, device, to_tensor
from advkip.recipe import Recipe as Recipe
from advkip.recipe import targets

FAR = 20.0
"""A distilled set leaves [0, 1], but not as far: these are pixels of 0..255."""

BATCH = 100
"""Images at a time when accuracies are measured."""

CLEAN_MARGIN = 0.1
"""Weights are kept only if their clean accuracy is within this of the best seen. Where training
brings no robustness, robust accuracy alone would choose the weights that have learned least, since
a constant prediction is right for a tenth of the images whatever an attack does."""


class Trained(NamedTuple):
    """A trained network and how it came about."""

    net: nn.Module  # the weights with the best robust validation accuracy, in evaluation mode
    epoch: int  # epochs behind them
    score: float  # their robust validation accuracy
    clean: float  # their clean validation accuracy
    history: list  # dicts; see `train`
    stopped: str  # "epochs", "patience" or "diverged"


class Watched(NamedTuple):
    """Images that training follows; the validation images choose, the test images do not."""

    x_validation: np.ndarray  # (V, H, W, C) in [0, 1]
    y_validation: np.ndarray  # integers (V,)
    x_test: np.ndarray | None = None
    y_test: np.ndarray | None = None


def watched(splits, n, *, seed):
    """n validation images and n test images of `data.Splits`, or all where there are fewer."""
    n_test = n if n < len(splits.x_test) else 0
    return Watched(
        splits.x_validation[:n], splits.y_validation[:n], *data.draw_test(splits, n_test, seed=seed)
    )


def train(net, x, y, *, recipe, watched, seed=0, checkpoint_dir=None, progress=True):
    """Trains a network, without augmentation, and keeps the weights that validate best.

    Weights are chosen, and training stops, by robust validation accuracy (PGD from the image
    itself) among those whose clean accuracy is within CLEAN_MARGIN of the best so far; clean
    accuracy tells equal ones apart. The history has lines with epoch, seconds, loss (of the
    training batches), clean, fgsm and pgd (validation accuracies) and, of the test images,
    test_clean, test_fgsm, test_pgd (Figure 3), and mean cross-entropy and mean input-gradient norm,
    split into images that are classified correctly and wrongly: loss_right, loss_wrong,
    gradient_right, gradient_wrong (Figure 2; None without such images). Nothing is chosen by the
    test images.

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
    parts = {key: (to_tensor(a), torch.as_tensor(b).to(device())) for key, (a, b) in parts.items()}
    path = checkpoint_dir and Path(checkpoint_dir) / f"checkpoint-net-{run.identity}.pt"
    if path and path.exists():
        run.load(path)
        if run.epoch > recipe.epochs:
            raise ValueError(
                f"expected a checkpoint of at most {recipe.epochs} epochs, got {run.epoch} in "
                f"{path.name}; pass as many epochs or more, or delete the file"
            )

    with tqdm(
        total=recipe.epochs, initial=run.epoch, disable=not progress, mininterval=1,
        desc="adversarial training" if recipe.adversarial_steps else "training", unit="epoch",
    ) as bar:  # fmt: skip
        state = path and run.state()
        try:
            while not (reason := run.finished()):
                run.advance()
                if due := run.epoch % recipe.eval_every == 0 or run.epoch == recipe.epochs:
                    run.look(parts)
                state = path and run.state()
                if path and due:
                    _save(path, state)
                bar.update(run.epoch - bar.n)
                if run.history:
                    line = run.history[-1]
                    bar.set_postfix_str(
                        f"loss {run.loss:.3f}, clean {line['clean']:.1%}, PGD {line['pgd']:.1%}",
                        refresh=False,
                    )
        except KeyboardInterrupt:
            if path:
                _save(path, state)
            raise
    net.load_state_dict(run.best)
    return Trained(net.eval(), run.best_epoch, *run.best_score, run.history, reason)


def _check_images(x, watched):
    inputs.check_layout(np.shape(x), "training images")
    inputs.check_floats(x, "training images")
    if not np.abs(x).max() <= FAR:
        raise ValueError(
            f"expected training images near [0, 1], got values up to {np.abs(x).max():.4g}; pass "
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


class Search(NamedTuple):
    """Networks of one kind on one training set."""

    best: list  # a `Trained` of the chosen learning rate for each seed
    learning_rate: float
    runs: dict  # {learning rate: Trained} of the first seed


def search(
    name, x, y, *, recipe, learning_rates, watched, seeds, checkpoint_dir=None, progress=True
):
    """Trains a network with each learning rate, chooses on validation images, repeats for seeds.

    Args:
      name: of `nets.build`.
      x, y, watched, checkpoint_dir, progress: as for `train`; y label vectors (N, classes).
      recipe: a `Recipe`, whose learning rate is replaced.
      learning_rates: the grid.
      seeds: integers; the grid is run with the first, the others with the chosen rate.

    Returns:
      A `Search`. A rate is chosen as `train` chooses an epoch; one whose training diverged is kept
      as a `Trained` without a network.

    Raises:
      FloatingPointError: training diverged with every rate.
    """

    def run(rate, seed):
        net = nets.build(name, shape=x.shape[1:], n_classes=y.shape[1], seed=seed)
        return train(
            net, x, y, recipe=dataclasses.replace(recipe, learning_rate=rate), watched=watched,
            seed=seed, checkpoint_dir=checkpoint_dir, progress=progress,
        )  # fmt: skip

    def try_rate(rate):
        try:
            return run(rate, seeds[0])
        except FloatingPointError:
            return Trained(None, 0, 0.0, 0.0, [], "diverged")

    runs = {rate: try_rate(rate) for rate in learning_rates}
    good = {rate: one for rate, one in runs.items() if one.stopped != "diverged"}
    if not good:
        raise FloatingPointError(
            f"expected a learning rate in {list(learning_rates)} with a finite loss, got none; "
            "pass smaller ones"
        )
    enough = max(one.clean for one in good.values()) - CLEAN_MARGIN
    best = max(
        (rate for rate in good if good[rate].clean >= enough),
        key=lambda rate: (good[rate].score, good[rate].clean),
    )
    return Search([runs[best], *(run(best, seed) for seed in seeds[1:])], best, runs)


class _Run:
    """The state of one training."""

    def __init__(self, net, x, y, recipe, watched, seed):
        self.net, self.recipe, self.seed = net, recipe, seed
        self.x, self.y = to_tensor(x), targets(y, len(x), recipe)
        make = torch.optim.Adam if recipe.optimizer == "adam" else torch.optim.SGD
        options = {"lr": recipe.learning_rate, "weight_decay": recipe.weight_decay}
        if recipe.optimizer == "sgd":
            options["momentum"] = 0.9
        self.optimizer = make(net.parameters(), **options)
        self.epoch, self.loss, self.history, self.seconds = 0, float("nan"), [], 0.0
        # A distilled set may leave the pixel range; attacks on its images then may, too.
        low, high = min(recipe.threat.low, x.min()), max(recipe.threat.high, x.max())
        self.threat = dataclasses.replace(recipe.threat, low=float(low), high=float(high))
        self.best, self.best_epoch, self.best_score = None, 0, (-1.0, -1.0)
        identity = hashlib.sha256(f"{net} {recipe.identity()} {seed} {x.shape}".encode())
        images = [a for a in watched if a is not None]
        for array in (x, y, *images, *(v.cpu().numpy() for v in net.state_dict().values())):
            identity.update(np.ascontiguousarray(array))
        self.identity = identity.hexdigest()[:12]

    def finished(self):
        if self.epoch >= self.recipe.epochs:
            return "epochs"
        waited = self.epoch - self.best_epoch
        return "patience" if self.recipe.patience and waited >= self.recipe.patience else ""

    def advance(self):
        """One epoch, in an order that derives from the seed and the epoch's number."""
        recipe, began = self.recipe, time.perf_counter()
        rate = recipe.learning_rate * 0.1 ** sum(self.epoch >= m for m in recipe.milestones)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        order = torch.as_tensor(
            data.generator(self.seed, "order", self.epoch).permutation(len(self.x))
        )
        batches = list(order.to(device()).split(recipe.batch_size or len(order)))
        if len(batches) > 1 and len(batches[-1]) == 1:  # batch normalisation cannot have one alone
            batches[-2:] = [torch.cat(batches[-2:])]
        noise = torch.Generator().manual_seed(derived_seed(self.seed, "noise", self.epoch))
        total = 0.0
        with torch.random.fork_rng(), torch.backends.cudnn.flags(enabled=True, deterministic=True):
            torch.manual_seed(derived_seed(self.seed, "dropout", self.epoch))
            for i, index in enumerate(batches):
                x, y = self.x[index], self.y[index]
                if recipe.adversarial_steps:
                    x = self.attacked(x, y, self.grown((i + 1) / len(batches)), noise)
                self.net.train()
                loss = torch_attacks.LOSSES[recipe.loss](self.net(x), y).mean()
                self.optimizer.zero_grad()
                loss.backward()
                self.optimizer.step()
                total = total + loss.detach() * len(index)
        self.loss = float(total) / len(self.x)
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

    def look(self, parts):
        """Adds a line to the history and keeps the weights if they are the best so far."""
        self.net.eval()
        line = {"epoch": self.epoch, "seconds": round(self.seconds, 2), "loss": self.loss}
        for prefix, (x, y) in parts.items():
            with nets.deterministic():
                found = look(self.net, x, y, self.recipe)
            split = {k: found.pop(k) for k in list(found) if "_" in k}
            line |= {prefix + key: value for key, value in found.items()}
            if prefix:
                line |= split
        self.history.append(line)
        score = (line["pgd"], line["clean"])
        clean = max(one["clean"] for one in self.history)
        outdated = self.best_score[1] < clean - CLEAN_MARGIN
        if line["clean"] >= clean - CLEAN_MARGIN and (outdated or score > self.best_score):
            self.best_score, self.best_epoch = score, self.epoch
            self.best = copy.deepcopy(self.net.state_dict())

    def state(self):
        """A copy of all that the run is."""
        notes = {
            "epoch": self.epoch, "loss": self.loss, "history": self.history,
            "seconds": self.seconds, "best_epoch": self.best_epoch, "best_score": self.best_score,
        }  # fmt: skip
        return copy.deepcopy({
            "notes": json.dumps(notes), "net": self.net.state_dict(), "best": self.best,
            "optimizer": self.optimizer.state_dict(),
        })  # fmt: skip

    def load(self, path):
        try:
            state = torch.load(path, map_location=device(), weights_only=True)
            notes = json.loads(state["notes"])
            self.net.load_state_dict(state["net"])
            self.optimizer.load_state_dict(state["optimizer"])
        except Exception as error:
            raise ValueError(
                f"expected a checkpoint in {path}, got a file that cannot be read "
                f"({type(error).__name__}); delete the file to start again"
            ) from error
        self.best = state["best"]
        for key, value in notes.items():
            setattr(self, key, tuple(value) if key == "best_score" else value)


def _save(path, state):
    """Writes the state aside first, so that a cut-off write leaves the old file whole."""
    with files.replacing(path) as file:
        torch.save(state, file)


def look(net, x, y, recipe):
    """Accuracies, and loss and input-gradient norm by right and wrong, of a net on images.

    Args:
      net: in evaluation mode.
      x, y: tensors of images in [0, 1] and integers.
      recipe: whose threat, step_size and eval_pgd_steps are used.

    Returns:
      A dict: clean, fgsm, pgd (the worst case of each image, as in `evaluate`), loss_right,
      loss_wrong, gradient_right, gradient_wrong.
    """
    parts = []
    for a, b in zip(x.split(BATCH), y.split(BATCH), strict=True):
        losses, gradient, logits = torch_attacks.input_gradient(net, a, b)
        right = logits.argmax(1) == b
        weak = torch_attacks.fgsm(net, a, b, threat=recipe.threat)
        strong = torch_attacks.pgd(
            net, a, b, threat=recipe.threat, n_steps=recipe.eval_pgd_steps,
            step_size=recipe.step_size,
        )  # fmt: skip
        with torch.no_grad():
            fgsm = right & (net(weak).argmax(1) == b)
            pgd = fgsm & (net(strong).argmax(1) == b)
        parts.append((right, fgsm, pgd, losses, gradient.flatten(1).norm(dim=1)))
    right, fgsm, pgd, losses, norms = (torch.cat(p).cpu().numpy() for p in zip(*parts, strict=True))

    def mean(values):
        return float(values.mean()) if len(values) else None

    return {
        "clean": mean(right), "fgsm": mean(fgsm), "pgd": mean(pgd),
        "loss_right": mean(losses[right]), "loss_wrong": mean(losses[~right]),
        "gradient_right": mean(norms[right]), "gradient_wrong": mean(norms[~right]),
    }  # fmt: skip
