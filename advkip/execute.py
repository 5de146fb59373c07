"""One notebook of an experiment, executed by papermill into the experiment's folder."""

import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import papermill
from nbclient.exceptions import DeadKernelError
from papermill.exceptions import PapermillExecutionError

from advkip import preflight, progress, records
from advkip.config import Experiment


class NotebookError(RuntimeError):
    """A notebook ended early; the message names it, the cell and the cause."""


def source(notebook) -> Path:
    """Path of a notebook's .ipynb."""
    return Path("notebooks") / f"{notebook}.ipynb"


MADE = (
    "results.json", "distillation-*.npz", "kept-*.npz", "network-*.npz", "attacks-*.npz",
    "inverted-*.npz", "adv-kip.npz", "kip.npz", "unrolled.npz", "adv-kip-*.npz", "kip-*.npz",
    "unrolled-*.npz", "relabelled.npz", "robust-features.npz", "scout-*.npz", "attacked-*.npz",
    "expert-*.npz",
)  # fmt: skip
"""What an experiment's later notebooks read of what its earlier ones left in the folder."""

VARIANTS = "variants"
"""Folder of notebook 05's distillations."""


def _start_over(folder, experiment):
    """Removes what would mix with the new run's results if that one were cut off."""
    for pattern in (*MADE, *(f"{notebook}.ipynb" for notebook in experiment.notebooks)):
        for path in folder.glob(pattern):
            path.unlink()
    shutil.rmtree(folder / VARIANTS, ignore_errors=True)


def prepare(experiment: Experiment, folder: Path, *, force: bool = False) -> None:
    """Makes a folder ready for an experiment's notebooks; with `force`, empties it of the last run.

    Raises:
      ValueError: the folder holds results of other settings.
    """
    if force:
        _start_over(folder, experiment)
    records.check_folder(
        folder, experiment, "--set name=... for a folder of its own, or --force to replace it"
    )
    os.environ[progress.BATCH] = "1"
    if os.environ.get("ADVKIP_DATA"):
        os.environ["ADVKIP_DATA"] = str(Path(os.environ["ADVKIP_DATA"]).expanduser().resolve())
    # It warns of settings that a notebook's parameters cell does not list; all are checked here.
    logging.getLogger("papermill").setLevel(logging.ERROR)


def execute(
    notebook: str, experiment: Experiment, folder: Path, *, force: bool = False, on_cell_start=None
) -> bool:
    """Executes a notebook into `<folder>/<notebook>.ipynb`; False if it is finished already.

    Raises:
      NotebookError: a cell failed (the notebook so far is kept as *.failed.ipynb), or the kernel
        died; KeyboardInterrupt: its cell was interrupted, and has saved what it had.
    """
    executed = folder / f"{notebook}.ipynb"
    running = folder / f"{notebook}.{os.getpid()}.running.ipynb"
    failed = folder / f"{notebook}.failed.ipynb"
    for left_over in folder.glob(f"{notebook}.*running.ipynb"):  # of a run that was cut off
        left_over.unlink()
    parameters = parameters_for(notebook, experiment, folder)
    digests = preflight.digests(experiment)
    if not force and _finished(executed, notebook, parameters, digests):
        note = "" if _same_code(executed, notebook) else ", with code that has changed since"
        print(f"{executed}: finished{note}, skipped (--force runs it again)")
        return False
    print(f"{executed}: running", flush=True)
    if differs := _differs(notebook):
        print(f"  {source(notebook)} differs from what is committed", flush=True)
    try:
        papermill.execute_notebook(
            source(notebook), _literal(running), parameters, cwd="notebooks",
            kernel_name="python3",
            stdout_file=sys.stdout, stderr_file=sys.stderr,
            progress_bar=False, extra_arguments=["--IPKernelApp.log_level=ERROR"],
            on_cell_start=on_cell_start,
        )  # fmt: skip
    except PapermillExecutionError as error:
        if error.ename == "KeyboardInterrupt":  # its cell has saved what it had
            running.unlink()
            raise KeyboardInterrupt from None
        running.replace(failed)
        raise NotebookError(
            f"{executed}: cell [{error.exec_count}] failed with {error.ename}: {error.evalue}\n"
            f"  it begins: {error.source.strip().splitlines()[0]}\n  see {failed}"
        ) from None
    except DeadKernelError as error:
        raise NotebookError(
            f"{executed}: the kernel died ({error}), often for want of memory; pass a smaller "
            "n_support or n_target, or run it again to continue from the last checkpoint"
        ) from None
    _tidy(running, source_differs_from_commit=differs, data=digests)
    running.replace(executed)
    failed.unlink(missing_ok=True)
    return True


def _literal(path):
    """A path as papermill takes it: it replaces {parameters} in it."""
    return str(path).replace("{", "{{").replace("}", "}}")


def parameters_for(notebook, experiment, folder) -> dict:
    """What papermill passes: the folder, and to notebooks that take an experiment its settings.

    Settings at their default are left out. A notebook runs in notebooks/, so a relative folder
    gets a '..' in front.
    """
    parameters = {"output": _from_notebooks(folder)}
    if takes_experiment(notebook):
        parameters |= experiment.changes()
        parameters.pop("notebooks", None)
    return parameters


def takes_experiment(notebook) -> bool:
    """Whether a notebook's parameters are sections of an experiment."""
    return bool(set(papermill.inspect_notebook(source(notebook))) & set(Experiment.model_fields))


def _from_notebooks(path):
    return (path if path.is_absolute() else Path("..") / path).as_posix()


def _finished(executed, notebook, parameters, digests):
    """Whether `executed` was run with these parameters and data, as far as it depends on them."""
    if not executed.exists():
        return False
    metadata = nbformat.read(executed, 4).metadata
    if not preflight.same_data(metadata.get("advkip", {}).get("data", {}), digests, notebook):
        return False
    old = metadata.get("papermill", {}).get("parameters", {})

    def settings(given):
        return {k: v for k, v in given.items() if k in Experiment.model_fields}

    try:
        new = Experiment.from_params(settings(parameters))
        same = records.same_results(new, settings(old), notebook)
    except ValueError:  # settings of an older version
        return False
    return same and old.get("output") == parameters["output"]


def _same_code(executed, notebook):
    """Whether a finished notebook's code is that of its source."""

    def code(path):
        cells = (c for c in nbformat.read(path, 4).cells if c.cell_type == "code")
        return [c.source for c in cells if "injected-parameters" not in c.metadata.get("tags", ())]

    return code(executed) == code(source(notebook))


def _differs(notebook):
    """Whether the notebook's source is not as it is committed; False without git."""
    command = ["git", "diff", "--quiet", "HEAD", "--", f"notebooks/{notebook}.*"]
    try:
        return subprocess.run(command, capture_output=True).returncode == 1
    except OSError:
        return False


def _tidy(path, **notes):
    """Drops what changes from run to run without saying anything: progress bars, cell clocks.

    `notes` go into the metadata.
    """
    notebook = nbformat.read(path, 4)
    notebook.metadata["advkip"] = notes
    for cell in notebook.cells:
        cell.metadata.pop("papermill", None)
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
    nbformat.write(notebook, path)
