"""Files that are whole or not there, and folders that one process has at a time."""

import fcntl
import hashlib
import os
import socket
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import BinaryIO

import numpy as np

ROOT = Path(__file__).parents[1]
"""The project's folder."""


def find(path: str | Path) -> Path:
    """A path of a setting: from the working directory, the one above it or the project's."""
    path = Path(path).expanduser()
    places = (base / path for base in (Path(), Path(".."), ROOT))
    return next((place for place in places if place.exists()), path)


@contextmanager
def replacing(path) -> Iterator[BinaryIO]:
    """An open binary file that takes the place of `path` when everything is written.

    A run that is cut off while it writes leaves the old file as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.stem}.{os.getpid()}.tmp")  # a process's own
    with open(temporary, "wb") as file:
        yield file
    os.replace(temporary, path)


@contextmanager
def taken(folder) -> Iterator[None]:
    """Holds a folder for this process: a second one is refused until this one ends.

    The file `.lock` in it names the process. The system gives the lock back when the process is
    gone, however it went, so a file that is left over hinders nobody.

    Raises:
      ValueError: another process holds the folder.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            owner = file.read().strip() or "another process"
            raise ValueError(
                f"expected {folder} to be free, got a run in it ({owner}); wait for it or stop it, "
                "or pass --set name=... for a folder of its own"
            ) from None
        file.truncate(0)
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {since}\n")
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)


def digest(path) -> str:
    """16 hex digits of the content of a file, or of the files of a folder.

    Of an .npz these are its arrays alone: the same ones saved again have the same digest. A file
    that is as it was is read once a process.
    """
    path, found = Path(path), hashlib.sha256()
    parts = sorted(path.iterdir()) if path.is_dir() else [path]
    for part in parts:
        if part.suffix == ".npz" and zipfile.is_zipfile(part):
            with zipfile.ZipFile(part) as archive:
                arrays = sorted((i.filename, i.file_size, i.CRC) for i in archive.infolist())
            found.update(repr(arrays).encode())
        elif part.is_file():
            stat = part.stat()
            found.update(_sha256(part.resolve(), stat.st_ino, stat.st_size, stat.st_mtime_ns))
    return found.hexdigest()[:16]


@cache
def _sha256(path, *state):
    """Of a file's content; `state` tells that it is another one."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def digest_of_arrays(*arrays: np.ndarray) -> str:
    """16 hex digits of the content, shape and dtype of arrays."""
    found = hashlib.sha256()
    for array in map(np.ascontiguousarray, arrays):
        found.update(f"{array.dtype} {array.shape}".encode())
        found.update(array.data)
    return found.hexdigest()[:16]
