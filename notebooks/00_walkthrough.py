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
# # Walkthrough: can data alone make a classifier robust?
#
# **0 walkthrough** → [1 kernels](01_kernels.ipynb) → [2 transfer](02_transfer.ipynb) → [3
# CNNs](03_cnns.ipynb) → [4 shortcomings](04_shortcomings.ipynb) → [5
# remedies](05_remedies.ipynb)
#
# *You will know* a neural tangent kernel, an attack on it, and how training images are optimised
# against it. *You need* what a derivative and a linear system are; Python. *It takes* half a
# minute on a CPU. Words are explained in the glossary (`notebooks/glossary.md`).
#
# A classifier that tells digits apart perfectly well can be fooled by a change of its input that we
# hardly see. The usual cure changes the *training*: adversarial training shows the net attacked
# images over and over. Tsilivis, Su and Kempe (2022) ask another question: could we change the
# *training data* instead, so that ordinary training on it gives a robust classifier?
#
# This notebook makes that question concrete with a few dozen tiny digits, in four steps:
#
# 1. what a neural tangent kernel (NTK) is, and how it classifies;
# 2. how an attack fools it;
# 3. how the training images themselves can be optimised;
# 4. what has been won, and what has not.

# %% tags=["parameters"]
n_images: int = 50  # training images, over all ten classes
radius: float = 0.15  # the attacker may change every pixel by this much; pixels lie in [0, 1]
outer_steps: int = 100  # steps of Algorithm 1
root_seed: int = 0  # every random choice derives from it
output: str = "../reports/scratch"  # where the figures go

# %%
import jax.numpy as jnp
import numpy as np

from advkip import (
    attacks,
    checked,
    data,
    distill,
    evaluate,
    figures,
    kernels,
    krr,
    panel,
    pictures,
)
from advkip.config import Experiment

# %% [markdown]
# ## The data
#
# Scikit-learn's digits: 8 x 8 pixels in shades of grey. We take very few of them for training, the
# same number of each class, and keep others for validation and for the final test.

# %%
digits = data.load("digits")
named = {
    "support.n_support": "n_images", "threat.epsilon": "radius", "adv_kip.n_steps": "outer_steps",
    "epsilon": "radius", "seed": "root_seed",
}  # fmt: skip
with checked.named(named):
    experiment = Experiment.from_params({
        "seed": root_seed, "support": {"n_support": n_images, "n_target": 200},
        "threat": {"epsilon": radius, "step_size": radius / 4}, "adv_kip": {"n_steps": outer_steps},
    })  # fmt: skip
    splits = data.split(digits, experiment)
{key: value.shape for key, value in splits._asdict().items() if key.startswith("x_")}

# %% [markdown]
# ## A neural net that is a kernel
#
# Train a very wide net with small gradient steps, and something surprising happens: each weight
# hardly moves, so the net stays close to its first-order expansion in the weights,
# $f(x) \approx f_0(x) + \nabla_\theta f_0(x) \cdot \Delta\theta$. That is a *linear* model, whose
# features are the gradients $\nabla_\theta f_0(x)$. All that a linear model needs to know about two
# images is the inner product of their features,
#
# $$k(x, s) = \nabla_\theta f_0(x) \cdot \nabla_\theta f_0(s),$$
#
# the **neural tangent kernel**. In the limit of infinite width it no longer depends on the random
# initialisation, and for ReLU nets it has a closed form: a few lines of arithmetic on the angle
# between the two images and their lengths. `kernels.by_name("fc3")` is the kernel of a
# fully-connected net with three hidden layers.
#
# The curve shows how similar two images count as their angle grows. It has a *kink* at angle 0:
# an image's influence falls off quickly around it, the more so the deeper the net.

# %%
angles = np.linspace(0, np.pi / 2, 100)
circle = jnp.asarray(np.stack([np.cos(angles), np.sin(angles)], axis=1))
profiles = {}
for net in ("fc1", "fc3", "fc7"):
    similarity = kernels.by_name(net)(circle, circle[:1])[:, 0]
    profiles[net] = similarity / similarity[0]
figures.save(figures.kernel_profile(np.cos(angles), profiles), output, "walkthrough_kernel")

# %% [markdown]
# ## Kernel regression: training in one line
#
# Training that wide net to the end on images $X_S$ with labels $Y_S$ is the same as solving one
# linear system (the paper's Eq. 4):
#
# $$f(x) = K_{xS}\,(K_{SS} + \lambda I)^{-1} Y_S .$$
#
# No epochs, no learning rate: the classifier is a *formula in the training data*. Keep that in
# mind; it is what makes the rest possible.

# %%
ntk = kernels.of(experiment.kernel)
x_support, y_support = distill.initial_support(experiment, splits)
original = krr.fit(ntk, x_support, y_support, diag_reg=experiment.kernel.diag_reg).machine
predicted = original(splits.x_test).argmax(1)
print(f"{n_images} images, test accuracy {(predicted == splits.y_test).mean():.1%}")

# %% [markdown]
# ## An attack
#
# The attacker knows the formula, too. It looks for the change of at most `radius` in each pixel
# that makes the loss as large as possible, by *projected gradient descent* (PGD, Eq. 8): follow
# the sign of the loss's gradient *with respect to the image*, and step back into the allowed box.

# %%
threat = attacks.Threat("linf", radius)
settings = {"threat": threat, "attack_names": ["fgsm", "pgd10"], "step_size": radius / 4}
before = evaluate.evaluate(
    original, splits.x_test, splits.y_test, keep=len(splits.x_test), **settings
)
{outcome.attack: f"{outcome.accuracy:.1%}" for outcome in before}

# %%
fooled = np.flatnonzero(before[0].right & ~before[-1].right)[:8]
attacked = before[-1].x_attacked[fooled]
wrong = np.asarray(original(attacked).argmax(1))
titles = [f"{a} taken for {b}" for a, b in zip(splits.y_test[fooled], wrong, strict=True)]
figures.save(
    pictures.attacked_images(splits.x_test[fooled], attacked, titles), output, "walkthrough_attack"
)

# %% [markdown]
# ## Changing the data instead
#
# Since $f$ is a formula in $X_S$ and $Y_S$, so is its error on attacked images. That error has a
# gradient with respect to the *training images*, and we can walk down it. That is Algorithm 1,
# adversarial KIP. Each outer step
#
# 1. draws a batch of training images, mostly others, and attacks it with PGD (the inner maximum),
# 2. moves the $n_s$ training images, and their labels, a little, such that the classifier
#    *they define* does better on the attacked batch (the outer minimum).

# %%
distilled = distill.distill(experiment, splits, progress=False)
figures.save(
    figures.training_curves({"accuracy on validation images": distilled.history}),
    output, "walkthrough_curves",
)  # fmt: skip

# %% [markdown]
# The training images are still legible, but something has been written into them. The bars are
# the labels, which were learned as well: one bar a class, grey as they were and blue as they are
# now. They may say "more than certainly a 3", or "a 3, and rather not an 8".

# %%
figures.save(
    pictures.before_and_after(x_support, y_support, distilled.x_support, distilled.y_support),
    output, "walkthrough_images",
)  # fmt: skip

# %% [markdown]
# ## What has been won
#
# The same kernel, the same formula, the same number of images; only the images have changed.

# %%
robust = krr.fit(ntk, distilled.x_support, distilled.y_support).machine
after = evaluate.evaluate(robust, splits.x_test, splits.y_test, **settings)
for images, outcomes in {"original": before, "distilled": after}.items():
    print(f"{images:10}", {o.attack: f"{o.accuracy:.1%}" for o in outcomes})

# %%
epsilons = [0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5]
curves = {"original images": [], "distilled images": []}
for machine, curve in zip((original, robust), curves.values(), strict=True):
    for size in epsilons:
        ball = {**settings, "threat": attacks.Threat("linf", size), "step_size": size / 4}
        outcomes = evaluate.evaluate(machine, splits.x_test, splits.y_test, progress=False, **ball)
        curve.append(outcomes[-1].accuracy)
figures.save(
    figures.accuracy_against(epsilons, curves, label="attack radius (pixel units)"),
    output, "walkthrough_epsilon",
)  # fmt: skip

# %% [markdown]
# ## Try it
#
# Pick an image, a radius and an attack. Where does the answer change? Under the images: the logits
# before (grey) and after (red), the loss along the attack, and the training images whose terms in
# $K(x, X_S)\,\alpha$ speak loudest for the answer.

# %%
panel.AttackPanel(
    {"distilled images": robust, "original images": original},
    splits.x_test[:100], splits.y_test[:100], radius=radius,
)  # fmt: skip

# %% [markdown]
# And Algorithm 1 while it runs: press *run*, watch images, labels (blue; grey as they were) and
# accuracy, stop it, move the radius, go on.

# %%
panel.LivePanel(experiment, splits)

# %% [markdown]
# ## Is it real?
#
# A robust curve must fall to nothing when the attacker may do anything, as it does here: at a
# radius of 0.5 every image can be turned grey (the last cell checks it). But a PGD attack only
# shows that *PGD* found nothing. A classifier can also look robust because its gradients point
# nowhere useful, and then a better attack breaks it. The paper itself found this for neural nets
# trained on such data. A robust number in this project therefore never stands without the attack
# it was measured with.
#
# Next: `01_kernels` does this at full size, with every table and figure of the paper on kernels.

# %% [markdown]
# ## Exercises
#
# 1. How much of what was won is in the *labels*? Fit the kernel to the distilled images with the
#    original labels, and to the original images with the distilled labels.
# 2. At a radius of 0.5 no curve may be above chance, whatever the classifier. Why? Name one image
#    that lies in the ball of every test image.
#
# (Solutions are in the folded cells below.)

# %% tags=["solution"] jupyter={"source_hidden": true}
for name, pair in {
    "distilled images, original labels": (distilled.x_support, y_support),
    "original images, distilled labels": (x_support, distilled.y_support),
}.items():
    half = krr.fit(ntk, *pair).machine
    outcomes = evaluate.evaluate(half, splits.x_test, splits.y_test, progress=False, **settings)
    print(f"{name}:", {o.attack: f"{o.accuracy:.1%}" for o in outcomes})

# %% tags=["solution"] jupyter={"source_hidden": true}
grey = np.full_like(splits.x_test[:1], 0.5)
assert (attacks.distance(grey, splits.x_test, "linf") <= 0.5).all()
print("the grey image is in every ball, and the classifier gives it one answer:", end=" ")
print(int(robust(grey).argmax()))

# %% [markdown]
# ## Checks

# %%
assert np.isfinite(distilled.x_support).all() and np.isfinite(distilled.y_support).all()
assert all(a.accuracy >= b.accuracy for a, b in zip(after, after[1:], strict=False))
assert after[-1].accuracy > before[-1].accuracy
assert all(curve[-1] <= 0.1 for curve in curves.values())
