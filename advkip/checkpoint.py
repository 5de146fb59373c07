"""The checkpoint of a distillation: its state, and what the state belongs to."""

import json

import jax
import jax.numpy as jnp
import numpy as np

from advkip import files


def save(path, state, run):
    """Writes the state aside first, so that a cut-off write leaves the old file whole."""
    leaves = jax.tree_util.tree_leaves((state.support, state.optimizer_states, state.best))
    notes = {
        "step": state.step, "best_step": state.best_step, "best_score": state.best_score,
        "history": state.history, "seconds": state.seconds,
        "experiment": run.experiment.to_dict(), "probe": run.probe, "data": run.data,
    }  # fmt: skip
    write(path, notes=json.dumps(notes), **{f"leaf{i}": a for i, a in enumerate(leaves)})


def load(path, template, run):
    """The state in a checkpoint of the same settings, kernel and data, shaped as `template`."""
    parts = (template.support, template.optimizer_states, template.best)
    leaves, structure = jax.tree_util.tree_flatten(parts)
    try:
        with np.load(path, allow_pickle=False) as file:
            notes = json.loads(str(file["notes"]))
            loaded = [jnp.asarray(file[f"leaf{i}"]) for i in range(len(leaves))]
    except Exception as error:
        raise ValueError(
            f"expected a checkpoint in {path}, got {error}; delete the file to start again"
        ) from error
    settings = type(run.experiment)(**notes["experiment"]).distillation()
    others = {
        "settings": settings != run.experiment.distillation(),
        "kernel": not np.allclose(notes["probe"], run.probe, rtol=1e-3),
        "training data": notes.get("data") != run.data,
    }
    if any(others.values()):
        found = ", ".join(name for name, other in others.items() if other)
        raise ValueError(
            f"expected {path} to be of the same settings, kernel and images, got other {found}; "
            "delete the file, or pass another checkpoint_dir"
        )
    support, states, best = jax.tree_util.tree_unflatten(structure, loaded)
    return template._replace(
        step=notes["step"], support=support, optimizer_states=states, best=best,
        best_step=notes["best_step"], best_score=notes["best_score"],
        history=tuple(notes["history"]), seconds=notes["seconds"],
    )  # fmt: skip


def write(path, **arrays):
    """An .npz that is whole or not there."""
    if jax.process_index():  # of several hosts, which all have the same arrays, the first writes
        return
    with files.replacing(path) as file:
        np.savez(file, **arrays)
