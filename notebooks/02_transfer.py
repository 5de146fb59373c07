# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # From the kernel to a network of the same depth
#
# [0 walkthrough](00_walkthrough.ipynb) → [1 kernels](01_kernels.ipynb) → **2 transfer** → [3
# CNNs](03_cnns.ipynb) → [4 shortcomings](04_shortcomings.ipynb) → [5
# remedies](05_remedies.ipynb)
#
# *You will know* how much of a kernel's robustness a finite network inherits, and what the
# learning rate has to do with it. *You need* notebooks 0 and 1; what training a network is. *It
# takes* half a minute on the defaults; 20 minutes for MNIST on two cores. Words are explained in
# the glossary (`notebooks/glossary.md`).
#
# *Section 4 of "Can we achieve robustness from data alone?" (Tsilivis, Su, Kempe 2022): the
# distilled set is handed to ordinary fully connected networks with ordinary training. Tables 3 and
# 4, and the sensitivity to the learning rate.*
#
# The paper's figures to compare with (test accuracy, %; networks of width 1024):
#
# | data, kernel of the set, images | clean | FGSM | PGD |
# | --- | ---: | ---: | ---: |
# | MNIST, FC3, 30,000 | 80.08 | 77.67 | 53.85 (40 steps) |
# | MNIST, FC7, 30,000 | 97.45 | 70.58 | 40.70 (40 steps) |
# | CIFAR-10, FC2, 40,000 | 46.29 | 20.98 | 16.89 (20 steps) |
# | CIFAR-10, FC3, 40,000 | 46.33 | 40.07 | 39.15 (20 steps) |

# %% [markdown]
# ## The experiment
#
# The set comes from notebook 01 of the same experiment (it is distilled here if it is not there
# yet), or from any `.npz` file: put its path in the place of "adv-kip". `advkip/settings.py` has
# all settings.

# %% tags=["parameters"]
seed: int = 0  # every random choice derives from it
dataset: dict = {"name": "digits", "folder": None}  # as in notebook 01
kernel: dict = {"name": "fc3"}  # that the set is (or was) distilled with
networks: dict = {
    "sets": ["adv-kip", "original"],  # also "kip", or the path of an .npz
    "n_original": 500,  # original images; None: all
    "n_seeds": 1,
}
fully_connected: dict = {
    "nets": ["fc3-256"],  # hidden layers and width
    "epochs": 60,  # at most
    "learning_rates": [1.0e-4, 3.0e-4, 1.0e-3, 3.0e-3],  # Adam; validation images choose
    "loss": "mse",  # with "labels" as they are, or "cross-entropy" with "softmax" or "argmax"
    "target": "labels",
}
evaluation: dict = {
    "attacks": ["fgsm", "pgd20", "autoattack"],
    "n_test": 50,  # test images of the table; None: all
}
output: str = None  # where checkpoints, figures and results.json go; None: reports/<name>

# %%
import numpy as np
from IPython.display import Markdown, display

from advkip import (
    data,
    evaluate,
    figures,
    kernels,
    records,
    search,
    sets,
    tables,
    training,
    trajectories,
)
from advkip.config import Experiment

experiment = Experiment.from_notebook(globals(), "02_transfer")
kernels.set_precision(experiment.kernel.dtype)
folder = records.folder_of(experiment, output)
recorder = records.Recorder(experiment, folder, "02_transfer")
experiment.changes()  # all else is at its default

# %% [markdown]
# ## Data
#
# Two training sets: the distilled one, with its learned label vectors (`fully_connected.target`
# says what is made of them), and original images as the yardstick. A robust figure means little
# without it: a small network that is stopped early keeps some accuracy under attack on *any* data.
# The sizes below are not the same; the original set should not be the smaller one.

# %%
images = data.load(experiment.dataset.name, experiment.dataset.folder)
splits = data.split(images, experiment)
chosen = sets.load(experiment.networks.sets, experiment, splits, images, folder)
{of_set: (one.x.shape, one.y.shape) for of_set, one in chosen.items()}

# %% [markdown]
# ## Training
#
# Why should a set that was made for a kernel work for a network? In the limit of infinite width,
# and for the squared error, training a network by gradient descent *is* regression with its neural
# tangent kernel, and that kernel made the set. A wide network is near that limit, but not in it.
#
# Training is plain: one fixed learning rate, no augmentation, no attack in the loop. Each rate of
# the grid is tried; accuracy under PGD on *validation* images chooses among the rates, and among
# the epochs of a run, as long as clean accuracy is within ten points of the best seen.

# %%
watched = training.watched(splits, experiment.networks.n_watch, seed=experiment.seed)
train = search.Trainer(experiment, watched, folder)
searches = {
    (net, of_set): train(net, of_set, one)
    for net in experiment.fully_connected.nets
    for of_set, one in chosen.items()
}

# %% [markdown]
# ## Sensitivity to the learning rate
#
# The paper claims that a wide range of rates works. Each point is the best epoch of one run.

# %%
titles = {key: f"{key[0]} on {key[1]}" for key in searches}
figures.save(
    figures.learning_rates({titles[key]: found for key, found in searches.items()}),
    folder, "learning_rates",
)  # fmt: skip

# %% [markdown]
# Accuracy on watched test images while the chosen networks train. Does robust accuracy come with
# clean accuracy, or only after it?

# %%
histories = {titles[key]: found.best[0].history for key, found in searches.items()}
figures.save(
    figures.training_curves(histories, against="epoch", images="test"), folder, "transfer_curves"
)

# %% [markdown]
# ## Tables 3 and 4: test accuracy
#
# The networks and, below, the kernel machine that made the set, on the same test images under the
# same attacks. AutoAttack is an ensemble of attacks that need no tuning, one of which never looks
# at a gradient: where PGD finds little and AutoAttack finds everything, gradients were hidden.
# AutoAttack on the kernel machine itself is the subject of a later notebook.

# %%
x_test, y_test = data.draw_test(splits, experiment.evaluation.n_test, seed=experiment.seed)
protocol = evaluate.Protocol.of(experiment, folder)
outcomes = {}
for (net, of_set), found in searches.items():
    for trained, net_seed in zip(found.best, experiment.net_seeds(), strict=True):
        outcomes[net, of_set, net_seed] = protocol(trained.net, x_test, y_test, keep=8)
        recorder.add(
            outcomes[net, of_set, net_seed], model=net, trained_on=of_set, training="plain",
            seed=net_seed, **records.of_training(chosen[of_set], found, trained),
        )  # fmt: skip

# %% [markdown]
# A set that follows adversarially trained networks (`unrolled.n_experts`) is to be read beside
# these teachers: they were attacked while they trained, on all images.

# %%
pool = data.TrainingSet(splits.x_pool, splits.y_pool)
teachers = trajectories.teachers(experiment, splits, folder)
for (net, teacher), net_seed in zip(teachers, experiment.net_seeds(), strict=False):
    outcomes[net, "adversarial", net_seed] = protocol(teacher, x_test, y_test, keep=8)
    recorder.add(
        outcomes[net, "adversarial", net_seed], model=net, trained_on="original",
        training="adversarial", seed=net_seed, set_kernel="as expert", **records.of_set(pool),
    )  # fmt: skip

# %%
light = protocol.with_attacks(*evaluate.without_autoattack(protocol.attack_names))
for of_set, made in ((key, one) for key, one in chosen.items() if one.kernel):
    model = f"kernel:{made.kernel.name}"
    outcomes[model, of_set] = light(sets.machine(made, experiment), x_test, y_test, keep=8)
    recorder.add(
        outcomes[model, of_set], model=model, trained_on=of_set, training="kernel",
        **records.of_set(made),
    )  # fmt: skip
recorder.write()

# %%
display(Markdown(tables.accuracy([recorder.own()], tables=("3", "4"))))

# %% [markdown]
# ## Checks

# %%
for found in searches.values():
    for trained in found.runs.values():
        assert all(np.isfinite(line["loss"]) for line in trained.history)
for results in outcomes.values():
    evaluate.check_order(results)
    assert results[0].accuracy > 1 / splits.n_classes

# %% [markdown]
# ## Exercises
#
# 1. A constant answer withstands every attack. How much does it keep here, and which networks of
#    the table are above it under the strongest attack?
# 2. Which epoch would *clean* validation accuracy have chosen, and what would that have cost under
#    PGD?

# %% tags=["solution"] jupyter={"source_hidden": true}
constant = np.bincount(y_test).max() / len(y_test)
print(f"a constant answer keeps {constant:.0%}")
for key, found in outcomes.items():
    print(*key, f"{found[-1].attack}: {found[-1].accuracy:.0%}", sep=", ")

# %% tags=["solution"] jupyter={"source_hidden": true}
for key, found in searches.items():
    history = found.best[0].history
    clean, robust = (max(history, key=lambda line, k=k: line[k]) for k in ("clean", "pgd"))
    print(f"{key}: epoch {clean['epoch']} has clean {clean['clean']:.0%}, PGD {clean['pgd']:.0%};")
    print(f"    epoch {robust['epoch']} has clean {robust['clean']:.0%}, PGD {robust['pgd']:.0%}")

# %% [markdown]
# ## What it means
#
# Read each line of the table from left to right, and then the lines against each other.
#
# - *Distilled against original images*, same network, same recipe: what the data did (mind the
#   sizes).
# - *Network against kernel*, same data: what is lost on the way from infinite width.
# - *PGD against AutoAttack*, same network: how much of the robustness under PGD is real. Accuracy
#   that AutoAttack takes away was never robustness; the gradients had only stopped pointing the
#   way.
