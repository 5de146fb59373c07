"""The door for images and the door for labels: every public function that takes them asks here.

Images are (n, H, W, C) with C = 1 or 3, floats in the pixel range; labels are integers (n,) or
label vectors (n, classes). What means something else under the same name (channels first, uint8
arithmetic that wraps, labels in a column that broadcast) is refused, with what to pass instead.
"""

import numpy as np

ROUNDING = 1e-6
"""How far pixels may leave their range."""

DARK, ALIKE = 32, 3
"""A largest uint8 pixel below the first is no image of 0..255; largest pixels of training and test
images that differ by more than a factor of the second are not of one scale."""


def images(x, *, low=0.0, high=1.0, name="images") -> None:
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
    check_pixels(x, low, high, name)


def check_pixels(x, low, high, name="images") -> None:
    """Raises ValueError unless the pixels of one image or more are in [low, high]."""
    smallest, largest = float(x.min()), float(x.max())
    if not (smallest >= low - ROUNDING and largest <= high + ROUNDING):
        raise ValueError(
            f"expected pixels in [{low}, {high}], got [{smallest:.4g}, {largest:.4g}] in {name}; "
            "pass images divided by 255, without standardisation and without NaN"
        )


def check_range(threat) -> None:
    """Raises ValueError unless a `Threat` keeps to the pixel range [0, 1]."""
    if (threat.low, threat.high) != (0, 1):
        raise ValueError(
            f"expected pixels in the range [0, 1], got a threat in [{threat.low}, {threat.high}]; "
            "pass a Threat with low 0 and high 1, and images that fit"
        )


ROWS = 10_000
"""Images that `as_eight_bit` looks at in one go."""


def as_eight_bit(x) -> np.ndarray | None:
    """float32 images (n, ...) in [0, 1] as uint8, or None where `data.to_float` would not be them.

    It takes a quarter of their memory.
    """
    found = np.empty(x.shape, "uint8")
    for start in range(0, len(x), ROWS):
        part = x[start : start + ROWS]
        with np.errstate(invalid="ignore"):  # NaN
            levels = np.clip(np.round(part * 255), 0, 255).astype("uint8")
        if not np.array_equal(levels.astype("float32") / 255, part):
            return None
        found[start : start + ROWS] = levels
    return found


def check_layout(shape, name="images") -> None:
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


def check_floats(x, name="images") -> None:
    """Raises ValueError unless x has a float32 or float64 dtype."""
    kind = str(x.dtype).removeprefix("torch.")
    if kind not in ("float32", "float64"):
        hint = "data.to_float(x), which divides by 255" if kind == "uint8" else "float32 or float64"
        raise ValueError(f"expected {name} of float32 or float64, got {kind}; pass {hint}")


def check_radius(norm, epsilon, shape) -> None:
    """Raises ValueError if an l2 radius exceeds the distance of any two images of a shape."""
    diameter = float(np.prod(shape)) ** 0.5
    if norm == "l2" and epsilon > diameter:
        raise ValueError(
            f"expected an l2 radius of at most {diameter:.1f}, the largest distance of two images "
            f"in [0, 1], got {epsilon:g}; pass 128/255 for what is sometimes written 128"
        )


def check_label_layout(y, n, *, vectors=True, name="y") -> None:
    """Raises ValueError unless shape and dtype of y are those of `labels`; no value is looked at.

    Args:
      y: a NumPy array or a PyTorch tensor; n, vectors, name: see `labels`.
    """
    kind = str(y.dtype).removeprefix("torch.")
    integers = kind.startswith(("int", "uint"))
    good = integers if y.ndim == 1 else (vectors and y.ndim == 2 and y.shape[1] > 1)
    if not good or not (integers or "float" in kind) or len(y) != n:
        expected = (
            f"{name} of {n} integers or label vectors (n, classes), one label an image"
            if vectors
            else f"one integer label an image, {n} {name}"
        )
        hint = "" if vectors else "argmax of one-hot labels, or "
        raise ValueError(
            f"expected {expected}, got shape {tuple(y.shape)} of {kind}; pass {hint}"
            "y.reshape(-1).astype('int64')"
        )


def labels(y, n, *, n_classes=None, vectors=True, name="y") -> np.ndarray:
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
    check_label_layout(y, n, vectors=vectors, name=name)
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


def part_of_data_set(x, y, part, *, in_range=True) -> tuple[np.ndarray, np.ndarray]:
    """Images as (N, H, W, C) and integer labels (N,) of a data set's file, or a ValueError."""
    if x.ndim == 3:
        x = x[..., None]
    if x.ndim != 4 or x.shape[3] not in (1, 3) or 0 in x.shape:
        raise ValueError(
            f"expected x_{part} of shape (N, H, W), (N, H, W, 1) or (N, H, W, 3), got {x.shape}; "
            "pass images with the channels last"
        )
    if x.dtype != np.uint8:
        if not np.issubdtype(x.dtype, np.floating):
            raise ValueError(
                f"expected x_{part} as uint8 or float, got {x.dtype}; pass {_advice(x)}"
            )
        outside = in_range and (x.min() < 0 or x.max() > 1)
        if outside or not np.isfinite(x).all():
            raise ValueError(
                f"expected float x_{part} in [0, 1], got [{np.min(x):.4g}, {np.max(x):.4g}]; "
                "pass pixels divided by 255 (not standardised), or as uint8"
            )
    elif 0 < x.max() < DARK:
        raise ValueError(
            f"expected uint8 x_{part} of 0..255, got a largest pixel of {x.max()}; pass "
            f"{_advice(x)}"
        )
    vectors = y.ndim == 2 and y.shape[1] > 1 and np.issubdtype(y.dtype, np.floating)
    if vectors:
        if not np.isfinite(y).all():
            raise ValueError(
                f"expected finite label vectors y_{part}, got NaN or infinity; pass others"
            )
        y = y.argmax(1)
    y = y.reshape(-1) if y.ndim == 2 and y.shape[1] == 1 else y
    if y.ndim != 1 or len(y) != len(x) or not np.issubdtype(y.dtype, np.integer):
        raise ValueError(
            f"expected y_{part} to be {len(x)} integers, got shape {y.shape} of {y.dtype}; "
            "pass one label an image"
        )
    if y.min() < 0:
        raise ValueError(f"expected labels y_{part} from 0, got {y.min()}; pass 0, 1, ..., C - 1")
    missing = np.flatnonzero(np.bincount(np.minimum(y.astype("int64"), 10**6)) == 0)
    if part == "train" and len(missing) and not vectors:
        hint = "y - 1 (in y_test, too)" if missing.tolist() == [0] else "0, 1, ..., C - 1"
        raise ValueError(
            f"expected labels y_train of every class from 0 to {y.max()}, got none of "
            f"{missing[:5].tolist()}; pass {hint}"
        )
    return x, y.astype(np.int64)


def _advice(x):
    """How to pass images of other numbers as floats, by what their numbers are."""
    most = int(x.max())
    return "x.astype('float32')" if most <= 1 else f"(x / {_scale_of(most)}).astype('float32')"


def _scale_of(most):
    """The white of images whose largest pixel is `most`."""
    return next((white for white in (16, 255, 1023, 4095, 65535) if most <= white), most)


def check_alike(x_train, x_test, *, distilled) -> None:
    """Refuses parts of another kind or scale; a distilled set is floats beside any test images."""
    if distilled:
        return
    kinds = [x.dtype == np.uint8 for x in (x_train, x_test)]
    if kinds[0] != kinds[1]:
        raise ValueError(
            f"expected x_train and x_test of one kind, got {x_train.dtype} and {x_test.dtype}; "
            "pass both as uint8 of 0..255 or both as floats in [0, 1]"
        )
    brightest = [float(x.max()) for x in (x_train, x_test)]
    if max(brightest) > ALIKE * min(brightest) > 0:
        raise ValueError(
            f"expected x_train and x_test of one scale, got largest pixels of {brightest[0]:.4g} "
            f"and {brightest[1]:.4g}; pass both divided by the same white"
        )
