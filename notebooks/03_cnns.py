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
# *Section 5 of "Can we achieve robustness from data alone?" (Tsilivis, Su, Kempe 2022): the set
# that a fully connected kernel made is handed to convolutional networks. Tables 5, 6 and 7; Figure
# 3.*
#
# With the defaults below: about a minute on a CPU. The real runs, `params/mnist-fc3-5k.yaml` and
# `params/cifar10-fc3-5k.yaml`, say in their first lines how long they take. `params/paper/`: GPUs.
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
# yet), or from any `.npz` file that `distilled_set` names.

# %% tags=["parameters"]
seed: int = 0  # every random choice derives from it
dataset: str = "digits"  # digits, mnist, fashion_mnist, cifar10, or a <name>.npz of your own
data_dir: str = ""  # folder of .npz files; "" means the environment variable ADVKIP_DATA
distilled_set: str = ""  # a .npz to train on; "" means the set of notebook 01
cnns: list = ["simple-cnn"]  # simple-cnn, alexnet, vgg11
n_original: int = 500  # original training images; 0 means all
net_learning_rates: list = [1.0e-3]  # Adam; validation images choose
net_epochs: int = 60  # at most
at_learning_rates: list = [2.0e-3]  # of adversarial training
at_epochs: int = 20
net_n_test: int = 50  # test images of the table; 0 means all
net_attacks: list = ["fgsm", "pgd20", "autoattack", "pgd20-l2"]
output: str = "../reports/scratch"  # where checkpoints, figures and results.json go

# %%
import numpy as np
from IPython.display import Markdown, display

from advkip import attacks, data, distill, evaluate, figures, kernels, records, tables, training
from advkip.config import Experiment

experiment = Experiment.from_notebook(globals())
kernels.set_precision(experiment.dtype)
recorder = records.Recorder(experiment, output, "03_cnns")
experiment.changes()  # all else is at its default

# %% [markdown]
# ## Data
#
# The distilled set, and original images: once for the same plain training, once for adversarial
# training.

# %%
images = data.load(experiment.dataset, experiment.data_dir)
splits = data.split(images, experiment)
sets = distill.training_sets(experiment, splits, images, output)
{key: (chosen.x.shape, chosen.y.shape) for key, chosen in sets.items()}

# %% [markdown]
# ## Training: what is changed is the data ...
#
# Plain training on either set. Nothing about these networks is near the kernel that made the
# images: they are convolutional, narrow and deep. That the set should work at all for them is the
# surprise of the paper.

# %%
watched = training.watched(splits, experiment.n_watch, seed=experiment.seed)
searches = {
    (net, chosen, "plain"): training.search(
        net, sets[chosen].x, sets[chosen].y, watched=watched,
        recipe=training.Recipe.of(experiment.for_cnns()),
        learning_rates=experiment.for_cnns().net_learning_rates, seeds=experiment.net_seed_list(),
        checkpoint_dir=output,
    )
    for net in experiment.cnns
    for chosen in sets
}  # fmt: skip

# %% [markdown]
# ## ... or the training
#
# Adversarial training (Madry et al. 2018) is the baseline: each batch is attacked by PGD, from a
# random start, before the network is trained on it. It costs a gradient for each step of the
# attack.

# %%
if experiment.at_epochs and "original" in sets:
    searches |= {
        (net, "original", "adversarial"): training.search(
            net, sets["original"].x, sets["original"].y, watched=watched,
            recipe=training.Recipe.of(experiment, adversarial=True),
            learning_rates=experiment.at_learning_rates,
            seeds=experiment.net_seed_list(), checkpoint_dir=output,
        )
        for net in experiment.cnns
    }  # fmt: skip
titles = {
    (net, chosen, how): f"{net}: {chosen}" + (", adversarial training" * (how == "adversarial"))
    for net, chosen, how in searches
}

# %% [markdown]
# ## Figure 3: accuracy while a network trains
#
# Watched test images; they choose nothing. The paper sees clean accuracy rise first on the
# distilled set, and accuracy under PGD only afterwards, when there is nothing left to fit. Compare
# the shape with that of adversarial training, where both rise together.

# %%
histories = {titles[key]: found.best[0].history for key, found in searches.items()}
figures.save(
    figures.training_curves(histories, against="epoch", images="test"),
    output, "figure3_training_curves",
)  # fmt: skip

# %% [markdown]
# ## Tables 5, 6 and 7: test accuracy
#
# FGSM and PGD from the image itself, as in the paper; then AutoAttack 'standard', the official
# code. An image counts as robust only if it survives this attack and every attack before it in the
# same ball; attacks that end in `-l2` search a ball of their own.

# %%
x_test, y_test = data.draw_test(splits, experiment.net_n_test, seed=experiment.seed)
threat = attacks.Threat(experiment.norm, experiment.epsilon)
threat_l2 = attacks.Threat("l2", experiment.epsilon_l2)
outcomes = {}
for (net, chosen, how), found in searches.items():
    for trained, net_seed in zip(found.best, experiment.net_seed_list(), strict=True):
        outcomes[net, chosen, how, net_seed] = evaluate.evaluate(
            trained.net, x_test, y_test, threat=threat, step_size=experiment.step_size,
            threat_l2=threat_l2, step_size_l2=experiment.step_size_l2, seed=experiment.seed,
            attack_names=experiment.net_attacks, keep=24, checkpoint_dir=output,
        )  # fmt: skip
        recorder.add(
            outcomes[net, chosen, how, net_seed], model=net, trained_on=chosen, training=how,
            seed=net_seed, n_train=len(sets[chosen].x), set_kernel=sets[chosen].kernel,
            epoch=trained.epoch, learning_rate=found.learning_rate,
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
for (net, chosen, how, net_seed), results in outcomes.items():
    for one in [one for one in results[1:] if one.norm == experiment.norm][-2:]:
        shown = np.flatnonzero(results[0].right[:24])[:8]
        names = figures.class_names(experiment.dataset, y_test[shown])
        pairs = zip(names, one.right[shown], strict=True)
        signs = [f"{y}, {'stays' if ok else 'falls'}" for y, ok in pairs]
        display(
            Markdown(f"**{titles[net, chosen, how]}**, {one.attack}"),
            figures.save(
                figures.attacked_images(x_test[shown], one.x_attacked[shown], signs),
                output, f"{one.attack}_{net}_{chosen}_{how}_{net_seed}",
            ),
        )  # fmt: skip

# %% [markdown]
# ## Checks

# %%
for found in searches.values():
    for trained in found.runs.values():
        assert all(np.isfinite(line["loss"]) for line in trained.history)
for results in outcomes.values():
    evaluate.check_order(results)
    for one in results[1:]:
        moved = attacks.distance(one.x_attacked, x_test[:24], one.norm)
        assert moved.max() <= one.epsilon + evaluate.TOLERANCE

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
