"""Params files to executed notebooks: `python -m advkip.run FILE... [--set key=value]`.

All files are checked before anything runs. Each notebook of an experiment is executed by
papermill into `reports/<name>/`, next to its figures and `results.json`. A notebook that is
finished with the same settings is skipped; if nothing but its prose has changed since, the executed
copy gets the new prose. One that was cut off continues from the checkpoints that `distill` left in
that folder.
"""

import argparse
import logging
import os
import sys
from pathlib import Path

import nbformat
import papermill
from nbclient.exceptions import DeadKernelError
from papermill.exceptions import PapermillExecutionError

from advkip import records
from advkip.config import Experiment, field_names, ignored_settings


class NotebookError(RuntimeError):
    """A notebook ended early; the message names it, the cell and the cause."""


def main(arguments=None):
    """Runs the params files of the command line; returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        experiments = check_files(options.files, options.set)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.check:
        print(f"{len(experiments)} params files are valid")
        return 0
    for experiment in experiments:
        try:
            run(experiment, options.reports, force=options.force)
        except NotebookError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        except (ValueError, OSError) as error:
            print(f"error: {experiment.name}: {error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print(
                "interrupted; the same command continues from the last checkpoint", file=sys.stderr
            )
            return 130
    show(experiments, options.reports)
    return 0


def _parser():
    parser = argparse.ArgumentParser("python -m advkip.run", description=__doc__.split("\n\n")[0])
    parser.add_argument("files", nargs="+", metavar="FILE", help="a params file (YAML)")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="key=value",
        help="replaces a setting of every file; may be given several times",
    )
    parser.add_argument("--reports", default="reports", help="folder of the results")
    parser.add_argument(
        "--force",
        action="store_true",
        help="starts over, replacing what the folder holds",
    )
    parser.add_argument("--check", action="store_true", help="checks the files and stops")
    return parser


def check_files(files, overrides=()):
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
        names[experiment.name] = file
        experiments.append(experiment)
    return experiments


def source(notebook):
    """Path of a notebook's .ipynb."""
    return Path("notebooks") / f"{notebook}.ipynb"


def run(experiment, reports="reports", *, force=False):
    """Executes an experiment's notebooks into `<reports>/<name>/`.

    Raises:
      NotebookError: a cell failed (the notebook so far is kept as *.failed.ipynb), or the
        kernel died.
      ValueError: the folder holds results of other settings, and not `force`.
    """
    folder = Path(reports) / experiment.name
    folder.mkdir(parents=True, exist_ok=True)
    _check_folder(folder, experiment, force)
    if os.environ.get("ADVKIP_DATA"):
        os.environ["ADVKIP_DATA"] = str(Path(os.environ["ADVKIP_DATA"]).expanduser().resolve())
    # It warns of settings that a notebook's parameters cell does not list; all are checked here.
    logging.getLogger("papermill").setLevel(logging.ERROR)
    for checkpoint in folder.glob("checkpoint-*") if force else ():
        checkpoint.unlink()
    for notebook in experiment.notebooks:
        executed = folder / f"{notebook}.ipynb"
        running, failed = (folder / f"{notebook}.{s}.ipynb" for s in ("running", "failed"))
        parameters = parameters_for(notebook, experiment, folder)
        if not force and _finished(executed, notebook, parameters):
            renewed = _renew_prose(executed, notebook)
            note = "" if renewed else ", with code that has changed since"
            print(f"{executed}: finished{note}, skipped (--force runs it again)")
            continue
        print(f"{executed}: running", flush=True)
        try:
            papermill.execute_notebook(
                source(notebook), running, parameters, cwd="notebooks", kernel_name="python3",
                stdout_file=sys.stdout, stderr_file=sys.stderr,
                progress_bar=False,
            )  # fmt: skip
        except PapermillExecutionError as error:
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
        _tidy(running)
        running.replace(executed)
        failed.unlink(missing_ok=True)


def parameters_for(notebook, experiment, folder):
    """What papermill passes: the folder, and to notebooks that take an experiment its settings.

    Settings at their default are left out unless the notebook's parameters cell names them.

    A notebook runs in notebooks/, so relative paths get a '..' in front.
    """
    declared = papermill.inspect_notebook(source(notebook))
    parameters = {"output": _from_notebooks(folder)}
    if set(declared) & set(field_names()):
        default = Experiment().to_dict()
        others = ignored_settings(notebook)
        parameters |= {
            k: v
            for k, v in experiment.to_dict().items()
            if (k in declared or v != default[k]) and k not in (*others, "notebooks")
        }
        for key in ("data_dir", "distilled_set", "robust_features"):
            if parameters.get(key):
                parameters[key] = _from_notebooks(Path(parameters[key]).expanduser())
    return parameters


def _from_notebooks(path):
    return (path if path.is_absolute() else Path("..") / path).as_posix()


def _check_folder(folder, experiment, force):
    path = folder / "results.json"
    if path.exists() and not force:
        old = records.read(path)["experiment"]
        # A run may go on with more steps.
        steps = {k: old[k] for k in ("n_steps", "kip_steps") if old[k] < getattr(experiment, k)}
        # Networks are trained anew when their settings change; nothing else depends on these.
        if not experiment.replace(**steps).same_results(old, "01_kernels"):
            new = experiment.to_dict()
            changed = sorted(
                k for k in set(new) - set(ignored_settings("01_kernels")) if old.get(k) != new[k]
            )
            raise ValueError(
                f"expected {path} to be of the same settings, got other {changed}; pass "
                "--set name=... for a folder of its own, or --force to replace it"
            )


def _finished(executed, notebook, parameters):
    """Whether `executed` was run with these parameters, as far as its results depend on them."""
    if not executed.exists():
        return False
    old = nbformat.read(executed, 4).metadata.get("papermill", {}).get("parameters", {})

    def settings(given):
        return {k: v for k, v in given.items() if k in field_names()}

    try:
        experiment = Experiment.from_params(settings(parameters))
        same = experiment.same_results(settings(old), notebook)
    except ValueError:  # settings of an older version
        return False
    outer = [{k: v for k, v in p.items() if k not in field_names()} for p in (old, parameters)]
    return same and bool(settings(old)) == bool(settings(parameters)) and outer[0] == outer[1]


def _renew_prose(executed, notebook):
    """Gives a finished notebook the source's present prose if their code is the same.

    Returns whether it is; outputs, and prose around other code, stay as they are.
    """
    old, new = nbformat.read(executed, 4), nbformat.read(source(notebook), 4)
    cells = [c for c in old.cells if "injected-parameters" not in c.metadata.get("tags", ())]

    def code(cells):
        return [c.source if c.cell_type == "code" else None for c in cells]

    if code(cells) != code(new.cells):
        return False
    changed = [(c, n) for c, n in zip(cells, new.cells, strict=True) if c.source != n.source]
    for cell, renewed in changed:
        cell.source = renewed.source
    if changed:
        nbformat.write(old, executed)
    return True


def _tidy(path):
    """Drops what changes from run to run without saying anything: progress bars, cell clocks."""
    notebook = nbformat.read(path, 4)
    for cell in notebook.cells:
        cell.metadata.pop("papermill", None)
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
    nbformat.write(notebook, path)


def show(experiments, reports):
    """Prints the results table and where to look."""
    paths = [Path(reports) / e.name / "results.json" for e in experiments]
    found = [records.read(path) for path in paths if path.exists()]
    if found:
        print("\nTest accuracy (%), the worst case of each image\n")
        print(records.table(found))
    print("\nExecuted notebooks, figures (PNG) and results.json:")
    for experiment in experiments:
        print(f"  {Path(reports) / experiment.name}/")


if __name__ == "__main__":
    sys.exit(main())
