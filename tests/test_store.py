"""States that are resumed: whole or not there, and of what they should be, or a clear error."""

import json

import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from advkip import files, store

ABOUT = {"seed": 0, "kernel.name": "fc3", "rates": [0.1, 0.2]}


def trees():
    """A tree with JAX, PyTorch and NumPy leaves and numbers, in dicts, tuples and named tuples."""
    support = jnp.arange(6.0, dtype="float32").reshape(2, 3), jnp.ones((2, 1))
    net = torch.nn.Linear(3, 2)
    return {
        "support": support, "moments": optax.adam(0.1).init(support), "net": net.state_dict(),
        "images": np.arange(4, dtype="uint8"), "group": [{"lr": 0.5, "amsgrad": False, "n": 3}],
    }  # fmt: skip


def test_what_is_saved_comes_back_in_kind(tmp_path):
    tree = trees()
    store.save(tmp_path / "s.npz", tree, about=ABOUT, notes={"history": [{"step": 1}]})
    found, notes = store.load(tmp_path / "s.npz", trees(), about=ABOUT)
    assert notes == {"history": [{"step": 1}]}
    assert found["group"] == tree["group"]
    assert type(found["group"][0]["amsgrad"]) is bool
    assert isinstance(found["moments"][0], type(tree["moments"][0]))
    assert isinstance(found["support"][0], type(tree["support"][0]))
    assert isinstance(found["net"]["weight"], torch.Tensor)
    assert found["images"].dtype == "uint8"
    for path in ("support", "moments"):
        assert (np.asarray(found[path][0][0]) == np.asarray(tree[path][0][0])).all()
    assert torch.equal(found["net"]["weight"], tree["net"]["weight"])


def test_a_layout_of_memory_is_kept(tmp_path):
    weights = torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last)
    store.save(tmp_path / "s.npz", {"w": weights}, about={})
    (found,) = store.load(tmp_path / "s.npz", {"w": torch.zeros_like(weights)}, about={})[
        0
    ].values()
    assert torch.equal(found, weights)
    assert found.stride() == weights.stride()


def test_without_an_expected_tree_leaves_come_by_name(tmp_path):
    store.save(tmp_path / "s.npz", {"file": np.ones(2), "a b": np.zeros(1)}, about=ABOUT)
    found, _ = store.load(tmp_path / "s.npz", about=ABOUT)
    assert set(found) == {"file", "a b"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("images"), "one that is not expected at images"),
        (lambda t: t.update(more=np.ones(1)), "none at more"),
        (lambda t: t.update(images=np.zeros(5, "uint8")), r"expected images of shape \(5,\) and"),
        (lambda t: t.update(images=np.zeros(4, "int8")), r"and int8 in .* got \(4,\) and uint8"),
    ],
)
def test_a_leaf_that_differs_is_named(tmp_path, change, message):
    store.save(tmp_path / "s.npz", trees(), about=ABOUT)
    like = trees()
    change(like)
    with pytest.raises(ValueError, match=message):
        store.load(tmp_path / "s.npz", like, about=ABOUT)


@pytest.mark.parametrize(
    ("about", "message"),
    [
        (ABOUT | {"seed": 1}, "got seed 0 instead of 1; delete"),
        ({"seed": 0, "rates": [0.1, 0.2]}, "got kernel.name 'fc3' instead of none"),
        (ABOUT | {"norm": "l2"}, "got no norm"),
    ],
)
def test_what_it_belongs_to_is_compared(tmp_path, about, message):
    store.save(tmp_path / "s.npz", trees(), about=ABOUT)
    with pytest.raises(ValueError, match=message):
        store.load(tmp_path / "s.npz", trees(), about=about)
    assert store.load(tmp_path / "s.npz", trees(), about=ABOUT | {"rates": (0.1, 0.2)})


def test_an_older_layout_and_damage_are_told_apart(tmp_path):
    path = tmp_path / "s.npz"
    np.savez(path, notes=json.dumps({"step": 1}), leaf0=np.ones(2))  # as it was before
    with pytest.raises(ValueError, match=f"layout {store.LAYOUT} in .* got layout 1, of another"):
        store.load(path, trees(), about=ABOUT)
    store.save(path, trees(), about=ABOUT)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match="expected a checkpoint in .* delete the file"):
        store.load(path, trees(), about=ABOUT)
    with pytest.raises(ValueError, match="expected a checkpoint in"):
        store.load(tmp_path / "none.npz", trees(), about=ABOUT)


def test_no_pickle_is_read(tmp_path):
    path = tmp_path / "s.npz"
    np.savez(path, head=json.dumps({"layout": store.LAYOUT, "about": {}, "notes": None}),
             **{"/a": np.array([object()], dtype=object)})  # fmt: skip
    with pytest.raises(ValueError, match="expected a checkpoint in"):
        store.load(path, about={})


def test_a_write_that_is_cut_off_leaves_the_old_state(tmp_path, monkeypatch):
    path = tmp_path / "s.npz"
    store.save(path, {"a": np.ones(2)}, about={})

    def cut_off(file, **arrays):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "savez", cut_off)
    with pytest.raises(KeyboardInterrupt):
        store.save(path, {"a": np.zeros(2)}, about={})
    monkeypatch.undo()
    assert store.load(path, {"a": np.zeros(2)}, about={})[0]["a"].sum() == 2


def test_digests_tell_shape_and_dtype_apart():
    a = np.zeros((2, 3), "float32")
    others = (a.reshape(3, 2), a.astype("float64"), a + 1)
    assert len({files.digest_of_arrays(one) for one in (a, *others)}) == 4
    assert files.digest_of_arrays(a.T.copy().T) == files.digest_of_arrays(a)
