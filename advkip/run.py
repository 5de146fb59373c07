"""Params files to executed notebooks: `python -m advkip.run FILE... [--set key=value]`.

All files are checked before anything runs. Each notebook of an experiment is executed by
papermill into `reports/<name>/`, next to its figures and `results.json`. A notebook that is
finished with the same settings is skipped. One that was cut off continues from the checkpoints
in that folder.
"""

import argparse
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import nbformat
import papermill
from nbclient.exceptions import DeadKernelError
from papermill.exceptions import PapermillExecutionError

from advkip import files, preflight, progress, records, signals, tables
from advkip.config import Experiment


class NotebookError(RuntimeError):
    """A notebook ended early; the message names it, the cell and the cause."""


def main(arguments=None) -> int:
    """Runs the params files of the command line; returns the exit code."""
    options = _parser().parse_args(arguments)
    for stream in (sys.stdout, sys.stderr):  # a terminal need not know every sign of the tables
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    if not Path("notebooks").is_dir():
        print(
            "error: expected the folder notebooks/ here, got a working directory without; run from "
            "the project's folder (cd to where README.md is)",
            file=sys.stderr,
        )
        return 2
    try:
        experiments = check_files(options.files, options.set)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.check:
        print(f"{len(experiments)} params files are valid")
        return 0
    failed = {}
    for i, experiment in enumerate(experiments):
        try:
            with signals.stopping_kernels() as on_cell_start:
                run(
                    experiment, options.reports, force=options.force, on_cell_start=on_cell_start
                )  # fmt: skip
        except (NotebookError, ValueError, OSError) as error:
            own = isinstance(error, NotebookError)
            print(f"error: {error if own else f'{experiment.name}: {error}'}", file=sys.stderr)
            failed[experiment.name] = 1 if own else 2
            rest = [other.name for other in experiments[i + 1 :]]
            if rest and not options.keep_going:
                print(f"not run: {', '.join(rest)} (--keep-going runs them)", file=sys.stderr)
                break
        except KeyboardInterrupt as stop:
            print(
                "interrupted; the same command continues from the last checkpoint", file=sys.stderr
            )
            return 128 + (stop.args[0] if stop.args else signal.SIGINT)
    if len(experiments) > len(failed) and (not failed or options.keep_going):
        show([one for one in experiments if one.name not in failed], options.reports)
    if failed:
        print(
            f"failed: {', '.join(failed)} (see above); the same command without --force continues",
            file=sys.stderr,
        )
    return max(failed.values(), default=0)


def _parser():
    parser = argparse.ArgumentParser("python -m advkip.run", description=__doc__.split("\n\n")[0])
    parser.add_argument("files", nargs="+", metavar="FILE", help="a params file (YAML)")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="section.key=value",
        help="replaces a setting of every file; may be given several times",
    )
    parser.add_argument("--reports", default="reports", help="folder of the results")
    parser.add_argument(
        "--force",
        action="store_true",
        help="starts over, replacing what the folder holds",
    )
    parser.add_argument(
        "--keep-going", action="store_true", help="runs the other experiments when one fails"
    )
    parser.add_argument("--check", action="store_true", help="checks the files and stops")
    return parser


def check_files(files, overrides=()) -> list[Experiment]:
    """Experiments of params files.

    Raises:
      ValueError, OSError: the first file that is wrong, its key, and what to pass; two files
        with one name; a notebook that does not exist.
    """
    experiments, names = [], {}
    for file in files:
        experiment = Experiment.from_file(file, overrides)
        if experiment.name in names:
            raise ValueError(
                f"{file}: expected a name of its own, got {experiment.name!r} like "
                f"{names[experiment.name]}; pass another name, they share a folder"
            )
        for notebook in experiment.notebooks:
            if not source(notebook).exists():
                raise ValueError(
                    f"{file}: expected notebooks to name files of notebooks/, got {notebook!r}; "
                    "pass for example '01_kernels', and run from the project's folder"
                )
        try:
            preflight.check(experiment)
        except (ValueError, OSError) as error:
            raise type(error)(f"{file}: {error}") from None
        names[experiment.name] = file
        experiments.append(experiment)
    return experiments


def source(notebook) -> Path:
    """Path of a notebook's .ipynb."""
    return Path("notebooks") / f"{notebook}.ipynb"


def run(experiment, reports="reports", *, force=False, on_cell_start=None) -> None:
    """Executes an experiment's notebooks into `<reports>/<name>/`.

    `on_cell_start(cell, cell_index)`, of keywords, is called before each cell.

    Raises:
      NotebookError: a cell failed (the notebook so far is kept as *.failed.ipynb), or the
        kernel died.
      ValueError: the folder holds results of other settings, and not `force`; or another process
        runs in it.
    """
    folder = Path(reports) / experiment.name
    with files.taken(folder):
        _run(experiment, folder, force, on_cell_start)


def _run(experiment, folder, force, on_cell_start):
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
    digests = preflight.digests(experiment)
    for notebook in experiment.notebooks:
        executed = folder / f"{notebook}.ipynb"
        running = folder / f"{notebook}.{os.getpid()}.running.ipynb"
        failed = folder / f"{notebook}.failed.ipynb"
        for left_over in folder.glob(f"{notebook}.*running.ipynb"):  # of a run that was cut off
            left_over.unlink()
        parameters = parameters_for(notebook, experiment, folder)
        if not force and _finished(executed, notebook, parameters, digests):
            note = "" if _same_code(executed, notebook) else ", with code that has changed since"
            print(f"{executed}: finished{note}, skipped (--force runs it again)")
            continue
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


MADE = (
    "results.json", "distillation-*.npz", "kept-*.npz", "network-*.npz", "attacks-*.npz",
    "inverted-*.npz", "adv-kip.npz", "kip.npz", "robust-features.npz",
)  # fmt: skip
"""What an experiment's later notebooks read of what its earlier ones left in the folder."""


def _start_over(folder, experiment):
    """Removes what would mix with the new run's results if that one were cut off."""
    for pattern in (*MADE, *(f"{notebook}.ipynb" for notebook in experiment.notebooks)):
        for path in folder.glob(pattern):
            path.unlink()


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
    return subprocess.run(command, capture_output=True).returncode == 1


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


def show(experiments, reports) -> None:
    """Prints the results table and where to look."""
    paths = [Path(reports) / e.name / "results.json" for e in experiments]
    found = [records.read(path) for path in paths if path.exists()]
    if found:
        print("\nTest accuracy (%), the worst case of each image\n")
        print(tables.accuracy(found))
    print("\nExecuted notebooks, figures (PNG) and results.json:")
    for experiment in experiments:
        print(f"  {Path(reports) / experiment.name}/")


if __name__ == "__main__":
    sys.exit(main())
