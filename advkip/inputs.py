"""The door for images and the door for labels: every public function that takes them asks here.

Images are (n, H, W, C) with C = 1 or 3, floats in the pixel range; labels are integers (n,) or
label vectors (n, classes). What means something else under the same name (channels first, uint8
arithmetic that wraps, labels in a column that broadcast) is refused, with what to pass instead.
"""

import numpy as np

ROUNDING = 1e-6
"""How far pixels may leave their range."""


def images(x, *, low=0.0, high=1.0, name="images"):
    """Raises ValueError unless x is of float images (n, H, W, C) with pixels in [low, high].

    Args:
      x: a NumPy, JAX or PyTorch array; it is looked at, not changed.
      low, high: the pixel range.
      name: what the message calls them.
    """
    check_layout(x.shape, name)
    check_floats(x, name)
    if not len(x):
        raise ValueError(f"expected {name}, got none (shape {tuple(x.shape)}); pass one or more")
    smallest, largest = float(x.min()), float(x.max())
    if not (smallest >= low - ROUNDING and largest <= high + ROUNDING):
        raise ValueError(
            f"expected pixels in [{low}, {high}], got [{smallest:.4g}, {largest:.4g}] in {name}; "
            "pass images divided by 255, without standardisation and without NaN"
        )


def check_layout(shape, name="images"):
    """Raises ValueError unless a shape is that of images (n, H, W, C), channels last."""
    shape = tuple(shape)
    if len(shape) == 3:
        raise ValueError(
            f"expected {name} (n, H, W, C), got shape {shape}; pass x[..., None] for grey images "
            "without a channel"
        )
    if len(shape) != 4:
        raise ValueError(f"expected {name} (n, H, W, C), got shape {shape}; pass four axes")
    if shape[3] not in (1, 3):
        first = shape[1] in (1, 3)
        raise ValueError(
            f"expected {name} (n, H, W, C) with one or three channels, got shape {shape}; pass "
            + ("numpy.moveaxis(x, 1, 3): the channels come last" if first else "grey or colour")
        )


def check_floats(x, name="images"):
    """Raises ValueError unless x has a float32 or float64 dtype."""
    kind = str(x.dtype).removeprefix("torch.")
    if kind not in ("float32", "float64"):
        hint = "data.to_float(x), which divides by 255" if kind == "uint8" else "float32 or float64"
        raise ValueError(f"expected {name} of float32 or float64, got {kind}; pass {hint}")


def labels(y, n, *, n_classes=None, vectors=True, name="y"):
    """Labels of n images as a NumPy array: integers (n,), int64, or label vectors (n, classes).

    A column (n, 1), as Keras gives, is refused: it would broadcast, or count as one class.

    Args:
      y: integers (n,), or, with `vectors`, finite vectors (n, classes).
      n: how many there must be.
      n_classes: if given, integers must be below it, and vectors have so many entries.
      vectors: whether label vectors (or distributions) will do.
      name: what the message calls them.

    Raises:
      ValueError: anything else.
    """
    y = np.asarray(y)
    integers = np.issubdtype(y.dtype, np.integer)
    good = integers if y.ndim == 1 else (vectors and y.ndim == 2 and y.shape[1] > 1)
    good = good and (integers or np.issubdtype(y.dtype, np.floating))
    if not good or len(y) != n:
        expected = (
            f"{name} of {n} integers or label vectors (n, classes), one label an image"
            if vectors
            else f"one integer label an image, {n} {name}"
        )
        hint = "" if vectors else "argmax of one-hot labels, or "
        raise ValueError(
            f"expected {expected}, got shape {y.shape} of {y.dtype}; pass {hint}"
            "y.reshape(-1).astype('int64')"
        )
    if y.ndim == 2:
        if not np.isfinite(y).all():
            raise ValueError(
                f"expected finite label vectors {name}, got NaN or infinity; pass others"
            )
        if n_classes is not None and y.shape[1] != n_classes:
            raise ValueError(
                f"expected {name} of {n_classes} classes, got {y.shape[1]}; pass one entry a class"
            )
        return y
    if n and (y.min() < 0 or (n_classes is not None and y.max() >= n_classes)):
        most = "C - 1" if n_classes is None else n_classes - 1
        raise ValueError(
            f"expected {name} from 0 to {most}, got {y.min()} to {y.max()}; pass 0, 1, ..., C - 1"
        )
    return y.astype("int64")
