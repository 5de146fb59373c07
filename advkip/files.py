"""Files that are whole or not there."""

import os
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path):
    """An open binary file that takes the place of `path` when everything is written.

    A run that is cut off while it writes leaves the old file as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.stem}.{os.getpid()}.tmp")  # a process's own
    with open(temporary, "wb") as file:
        yield file
    os.replace(temporary, path)
