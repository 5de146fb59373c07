"""Threads that spin while they wait, and threads that sleep: `python -m tests.bench threads`.

Each work in a process of its own, with PyTorch's OpenMP threads as they come (OMP_WAIT_POLICY
empty) and as this project sets them (PASSIVE); alone, and beside two processes that are busy all
the time. A work that is not done after LIMIT seconds is stopped: its time is at least that.
"""

import os
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager

LIMIT, BUSY = 150, 2

TRAINING = """
from advkip import attacks, data, nets, training
d = data.load("digits")
net = nets.build("simple-cnn", shape=(8, 8, 1), n_classes=10, seed=0)
recipe = training.Recipe(epochs=12, learning_rate=1e-3, threat=attacks.Threat("linf", 0.15),
                         step_size=0.04, batch_size=64, eval_every=12, eval_pgd_steps=10,
                         adversarial_steps=5)
watched = training.Watched(d.x_train[1000:1100], d.y_train[1000:1100])
training.train(net, d.x_train[:1000], d.y_train[:1000], recipe=recipe, watched=watched,
               progress=False)
"""

AUTOATTACK = """
from advkip import attacks, data, evaluate, nets, training
d = data.load("digits")
net = nets.build("simple-cnn", shape=(8, 8, 1), n_classes=10, seed=0)
recipe = training.Recipe(epochs=20, learning_rate=1e-3, threat=attacks.Threat("linf", 0.05),
                         step_size=0.02, batch_size=64, eval_every=20, eval_pgd_steps=5)
watched = training.Watched(d.x_train[1000:1100], d.y_train[1000:1100])
training.train(net, d.x_train[:1000], d.y_train[:1000], recipe=recipe, watched=watched,
               progress=False)
evaluate.evaluate(net.eval(), d.x_test[:100], d.y_test[:100], progress=False, step_size=0.02,
                  threat=attacks.Threat("linf", 0.05), attack_names=["autoattack"])
"""

NOTEBOOK = """
import papermill, sys
papermill.execute_notebook("notebooks/04_shortcomings.ipynb", sys.argv[1] + "/04.ipynb",
                           {"output": sys.argv[1]}, cwd="notebooks", progress_bar=False)
"""

WORKS = {
    "adversarial training of simple-cnn on 1,000 digits, 12 epochs": TRAINING,
    "training and AutoAttack of simple-cnn, 100 digits": AUTOATTACK,
    "notebook 04 on its defaults": NOTEBOOK,
}


@contextmanager
def busy(n):
    """n processes that never rest."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(n)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def seconds(program, policy):
    """Of a program in a process of its own; None if it was stopped after LIMIT seconds."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-c", program, folder], env=os.environ | {"OMP_WAIT_POLICY": policy},
            stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        try:
            if process.wait(timeout=LIMIT):
                raise RuntimeError(f"expected the program to end well, got {process.returncode}")
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.wait()
            return None
        return time.perf_counter() - began


def rows():
    """The lines of `tests.bench`: the reference lets threads spin, ours lets them sleep."""
    found = []
    for name, program in WORKS.items():
        for n in (0, BUSY):
            with busy(n):
                ours, reference = (seconds(program, policy) for policy in ("PASSIVE", ""))
            found.append({
                "work": f"{name}, " + (f"beside {n} busy processes" if n else "alone"),
                "reference_s": round(reference or LIMIT, 1),
                "ours_s": round(ours or LIMIT, 1),
                "ratio": round((reference or LIMIT) / (ours or LIMIT), 2),
                "stopped": [k for k, v in (("reference", reference), ("ours", ours)) if v is None],
            })  # fmt: skip
    return found
