"""Figures that show images: distilled, attacked, inverted. `figures.save` writes them, too."""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from advkip.figures import COLOURS

CLASSES = {
    "cifar10": ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship",
                "truck"),
    "fashion_mnist": ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt",
                      "sneaker", "bag", "ankle boot"),
}  # fmt: skip


def class_names(dataset, y) -> list[str]:
    """The names of labels y of a data set, where they are known; else the labels as text."""
    names = CLASSES.get(dataset)
    return [names[label] if names else str(label) for label in np.asarray(y).tolist()]


def before_and_after(x_before, y_before, x_after, y_after, *, count=10, dataset=None) -> Figure:
    """Figures 5 and 6: distilled images below those at the start, their difference and labels.

    Shows one image of each class in turn. Pixels outside [0, 1] are shown clipped; the
    difference is scaled to its largest value (red up, blue down, mean over colours).

    Args:
      x_before, x_after: images (S, H, W, C); y_before, y_after: label vectors (S, C).
      dataset: name of the data set; its classes have their names where they are known.
    """
    classes = y_before.argmax(1)
    rank = np.zeros(len(classes), int)
    for label in np.unique(classes):
        rank[classes == label] = np.arange((classes == label).sum())
    index = np.lexsort((classes, rank))[:count]
    figure, axes = plt.subplots(4, len(index), figsize=(1.25 * len(index), 5.4), squeeze=False)
    difference = (x_after - x_before).mean(3)[index]
    limit = max(np.abs(difference).max(), 1e-12)
    labels = np.concatenate([y_before[index], y_after[index]])
    names = class_names(dataset, classes[index])
    for column, i in enumerate(index):
        draw_image(axes[0, column], x_before[i])
        draw_image(axes[1, column], x_after[i])
        axes[2, column].imshow(difference[column], cmap="RdBu_r", vmin=-limit, vmax=limit)
        positions = np.arange(y_after.shape[1])
        axes[3, column].bar(positions, y_before[i], color="#bbbbbb", width=0.9)
        axes[3, column].bar(positions, y_after[i], color=COLOURS["clean"], width=0.5)
        axes[3, column].set_ylim(labels.min() - 0.05, labels.max() + 0.05)
        axes[0, column].set_title(names[column], fontsize=9)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    rows = ("before", "distilled", f"difference\n(±{limit:.2f})", "labels\n(grey: before)")
    for axis, name in zip(axes[:, 0], rows, strict=True):
        axis.set_ylabel(name)
    figure.tight_layout()
    return figure


def attacks_survived(x, y, clean, attacked, *, dataset=None, count=8) -> Figure:
    """What an attack does to `count` correctly classified images, and whether they stay so.

    `clean` and `attacked` are `evaluate.Outcome` of images x and labels y, with some kept.
    """
    kept = len(attacked.x_attacked)
    shown = np.flatnonzero(clean.right[:kept])[:count]
    names = zip(class_names(dataset, y[shown]), attacked.right[shown], strict=True)
    titles = [f"{name}, {'stays' if right else 'falls'}" for name, right in names]
    return attacked_images(x[shown], attacked.x_attacked[shown], titles)


def attacked_images(x, x_attacked, titles) -> Figure:
    """Images, the same after an attack, and what the attack added; one title a column."""
    if not len(x):
        figure, axis = plt.subplots(figsize=(5.2, 3.6))
        axis.set_axis_off()
        axis.set_title("no image of these is classified correctly")
        return figure
    figure, axes = plt.subplots(3, len(x), figsize=(1.35 * len(x), 4.4), squeeze=False)
    for column, title in enumerate(titles):
        draw_image(axes[0, column], x[column])
        draw_image(axes[1, column], x_attacked[column])
        difference = (x_attacked[column] - x[column]).mean(2)
        limit = max(np.abs(difference).max(), 1e-12)
        axes[2, column].imshow(difference, cmap="RdBu_r", vmin=-limit, vmax=limit)
        axes[0, column].set_title(title, fontsize=9)
    for axis, name in zip(axes[:, 0], ("image", "attacked", "added"), strict=True):
        axis.set_ylabel(name)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    figure.tight_layout()
    return figure


def inverted_images(x_original, x_start, x_made) -> Figure:
    """Robust features: the originals, what inversion starts from, and what it ends with."""
    figure, axes = plt.subplots(3, len(x_made), figsize=(1.25 * len(x_made), 4), squeeze=False)
    rows = {"original": x_original, "start": x_start, "made": x_made}
    for line, (name, images) in zip(axes, rows.items(), strict=True):
        for axis, image in zip(line, images, strict=True):
            draw_image(axis, image)
            axis.set(xticks=[], yticks=[])
        line[0].set_ylabel(name)
    figure.tight_layout()
    return figure


def draw_image(axis, image) -> None:
    """Shows an image (H, W, C), grey or in colour, within the pixel range."""
    axis.imshow(np.clip(image, 0, 1).squeeze(), cmap="gray", vmin=0, vmax=1)
