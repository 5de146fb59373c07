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
# # Convolutional networks, beside adversarial training
#
# [0 walkthrough](00_walkthrough.ipynb) → [1 kernels](01_kernels.ipynb) → [2
# transfer](02_transfer.ipynb) → **3 CNNs** → [4 shortcomings](04_shortcomings.ipynb) →
# [5 remedies](05_remedies.ipynb)
#
# *You will know* what the set does to convolutional networks, and what adversarial training costs
# and brings. *You need* notebooks 0 to 2. *It takes* 40 seconds on the defaults; 40 minutes for
# MNIST on two cores. Words are explained in the glossary (`notebooks/glossary.md`).
#
# *Section 5 of "Can we achieve robustness from data alone?" (Tsilivis, Su, Kempe 2022): the set
# that a fully connected kernel made is handed to convolutional networks. Tables 5, 6 and 7; Figure
# 3.*
#
# The paper's figures to compare with (test accuracy, %):
#
# | data, network | trained on | clean | FGSM | PGD | AutoAttack |
# | --- | --- | ---: | ---: | ---: | ---: |
# | MNIST, simple-CNN | adv-KIP (FC3), 30,000 | 98.15 | 98.06 | 97.17 (40 steps) | 0.00 |
# | MNIST, simple-CNN | original, adversarially | 99.11 | 97.52 | 95.82 (40 steps) | 88.77 |
# | CIFAR-10, simple-CNN | adv-KIP (FC3), 50,000 | 72.10 | 67.45 | 67.03 (20 steps) | 0.00 |
# | CIFAR-10, simple-CNN | original, adversarially | 58.07 | 33.94 | 31.49 (20 steps) | 26.18 |

# %% [markdown]
# ## The experiment
#
# The set comes from notebook 01 of the same experiment (it is distilled here if it is not there
# yet), or from any `.npz` file: put its path in the place of "adv-kip".

# %% tags=["parameters"]
seed: int = 0  # every random choice derives from it
dataset: dict = {"name": "digits", "folder": None}  # as in notebook 01
networks: dict = {
    "sets": ["adv-kip", "original"],  # also "kip", or the path of an .npz
    "n_original": 500,  # original images, plain and adversarial; None: all
    "n_seeds": 1,
}
cnns: dict = {
    "nets": ["simple-cnn"],  # simple-cnn, alexnet, vgg11
    "epochs": 60,  # at most
    "learning_rates": [1.0e-3],  # Adam; validation images choose
}
adversarial_training: dict = {"epochs": 20, "learning_rates": [2.0e-3]}  # None leaves it out
evaluation: dict = {
    "attacks": ["fgsm", "pgd20", "autoattack"],  # -l2 behind a name: in the ball threat_l2
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
    pictures,
    records,
    search,
    sets,
    tables,
    training,
)
from advkip.config import Experiment

experiment = Experiment.from_notebook(globals(), "03_cnns")
kernels.set_precision(experiment.kernel.dtype)
folder = records.folder_of(experiment, output)
recorder = records.Recorder(experiment, folder, "03_cnns")
experiment.changes()  # all else is at its default

# %% [markdown]
# ## Data
#
# The distilled set, and original images: once for the same plain training, once for adversarial
# training.

# %%
images = data.load(experiment.dataset.name, experiment.dataset.folder)
splits = data.split(images, experiment)
chosen = sets.load(experiment.networks.sets, experiment, splits, images, folder)
{of_set: (one.x.shape, one.y.shape) for of_set, one in chosen.items()}

# %% [markdown]
# ## Training: what is changed is the data ...
#
# Plain training on either set. Nothing about these networks is near the kernel that made the
# images: they are convolutional, narrow and deep. That the set should work at all for them is the
# surprise of the paper.

# %%
watched = training.watched(splits, experiment.networks.n_watch, seed=experiment.seed)
train = search.Trainer(experiment, watched, folder)
searches = {
    (net, of_set, "plain"): train(net, of_set, one)
    for net in experiment.cnns.nets
    for of_set, one in chosen.items()
}

# %% [markdown]
# ## ... or the training
#
# Adversarial training (Madry et al. 2018) is the baseline: each batch is attacked by PGD, from a
# random start, before the network is trained on it. It costs a gradient for each step of the
# attack.

# %%
if experiment.adversarial_training and "original" in chosen:
    searches |= {
        (net, "original", "adversarial"): train(
            net, "original", chosen["original"], adversarially=True
        )
        for net in experiment.cnns.nets
    }

# %% [markdown]
# ## Figure 3: accuracy while a network trains
#
# Watched test images; they choose nothing. The paper sees clean accuracy rise first on the
# distilled set, and accuracy under PGD only afterwards, when there is nothing left to fit. Compare
# the shape with that of adversarial training, where both rise together.

# %%
histories = {records.title(*key): found.best[0].history for key, found in searches.items()}
figures.save(
    figures.training_curves(histories, against="epoch", images="test"),
    folder, "figure3_training_curves",
)  # fmt: skip

# %% [markdown]
# ## Tables 5, 6 and 7: test accuracy
#
# FGSM and PGD from the image itself, as in the paper; then AutoAttack 'standard', the official
# code. An image counts as robust only if it survives this attack and every attack before it in the
# same ball; attacks that end in `-l2` search a ball of their own.

# %%
x_test, y_test = data.draw_test(splits, experiment.evaluation.n_test, seed=experiment.seed)
protocol = evaluate.Protocol.of(experiment, folder)
outcomes = {}
for (net, of_set, how), found in searches.items():
    for trained, net_seed in zip(found.best, experiment.net_seeds(), strict=True):
        outcomes[net, of_set, how, net_seed] = protocol(trained.net, x_test, y_test, keep=24)
        recorder.add(
            outcomes[net, of_set, how, net_seed], model=net, trained_on=of_set, training=how,
            seed=net_seed, **records.of_training(chosen[of_set], found, trained),
        )  # fmt: skip
recorder.write()

# %%
display(Markdown(tables.accuracy([recorder.own()], tables=("5", "6", "7"))))

# %% [markdown]
# ## What an attack does to the images
#
# The last two l_inf attacks of the list on test images that each network classifies correctly. PGD
# always moves, as long as there is a gradient: an empty difference is one that is not there.
# AutoAttack returns the images that it could not break as they were. Where the attack of a robust
# network has to draw, that of another adds what looks like noise.

# %%
for (*model, net_seed), results in outcomes.items():
    for one in [one for one in results[1:] if one.norm == experiment.threat.norm][-2:]:
        figure = pictures.attacks_survived(
            x_test, y_test, results[0], one, dataset=experiment.dataset.name
        )
        display(Markdown(f"**{records.title(*model)}**, {one.attack}"))
        display(figures.save(figure, folder, f"{one.attack}_{'_'.join(model)}_{net_seed}"))

# %% [markdown]
# ## Checks

# %%
for found in searches.values():
    for trained in found.runs.values():
        assert all(np.isfinite(line["loss"]) for line in trained.history)
for results in outcomes.values():
    evaluate.check_order(results)
    evaluate.check_inside(results, x_test)

# %% [markdown]
# ## Exercises
#
# 1. How many gradients does an epoch of adversarial training cost for each one of plain training?
# 2. Of the images that withstand FGSM and the last PGD of the list, what share does AutoAttack
#    break, network by network? Where it is nearly all, was that robustness?

# %% tags=["solution"] jupyter={"source_hidden": true}
if experiment.adversarial_training:
    steps = experiment.adversarial_training.pgd_steps
    print(f"{steps} for the attack and one for the weights: {steps + 1} times as many")

# %% tags=["solution"] jupyter={"source_hidden": true}
for key, results in outcomes.items():
    same = [one for one in results if one.norm == experiment.threat.norm]
    before = [one for one in same if one.attack.startswith(("pgd", "fgsm"))]
    if before and same[-1].attack == "autoattack" and before[-1].robust.any():
        broken = 1 - same[-1].robust.sum() / before[-1].robust.sum()
        print(records.title(*key[:3]), f"{broken:.0%} of {before[-1].robust.sum()} images")

# %% [markdown]
# ## What it means
#
# The networks on original images frame the others: plain training, whose accuracy under attack is
# what one gets for nothing, and adversarial training, which shows that the attacks here can see
# real robustness when it is there: accuracy under AutoAttack stays close to that under PGD.
#
# Now compare PGD and AutoAttack for the networks with plain training. If PGD fails where AutoAttack
# succeeds, then adversarial examples exist all the same, and PGD does not find the way to them. How
# that comes about, and whether it is particular to the distilled set, is the subject of the next
# notebook.
