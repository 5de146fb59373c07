"""Figures of the notebooks, but for those of images (`pictures`). Each function returns a
matplotlib Figure; `save` writes a PNG."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

COLOURS = {"clean": "#2f6f9f", "fgsm": "#d98c1f", "pgd": "#b3343a", "strong": "#5b3a8c"}
NAMES = {"clean": "clean", "fgsm": "FGSM", "pgd": "PGD", "strong": "worst of several losses"}


def save(figure, folder, name) -> Figure:
    """Writes `<folder>/<name>.png` and returns the figure, so that a notebook shows it."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    figure.savefig(Path(folder) / f"{name}.png", dpi=110, bbox_inches="tight")
    plt.close(figure)  # shown once, as the cell's value
    return figure


def training_curves(histories, *, against="step", images="validation") -> Figure:
    """Figures 1 and 3: accuracy, clean and under attack, against outer steps or epochs.

    Args:
      histories: {title: history of `distill.Distilled` or `training.Trained`}.
      against: 'step' or 'epoch'.
      images: 'validation' or, of networks, 'test'.
    """
    figure, axes = _panels(len(histories), sharey=True)
    prefix = "test_" if images == "test" else ""
    for axis, (title, history) in zip(axes, histories.items(), strict=True):
        steps = [line[against] for line in history]
        for key in (key for key in NAMES if prefix + key in history[0]):
            values = [100 * line[prefix + key] for line in history]
            axis.plot(steps, values, color=COLOURS[key], label=NAMES[key], marker=".")
        axis.set(title=title, ylim=(-2, 102))
        axis.set_xlabel("outer step" if against == "step" else against)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(f"{images} accuracy (%)")
    _legend_below(figure, axes)
    return figure


def gradient_norms(histories) -> Figure:
    """Figure 4: mean input-gradient norm of the kernel on validation data during distillation."""
    figure, (axis,) = _panels(1)
    for title, history in histories.items():
        points = [(line["step"], line["gradient_norm"]) for line in history]
        axis.plot(*zip(*points, strict=True), label=title, marker=".")
    axis.margins(y=0.2)  # room for the legend
    axis.set(xlabel="outer step", ylabel=r"mean $\|\nabla_x L\|_2$ (validation)", ylim=(0, None))
    axis.grid(alpha=0.3)
    axis.legend()
    return figure


def learning_rates(searches) -> Figure:
    """Validation accuracy, clean and under the attack that chooses, against the learning rate.

    Args:
      searches: {title: `training.Search`}.
    """
    figure, axes = _panels(len(searches), sharey=True)
    for axis, (title, found) in zip(axes, searches.items(), strict=True):
        rates = sorted(found.runs)
        attack = "strong" if "strong" in [*found.best[0].history, {}][0] else "pgd"
        for key, name in (("clean", "clean"), ("score", attack)):
            values = [100 * getattr(found.runs[rate], key) for rate in rates]
            axis.semilogx(rates, values, color=COLOURS[name], label=NAMES[name], marker="o")
        axis.axvline(found.learning_rate, color="#888888", ls=":", label="chosen")
        axis.set(title=title, xlabel="learning rate", ylim=(-2, 102))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("validation accuracy (%)")
    _legend_below(figure, axes)
    return figure


def trade_off(histories) -> Figure:
    """PGD against clean validation accuracy along each run; the first step is ringed."""
    figure, (axis,) = _panels(1)
    for title, history in histories.items():
        clean, robust = ([100 * line[k] for line in history] for k in ("clean", "pgd"))
        (drawn,) = axis.plot(clean, robust, marker=".", label=title)
        axis.plot(clean[:1], robust[:1], "o", ms=11, mfc="none", color=drawn.get_color())
    axis.set(xlabel="clean validation accuracy (%)", ylabel="PGD validation accuracy (%)")
    axis.set_title("the price of robustness")
    axis.grid(alpha=0.3)
    axis.legend()
    return figure


def kernel_profile(cosines, values) -> Figure:
    """Normalised kernels against the angle between two images.

    Args:
      cosines: shape (n,); values: {title: kernel values (n,), 1 at angle 0}.
    """
    figure, (axis,) = _panels(1)
    for title, value in values.items():
        axis.plot(np.degrees(np.arccos(np.clip(cosines, -1, 1))), value, label=title)
    axis.set(xlabel="angle between the images (degrees)", ylabel="k(x, s) / k(x, x)")
    axis.set_title("how far an image reaches")
    axis.grid(alpha=0.3)
    axis.legend()
    return figure


def encoding(values, parts) -> Figure:
    """What a kernel of `pieces.Pieces` sees of a pixel.

    Args:
      values: of the pixel, shape (n,); parts: its pieces, shape (n, number of pieces).
    """
    figure, (axis,) = _panels(1)
    for number, part in enumerate(np.transpose(parts), 1):
        axis.plot(values, part, label=f"piece {number}")
    axis.set(xlabel="value of a pixel", ylabel="what the kernel sees")
    axis.grid(alpha=0.3)
    axis.legend()
    return figure


def accuracy_against(values, accuracies, *, label, log=False, levels=None) -> Figure:
    """Accuracy against a setting, as the attack radius or a network's width.

    Args:
      values: of the setting.
      accuracies: {title: list in [0, 1]}; NaN leaves a gap.
      label: what the setting is called.
      log: a logarithmic axis, with a mark at each value.
      levels: {title: accuracy in [0, 1]} of what does not depend on it; dashed, the first in the
        colour of the first line and so on.
    """
    figure, (axis,) = _panels(1)
    for title, line in accuracies.items():
        axis.plot(values, [100 * value for value in line], marker="o", label=title)
    for (title, level), drawn in zip((levels or {}).items(), axis.lines, strict=False):
        axis.axhline(100 * level, color=drawn.get_color(), ls="--", label=title)
    if log:
        axis.set_xscale("log")
        axis.set_xticks(values, [f"{value:,}" for value in values])
        axis.minorticks_off()
    axis.set(xlabel=label, ylabel="accuracy (%)", ylim=(-2, 102))
    axis.grid(alpha=0.3)
    _legend_below(figure, [axis])
    return figure


def loss_and_gradient(histories) -> Figure:
    """Figure 2: loss and input-gradient norm on watched test images while networks train.

    Split into images that are classified correctly and wrongly at the time; logarithmic, since both
    grow and vanish over many orders of magnitude. A value of 0 is drawn at the lower edge.

    Args:
      histories: {title: history of `training.Trained`}.
    """
    figure, axes = plt.subplots(
        2, len(histories), figsize=(5.2 * len(histories), 6.4), squeeze=False, sharey="row",
        layout="constrained",
    )  # fmt: skip
    rows = (("loss", "mean cross-entropy"), ("gradient", r"mean $\|\nabla_x L\|_2$"))
    for column, (title, history) in zip(axes.T, histories.items(), strict=True):
        for axis, (key, label) in zip(column, rows, strict=True):
            for part, name, colour in (
                ("right", "correctly classified", COLOURS["clean"]),
                ("wrong", "wrongly classified", COLOURS["pgd"]),
            ):
                lines = [line for line in history if line[f"{key}_{part}"] is not None]
                axis.plot(
                    [line["epoch"] for line in lines],
                    [max(line[f"{key}_{part}"], 1e-45) for line in lines],
                    color=colour, marker=".", label=f"images {name}",
                )  # fmt: skip
            axis.set_yscale("log")
            axis.set(xlabel="epoch", ylabel=label)
            axis.grid(alpha=0.3)
        column[0].set_title(title)
    axes[0, 0].legend()
    return figure


def evidence(diagnoses) -> Figure:
    """What a verdict rests on: which attack breaks claimed images, and a growing ball.

    Args:
      diagnoses: {title: `diagnose.Diagnosis`}.
    """
    found = list(diagnoses.values())
    attacks = list(dict.fromkeys(name for one in found for name in one.broken))
    radii = sorted({radius for one in found for radius in one.sweep})
    names = [f"{title}\n{one.verdict}" for title, one in diagnoses.items()]
    figure, (left, right) = plt.subplots(
        1, 2, sharey=True, layout="constrained", width_ratios=(len(attacks), len(radii)),
        figsize=(4 + 0.58 * (len(attacks) + len(radii)), 2.6 + 0.42 * len(found)),
    )  # fmt: skip
    _heat(left, [[one.broken.get(name, np.nan) for name in attacks] for one in found], "Reds")
    left.set_xticks(range(len(attacks)), attacks, rotation=40, ha="right")
    left.set_yticks(range(len(found)), names)
    left.set_title("claimed images that each attack\nbreaks (grey: not asked)")
    _heat(right, [[one.sweep.get(radius, np.nan) for radius in radii] for one in found], "Blues")
    labels = [f"{radius:.3g}" for radius in radii]
    right.set_xticks(range(len(radii)), labels, rotation=40, ha="right")
    right.set(title="PGD accuracy,\ngrowing ball", xlabel="attack radius")
    right.tick_params(left=False)
    return figure


def rounding(diagnoses, *, rounded, lost) -> Figure:
    """How sure each model is of the images it classifies correctly, and which of them PGD leaves.

    Args:
      diagnoses: {title: `diagnose.Diagnosis`}.
      rounded, lost: log-odds beyond which float32 loses a part of the gradient, and all of it.
    """
    found = list(diagnoses.values())
    figure, axis = plt.subplots(figsize=(9, 1.8 + 0.42 * len(found)), layout="constrained")
    spread = np.random.default_rng(0).uniform(-0.3, 0.3, max(one.n for one in found))
    for withstood, colour, label in (
        (False, "#8c8c8c", "FGSM or PGD finds an adversarial image"),
        (True, COLOURS["pgd"], "neither does"),
    ):
        for row, one in enumerate(found):
            shown = one.right & (one.withstood == withstood)
            axis.scatter(
                one.log_odds[shown], row + spread[: one.n][shown], s=9, alpha=0.7,
                color=colour, linewidths=0, label=label if row == 0 else None,
            )  # fmt: skip
    largest = 1.5 * max(2 * lost, *(one.log_odds.max() for one in found))
    axis.set_xscale("symlog", linthresh=3)
    axis.axvspan(rounded, lost, color=COLOURS["fgsm"], alpha=0.15, linewidth=0)
    axis.axvspan(lost, largest, color=COLOURS["pgd"], alpha=0.15, linewidth=0)
    smallest = min(-3, *(one.log_odds[one.right].min(initial=0) for one in found))
    axis.set(
        xlim=(smallest, largest), ylim=(len(found) - 0.5, -0.5),
        xlabel="log-odds of the right class: how sure the model is",
        title="float32 leaves of the gradient:\nnearly all | the wrong classes' part | nothing",
    )  # fmt: skip
    axis.set_yticks(range(len(found)), [f"{t}\n{one.verdict}" for t, one in diagnoses.items()])
    figure.legend(loc="outside lower center", ncols=2, markerscale=2)
    return figure


def _legend_below(figure, axes):
    """One legend for all panels, where it hides no data."""
    found = {}
    for axis in axes:
        handles, labels = axis.get_legend_handles_labels()
        found |= dict(zip(labels, handles, strict=True))
    columns = int(figure.get_figwidth() / 2.4)
    figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=columns)


def _panels(count, **options):
    """A figure and `count` axes, three in a row."""
    columns = min(count, 3)
    rows = -(-count // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(5.2 * columns, 3.6 * rows), squeeze=False, layout="constrained",
        **options,
    )  # fmt: skip
    for axis in axes.flat[count:]:
        axis.set_axis_off()
    return figure, axes.flat[:count]


def _heat(axis, shares, colours):
    """A table of shares between 0 and 1, coloured; NaN, not asked, is grey."""
    axis.set_facecolor("#d9d9d9")
    axis.imshow(shares, cmap=colours, vmin=0, vmax=1, aspect="auto")
    for (row, column), share in np.ndenumerate(shares):
        if np.isfinite(share):
            axis.text(
                column, row, f"{share:.0%}", ha="center", va="center", fontsize=8,
                color="white" if share > 0.6 else "black",
            )  # fmt: skip
        else:
            axis.text(column, row, "–", ha="center", va="center", color="#666666")
