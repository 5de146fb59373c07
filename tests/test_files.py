"""Files that are whole or not there."""

import pytest

from advkip import files


def test_a_cut_off_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "new" / "a.json"
    with files.replacing(path) as file:
        file.write(b"old")
    assert path.read_bytes() == b"old"
    with pytest.raises(KeyboardInterrupt):
        write_half(path)
    assert path.read_bytes() == b"old"
    with files.replacing(path) as file:
        file.write(b"new")
    assert path.read_bytes() == b"new"
    assert [p.name for p in path.parent.iterdir()] == ["a.json"]


def write_half(path):
    with files.replacing(path) as file:
        file.write(b"half")
        raise KeyboardInterrupt
