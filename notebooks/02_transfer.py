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
# *Section 4 of "Can we achieve robustness from data alone?" (Tsilivis, Su, Kempe 2022): the
# distilled set is handed to ordinary fully connected networks with ordinary training. Tables 3 and
# 4, and the sensitivity to the learning rate.*
#
# With the defaults below: about a minute on a CPU. The real run, `params/mnist-fc3-5k.yaml`, says
# in its first lines how long it takes. `params/paper/`: GPUs.
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
# yet), or from any `.npz` file that `distilled_set` names. Every other field of
# `advkip.config.Experiment` can be set here, too.

# %% tags=["parameters"]
seed: int = 0  # every random choice derives from it
dataset: str = "digits"  # digits, mnist, fashion_mnist, cifar10, or a <name>.npz of your own
data_dir: str = ""  # folder of .npz files; "" means the environment variable ADVKIP_DATA
distilled_set: str = ""  # a .npz to train on; "" means the set of notebook 01
kernel: str = "fc3"  # that the set is (or was) distilled with
fc_nets: list = ["fc3-256"]  # hidden layers and width
net_learning_rates: list = [1.0e-4, 3.0e-4, 1.0e-3, 3.0e-3]  # Adam; validation images choose
net_epochs: int = 60  # at most
net_loss: str = "mse"  # with "labels" as they are, or "cross-entropy" with "softmax" or "argmax"
net_target: str = "labels"
net_n_test: int = 50  # test images of the table; 0 means all
net_attacks: list = ["fgsm", "pgd20", "autoattack"]
output: str = "../reports/scratch"  # where checkpoints, figures and results.json go

# %%
import re

import numpy as np
from IPython.display import Markdown, display

from advkip import attacks, data, distill, evaluate, figures, kernels, records, tables, training
from advkip.config import Experiment

experiment = Experiment.from_notebook(globals())
kernels.set_precision(experiment.dtype)
recorder = records.Recorder(experiment, output, "02_transfer")
experiment.changes()  # all else is at its default

# %% [markdown]
# ## Data
#
# Two training sets: the distilled one, with its learned label vectors (`net_target` says what is
# made of them), and original images as the yardstick. A robust figure means little without it: a
# small network that is stopped early keeps some accuracy under attack on *any* data. The sizes
# below are not the same; the original set should not be the smaller one.

# %%
images = data.load(experiment.dataset, experiment.data_dir)
splits = data.split(images, experiment)
sets = distill.training_sets(experiment, splits, images, output)
{key: (chosen.x.shape, chosen.y.shape) for key, chosen in sets.items()}

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
watched = training.watched(splits, experiment.n_watch, seed=experiment.seed)
searches = {
    (net, chosen): training.search(
        net, sets[chosen].x, sets[chosen].y, recipe=training.Recipe.of(experiment),
        watched=watched, learning_rates=experiment.net_learning_rates,
        seeds=experiment.net_seed_list(), checkpoint_dir=output,
    )
    for net in experiment.fc_nets
    for chosen in sets
}  # fmt: skip

# %% [markdown]
# ## Sensitivity to the learning rate
#
# The paper claims that a wide range of rates works. Each point is the best epoch of one run.

# %%
titles = {key: f"{key[0]} on {key[1]}" for key in searches}
figures.save(
    figures.learning_rates({titles[key]: found for key, found in searches.items()}),
    output, "learning_rates",
)  # fmt: skip

# %% [markdown]
# Accuracy on watched test images while the chosen networks train. Does robust accuracy come with
# clean accuracy, or only after it?

# %%
histories = {titles[key]: found.best[0].history for key, found in searches.items()}
figures.save(
    figures.training_curves(histories, against="epoch", images="test"), output, "transfer_curves"
)

# %% [markdown]
# ## Tables 3 and 4: test accuracy
#
# The networks and, below, the kernel machine that made the set, on the same test images under the
# same attacks. AutoAttack is an ensemble of attacks that need no tuning, one of which never looks
# at a gradient: where PGD finds little and AutoAttack finds everything, gradients were hidden.
# AutoAttack on the kernel machine itself is the subject of a later notebook.

# %%
x_test, y_test = data.draw_test(splits, experiment.net_n_test, seed=experiment.seed)
threat = attacks.Threat(experiment.norm, experiment.epsilon)
threat_l2 = attacks.Threat("l2", experiment.epsilon_l2)
outcomes = {}
for (net, chosen), found in searches.items():
    for trained, net_seed in zip(found.best, experiment.net_seed_list(), strict=True):
        outcomes[net, chosen, net_seed] = evaluate.evaluate(
            trained.net, x_test, y_test, threat=threat, step_size=experiment.step_size,
            threat_l2=threat_l2, step_size_l2=experiment.step_size_l2, seed=experiment.seed,
            attack_names=experiment.net_attacks, keep=8, checkpoint_dir=output,
        )  # fmt: skip
        recorder.add(
            outcomes[net, chosen, net_seed], model=net, trained_on=chosen, training="plain",
            seed=net_seed, n_train=len(sets[chosen].x), set_kernel=sets[chosen].kernel,
            epoch=trained.epoch, learning_rate=found.learning_rate,
        )  # fmt: skip

# %%
for chosen, made in ((key, one) for key, one in sets.items() if one.kernel):
    machine = distill.machine(made, experiment)
    outcomes["kernel", chosen, made.kernel] = evaluate.evaluate(
        machine, x_test, y_test, threat=threat, step_size=experiment.step_size,
        threat_l2=threat_l2, step_size_l2=experiment.step_size_l2, seed=experiment.seed,
        attack_names=[a for a in experiment.net_attacks if re.match("fgsm|pgd", a)],
        keep=8, checkpoint_dir=output,
    )  # fmt: skip
    recorder.add(
        outcomes["kernel", chosen, made.kernel], model=f"kernel:{made.kernel}",
        trained_on=chosen, training="kernel", n_train=len(made.x),
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
