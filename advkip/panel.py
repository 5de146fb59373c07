"""Panels to play with in JupyterLab: an attack on one image, and a distillation while it runs.

Where there is no front end for widgets (papermill, a rendered page) a panel is a figure of what it
shows first.
"""

import base64
import io
import threading
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from advkip import (
    algorithm,
    attacks,
    data,
    distill,
    figures,
    kernels,
    krr,
    models,
    pictures,
    torch_attacks,
)
from advkip.attack_names import Attack
from advkip.config import Experiment

NEIGHBOURS = 4
"""Support images that speak loudest for an answer."""


class Attacked(NamedTuple):
    """One image under attack."""

    x: np.ndarray  # (H, W, C)
    x_attacked: np.ndarray  # (H, W, C)
    before: np.ndarray  # logits (C,)
    after: np.ndarray  # logits (C,)
    losses: list  # cross-entropy at the start and after each step
    neighbours: list  # (support image, its term of the logit): those that speak for `after`


def attack(
    model, x: np.ndarray, y: int, *, threat: attacks.Threat, name: str = "pgd10"
) -> Attacked:
    """What an attack makes of one image, and why the model answers so.

    Args:
      model: a network or a kernel machine, as for `evaluate.evaluate`.
      x, y: an image (H, W, C) and its class.
      threat: an `attacks.Threat`; a radius of 0 leaves the image as it is.
      name: 'fgsm' or 'pgd<steps>'; a step is a quarter of the radius.

    Raises:
      ValueError: another attack.
    """
    chosen = Attack.parse(name)
    if chosen.kind not in ("fgsm", "pgd"):
        raise ValueError(f"expected 'fgsm' or 'pgd10', got {name!r}; pass one of them")
    judged = models.judged(model)
    start, label = judged.tensor(x[None]), torch.tensor([y])
    label = label.to(start.device)
    steps, size = (1, 1.0) if chosen.kind == "fgsm" else (chosen.n_steps, 0.25)
    points = [start]
    if threat.epsilon:
        points += torch_attacks.ascent(
            judged.net, start, start, label, threat, steps, size * threat.epsilon
        )
    with torch.no_grad():
        logits = torch.cat([judged.net(point) for point in points])
        losses = torch_attacks.cross_entropy(logits, label.expand(len(logits)))
    found = points[-1].detach().movedim(1, 3).cpu().numpy()
    return Attacked(
        x, found[0], logits[0].cpu().numpy(), logits[-1].cpu().numpy(), losses.tolist(),
        _neighbours(model, found, int(logits[-1].argmax())),
    )  # fmt: skip


def _neighbours(model, x, label):
    """The largest terms of K(x, S) alpha for a class, of a kernel machine."""
    if not isinstance(model, krr.KernelMachine):
        return []
    weights = model.kernel.value(jnp.asarray(x, model.alpha.dtype), model.x_support)[0]
    terms = np.asarray(weights * model.alpha[:, label])
    loudest = np.argsort(-terms)[:NEIGHBOURS]
    return [(np.asarray(model.x_support[i]), float(terms[i])) for i in loudest]


class _Drawing:
    """A figure of an `Attacked` whose artists are kept, so that it is redrawn quickly."""

    def __init__(self, n_classes):
        self.figure = Figure(figsize=(9, 4.6), dpi=75)
        FigureCanvasAgg(self.figure)
        grid = self.figure.add_gridspec(
            2, 3, hspace=0.35, wspace=0.25, left=0.05, right=0.98, top=0.94, bottom=0.07
        )
        self.images = [self.figure.add_subplot(grid[0, i]) for i in range(3)]
        self.logits = self.figure.add_subplot(grid[1, 0])
        self.loss = self.figure.add_subplot(grid[1, 1])
        inner = grid[1, 2].subgridspec(2, NEIGHBOURS // 2, hspace=0.35)
        self.support = [self.figure.add_subplot(inner[i]) for i in range(NEIGHBOURS)]
        self.bars = [
            self.logits.bar(np.arange(n_classes) + shift, np.zeros(n_classes), 0.4, label=label,
                            color=colour)
            for shift, label, colour in ((-0.2, "before", "#8a949e"), (0.2, "after", "#b3343a"))
        ]  # fmt: skip
        (self.line,) = self.loss.plot([], [], marker=".", color="#2f6f9f")
        self.logits.set_title("logits", fontsize=9)
        self.logits.legend(fontsize=7)
        self.logits.set_xticks(range(n_classes))
        self.loss.set_title("loss along the attack", fontsize=9)
        for axis in (*self.images, *self.support):
            axis.set(xticks=[], yticks=[])

    def png(self, found: Attacked, names) -> bytes:
        added = (found.x_attacked - found.x).mean(2)
        limit = max(float(np.abs(added).max()), 1e-12)
        shown = (found.x, found.x_attacked, added)
        titles = (
            f"taken for {names[int(found.before.argmax())]}",
            f"attacked: taken for {names[int(found.after.argmax())]}",
            f"added (white 0, colour ±{limit:.2g})",
        )
        for axis, picture, title in zip(self.images, shown, titles, strict=True):
            axis.clear()
            axis.set(xticks=[], yticks=[])
            axis.set_title(title, fontsize=9)
            if picture is added:
                axis.imshow(picture, cmap="RdBu_r", vmin=-limit, vmax=limit)
            else:
                pictures.draw_image(axis, picture)
        for bars, values in zip(self.bars, (found.before, found.after), strict=True):
            for bar, value in zip(bars, values, strict=True):
                bar.set_height(float(value))
        self.logits.relim()
        self.logits.autoscale_view()
        self.line.set_data(range(len(found.losses)), found.losses)
        self.loss.relim()
        self.loss.autoscale_view()
        for i, axis in enumerate(self.support):
            axis.clear()
            axis.set(xticks=[], yticks=[])
            axis.set_visible(i < len(found.neighbours))
            if i < len(found.neighbours):
                image, term = found.neighbours[i]
                pictures.draw_image(axis, image)
                axis.set_title(f"speaks for it: {term:+.2f}", fontsize=8)
        return _png(self.figure)


def _png(figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


class Panel:
    """Widgets beside a picture; without a front end the picture alone."""

    def __init__(self):
        import ipywidgets

        self.widgets = ipywidgets
        self.picture = ipywidgets.Image(format="png")
        self.box = ipywidgets.VBox()

    def _repr_mimebundle_(self, **options) -> dict[str, Any]:
        """The widget for front ends that know it; else the PNG."""
        bundle = self.box._repr_mimebundle_(**options)
        bundle = dict(bundle[0] if isinstance(bundle, tuple) else bundle)
        return bundle | {"image/png": base64.b64encode(self.picture.value).decode()}


class AttackPanel(Panel):
    """Pick a model, a test image, an attack and a radius; see what happens.

    Args:
      machines: {title: network or kernel machine}; each is what a training set makes of a model.
      x, y: test images (n, H, W, C) in [0, 1] and integer labels.
      radius: where the slider starts; it ends at `largest`, or at four times as much.
      norm: 'linf' or 'l2'.
      dataset: whose class names are shown; None for numbers.
    """

    def __init__(
        self, machines: dict, x, y, *, radius: float, largest: float | None = None,
        norm: str = "linf", dataset: str | None = None,
    ):  # fmt: skip
        super().__init__()
        w, self.machines, self.x, self.y, self.norm = self.widgets, machines, x, y, norm
        classes = models.judged(next(iter(machines.values()))).logits(x[:1]).shape[1]
        largest = largest or (min(1.0, 4 * radius) if norm == "linf" else 4 * radius)
        self.names = pictures.class_names(dataset, np.arange(classes))
        self.drawing = _Drawing(classes)
        self.model = w.Dropdown(options=list(machines), description="model")
        self.index = w.IntSlider(0, 0, len(x) - 1, description="image")
        self.attack = w.Dropdown(options=["pgd10", "fgsm", "pgd40"], description="attack")
        self.radius = w.FloatSlider(radius, min=0, max=largest, step=largest / 100,
                                    description="radius", readout_format=".3f")  # fmt: skip
        self.box.children = [
            w.HBox([self.model, self.attack]), w.HBox([self.index, self.radius]), self.picture,
        ]  # fmt: skip
        for control in (self.model, self.index, self.attack, self.radius):
            control.observe(self.redraw, names="value")
        self.redraw()

    def redraw(self, change=None) -> None:
        """Attacks what is chosen, and shows it."""
        i = self.index.value
        found = attack(
            self.machines[self.model.value], self.x[i], int(self.y[i]), name=self.attack.value,
            threat=attacks.Threat(self.norm, self.radius.value),
        )  # fmt: skip
        self.picture.value = self.drawing.png(found, self.names)


def _so_far(y_before, x, y, history, names):
    """A figure of a distillation: some images, their labels, and validation accuracy."""
    figure = Figure(figsize=(9, 4.6), dpi=75)
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(
        3, 8, height_ratios=(1, 0.8, 1.5), left=0.07, right=0.98, top=0.94, bottom=0.12, hspace=0.3
    )
    for column, i in enumerate(np.linspace(0, len(x) - 1, 8).astype(int)):
        image, labels = (figure.add_subplot(grid[row, column]) for row in (0, 1))
        pictures.draw_image(image, x[i])
        image.set_title(names[i], fontsize=9)
        labels.bar(range(y.shape[1]), y_before[i], color="#b9c0c6")
        labels.bar(range(y.shape[1]), y[i], 0.5, color=figures.COLOURS["clean"])
        for axis in (image, labels):
            axis.set(xticks=[], yticks=[])
    axis = figure.add_subplot(grid[2, :])
    for key in (key for key in figures.NAMES if key in history[0]):
        points = [(line["step"], 100 * line[key]) for line in history]
        colour, label = figures.COLOURS[key], figures.NAMES[key]
        axis.plot(*zip(*points, strict=True), color=colour, label=label, marker=".")
    axis.set(xlabel="outer step", ylabel="validation accuracy (%)", ylim=(-2, 102))
    axis.legend(loc="lower left", fontsize=8, ncols=3)
    return figure


class LivePanel(Panel):
    """Algorithm 1 while it runs: images, labels and accuracies; stop it, change the radius, go on.

    Args:
      experiment, splits: as for `distill.distill`; a step should take well under a second.
      first: outer steps before the first picture.
      every: outer steps between two pictures.
    """

    def __init__(
        self, experiment: Experiment, splits: data.Splits, *, first: int = 5, every: int = 2
    ):
        super().__init__()
        w, self.splits, self.every = self.widgets, splits, every
        self.going, self.lock = threading.Event(), threading.Lock()
        self.initial = distill.starting_support(experiment, splits)
        self.set_experiment(experiment.replace(adv_kip={"eval_every": every}))
        self.state = self.run.start(self.initial)
        self.button = w.ToggleButton(False, description="run", icon="play")
        self.radius = w.FloatSlider(experiment.threat.epsilon, min=0.01, max=0.5, step=0.01,
                                    description="radius")  # fmt: skip
        self.text = w.Label()
        self.box.children = [w.HBox([self.button, self.radius, self.text]), self.picture]
        self.button.observe(self._toggled, names="value")
        self.radius.observe(self._changed, names="value")
        self.advance(first)

    def set_experiment(self, experiment: Experiment) -> None:
        """Goes on with other settings from the support as it is."""
        self.experiment = experiment
        self.run = algorithm.Run(experiment, self.splits, kernels.of(experiment.kernel), "adv-kip")

    def advance(self, steps: int) -> None:
        """Runs some outer steps, and shows where they led."""
        with self.lock:
            for _ in range(steps):
                if self.run.finished(self.state):
                    break
                self.state = self.run.advance(self.state)
            self._show()

    def _show(self):
        support = [np.asarray(part) for part in self.state.support]
        dataset = self.experiment.dataset.name
        names = pictures.class_names(dataset, self.initial[1].argmax(1))
        self.picture.value = _png(_so_far(self.initial[1], *support, self.state.history, names))
        line = self.state.history[-1]
        self.text.value = (
            f"step {self.state.step}: clean {line['clean']:.0%}, PGD {line['pgd']:.0%} (validation)"
        )

    def _toggled(self, change):
        if change["new"]:
            self.going.set()
            threading.Thread(target=self._work, daemon=True).start()
        else:
            self.going.clear()

    def _work(self):
        while self.going.is_set() and not self.run.finished(self.state):
            self.advance(self.every)
        self.button.value = False

    def _changed(self, change):
        radius = change["new"]
        threat = {"epsilon": radius, "step_size": radius / 4}
        with self.lock:
            self.set_experiment(self.experiment.replace(threat=threat))
