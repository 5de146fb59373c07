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
# # Remedies: what robustness survives every attack?
#
# [0 walkthrough](00_walkthrough.ipynb) → [1 kernels](01_kernels.ipynb) → [2
# transfer](02_transfer.ipynb) → [3 CNNs](03_cnns.ipynb) → [4
# shortcomings](04_shortcomings.ipynb) → **5 remedies**
#
# *You will know* which attack should choose, what a switch in Algorithm 1 is worth, how much of the
# kernel's robustness a network keeps as it widens, and how a printed figure of 20 % can be 0. *You
# need* notebooks 0 to 4. *It takes* a minute on the defaults. Words are explained in the glossary
# (`notebooks/glossary.md`).
#
# *Beyond the paper: its last section asks whether networks can be robust because of their data
# alone. Judge by AutoAttack, in pixels:*
#
# | data set, model (plain training) | published | how |
# | --- | ---: | --- |
# | CIFAR-10, AlexNet on an adv-KIP set (the paper) | 0.9 | 8/255 in pixels |
# | CIFAR-10, ConvNet-3 on BACON's set (BEARD) | 23.9 | 8/255 in *standardised* units |
# | MNIST, simple-CNN on an adv-KIP set (the paper) | 0.0 | 0.3 in pixels |
# | for scale, CIFAR-10, simple-CNN, *adversarial* training (the paper) | 26.2 | 8/255 in pixels |

# %% [markdown]
# ## The experiment

# %% tags=["parameters"]
name: str = "remedies"
seed: int = 0  # every random choice derives from it
dataset: dict = {"name": "digits", "folder": None}  # as in notebook 01
kernel: dict = {"name": "fc1"}  # shallow: see "From the kernel to networks"
support: dict = {"n_support": 100, "n_target": 100}
threat: dict = {"norm": "linf", "epsilon": 0.2, "step_size": 0.05}  # pixel units
adv_kip: dict = {
    "n_steps": 60,
    "choose_by": "worst-case",  # of several losses; the paper's "pgd" on the cross-entropy
}
kip: dict = None  # not needed here
remedies: dict = {
    "variants": {  # what each changes; all else is as above
        "margin and hinge": {"adv_kip": {"inner_loss": "margin", "outer_loss": "hinge"}},
    },
}
networks: dict = {"n_original": 100, "choose_by": "worst-case"}  # as many original images
fully_connected: dict = {
    "nets": ["fc1-256-ntk0.1", "fc1-2048-ntk0.1", "fc1-16384-ntk0.1"],  # widths, scale 0.1
    "epochs": 100,
    "batch_size": None,  # all images at once
    "optimizer": "sgd",
    "learning_rates": [2.0],
    "eval_every": 10,
}
cnns: dict = {"nets": []}
evaluation: dict = {
    "attacks": ["fgsm", "pgd20", "autoattack"],
    "n_test": 50,  # test images of the tables; None: all
}
output: str = None  # where checkpoints, figures and results.json go; None: reports/<name>

# %%
import numpy as np
from IPython.display import Markdown, display

from advkip import (
    data,
    diagnose,
    distill,
    evaluate,
    figures,
    kernels,
    nets,
    pictures,
    published,
    recipe,
    records,
    search,
    sets,
    tables,
    training,
)  # fmt: skip
from advkip.config import Experiment

experiment = Experiment.from_notebook(globals(), "05_remedies")
kernels.set_precision(experiment.kernel.dtype)
folder = records.folder_of(experiment, output)
recorder = records.Recorder(experiment, folder, "05_remedies")
experiment.changes()  # all else is at its default

# %% [markdown]
# ## Which attack should choose?
#
# Algorithm 1 keeps the support of the step with the best robust *validation* accuracy. Under which
# attack? The paper's PGD climbs the cross-entropy. A stronger judge takes, image by image, the
# worst case of PGD on the cross-entropy, on the margin and towards the three likeliest wrong
# classes (`advkip.worst_case`), which is close to what AutoAttack leaves, and cheap on a kernel.
# Below is the first run, judged by both.

# %%
images = data.load(experiment.dataset.name, experiment.dataset.folder)
splits = data.split(images, experiment)
runs = {"as above": experiment} | experiment.variants()
distilled = {}
for title, own in runs.items():
    distilled[title] = distill.distill(
        own, data.split(images, own), checkpoint_dir=f"{folder}/{own.name}"
    )
    distill.save(f"{folder}/{own.name}/adv-kip.npz", distilled[title], own, images)

# %%
histories = {title: result.history for title, result in distilled.items()}
figures.save(figures.training_curves(histories), folder, "curves")

# %% [markdown]
# What each judge would have chosen, and what that leaves under the worst case:

# %%
for title, history in histories.items():
    by_pgd, by_worst = (
        max(history, key=lambda line, k=k: line.get(k, 0)) for k in ("pgd", "strong")
    )
    print(
        f"{title}: PGD chooses step {by_pgd['step']}, the worst case step {by_worst['step']};",
        *(f"of it, {line.get('strong', np.nan):.1%}" for line in (by_pgd, by_worst)),
    )

# %% [markdown]
# ## What a switch is worth
#
# The kernel machine of each variant under AutoAttack, with a verdict; original images, and the
# paper's own choices, beside it. What goes into the objective is written out in
# `advkip.objective`, the losses in `advkip.losses`.

# %%
x_test, y_test = data.draw_test(splits, experiment.evaluation.n_test, seed=experiment.seed)
protocol = evaluate.Protocol.of(experiment, folder)
made = {
    title: data.TrainingSet(result.x_support, result.y_support, runs[title].kernel)
    for title, result in distilled.items()
}
made["original images"] = data.TrainingSet(
    *distill.initial_support(experiment, splits), experiment.kernel
)
outcomes, verdicts = {}, {}
for title, one in made.items():
    machine = sets.machine(one, runs.get(title, experiment))
    verdicts[title] = diagnose.by_protocol(
        protocol, machine, x_test, y_test, n_steps=experiment.networks.pgd_steps
    )
    outcomes[title] = protocol(machine, x_test, y_test)
    recorder.add(
        outcomes[title], model=f"kernel:{one.kernel.name}", training="kernel", variant=title,
        trained_on="adv-kip" if title in runs else "original", diagnosis=verdicts[title],
        **records.of_set(one),
    )  # fmt: skip
recorder.write()

# %%
display(Markdown(tables.accuracy([recorder.own()], tables=(), models="kernel:.*")))

# %% [markdown]
# The images of the variant that validation likes best:

# %%
best = max(histories, key=lambda title: max(line.get("strong", 0) for line in histories[title]))
result = distilled[best]
figure = pictures.before_and_after(
    result.x_initial, result.y_initial, result.x_support, result.y_support,
    dataset=experiment.dataset.name,
)  # fmt: skip
display(Markdown(f"**{best}**"), figures.save(figure, folder, "images_of_the_best"))

# %% [markdown]
# ## From the kernel to networks
#
# The kernel machine *is* a network: of infinite width, in NTK parametrisation, trained to the end
# by gradient descent on the squared error, less its value at the start. So take that network at
# finite widths (`advkip.lazy`), on that set, all images at once, and let the width grow. A network
# of width W answers as the kernel does, plus something random that nobody made robust, and that is
# smaller the wider it is; an attacker uses it. With depth it grows, so there is one hidden layer.
#
# The 0.1 in the names is a scale: f = 0.1 (net - net at the start). At infinite width it is without
# effect. At a finite one it says how far the weights move: with a large scale hardly at all, so
# that the network is a linear model in random features, whose ReLUs' kinks stay where they are and
# whose gradient says little about its values (a hiding place); with a small one features are
# learned. The same on as many original images is the yardstick.

# %%
chosen = {"adv-kip": made[best], "original": data.draw_original(experiment, splits)}
watched = training.watched(splits, experiment.networks.n_watch, seed=experiment.seed)
train = search.Trainer(experiment, watched, folder)
every_net = (*experiment.fully_connected.nets, *experiment.cnns.nets)
searches = {
    (net, of_set): train(net, of_set, chosen[of_set]) for net in every_net for of_set in chosen
}

# %%
curves = {f"{net} on {of_set}": one.best[0].history for (net, of_set), one in searches.items()}
figures.save(figures.training_curves(curves, against="epoch"), folder, "networks")

# %%
for (net, of_set), found in searches.items():
    for trained, net_seed in zip(found.best, experiment.net_seeds(), strict=True):
        outcomes[net, of_set, net_seed] = protocol(trained.net, x_test, y_test)
        recorder.add(
            outcomes[net, of_set, net_seed], model=net, trained_on=of_set, training="plain",
            seed=net_seed, **records.of_training(chosen[of_set], found, trained),
        )  # fmt: skip
recorder.write()
display(Markdown(tables.accuracy([recorder.own()], tables=())))

# %% [markdown]
# AutoAttack accuracy against width; dashed, the kernel machine that made the set. (With several
# seeds, the first.)

# %%
wide = [net for net in experiment.fully_connected.nets if net.endswith("-ntk")]
widths = [int(net.split("-")[1]) for net in wide]
left = {
    f"{of_set}, {attack}": [
        outcomes[net, of_set, experiment.net_seeds()[0]][place].accuracy for net in wide
    ]
    for of_set in chosen
    for place, attack in ((0, "clean"), (-1, protocol.attack_names[-1]))
}
kernel_has = {
    f"kernel machine, {one.attack}": one.accuracy
    for one in outcomes[best][:: len(outcomes[best]) - 1]
}
if wide:
    figure = figures.accuracy_against(widths, left, label="width", log=True, levels=kernel_has)
    display(figures.save(figure, folder, "width"))

# %% [markdown]
# ## Other people's figures
#
# Many programs standardise images, z = (x - mean) / std, and attack z with the radius that is meant
# for pixels. Every pixel then moves by a fraction of it, std, and robustness appears where there is
# none. Here is a network of standardised images; the same attack, once as such programs do it,
# once in pixels (`advkip.published`; `evaluate` and `diagnose` take `mean` and `std` of such a
# network and always attack pixels).

# %%
original = data.draw_original(experiment, splits)
mean, std = float(original.x.mean()), float(original.x.std())
own = recipe.Recipe.of(experiment.cnns, experiment)
net = nets.build("simple-cnn", shape=original.x.shape[1:], n_classes=splits.n_classes, seed=0)
trained = training.train(
    nets.Standardised(net, mean, std), original.x, original.y, recipe=own, watched=watched,
    checkpoint_dir=folder, label="standardised",
)  # fmt: skip
printed = published.compare(
    trained.net.net, x_test, y_test, mean=mean, std=std, epsilon=experiment.threat.epsilon,
    step_size=experiment.threat.step_size,
)  # fmt: skip
print(f"clean {printed.clean:.1%};", printed.sentence())

# %% [markdown]
# ## Checks

# %%
for results in outcomes.values():
    evaluate.check_order(results)
for found in verdicts.values():
    assert found.strong <= found.claimed <= found.clean
assert max(printed.radius) < experiment.threat.epsilon

# %% [markdown]
# ## Exercises
#
# 1. The worst case chose some step of each run. Would the last step have been better?
# 2. Which radius in standardised units is the experiment's in pixels? Attack with that. The two
#    figures still differ: what else do such programs do to a standardised image?

# %% tags=["solution"] jupyter={"source_hidden": true}
for title, history in histories.items():
    strong = [line.get("strong", np.nan) for line in history]
    print(f"{title}: best {np.nanmax(strong):.1%}, last {strong[-1]:.1%}")

# %% tags=["solution"] jupyter={"source_hidden": true}
again = published.compare(
    trained.net.net, x_test, y_test, mean=mean, std=std, epsilon=experiment.threat.epsilon / std,
    step_size=experiment.threat.step_size / std,
)  # fmt: skip
print(f"at epsilon / std: {again.as_published:.1%}; in pixels it was {printed.in_pixels:.1%}")
print("They clip it to [0, 1], as if it were pixels, which cuts off what is darker than the mean.")

# %% [markdown]
# ## What it means
#
# Read the tables from the top.
#
# - *The judge.* PGD on the cross-entropy likes steps that the worst case does not. Whoever reports
#   AutoAttack should choose by an attack that is close to it.
# - *The switches.* The kernel machine of a variant is robust as far as AutoAttack leaves it so and
#   its verdict is *genuine*.
# - *The widths.* If the line of the distilled set climbs towards the dashed one, and that of
#   original images stays where it is, then the data did it: plain training, no attack in it, on a
#   set that was made for a kernel. What is missing at a usual width is then a matter of the
#   network, not of the set.
# - *The printed figure.* It was measured correctly, and says nothing about pixels.
