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
# *You will know* which attack should choose, what a switch in Algorithm 1 is worth, what a kernel
# must be able to tell apart, how much of its robustness a network keeps as it widens, what labels
# can carry, and how a printed figure of 20 % can be 0. *You need* notebooks 0 to 4. *It takes* five
# minutes on the defaults. Words are explained in the glossary (`notebooks/glossary.md`).
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
#
# `remedies.variants` says what is tried, each variant a name and the settings that it changes. All
# else is the experiment's.

# %% tags=["parameters"]
seed: int = 0  # every random choice derives from it
dataset: dict = {"name": "digits", "folder": None}  # as in notebook 01
kernel: dict = {"name": "fc3"}
support: dict = {"n_support": 100, "n_target": 100}
threat: dict = {"norm": "linf", "epsilon": 0.2, "step_size": 0.05}  # pixel units
adv_kip: dict = {"n_steps": 60}  # the paper's losses and judge, as in notebook 01
remedies: dict = {
    "variants": [
        {
            "name": "FC1, margin and hinge",
            "kernel": {"name": "fc1"},
            "adv_kip": {
                "choose_by": "worst-case",
                "inner_loss": "margin",
                "outer_loss": "hinge",
                "eval_every": 20,
                "keep_every": 20,
            },
        },
        {
            "name": "the same in 3 pieces",
            "kernel": {"name": "fc1-pieces3"},
            "adv_kip": {
                "choose_by": "worst-case",
                "inner_loss": "margin",
                "outer_loss": "hinge",
            },
        },
    ],
    "hand_on": "FC1, margin and hinge",  # whose set the networks get
    "nets": ["fc1-256-ntk0.1", "fc1-2048-ntk0.1"],  # widths, scale 0.1
    "epochs": 100,
    "eval_every": 20,
    "batch_size": None,  # all images at once
    "optimizer": "sgd",
    "learning_rates": [2.0],
    "copies": [1, 4],  # of each image, for networks whose labels say more
    "student": "fc1-256",
    "student_rate": 1e-3,
}
networks: dict = {"n_seeds": 1}
diagnosis: dict = {"n_images": 20}  # test images of a verdict; 100 or more say something
evaluation: dict = {
    "attacks": ["fgsm", "pgd20", "autoattack"],
    "n_test": 50,  # test images of the tables; None: all
}
output: str = None  # where checkpoints, figures and results.json go; None: reports/<name>

# %%
from functools import partial

import numpy as np
from IPython.display import Markdown, display

from advkip import (
    data,
    diagnose,
    distill,
    evaluate,
    execute,
    figures,
    kernels,
    nets,
    pictures,
    pieces,
    published,
    recipe,
    records,
    relabel,
    search,
    sets,
    settings,
    tables,
    training,
)  # fmt: skip
from advkip.config import MACHINE, Experiment

experiment = Experiment.from_notebook(globals(), "05_remedies")
kernels.set_precision(experiment.kernel.dtype)
folder = records.folder_of(experiment, output)
recorder = records.Recorder(experiment, folder, "05_remedies")
experiment.changes()  # all else is at its default

# %% [markdown]
# ## Which attack should choose?
#
# Algorithm 1 keeps the support of the step with the best robust *validation* accuracy. Under which
# attack? The paper's PGD climbs the cross-entropy. A stronger judge counts an image only if it
# withstands PGD on the cross-entropy, on the margin (the largest wrong logit minus the right one)
# and towards each of the three likeliest wrong classes (`advkip.worst_case`). That is close to what
# AutoAttack leaves, and cheap on a kernel. `adv_kip.choose_by` names the judge. A run that is
# judged by the worst case says what PGD leaves as well, so below it can be read off which step
# either would have kept.

# %%
images = data.load(experiment.dataset.name, experiment.dataset.folder)
splits = data.split(images, experiment)
runs = {settings.AS_GIVEN: experiment} | experiment.variants()
distilled, kept = {}, {}
for title, own in runs.items():
    place = folder if own is experiment else f"{folder}/{execute.VARIANTS}/{own.name}"
    distilled[title] = distill.distill(own, data.split(images, own), checkpoint_dir=place)
    distill.save(f"{place}/adv-kip.npz", distilled[title], own, images)
    every = own.adv_kip.keep_every or own.adv_kip.n_steps + 1
    steps = [line["step"] for line in distilled[title].history if line["step"] % every == 0]
    kept[title] = sets.kept(place, "adv-kip", steps[1:])  # without step 0
    if len(kept[title]) < len(steps) - 1:
        print(f"{title}: supports were not kept; for those of other steps delete {place}")

# %%
histories = {title: result.history for title, result in distilled.items()}
figures.save(figures.training_curves(histories), folder, "remedies_curves")

# %%
judged = {title: one for title, one in histories.items() if "strong" in one[0]}
likes = {
    title: {
        judge: max(history, key=lambda line, key=key: line[key])
        for judge, key in (("PGD", "pgd"), ("the worst case", "strong"))
        if key in history[0]
    }
    for title, history in histories.items()
}
for title in judged:
    for judge, line in likes[title].items():
        print(f"{title}: {judge} likes step {line['step']}, of which {line['strong']:.1%} is left")

# %% [markdown]
# ## What a kernel can tell apart
#
# An l_inf attack moves *every* pixel a little. The kernel of a fully connected net knows two images
# by their inner product and norms: it stays the same if one turns both in the space of all pixels,
# so single pixels are nothing special to it, and only the training images can tell its machine
# which directions matter. A network may learn to look at a pixel through a threshold, and
# adversarially trained ones do so on MNIST (Madry et al. 2018). To a kernel it can be given: with
# `fc1-pieces3` each pixel is cut into 3 *pieces* first (`advkip.pieces`), a fixed layer of ReLUs on
# single pixels. Nothing is rounded or thrown away; the pieces add up to the pixel.

# %%
values = np.linspace(0, 1, 61)
parts = pieces.encode(values.reshape(-1, 1, 1, 1), 3).reshape(len(values), 3)
figures.save(figures.encoding(values, parts), folder, "remedies_pieces")

# %% [markdown]
# A machine of such a kernel may disregard what moves a pixel at its dark or bright end, and heed
# what takes it across the middle: a black or white pixel that moves by less than a third leaves
# piece 2 as it is. That suits images of nearly black and white pixels, and a radius below 1/3.
# Whether a machine does it is up to its images: below there is a line for original images with each
# of the kernels.
#
# ## What a switch is worth
#
# The kernel machine of each variant under AutoAttack, with a verdict, beside that of original
# images with its kernel. *Margin and hinge*: the attack climbs the margin, and the outer loss is
# the hinge, which asks for a margin and for nothing beyond. What goes into the objective is written
# out in `advkip.objective`, the losses in `advkip.losses`. (A verdict on few images is
# *inconclusive*.)

# %%
yardsticks = {}  # original images, once for each kernel and number of images
for title, own in runs.items():
    if all((own.kernel, own.support) != (o.kernel, o.support) for o in yardsticks.values()):
        yardsticks[f"{settings.ORIGINAL_IMAGES} for {title}"] = own
made = {title: (result.x_support, result.y_support) for title, result in distilled.items()}
for title, own in yardsticks.items():
    made[title] = distill.initial_support(own, data.split(images, own))

# %%
x_test, y_test = data.draw_test(splits, experiment.evaluation.n_test, seed=experiment.seed)
protocol = evaluate.Protocol.of(experiment, folder)
n = experiment.diagnosis.n_images
outcomes, verdicts, known = {}, {}, {}
for title, own in (yardsticks | runs).items():
    one = data.TrainingSet(*made[title], own.kernel)
    machine = sets.machine(one, experiment)
    names = {"trained_on": "original"}
    if title in runs:
        key = records.of_set(one)["set"], own.kernel  # judges may agree on a step
        if key not in known:
            known[key] = diagnose.by_protocol(
                protocol, machine, x_test[:n], y_test[:n], n_steps=experiment.networks.pgd_steps
            )
        verdicts[title] = known[key]
        names = {"trained_on": "adv-kip", "variant": title}
    elif own is not experiment:
        names["variant"] = title.removeprefix(f"{settings.ORIGINAL_IMAGES} ")
    outcomes[title] = protocol(machine, x_test, y_test)
    recorder.add(
        outcomes[title], model=f"kernel:{one.kernel.name}", training="kernel", **names,
        diagnosis=verdicts.get(title), **records.of_set(one),
    )  # fmt: skip
recorder.write()

# %%
display(Markdown(tables.accuracy([recorder.own()], tables=())))

# %% [markdown]
# Variants that differ from the experiment in their number of images (`support.n_support`) alone say
# what more images are worth.

# %%
rest = {
    title: own.of(*MACHINE, "adv_kip", without=["support.n_support"]) for title, own in runs.items()
}
sizes = {
    own.support.n_support: title
    for title, own in runs.items()
    if rest[title] == rest[settings.AS_GIVEN]
}
strongest = range(len(outcomes[settings.AS_GIVEN]))[-2:]  # places of the last two attacks
if len(sizes) > 1:
    lines = {
        outcomes[settings.AS_GIVEN][place].attack: [
            outcomes[sizes[n]][place].accuracy for n in sorted(sizes)
        ]
        for place in {0, *strongest}
    }
    figure = figures.accuracy_against(sorted(sizes), lines, label="images in the set", log=True)
    display(figures.save(figure, folder, "remedies_sizes"))

# %% [markdown]
# ## What the judge is worth
#
# Of runs with `adv_kip.keep_every` the supports of other steps are still there. Attacked on test
# images, they say what was there to choose from, and what each judge took of it. PGD may stand
# still while what stronger attacks leave goes on rising; then the two choices differ.

# %%
for title, liked in likes.items():
    choices = {f"{judge}'s choice": line["step"] for judge, line in liked.items()}
    choices = {label: step for label, step in choices.items() if step in kept[title]}
    named = {f"step {step}": step for step in kept[title]} | choices
    for label, step in named.items():
        one = kept[title][step]
        found = protocol(sets.machine(one, experiment), x_test, y_test)
        recorder.add(
            found, model=f"kernel:{one.kernel.name}", training="kernel", trained_on="adv-kip",
            variant=f"{title}, {label}", **records.of_set(one),
        )  # fmt: skip
        outcomes[title, label] = found
    for label, step in choices.items():
        left = outcomes[title, label][-1]
        print(f"{title}: {label} is step {step}, {left.accuracy:.1%} under {left.attack}")
recorder.write()

# %%
steps = sorted({step for one in kept.values() for step in one})
lines = {
    f"{title}, {outcomes[title][place].attack}": [
        outcomes[title, f"step {step}"][place].accuracy if step in kept[title] else np.nan
        for step in steps
    ]
    for title in runs
    for place in strongest
    if kept[title]
}
if lines:
    figure = figures.accuracy_against(steps, lines, label="outer step")
    display(figures.save(figure, folder, "remedies_steps"))

# %% [markdown]
# The images of the set that is handed on:

# %%
chosen_one = experiment.remedies.hand_on
result = distilled[chosen_one]
figure = pictures.before_and_after(
    result.x_initial, result.y_initial, result.x_support, result.y_support,
    dataset=experiment.dataset.name,
)  # fmt: skip
figures.save(figure, folder, "remedies_images")

# %% [markdown]
# ## From the kernel to networks
#
# But for the ridge, the kernel machine *is* a network: of infinite width, in NTK parametrisation,
# trained by gradient descent on the squared error to the end, less its value at the start. So take
# that network at finite widths (`advkip.lazy`), on that set, and let the width grow. A network of
# width W answers as the kernel does, plus something random that nobody made robust, and that is
# smaller the wider it is. An attacker uses it. It grows with depth, hence the single hidden layer.
#
# The 0.1 in the names is a scale: f = 0.1 (net - net at the start). At infinite width it is without
# effect. At a finite one it says how far the weights move: with a large scale hardly at all, and
# the network stays a linear model of random features; with a small one it learns features. The
# yardstick is the same network, recipe and stopping rule (the judge above, on validation images) on
# as many original images.

# %%
e = runs[chosen_one]
chosen = {
    "adv-kip": data.TrainingSet(result.x_support, result.y_support, e.kernel),
    "original": data.TrainingSet(*distill.initial_support(e, data.split(images, e))),
}
watched = training.watched(splits, experiment.networks.n_watch, seed=experiment.seed)
strict = experiment.replace(networks={"choose_by": "worst-case"})
train = search.Trainer(strict, watched, folder)
searches = {
    (net, of_set): train(net, of_set, one, section=experiment.remedies)
    for net in experiment.remedies.nets
    for of_set, one in chosen.items()
}

# %%
curves = {f"{net} on {of_set}": one.best[0].history for (net, of_set), one in searches.items()}
if curves:
    display(figures.save(figures.training_curves(curves, against="epoch"), folder, "remedies_nets"))

# %%
for (net, of_set), found in searches.items():
    for trained, net_seed in zip(found.best, experiment.net_seeds(), strict=True):
        outcomes[net, of_set, net_seed] = protocol(trained.net, x_test, y_test)
        names = {"trained_on": of_set} | ({"variant": chosen_one} if of_set == "adv-kip" else {})
        recorder.add(
            outcomes[net, of_set, net_seed], model=net, training="plain", seed=net_seed,
            **names, **records.of_training(chosen[of_set], found, trained),
        )  # fmt: skip
recorder.write()
display(Markdown(tables.accuracy([recorder.own()], tables=())))

# %% [markdown]
# Accuracy against width, clean and under the last of the attacks (the mean of the seeds); dashed,
# the kernel machine that made the set.

# %%
widths = {net: int(net.split("-")[1]) for net in experiment.remedies.nets if "-ntk" in net}
left = {
    f"{of_set}, {'clean' if place == 0 else outcomes[chosen_one][-1].attack}": [
        np.mean([outcomes[net, of_set, one][place].accuracy for one in experiment.net_seeds()])
        for net in widths
    ]
    for of_set in chosen
    for place in (0, -1)
}
ends = outcomes[chosen_one][0], outcomes[chosen_one][-1]
levels = {f"kernel machine, {one.attack}": one.accuracy for one in ends}
if widths:
    figure = figures.accuracy_against(
        list(widths.values()), left, label="width", log=True, levels=levels
    )
    display(figures.save(figure, folder, "remedies_width"))

# %% [markdown]
# ## Labels that say more
#
# Ordinary networks take over more of a kernel machine when they are asked for its *answers*. The
# set `relabelled` has original images, and copies of them with noise or mixed in pairs, with what
# the machine answers in place of the classes (`advkip.relabel`). Here is `remedies.student` on such
# sets, labelled by the machine of the set that was handed on, and on `noisy`, the same images with
# their classes, its yardstick; for each number of copies in `remedies.copies`, and with as many
# training steps for all. With `relabelling.shift` a third kind of network is also asked, of each
# image, what the machine answers to the image moved by so many pixels to four sides: its
# *features*.

# %%
student, section = experiment.remedies.student, experiment.section_of(experiment.remedies.student)
answer = partial(relabel.answers, sets.machine(chosen["adv-kip"], experiment))
teacher = sets.Teacher(e.kernel.name, e.kernel, answer)
kinds = ["classes", "answers", *(["answers and features"] * (experiment.relabelling.shift > 0))]
labelled, taught = {}, {}
for copies in experiment.remedies.copies:
    for kind in kinds:
        given = {"copies": copies, "rounds": 0} | ({} if "features" in kind else {"shift": 0})
        own = experiment.replace(relabelling=given)
        if kind == "classes":
            labelled[kind, copies] = sets.noisy(own, splits)
        else:
            labelled[kind, copies] = sets.relabelled(teacher, own, splits, folder)
        longer = section.longer(max(experiment.remedies.copies) // copies)
        taught[kind, copies] = train(
            student, f"{kind.replace(' ', '-')}-{copies}", labelled[kind, copies], section=longer,
            learning_rates=[experiment.remedies.student_rate],
        )  # fmt: skip

# %%
left = {}
for (kind, copies), found in taught.items():
    for trained, net_seed in zip(found.best, experiment.net_seeds(), strict=True):
        outcomes[kind, copies, net_seed] = protocol(trained.net, x_test, y_test)
        recorder.add(
            outcomes[kind, copies, net_seed], model=student, training="plain", seed=net_seed,
            trained_on="noisy" if kind == "classes" else "relabelled",
            **records.of_training(labelled[kind, copies], found, trained),
        )  # fmt: skip
    lasts = [outcomes[kind, copies, one][-1] for one in experiment.net_seeds()]
    left.setdefault(f"{kind}, {lasts[0].attack}", []).append(np.mean([o.accuracy for o in lasts]))
recorder.write()
if left:
    figure = figures.accuracy_against(
        list(experiment.remedies.copies), left, label="copies of each image", log=True
    )
    display(figures.save(figure, folder, "remedies_copies"))

# %% [markdown]
# With `relabelling.rounds` a scout, a network of the same training, is attacked and the attacked
# images join the set, labelled by the machine as well, so that it also says what the machine
# answers where networks err (`advkip.aggregate`). Put `relabelled` among `networks.sets` in
# notebooks 2 to 4. Are the attacked images what helps, or the answers? With `relabelling.teacher`
# 'classes' the images that were attacked keep their classes, and with 'original' the machine of as
# many original images answers (`params/mnist-pieces-controls.yaml`). The network of a kernel of
# pieces is named like it: `fc1-256-ntk0.1-pieces3`, and `fc3-1024-pieces3` of the usual kind.
#
# One can also leave out the kernel. The set `unrolled` (`advkip.unrolled`, and for a run of it
# `params/digits-unrolled.yaml`) comes from Algorithm 1 with a finite network in its place: in each
# outer step networks with new first weights are trained on the support and attacked, and the
# gradient goes through their whole training to the images. It may start from the kernel's set
# (`unrolled.start_from`). With `unrolled.n_experts` plain training on the set is to follow the way
# that adversarially trained networks took (`advkip.trajectories`; see
# `params/digits-trajectories.yaml`): then robustness comes from a teacher that was attacked while
# it trained, and not from data alone.
#
# ## Other people's figures
#
# Many programs standardise images, z = (x - mean) / std, attack z with the radius that is meant for
# pixels, and clip z to [0, 1], as if it were pixels. The radius is then a fraction of what is
# printed, std times as large, and robustness may appear where there is none. Here is a network of
# standardised images; the same attack, once as such programs do it, once in pixels
# (`advkip.published`; `evaluate` and `diagnose` take `mean` and `std` of such a network, and always
# attack pixels).

# %%
original = data.draw_original(experiment, splits)
mean, std = float(original.x.mean()), float(original.x.std())
plain = recipe.Recipe.of(experiment.cnns, experiment)
first = experiment.net_seeds()[0]
net = nets.build("simple-cnn", shape=original.x.shape[1:], n_classes=splits.n_classes, seed=first)
trained = training.train(
    nets.Standardised(net, mean, std), original.x, original.y, recipe=plain, watched=watched,
    seed=first, checkpoint_dir=folder, label="network-standardised",
)  # fmt: skip
ball = {"epsilon": min(1.0, experiment.threat.epsilon), "step_size": experiment.threat.step_size}
printed = published.compare(trained.net.net, x_test, y_test, mean=mean, std=std, **ball)
recorder.note(published={"model": "simple-cnn", "mean": mean, "std": std} | printed._asdict())
recorder.write()
print(f"clean {printed.clean:.1%};", printed.sentence())

# %% [markdown]
# ## Checks

# %%
for results in outcomes.values():
    evaluate.check_order(results)
for found in verdicts.values():
    assert found.strong <= found.claimed <= found.clean
for result in distilled.values():
    assert np.isfinite(result.x_support).all() and np.isfinite(result.y_support).all()
for found in searches.values():
    assert all(np.isfinite(line["loss"]) for one in found.runs.values() for line in one.history)

# %% [markdown]
# ## Exercises
#
# 1. The worst case chose some step of each run. Would the last step have been better, and how would
#    one know without looking at test images?
# 2. Which radius in standardised units is the experiment's in pixels? Attack with that. Why do the
#    two figures still differ?

# %% tags=["solution"] jupyter={"source_hidden": true}
for title, history in judged.items():
    strong = [line["strong"] for line in history]
    print(f"{title}: best {max(strong):.1%}, last {strong[-1]:.1%}, of validation images")

# %% tags=["solution"] jupyter={"source_hidden": true}
wider = {key: min(1.0, value / std) for key, value in ball.items()}
again = published.compare(trained.net.net, x_test, y_test, mean=mean, std=std, **wider)
print(f"at epsilon / std: {again.as_published:.1%}; in pixels it was {printed.in_pixels:.1%}")
print("The clip to [0, 1] cuts off what is darker than the mean or brighter than mean + std.")

# %% [markdown]
# ## What it means
#
# Read the tables from the top.
#
# - *The judge.* Does what PGD likes best leave most under the worst case? If not, whoever reports
#   AutoAttack should choose by an attack that is close to it.
# - *The switches.* The kernel machine of a variant is as robust as AutoAttack leaves it, if its
#   verdict (on enough images) is *genuine*.
# - *The pieces.* If the machine of original images keeps nothing with them, and that of the
#   distilled ones more than without, then the data made use of what the kernel can tell apart.
# - *The widths.* If the line of the distilled set climbs towards the dashed one, and that of
#   original images stays where it is, then the data did it: plain training, no attack in it, on a
#   set that was made for a kernel. What is missing at a usual width is then a matter of the
#   network, not of the set.
# - *The labels.* If the network asked for answers keeps more than the one asked for classes, on
#   the same images, then a label can carry robustness; more copies show more of the machine.
# - *The printed figure.* It is what was measured, at another radius than the one it is printed for.
