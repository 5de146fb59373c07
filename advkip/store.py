"""The state of what is resumed (distillation, training, attacked batches, inverted images).

A state is a tree of arrays and numbers beside notes that JSON can hold. It lies in one .npz without
pickles, which is whole or not there, together with what it belongs to: plain JSON values. It is
loaded against the tree that is expected, and what differs is named.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch

from advkip import files

LAYOUT = 2
"""Of the files; those of layout 1 had no names for their leaves."""


def digest(about: Mapping[str, Any]) -> str:
    """12 hex digits of what a state belongs to."""
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:12]


def save(path: str | Path, tree: Any, *, about: Mapping[str, Any], notes: Any = None) -> None:
    """Writes a state; a write that is cut off leaves the old file whole.

    Args:
      path: of an .npz.
      tree: arrays, tensors and numbers in dicts, lists and (named) tuples.
      about: what it belongs to.
      notes: what else there is, as JSON.
    """
    if jax.process_index():  # of several hosts, which all have the same arrays, the first writes
        return
    leaves = {f"/{name}": _array(leaf) for name, leaf in _named(tree)}
    head = {"layout": LAYOUT, "about": about, "notes": notes}
    with files.replacing(path) as file:
        np.savez(file, head=json.dumps(head), **leaves)


def load(path: str | Path, like: Any = None, *, about: Mapping[str, Any]) -> tuple[Any, Any]:
    """(tree, notes) of a state that belongs to `about`.

    Args:
      path: of an .npz.
      like: the expected tree; None takes any leaves, as a flat dict of NumPy arrays.
      about: what it must belong to.

    Returns:
      A tree as `like`, with leaves of its kinds (JAX, PyTorch on its device, NumPy, numbers).

    Raises:
      ValueError: no such file, of another layout, of something else (which settings differ), or
        with other leaves (path, shape and dtype).
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            head: dict = json.loads(str(file["head"])) if "head" in file.files else {"layout": 1}
            arrays = {key[1:]: file[key] for key in file.files if key.startswith("/")}
        layout = head["layout"]
    except Exception as error:  # a damaged file can fail in any way
        raise ValueError(
            f"expected a checkpoint in {path}, got {error}; delete the file to start again"
        ) from error
    if layout != LAYOUT:
        raise ValueError(
            f"expected a checkpoint of layout {LAYOUT} in {path}, got layout {layout}, of another "
            "version of advkip; delete the file to start again"
        )
    plain = json.loads(json.dumps(about))
    if differs := _differences(dict(head["about"]), plain):
        raise ValueError(
            f"expected {path} to be of the same settings, model and data, got {differs}; delete "
            "the file, or pass another folder"
        )
    if like is None:
        return arrays, head["notes"]
    return _fitted(path, arrays, like), head["notes"]


def _differences(old: Mapping, new: Mapping) -> str:
    """What two descriptions disagree on, in words; '' if they do not."""
    found = []
    for key in sorted(old.keys() | new.keys()):
        if key not in new:
            found.append(f"{key} {old[key]!r} instead of none")
        elif key not in old:
            found.append(f"no {key}")
        elif old[key] != new[key]:
            found.append(f"{key} {old[key]!r} instead of {new[key]!r}")
    return ", ".join(found)


def _fitted(path, arrays, like):
    leaves, structure = jax.tree_util.tree_flatten(like)
    expected = dict(zip((name for name, _ in _named(like)), leaves, strict=True))
    for name in sorted(arrays.keys() ^ expected.keys()):
        got = "none" if name in expected else "one that is not expected"
        raise ValueError(
            f"expected a checkpoint with the leaves of this run in {path}, got {got} at {name}; "
            "delete the file to start again"
        )
    for name, leaf in expected.items():
        want, have = _array(leaf), arrays[name]
        if (want.shape, want.dtype) != (have.shape, have.dtype):
            raise ValueError(
                f"expected {name} of shape {want.shape} and {want.dtype} in {path}, got "
                f"{have.shape} and {have.dtype}; delete the file to start again"
            )
    return jax.tree_util.tree_unflatten(
        structure, [_like(arrays[name], leaf) for name, leaf in expected.items()]
    )


def _named(tree):
    """(path, leaf) of each leaf of a tree."""
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        yield jax.tree_util.keystr(path, simple=True, separator="/"), leaf


def _array(leaf):
    return leaf.detach().cpu().numpy() if isinstance(leaf, torch.Tensor) else np.asarray(leaf)


def _like(array, leaf):
    if isinstance(leaf, torch.Tensor):
        return torch.empty_like(leaf).copy_(torch.as_tensor(array))  # in its layout of memory
    if isinstance(leaf, jax.Array):
        return jax.numpy.asarray(array)
    return array if isinstance(leaf, np.ndarray) else array.item()
