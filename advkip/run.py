"""Params files to executed notebooks: `python -m advkip.run FILE... [--set key=value]`.

All files are checked before anything runs. Each notebook of an experiment is executed by
papermill into `reports/<name>/`, next to its figures and `results.json`. A notebook that is
finished with the same settings is skipped. One that was cut off continues from the checkpoints
in that folder.
"""

import argparse
import shlex
import signal
import sys
from pathlib import Path

from advkip import files, grid, preflight, records, signals, sweep, tables
from advkip.config import Experiment
from advkip.execute import NotebookError, execute, prepare, source


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
    side_by_side = options.workers or options.scheduler
    try:
        experiments = check_files(
            options.files, options.set, None if side_by_side else options.reports
        )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.check:
        print(f"{len(experiments)} params files are valid")
        return 0
    if options.workers or options.scheduler:
        return _on_cluster(experiments, options, sys.argv[1:] if arguments is None else arguments)
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


def _on_cluster(experiments, options, arguments):
    """Runs experiments side by side; returns the exit code."""
    try:
        with sweep.cluster(options.workers, options.scheduler) as client:
            outcomes = sweep.run(
                experiments, client, reports=options.reports, force=options.force
            )  # fmt: skip
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command continues from the checkpoints", file=sys.stderr)
        return 130
    failed = {one.experiment for one in outcomes if one.state == "failed"}
    good = [one for one in experiments if one.name not in failed]
    if good:
        show(good, options.reports)
    again = (argument for argument in arguments if argument != "--force")
    print("\n" + sweep.summary(outcomes, f"python -m advkip.run {shlex.join(again)}"))
    return 1 if failed else 0


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
    parser.add_argument(
        "--workers", type=int, metavar="N",
        help="runs experiments side by side in N processes (extra [cluster])",
    )  # fmt: skip
    parser.add_argument(
        "--scheduler", metavar="tcp://HOST:PORT", help="hands them to a Dask cluster"
    )
    parser.add_argument("--check", action="store_true", help="checks the files and stops")
    return parser


def check_files(paths, overrides=(), reports=None) -> list[Experiment]:
    """Experiments of params files; with `reports` they may take sets that those before leave there.

    Raises:
      ValueError, OSError: the first file that is wrong, its key, and what to pass; two files
        with one name; a notebook that does not exist.
    """
    experiments, names = [], {}
    for file in paths:
        for experiment in grid.experiments(file, overrides):
            if experiment.name in names:
                raise ValueError(
                    f"{file}: expected a name of its own, got {experiment.name!r} like "
                    f"{names[experiment.name]}; pass another name, they share a folder"
                )
            for notebook in experiment.notebooks:
                if not source(notebook).exists():
                    raise ValueError(
                        f"{file}: expected notebooks to name files of notebooks/, got "
                        f"{notebook!r}; pass for example '01_kernels', and run from the project's "
                        "folder"
                    )
            try:
                before = [Path(reports) / name for name in names] if reports else []
                preflight.check(experiment, before)
            except (ValueError, OSError) as error:
                raise type(error)(f"{file}: {error}") from None
            names[experiment.name] = file
            experiments.append(experiment)
    return experiments


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
        prepare(experiment, folder, force=force)
        for notebook in experiment.notebooks:
            execute(notebook, experiment, folder, force=force, on_cell_start=on_cell_start)


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
