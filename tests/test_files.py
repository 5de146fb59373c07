"""Files that are whole or not there."""

import hashlib

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


def test_a_file_is_digested_again_only_when_it_is_another(tmp_path, monkeypatch):
    read, digest = [], hashlib.file_digest

    def counted(file, kind):
        read.append(file.name)
        return digest(file, kind)

    monkeypatch.setattr(hashlib, "file_digest", counted)
    path = tmp_path / "CIFAR_ims"
    path.write_bytes(b"images")
    first = files.digest(tmp_path)
    assert (files.digest(tmp_path), len(read)) == (first, 1)
    with files.replacing(path) as file:
        file.write(b"others")  # of the same size
    assert files.digest(tmp_path) != first
    assert len(read) == 2
