"""Models of known kind under the diagnosis: `python -m tests.planted`, two minutes.

Networks on digits that answer by votes or by one hard label, with another network's gradient beside
the answers, which leads AutoAttack astray, too; and the networks themselves. Writes
reports/benchmarks/planted.json, from which README's figures are.
"""

import json
import time
from pathlib import Path

from advkip import attacks, data, diagnose, nets, records, training
from tests.test_diagnose import HardLabel, Votes

N, SEED, N_STEPS = 100, 0, 20
TRAINED_FOR = attacks.Threat("linf", 0.2)
SHOWN = ("apgd-ce", "apgd-t", "fab-t", "square", "from imitation", "labels alone")


def fresh(seed):
    return nets.build("fc2-128", shape=(8, 8, 1), n_classes=10, seed=seed)


def train(d, seed, *, epochs, adversarial=0):
    recipe = training.Recipe(
        epochs=epochs, learning_rate=3e-3, threat=TRAINED_FOR, step_size=0.05, batch_size=32,
        eval_every=epochs, eval_pgd_steps=2, adversarial_steps=adversarial,
    )  # fmt: skip
    watched = training.Watched(d.x_train[1000:1050], d.y_train[1000:1050])
    return training.train(
        fresh(seed), d.x_train[:1000], d.y_train[:1000], recipe=recipe, watched=watched,
        progress=False,
    ).net  # fmt: skip


def main():
    d = data.load("digits")
    voters = [train(d, seed, epochs=20) for seed in (0, 5, 7)]
    robust, untrained = train(d, 0, epochs=30, adversarial=7), fresh(9).eval()
    cases = {
        "one network": (voters[0], 0.15),
        "votes of three networks, and 0.001 of an untrained one": (
            Votes(voters, untrained, 1e-3), 0.15),
        "votes of three networks, and 0.3 of an adversarially trained one": (
            Votes(voters, robust, 0.3), 0.15),
        "one network's label, and 0.001 of an untrained one": (
            HardLabel(voters[0], untrained), 0.15),
        "an adversarially trained network": (robust, 0.2),
    }  # fmt: skip
    rows = []
    for name, (model, epsilon) in cases.items():
        began = time.perf_counter()
        found = diagnose.diagnose(
            model, d.x_test[:N], d.y_test[:N], threat=attacks.Threat("linf", epsilon),
            step_size=epsilon / 4, n_steps=N_STEPS, seed=SEED, progress=False,
        )  # fmt: skip
        rows.append({
            "model": name, "epsilon": epsilon, "verdict": found.verdict, "clean": found.clean,
            "claimed": found.claimed, "left": found.strong,
            "broken": {key: found.broken[key] for key in SHOWN},
            "seconds": round(time.perf_counter() - began, 1),
        })  # fmt: skip
        print(json.dumps(rows[-1], indent=1), flush=True)
    settings = {"n_test": N, "seed": SEED, "n_steps": N_STEPS, "norm": "linf"}
    record = {"settings": settings, "environment": records.environment(), "rows": rows}
    path = Path("reports/benchmarks/planted.json")
    path.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
