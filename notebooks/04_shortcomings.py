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
# # Is it real? Robust features, AutoAttack on kernels, and a verdict
#
# [0 walkthrough](00_walkthrough.ipynb) → [1 kernels](01_kernels.ipynb) → [2
# transfer](02_transfer.ipynb) → [3 CNNs](03_cnns.ipynb) → **4 shortcomings** →
# [5 remedies](05_remedies.ipynb)
#
# *You will know* how to tell a robust model from one that hides its gradients, and what to make
# of a published figure. *You need* notebooks 0 to 3. *It takes* a minute and a half on the
# defaults; two hours for MNIST on two cores. Words are explained in the glossary
# (`notebooks/glossary.md`).
#
# *Section 6 and the appendices of "Can we achieve robustness from data alone?" (Tsilivis, Su, Kempe
# 2022): Tables 8 and 10, appendix A.4, Figure 2. Then what the paper leaves open: AutoAttack on the
# kernel machine itself, and for every model one diagnosis, with its evidence, of whether its
# robustness is real.*
#
# The paper's figures to compare with (test accuracy, %; PGD and AutoAttack in the l_inf ball, or
# in the l2 ball where it says so):
#
# | data, network | trained on | clean | PGD | AutoAttack | PGD (l2) |
# | --- | --- | ---: | ---: | ---: | ---: |
# | CIFAR-10, simple-CNN | adv-KIP (FC3), 50,000 | 72.10 | 67.03 | 0.00 | 70.79 |
# | CIFAR-10, AlexNet | adv-KIP (FC3), 50,000 | 68.87 | 49.06 | 0.89 | 50.07 |
# | CIFAR-10, VGG11 | adv-KIP (FC3), 50,000 | 74.88 | 53.18 | 0.27 | 59.60 |
# | CIFAR-10, simple-CNN | robust features, 50,000 | 65.25 | | | 60.73 |
# | MNIST, simple-CNN | adv-KIP, 30,000 | 98.15 | 97.17 | 0.00 | |

# %% [markdown]
# ## The experiment
#
# Networks and sets come from the notebooks before, if they ran in the same experiment; what is
# missing is made here.

# %% tags=["parameters"]
seed: int = 0  # every random choice derives from it
dataset: dict = {"name": "digits", "folder": None}  # as in notebook 01
networks: dict = {"n_original": 500, "n_seeds": 1}  # original images, plain and adversarial
cnns: dict = {
    "nets": ["simple-cnn"],  # simple-cnn, alexnet, vgg11
    "epochs": 60,  # at most
    "learning_rates": [1.0e-3],  # Adam; validation images choose
}
adversarial_training: dict = {
    "nets": ["simple-cnn"],  # the first one makes the robust features
    "sets": ["original"],  # a choice of diagnosis.sets
    "epochs": 20,
    "learning_rates": [2.0e-3],
}
robust_features: dict = {"n_steps": 30}  # gradient steps behind each image
diagnosis: dict = {
    # also "kip", the path of an .npz, or a folder with the published CIFAR_ims and CIFAR_lab
    "sets": ["adv-kip", "original", "robust-features"],
    "nets": ["simple-cnn"],  # with plain training; None: those of fully_connected and cnns
    "n_images": 20,  # test images of a verdict; 100 or more say something
}
evaluation: dict = {
    "attacks": ["fgsm", "pgd20", "autoattack"],  # -l2 behind a name: in the ball threat_l2
    "n_test": 50,  # test images of the table; None: all
}
output: str = None  # where checkpoints, figures and results.json go; None: reports/<name>

# %%
import numpy as np
import torch
from IPython.display import Markdown, display

from advkip import (
    data,
    diagnose,
    evaluate,
    figures,
    kernels,
    panel,
    pictures,
    records,
    search,
    sets,
    tables,
    torch_attacks,
    training,
    verdict,
)  # fmt: skip
from advkip.config import Experiment

experiment = Experiment.from_notebook(globals(), "04_shortcomings")
kernels.set_precision(experiment.kernel.dtype)
folder = records.folder_of(experiment, output)
recorder = records.Recorder(experiment, folder, "04_shortcomings")
experiment.changes()  # all else is at its default

# %% [markdown]
# ## Data, and adversarial training
#
# Three of the sets need no network: original images, KIP's, and adv-KIP's.

# %%
images = data.load(experiment.dataset.name, experiment.dataset.folder)
splits = data.split(images, experiment)
chosen = sets.load(experiment.diagnosis.sets, experiment, splits, images, folder)
original = data.draw_original(experiment, splits)
watched = training.watched(splits, experiment.networks.n_watch, seed=experiment.seed)
train = search.Trainer(experiment, watched, folder)
robust_nets = getattr(experiment.adversarial_training, "nets", ())
searches = {
    (net, "original", "adversarial"): train(net, "original", original, adversarially=True)
    for net in robust_nets
}

# %% [markdown]
# ## Robust features
#
# Ilyas et al. (2019) made a data set that should hold *only* robust features: each image starts as
# some other image and is moved until an adversarially trained network represents it as it
# represents the original. Its label is that of the original. They found that plain training on it
# gives some robustness: "robustness from data alone", years before adv-KIP. It is loaded from the
# published files, or made here with the adversarially trained network above. The distance is that
# of the representations, relative to the start. (With `robust_features.noise`, as on MNIST, noise
# is mixed into the start: such a network ignores dark pixels, so on black ones it has no gradient.)

# %%
if sets.ROBUST_FEATURES in experiment.diagnosis.sets:
    made = sets.invert(
        searches[robust_nets[0], "original", "adversarial"].best[0].net, original, experiment,
        folder,
    )  # fmt: skip
    chosen[sets.ROBUST_FEATURES] = data.TrainingSet(made.x, made.y)
    print(f"mean distance to the original's representation: {made.distance.mean():.2f}")
    figure = pictures.inverted_images(made.x_original[:10], made.x_start[:10], made.x[:10])
    display(figures.save(figure, folder, "robust_features"))
{of_set: (one.x.shape, one.y.shape) for of_set, one in chosen.items()}

# %% [markdown]
# ## Plain training on each set
#
# The same networks and the same recipe throughout; a network that notebook 02 or 03 has trained is
# taken from there. Learning rates are chosen on validation images, by PGD accuracy unless
# `networks.choose_by` says otherwise. KIP's set takes the rate of adv-KIP's, so that nothing
# differs but the data.

# %%
order = sorted(chosen, key=lambda of_set: of_set not in ("adv-kip", "original"))
for net in experiment.diagnosed_nets():
    for of_set in order:
        like = searches.get((net, "adv-kip", "plain")) if of_set == "kip" else None
        rates = [like.learning_rate] if like else None
        searches[net, of_set, "plain"] = train(net, of_set, chosen[of_set], learning_rates=rates)

# %% [markdown]
# Adversarial training needs no special data; what does it make of these sets? (Off by default:
# `adversarial_training.sets` names them.)

# %%
for net in robust_nets:  # those on original images are there already
    for of_set in experiment.adversarial_training.sets:
        one = sets.one_of({"original": original} | chosen, of_set)
        searches[net, of_set, "adversarial"] = train(net, of_set, one, adversarially=True)

# %% [markdown]
# ## Figure 2: where the gradients go
#
# An attack follows the gradient of the loss. While a network trains, the loss on *correctly* read
# test images shrinks, as it should. If it shrinks far enough, the gradient goes with it: at some
# point float32 has nothing left, and PGD, which starts at such an image, has nowhere to go. In the
# paper this happens on the adv-KIP set and on robust features alike. Does it here? Compare with
# original images, and with adversarial training. (Points are means, so a few images with a gradient
# can hide many without; the table of checks below counts them.)

# %%
shown = [
    (net, of_set, how)
    for net, of_set, how in searches
    if net in experiment.cnns.nets[:1] and of_set != ("kip" if how == "plain" else "")
]
shown = [key for key in shown if key[1:] == ("original", "adversarial") or key[2] == "plain"]
histories = {records.title(*key): searches[key].best[0].history for key in shown}
if histories:
    figure = figures.loss_and_gradient(histories)
    display(figures.save(figure, folder, "figure2_loss_and_gradient"))

# %% [markdown]
# ## Kernel machines
#
# The kernel classifier of each set, as in notebook 01. A set that a kernel made is given that
# kernel, with the variances and the ridge that stand in its file, whatever the experiment's are.
# The machine is a formula in JAX; wrapped as a PyTorch module whose backward pass is the kernel's
# exact derivative (`advkip.bridge`), it can be given to AutoAttack like any network. The paper does
# not report that.

# %%
machines = {
    (f"kernel:{(one.kernel or experiment.kernel).name}", of_set, "kernel"): sets.machine(
        one, experiment
    )
    for of_set, one in chosen.items()
    if experiment.diagnosis.kernels
}

# %% [markdown]
# ## The diagnosis
#
# A figure for robustness says that *this* attack found nothing. So each model is asked again. Of
# the images that withstand FGSM and PGD, which fall when the attack loses nothing to rounding,
# uses another loss, rescaled logits, float64, more steps, random starts; when it uses no gradient
# at all; when the adversarial image comes from another model, among them a small one that has
# learned to imitate the answers of this one; when nothing but these answers is looked at; when it
# is mere noise? Any such image was never robust. Are there gradients to follow? Does accuracy
# fall to chance when the attacker may do anything?
# (`advkip.verdict` states the thresholds and where they come from.)

# %%
x_test, y_test = data.draw_test(splits, experiment.evaluation.n_test, seed=experiment.seed)
protocol = evaluate.Protocol.of(experiment, folder)
models = machines | {key: found.best[0].net for key, found in searches.items()}
helpers = {
    f"adv. {net}" if how == "adversarial" else "kernel": (net, of_set, how)
    for net, of_set, how in models
    if of_set == "original" and how != "plain"
}

# %%
diagnoses = {}
n = experiment.diagnosis.n_images
for key, model in models.items():
    print(records.title(*key))
    others = {short: models[other] for short, other in helpers.items() if other != key}
    diagnoses[key] = diagnose.by_protocol(
        protocol, model, x_test[:n], y_test[:n], n_steps=experiment.networks.pgd_steps,
        sources=others,
    )  # fmt: skip

# %%
outcomes = {}
for key, model in models.items():
    found, trained_on = searches.get(key), chosen.get(key[1], original)
    nets = {experiment.seed: model}
    if found:
        nets = dict(zip(experiment.net_seeds(), (one.net for one in found.best), strict=True))
        more = records.of_training(trained_on, found)
    else:
        more = records.of_set(trained_on, n_train=len(model.x_support))
    for net_seed, net in nets.items():
        outcomes[*key, net_seed] = protocol(net, x_test, y_test, keep=8)
        recorder.add(
            outcomes[*key, net_seed], model=key[0], trained_on=key[1], training=key[2],
            seed=net_seed, diagnosis=diagnoses[key] if net is model else None, **more,
        )  # fmt: skip
    recorder.write()

# %% [markdown]
# ## Test accuracy of all models
#
# More images, and AutoAttack as it is usually run. The verdict is that of the first seed's network.

# %%
display(Markdown(tables.accuracy([recorder.own()], tables=("8", "10"))))

# %% [markdown]
# ## Why: one figure and one table
#
# Each line is a model. Red: each column is an attack that the *claimed* images were given to,
# those that withstand FGSM and PGD; a genuine line is pale. (A grey cell was not asked, as where
# the adversarial images would come from the model itself.) Blue: accuracy under PGD when the ball
# grows. At radius 1 (l_inf) every image can be turned into every other, so a line that stays blue
# to the end belongs to an attack that does not see. Models of which hardly anything is claimed
# (nearly all images fall to PGD already) are left out.
#
# The table has one line for each check, with what it may be at most. *order*: images that FGSM
# breaks and PGD does not, though it has more steps. *repeatable*: a model that answers differently
# the second time. *silent success*: images that PGD broke on its way and came back from.

# %%
titled = {records.title(*key): found for key, found in diagnoses.items()}
claimed = {title: one for title, one in titled.items() if one.claimed > verdict.NOTHING}
if claimed:
    display(figures.save(figures.evidence(claimed), folder, "evidence"))
display(Markdown(tables.checks({title: one.to_dict() for title, one in titled.items()})))

# %% [markdown]
# ## How far rounding explains it
#
# PGD climbs the cross-entropy. With p the softmax of the right class, its gradient is p - 1 in the
# right logit, and the other classes' softmax in theirs. A computer rounds. In float32, p - 1 is 0
# when the log-odds of the right class exceed 17, at the latest: the attack still raises wrong
# logits, and no longer lowers the right one, so it may climb the wrong hill. Beyond 104 the other
# classes' softmax is 0 as well, and nothing is left to climb. Below, each dot is a correctly
# classified test image.
#
# *No rounding*, in the figure and the table above, is the same PGD, with its gradient computed from
# the log-odds, log((1 - p) / p). It is parallel to that of the cross-entropy, and does not round to
# 0 (`torch_attacks.log_odds`). What it breaks was never robust. Where nothing is rounded it should
# find what PGD finds and no more, even where another loss finds more: look at the kernel machine.
#
# Being sure need not hide anything, since what is left of the gradient may be enough. Models that
# PGD breaks all the same are not in the figure; the table has their shares (*rounds at least in
# part*, *to 0*).

# %%
if claimed:
    limits = {"rounded": torch_attacks.ROUNDED, "lost": torch_attacks.LOST}
    display(figures.save(figures.rounding(claimed, **limits), folder, "rounding"))

# %%
for title, found in titled.items():
    print(f"{title}: {found.verdict}", *found.reasons, sep="\n    ")

# %% [markdown]
# ## Checks

# %%
for found in diagnoses.values():
    assert found.strong <= found.claimed <= found.clean
    assert found.verdict in verdict.VERDICTS
for results in outcomes.values():
    evaluate.check_order(results)
for trained in (one for found in searches.values() for one in found.best):
    assert all(np.isfinite(line["loss"]) for line in trained.history)

# %% [markdown]
# ## Try it
#
# The models of this notebook, one image at a time. (Terms of $K(x, X_S)\,\alpha$ are shown for
# kernel machines.)

# %%
panel.AttackPanel(
    {records.title(*key): model for key, model in models.items()}, x_test[:50], y_test[:50],
    radius=experiment.threat.epsilon, norm=experiment.threat.norm, dataset=experiment.dataset.name,
)  # fmt: skip

# %% [markdown]
# ## What was found here

# %%
display(Markdown("\n".join(f"- {line}" for line in verdict.findings(titled))))

# %% [markdown]
# ## Exercises
#
# 1. Mask a network yourself: multiply the logits of a network with plain training by 1,000. What
#    does PGD leave now, and what does the verdict say? Which check fails first?
# 2. A paper reports 20 % at "8/255" for images that were standardised with a standard deviation of
#    0.2. Which radius in pixels was attacked?


# %% tags=["solution"] jupyter={"source_hidden": true}
class Loud(torch.nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return 1000 * self.net(x)


# %% tags=["solution"] jupyter={"source_hidden": true}
plain = next((found.best[0].net for key, found in searches.items() if key[2] == "plain"), None)
if plain is not None:
    found = diagnose.by_protocol(
        protocol, Loud(plain).eval(), x_test[:n], y_test[:n], n_steps=10, parts=["square"]
    )
    print(f"PGD leaves {found.claimed:.0%}, everything {found.strong:.0%}: {found.verdict}")
    print(*(check.name for check in found.checks if check.passed is False), sep=", ")

# %% tags=["solution"] jupyter={"source_hidden": true}
print(f"8/255 of a standard deviation of 0.2 is {8 / 255 * 0.2 * 255:.1f}/255 in pixels")

# %% [markdown]
# ## What it means
#
# Take a model that is called *masked* and read its column of the table from top to bottom.
#
# 1. **The claim.** So many images withstand FGSM and PGD, as in the paper's tables. That is a
#    statement about PGD.
# 2. **Is there something to follow?** A network may be very sure of the images that it classifies
#    correctly. Beyond log-odds of 104 the gradient is exactly 0. PGD moves by the sign of the
#    gradient, and the sign of 0 is 0: the image stays where it is and counts as robust (*zero
#    gradients*). Between 17 and 104 the right class's part is lost, and what remains may lead PGD
#    astray, or not. A model that stays far above chance in a ball in which every image can become
#    grey (*large radius*) cannot be robust there; its attacker is blind.
# 3. **The adversarial images are there.** The same PGD may find them when its gradient is not
#    rounded (*no rounding*), or when it maximises the margin of the logits; an attack that never
#    looks at a gradient (*square*), or the adversarial images of another model, may find them, too.
#    float64 need not be enough: it rounds as well, only later. The table's last checks are
#    stricter: they count what such attacks find *beyond* all others.
# 4. **Is it particular to distilled data?** Compare the lines of original images and of KIP's: same
#    network, same recipe. Where these are masked as well it is the training that hides the
#    gradient, and choosing epochs and rates by PGD accuracy cannot tell the two kinds of robustness
#    apart.
#
# Then take a model that is called *genuine*: other losses, precisions, steps and starts find next
# to nothing more, AutoAttack little, and accuracy comes down as the ball grows. *Nothing claimed*
# is said of a model of which next to nothing withstands FGSM and PGD: then nothing can be hidden.
# *Inconclusive* is what lies between: AutoAttack takes more than adversarially trained networks
# usually lose to it, and not most; or too few images are claimed to tell; or most of the claim
# stands, and a check fails all the same.
#
# A kernel machine may be masked with every gradient in place: PGD is then just too weak. Its
# outputs are small, so the cross-entropy pulls at all wrong classes at once instead of the nearest.
# What AutoAttack leaves is the most that data alone can be credited with.
