"""Signals to a batch run: the cell that is running saves what it has."""

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psutil


@contextmanager
def stopping_kernels() -> Iterator[Callable]:
    """SIGINT, and SIGTERM as a cluster sends it, interrupt the kernel's cell, which then saves.

    One that comes while no cell runs ends before the next. A second one ends at once. Yields what
    is to be called before each cell.
    """
    sent, started = [], []

    def stop(number, frame):
        sent.append(number)
        kernels = [one for one in psutil.Process().children() if _is_kernel(one)]
        if len(sent) > 1 or not kernels:
            raise KeyboardInterrupt(number)
        print("stopping: the cell saves its state (once more ends at once)", file=sys.stderr)
        for kernel in kernels if started else ():
            kernel.send_signal(signal.SIGINT)

    def on_cell_start(**_):
        if sent:
            raise KeyboardInterrupt
        started.append(True)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield on_cell_start
        on_cell_start()
    except KeyboardInterrupt:
        raise KeyboardInterrupt(*sent[:1]) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _is_kernel(process):
    try:
        return any("ipykernel" in part for part in process.cmdline())
    except psutil.Error:  # it has just ended
        return False
