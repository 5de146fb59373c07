"""Progress bars: widgets in JupyterLab; text in a terminal, also for a kernel of a batch run.

A kernel whose run is watched from elsewhere (`sweep`) also writes where it is into a file.
"""

import json
import os
import time
from pathlib import Path

from tqdm import auto, std

BATCH = "ADVKIP_BATCH"
"""Environment variable that `advkip.run` sets for the kernels it starts."""

STATUS = "ADVKIP_STATUS"
"""Environment variable: the file that a watched kernel writes."""


class _Watched(std.tqdm):
    """A text bar that writes its state into the file of STATUS, once a second at most."""

    written = 0.0

    def display(self, *arguments, **options):
        path, now = os.environ[STATUS], time.monotonic()
        if now - _Watched.written >= 1:
            _Watched.written = now
            write_status(path, {
                "desc": self.desc, "n": self.n, "total": self.total, "postfix": self.postfix,
                "rate": self.format_dict["rate"],
            })  # fmt: skip
        return super().display(*arguments, **options)


def write_status(path: str | Path, state: dict) -> None:
    """Writes a state as JSON; a reader never sees half of it."""
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(state))
    temporary.replace(path)


tqdm: type[std.tqdm]
if os.environ.get(STATUS):
    tqdm = _Watched
elif os.environ.get(BATCH):
    tqdm = std.tqdm
else:
    tqdm = auto.tqdm

__all__ = ["BATCH", "STATUS", "tqdm", "write_status"]
