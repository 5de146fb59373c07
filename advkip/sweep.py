"""Many experiments side by side on a Dask cluster: a task is a notebook of an experiment.

Notebooks of an experiment run one after another. Of experiments that agree in all that a distilled
set or an adversarially trained network depends on, the first makes it and the others wait for it
and take its files. Workers share nothing but the folder of the project. A task whose worker is gone
runs again on another one, from the checkpoints; what is finished is never run twice.
"""

import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

from advkip import files, progress
from advkip.config import MACHINE, SECTIONS, Experiment
from advkip.execute import NotebookError, execute, prepare

STATUS = ".status.json"
"""File in an experiment's folder that says where it is."""

UNROLLED, EXPERTS = "distillation-unrolled.npz", "expert-*.npz"
_ROBUST = (*MACHINE, "networks", "adversarial_training")
SHARED = (
    (
        "distillation-*kip.npz", SECTIONS["01_kernels"],
        ("01_kernels", "02_transfer", "03_cnns", "04_shortcomings", "05_remedies"),
    ),
    *(
        (pattern, (*MACHINE, "adv_kip", "unrolled"), ("02_transfer", "03_cnns", "04_shortcomings"))
        for pattern in (UNROLLED, EXPERTS)
    ),
    ("network-*-original-adversarial-*.npz", _ROBUST, ("03_cnns", "04_shortcomings")),
)  # fmt: skip
"""What experiments share: files, the sections that they depend on, the notebooks that make them."""

LOG = "run.log"
"""File in an experiment's folder with what its notebooks print."""


class Outcome(NamedTuple):
    """What became of a notebook of an experiment."""

    experiment: str
    notebook: str
    state: str  # "done", "finished before", "failed", "not run"
    message: str = ""


class Task(NamedTuple):
    """A notebook of an experiment, and what it waits for: indices of tasks."""

    experiment: Experiment
    notebook: str
    after: int | None  # the notebook before it
    takes: tuple  # (index, pattern) of tasks of other experiments whose files it takes


def plan(experiments: list[Experiment]) -> list[Task]:
    """The tasks of experiments, each after those that it waits for."""
    tasks: list[Task] = []
    makers: dict = {}
    for experiment in experiments:
        before = None
        for notebook in experiment.notebooks:
            takes = []
            for pattern, parts, notebooks in SHARED:
                through = pattern in (UNROLLED, EXPERTS)
                if notebook not in notebooks or through and not experiment.unrolled:
                    continue
                key = pattern, json.dumps(experiment.of(*parts), sort_keys=True)
                maker = makers.setdefault(key, len(tasks))
                if maker < len(tasks) and tasks[maker].experiment is not experiment:
                    takes.append((maker, pattern))
            tasks.append(Task(experiment, notebook, before, tuple(takes)))
            before = len(tasks) - 1
    return tasks


def perform(
    settings: dict, notebook: str, reports: str, root: str, force: bool, take: list,
    before: Outcome | None, *made: Outcome,
) -> Outcome:  # fmt: skip
    """Runs one task on a worker.

    Args:
      settings: of the experiment, as plain JSON values.
      notebook: its name.
      reports: folder of the results, from `root`, the project's folder.
      force: starts over.
      take: (folder, pattern) of files of other experiments.
      before, made: outcomes of what the task waited for.
    """
    experiment = Experiment.from_params(settings)
    if before is not None and before.state in ("failed", "not run"):
        return Outcome(experiment.name, notebook, "not run", f"{before.notebook} failed")
    os.chdir(root)
    folder = Path(reports) / experiment.name
    _own_cores()
    try:
        with files.taken(folder), _reporting(folder, notebook):
            prepare(experiment, folder, force=force and before is None)
            for source, pattern in take:
                _take(Path(source), folder, pattern)
            ran = execute(notebook, experiment, folder, force=force)
    except (NotebookError, ValueError, OSError) as error:
        return Outcome(experiment.name, notebook, "failed", str(error))
    return Outcome(experiment.name, notebook, "done" if ran else "finished before")


@contextmanager
def _reporting(folder, notebook) -> Iterator[None]:
    """The kernel started inside says where it is in the folder's STATUS, and all else in LOG."""
    path = (folder / STATUS).resolve()
    progress.write_status(path, {"notebook": notebook})
    os.environ[progress.STATUS] = str(path)
    try:
        with open(folder / LOG, "a") as log, redirect_stdout(log), redirect_stderr(log):
            yield
    finally:
        os.environ.pop(progress.STATUS)
        path.unlink(missing_ok=True)


def _own_cores():
    """Gives this worker of a local cluster its share of the cores; libraries look at nothing else.

    Workers that a cluster's scheduler starts have theirs already.
    """
    from distributed import get_worker

    name, share = get_worker().name, os.environ.get("ADVKIP_WORKERS")
    if share and isinstance(name, int) and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(os.getppid()))
        own = cores[name % int(share) :: int(share)] or [cores[name % len(cores)]]
        os.sched_setaffinity(0, own)


def _take(source, folder, pattern):
    """Files of another experiment that are not here yet."""
    for path in source.glob(pattern):
        if not (folder / path.name).exists():
            temporary = folder / f"{path.name}.{os.getpid()}.tmp"
            shutil.copy2(path, temporary)
            temporary.replace(folder / path.name)


@contextmanager
def cluster(workers: int | None, scheduler: str | None):
    """A `distributed.Client` of `workers` processes of this machine, or of a scheduler's address.

    Raises:
      ValueError: the extra [cluster] is not installed, or no scheduler answers.
    """
    try:
        from distributed import Client, LocalCluster
    except ImportError:
        raise ValueError(
            "expected dask.distributed for --workers and --scheduler, got none; install the extra "
            "[cluster] (pip install 'advkip[cluster]'), or leave them out"
        ) from None
    if scheduler:
        try:
            client = Client(scheduler, timeout=10)
        except (OSError, TimeoutError) as error:
            raise ValueError(
                f"expected a Dask scheduler at {scheduler}, got {error}; pass its address"
            ) from None
        with client:
            yield client
        return
    os.environ["ADVKIP_WORKERS"] = str(workers)
    with (
        LocalCluster(n_workers=workers, threads_per_worker=1, dashboard_address=":0") as local,
        Client(local) as client,
    ):
        print(f"{workers} workers; dashboard at {local.dashboard_link}", flush=True)
        yield client


def run(
    experiments: list[Experiment], client, *, reports: str = "reports", force: bool = False
) -> list[Outcome]:
    """Runs experiments on a cluster; returns the outcome of every notebook.

    Args:
      experiments: in the order in which they are begun.
      client: a `distributed.Client` whose workers see this project's folder.
      reports, force: as for `run.run`.
    """
    tasks, futures = plan(experiments), []
    for i, task in enumerate(tasks):
        before = futures[task.after] if task.after is not None else None
        take = [
            (str(Path(reports) / tasks[maker].experiment.name), pattern)
            for maker, pattern in task.takes
        ]
        futures.append(
            client.submit(
                perform, task.experiment.to_dict(), task.notebook, str(reports), str(Path.cwd()),
                force, take, before, *(futures[maker] for maker, _ in task.takes),
                key=f"{task.experiment.name}/{task.notebook}/{i}", pure=False,
            )
        )  # fmt: skip
    _watch(experiments, tasks, futures, reports)
    return [
        future.result()
        if future.status == "finished"
        else Outcome(task.experiment.name, task.notebook, "failed", str(future.exception()))
        for task, future in zip(tasks, futures, strict=True)
    ]


def _watch(experiments, tasks, futures, reports):
    """One line an experiment until all is done; a terminal shows them in place."""
    shown = {}
    while True:
        lines = {e.name: _line(e, tasks, futures, reports) for e in experiments}
        if sys.stdout.isatty():
            print(f"\033[{len(shown)}A" * bool(shown), end="")
            print(*(f"\033[K{name}: {line[1]}" for name, line in lines.items()), sep="\n")
        else:  # a log has a line when something has changed
            for name, (state, line) in lines.items():
                if shown.get(name, ("",))[0] != state:
                    print(f"{name}: {line}", flush=True)
        shown = lines
        if all(future.done() for future in futures):
            return
        time.sleep(1)


def _line(experiment, tasks, futures, reports):
    """(what decides whether a log gets a line, the line) of an experiment."""
    own = [
        (task.notebook, future)
        for task, future in zip(tasks, futures, strict=True)
        if task.experiment is experiment
    ]
    waiting = [notebook for notebook, future in own if not future.done()]
    if not waiting:
        last = own[-1][1]
        state = last.result().state if last.status == "finished" else "failed"
        return state, state
    path = Path(reports) / experiment.name / STATUS
    try:
        status = json.loads(path.read_text())
    except (OSError, ValueError):
        return f"waits for {waiting[0]}", f"{waiting[0]}: waits"
    text = [f"{waiting[0]}: {status.get('desc') or 'running'}"]
    if total := status.get("total"):
        text.append(f"{status['n']} of {total}")
        if status.get("rate"):
            text.append(f"{(total - status['n']) / status['rate']:.0f} s left")
    text += [status["postfix"]] if status.get("postfix") else []
    return f"{waiting[0]} {status.get('desc')}", ", ".join(text)


def summary(outcomes: list[Outcome], command: str) -> str:
    """What succeeded, what failed and where, and the command that goes on."""
    lines = []
    for name in dict.fromkeys(one.experiment for one in outcomes):
        own = [one for one in outcomes if one.experiment == name]
        bad = next((one for one in own if one.state == "failed"), None)
        if bad:
            lines.append(f"  failed   {name}: {bad.message}")
        else:
            lines.append(f"  finished {name}")
    if any(one.state == "failed" for one in outcomes):
        lines.append(f"this continues: {command}")
    return "\n".join(lines)
