"""Accuracy of kernel machines and networks under attacks, as the worst case of each image.

An image counts as robust against an attack when it is classified correctly after it *and* after
every attack before it in the list that has the same norm. Accuracy can therefore only fall along
the list, as it must: the clean image, and whatever one attack finds, are points of the ball that
the next one searches.

Attacks have names:

    fgsm           one step of length epsilon
    pgd40          40 steps from the image itself, as in the paper; pgd40x5: 5 random starts
    autoattack     the official AutoAttack, version 'standard' (Croce and Hein 2020): apgd-ce,
                   apgd-t, fab-t and square, the figure that RobustBench reports
    apgd-ce, apgd-t, fab-t, square   parts of it, under their own names because they are weaker

and each of them ends in '-l2' when its threat model is an l2 ball. On a kernel machine FGSM and PGD
run in JAX, AutoAttack through `bridge`.
"""

import hashlib
import importlib.metadata
import re
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import torch
from tqdm import tqdm

import advkip
from advkip import attacks, bridge, files, krr, nets, torch_attacks
from advkip.config import ATTACK, ATTACK_PARTS, UNTARGETED_PARTS

TOLERANCE = 1e-5
"""How far an attacked image may leave the ball: rounding of float32 pixels and their norms."""

BATCH = 100 if nets.device().type == "cpu" else 500
"""Images that a network is given at a time."""


class Outcome(NamedTuple):
    """One attack on n images."""

    attack: str  # "clean", "fgsm", "pgd10", "pgd10-l2", "autoattack", ...
    norm: str
    epsilon: float
    accuracy: float  # worst case of this attack and those before it, in [0, 1]
    accuracy_alone: float  # of this attack by itself
    robust: np.ndarray  # bool, shape (n,): which images are right in the worst case
    right: np.ndarray  # bool, shape (n,): which are right after this attack by itself
    x_attacked: np.ndarray  # the first `keep` attacked images


def evaluate(
    model, x, y, *, threat, attack_names, step_size, threat_l2=None, step_size_l2=None, seed=0,
    batch_size=0, keep=0, checkpoint_dir=None, progress=True,
):  # fmt: skip
    """Measures accuracy under attacks that accumulate (the accuracies of all tables).

    Args:
      model: a `krr.KernelMachine`, or a `torch.nn.Module` of images (n, C, H, W) in [0, 1] to
        logits, in evaluation mode.
      x, y: images in [0, 1], shape (n, H, W, C), and integer labels (n,).
      threat: an `attacks.Threat`, of all attacks but those whose name ends in '-l2'.
      attack_names: see the module's text; 'clean' comes first by itself.
      step_size: of PGD, in pixel units.
      threat_l2, step_size_l2: of the attacks that end in '-l2'.
      seed: of random starts and of AutoAttack.
      batch_size: images at a time; 0 chooses.
      keep: how many attacked images to return of each attack, for figures.
      checkpoint_dir: folder that finished batches are written to, and continued from when the
        model, the images and the seed are the same; None for none.
      progress: shows a bar.

    Returns:
      A list of `Outcome`, 'clean' first.

    Raises:
      ValueError: an unknown attack, labels that do not fit, pixels outside the range, a radius
        that looks like one of pixels in 0..255, a network in training mode, probabilities instead
        of logits, a checkpoint that cannot be read.
      FloatingPointError: logits that are not finite, or an attack that left the ball.
    """
    x, y = np.asarray(x), np.asarray(y)
    if y.shape != x.shape[:1] or not np.issubdtype(y.dtype, np.integer) or not len(y):
        raise ValueError(
            f"expected one integer label an image, got labels {y.shape} of {y.dtype} for images "
            f"{x.shape}; pass argmax of one-hot labels"
        )
    y = y.astype("int64")
    attacks.check_images(x, threat)
    plans = {"clean": (threat, None)}
    for name in attack_names:
        plans[name] = _plan(name, x, threat, step_size, threat_l2, step_size_l2)
    wrapped = wrap(model, seed=seed, batch_size=batch_size)
    size = wrapped.batch_size
    _check_logits(wrapped.logits(x[:size]), y)
    done = _Checkpoint(checkpoint_dir, wrapped, x, y)

    outcomes, robust = [], {}
    starts = range(0, len(y), size)
    with tqdm(
        total=len(plans) * len(starts), desc="attacks", unit="batch", disable=not progress
    ) as bar:
        for name, (ball, step) in plans.items():
            kept, right = [], np.zeros(len(y), bool)
            for start in starts:
                part = slice(start, start + size)
                key = f"{name} {ball} {step} {start} {size}"
                needed = max(0, min(keep - start, size))
                found = done.get(key, needed)
                if found is None:
                    with nets.deterministic():
                        found = _attack(wrapped, name, x[part], y[part], ball, step)
                    found = found[0], found[1][:needed]
                    done.put(key, *found)
                right[part] = found[0]
                kept.append(found[1][:needed])
                bar.update()
                bar.set_postfix_str(f"{name} {right[: start + size].mean():.1%}", refresh=False)
            norm = ball.norm
            robust[norm] = robust.get(norm, outcomes[0].right if outcomes else right) & right
            plain = name == "clean" or name.endswith("-l2") or norm != "l2"
            outcomes.append(
                Outcome(
                    name if plain else name + "-l2", norm, 0.0 if name == "clean" else ball.epsilon,
                    float(robust[norm].mean()), float(right.mean()), robust[norm], right,
                    np.concatenate(kept),
                )
            )  # fmt: skip
    check_order(outcomes)
    return outcomes


def wrap(model, *, seed=0, batch_size=0):
    """A network or kernel machine with `net`, `tensor` and `logits`; for `diagnose`."""
    kind = _Machine if isinstance(model, krr.KernelMachine) else _Network
    return kind(model, seed, batch_size)


def check_order(outcomes):
    """Raises ValueError unless accuracy falls, image by image, along the attacks of each norm.

    It does in what `evaluate` returns; figures from elsewhere often do not (an AutoAttack accuracy
    above PGD's, an attack with an accuracy above the clean one).
    """
    clean = outcomes[0]
    last = {}
    for outcome in outcomes:
        before = last.get(outcome.norm, clean)
        if (outcome.robust & ~before.robust).any() or outcome.accuracy > before.accuracy:
            raise ValueError(
                f"expected accuracy under {outcome.attack} to be at most {before.accuracy:.4f}, as "
                f"under {before.attack}, got {outcome.accuracy:.4f}; take the worst case per image"
            )
        last[outcome.norm] = outcome


def _plan(name, x, threat, step_size, threat_l2, step_size_l2):
    """(threat, step size) of an attack's name."""
    base = name.removesuffix("-l2")
    if not re.fullmatch(ATTACK, name):
        raise ValueError(
            f"expected attacks 'fgsm', 'pgd10', 'pgd40x5', 'autoattack' or one of {ATTACK_PARTS}, "
            f"with '-l2' behind it or not, got {name!r}; pass one of them"
        )
    if name.endswith("-l2"):
        if threat.norm == "l2":
            raise ValueError(
                f"expected attacks of one l2 ball, got {name!r} beside an l2 threat; pass "
                f"{base!r}, or an l_inf threat beside threat_l2"
            )
        if threat_l2 is None or threat_l2.norm != "l2":
            raise ValueError(f"expected threat_l2 for {name!r}, got {threat_l2}; pass an l2 Threat")
        threat, step_size = threat_l2, step_size_l2
    diameter = x[0].size ** 0.5
    if threat.norm == "l2" and threat.epsilon > diameter:
        raise ValueError(
            f"expected an l2 radius of at most {diameter:.1f}, the largest distance of two images "
            f"in [0, 1], got {threat.epsilon:g}; pass 128/255 for what is sometimes written 128"
        )
    if base.startswith("pgd") and step_size is None:
        raise ValueError(f"expected step_size_l2 for {name!r}, got None; pass one in pixel units")
    if base.startswith("pgd") and not 0 <= step_size <= 2 * threat.epsilon:
        raise ValueError(
            f"expected a step size in [0, {2 * threat.epsilon:g}] for {name!r} with radius "
            f"{threat.epsilon:g}, got {step_size:g}; pass 2/255 for what is sometimes written 2"
        )
    return threat, step_size


def _attack(wrapped, name, x, y, threat, step_size):
    """(which are right after the attack, attacked images), both checked."""
    base = name.removesuffix("-l2")
    attacked = x if name == "clean" else wrapped.attack(base, x, y, threat, step_size)
    distance = float(np.max(attacks.distance(attacked, x, threat.norm)))
    if not distance <= threat.epsilon + TOLERANCE:
        raise FloatingPointError(
            f"expected {name} to stay within {threat.epsilon:g} ({threat.norm}), got {distance:g}; "
            "report this as a bug"
        )
    attacks.check_images(attacked, threat)
    logits = wrapped.logits(attacked)
    if not np.isfinite(logits).all():
        raise FloatingPointError(
            f"expected finite logits under {name}, got NaN or infinity; fit the machine with a "
            "larger diag_reg or in float64, or train the network with a smaller learning rate"
        )
    return logits.argmax(1) == y, attacked


class _Network:
    """A PyTorch network as `evaluate` needs it: arrays in, arrays out."""

    def __init__(self, net, seed, batch_size):
        if not isinstance(net, torch.nn.Module):
            raise ValueError(
                f"expected a krr.KernelMachine or a torch.nn.Module, got {type(net).__name__}; "
                "pass one of them"
            )
        nets.check_evaluated(net)
        self.net, self.seed, self.batch_size = net, seed, batch_size or BATCH
        self.model = f"{type(net).__qualname__} {net!r}"
        own = [*net.parameters(), *net.buffers()]
        self.like = next((t for t in own if t.is_floating_point()), None)

    def weights(self):
        """What the model is, as arrays."""
        return [tensor.cpu().numpy() for tensor in self.net.state_dict().values()]

    def tensor(self, x):
        """Images as the network takes them: on its device, in its dtype."""
        return nets.to_tensor(x, like=self.like)

    def like_own(self, x):
        """A tensor of images on the network's device, in its dtype."""
        return x if self.like is None else x.to(self.like.device, self.like.dtype)

    def gradient(self, x):
        """d(sum of the logits)/dx, or an empty array where autograd sees none."""
        x = self.tensor(x).requires_grad_()
        try:
            with torch.enable_grad(), nets.deterministic():
                # A copy, since the network may change its input in place.
                (found,) = torch.autograd.grad(self.net(x.clone()).sum(), x, allow_unused=True)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, BufferError, TypeError):
            found = None  # detached, or computed elsewhere (NumPy and DLPack refuse such a tensor)
        return np.zeros(0) if found is None else found.cpu().numpy()

    def logits(self, x):
        with torch.no_grad(), nets.deterministic():
            parts = [self.net(a) for a in self.tensor(x).split(self.batch_size)]
        return torch.cat(parts).cpu().numpy()

    def attack(self, name, x, y, threat, step_size):
        """Attacked images of an attack's name without '-l2'."""
        x = self.tensor(x)
        y = torch.as_tensor(y).to(x.device)
        if not (name == "fgsm" or name.startswith("pgd")):
            return nets.to_array(_autoattack(self.net, name, x, y, threat, self.seed))
        if name == "fgsm":
            return nets.to_array(torch_attacks.fgsm(self.net, x, y, threat=threat))
        steps, restarts = _numbers(name)
        attacked = torch_attacks.pgd(
            self.net, x, y, threat=threat, n_steps=steps, step_size=step_size,
            n_restarts=restarts or 1,
            generator=torch.Generator().manual_seed(self.seed) if restarts else None,
        )  # fmt: skip
        return nets.to_array(attacked)


class _Machine(_Network):
    """A kernel machine; what JAX has of attacks runs there, the rest through the bridge."""

    def __init__(self, machine, seed, batch_size):
        net = bridge.KernelNet(machine, batch_size=batch_size)
        super().__init__(net, seed, net.batch_size)
        self.machine, self.model = machine, f"{machine.kernel}"

    def weights(self):
        return [np.asarray(self.machine.x_support), np.asarray(self.machine.alpha)]

    def logits(self, x):
        return np.asarray(attacks.predict(self.machine, x, batch_size=self.batch_size))

    def attack(self, name, x, y, threat, step_size):
        if name == "fgsm":
            attack = partial(attacks.fgsm, self.machine, threat=threat)
        elif name.startswith("pgd"):
            steps, restarts = _numbers(name)
            attack = partial(
                attacks.pgd, self.machine, threat=threat, n_steps=steps, step_size=step_size,
                n_restarts=restarts or 1, key=jax.random.key(self.seed) if restarts else None,
            )  # fmt: skip
        else:
            return super().attack(name, x, y, threat, step_size)
        return np.asarray(attack(x, y))


class _ContiguousGradient(torch.autograd.Function):
    """The identity, with a gradient that can be viewed: AutoAttack does, and that of a convolution
    on colour images may have its channels last in memory."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return gradient.contiguous()


def _autoattack(net, name, x, y, threat, seed):
    """The official code, 'standard' or one of its parts."""
    from pyautoattack import AutoAttack

    with torch.no_grad():
        n_classes = net(x[:1]).shape[1]
    if n_classes < 4 and name not in UNTARGETED_PARTS:
        raise ValueError(
            f"expected 4 classes or more for {name!r}, whose targeted losses need them, got "
            f"{n_classes}; pass 'apgd-ce' or 'square'"
        )
    if (threat.low, threat.high) != (0, 1):
        raise ValueError(
            f"expected the range [0, 1] for {name!r}, got [{threat.low}, {threat.high}]; pass a "
            "Threat with low 0 and high 1, and images that fit"
        )

    def logits(x_single):  # it works in single precision, which the network need not
        return net(_ContiguousGradient.apply(x_single).to(x.dtype)).float()

    adversary = AutoAttack(
        logits, version="standard", seed=seed, norm={"linf": "Linf", "l2": "L2"}[threat.norm],
        eps=threat.epsilon, device=x.device,
    )  # fmt: skip
    adversary.verbose = False
    # As 'standard' has it for 10 classes; with fewer, every other class is a target.
    targets = min(9, n_classes - 1)
    adversary.apgd_targeted.n_target_classes = adversary.fab.n_target_classes = targets
    if name != "autoattack":
        adversary.attacks_to_run = [name]
    return adversary.run_standard_evaluation(x.float(), y, batch_size=len(x))[0].to(x.dtype)


def _numbers(name):
    """(steps, random restarts or 0) of 'pgd40' or 'pgd40x5'."""
    steps, _, restarts = name[3:].partition("x")
    return int(steps), int(restarts or 0)


def _check_logits(logits, y):
    if logits.ndim != 2 or len(logits) == 0 or y.max() >= logits.shape[1] or y.min() < 0:
        raise ValueError(
            f"expected logits (n, classes) for labels {y.min()} to {y.max()}, got shape "
            f"{logits.shape}; pass a model with one logit a class"
        )
    if not np.isfinite(logits).all():
        raise FloatingPointError(
            "expected finite logits on clean images, got NaN or infinity; fit the machine with a "
            "larger diag_reg, or train the network with a smaller learning rate"
        )
    if (logits >= 0).all() and np.allclose(logits.sum(1), 1, atol=1e-4):
        raise ValueError(
            "expected logits, got rows that are probabilities; remove the softmax, which flattens "
            "the gradients that attacks need"
        )


class _Checkpoint:
    """Finished batches of an evaluation in one .npz, named after what was evaluated."""

    def __init__(self, folder, wrapped, x, y):
        self.path, self.arrays = None, {}
        if not folder:
            return
        versions = [importlib.metadata.version(name) for name in ("torch", "pyautoattack")]
        about = f"{advkip.__version__} {versions} {wrapped.seed} {x.shape} {wrapped.model}"
        identity = hashlib.sha256(about.encode())
        # Logits and gradients tell models apart whose difference is in no weight, as a rounded
        # input, which clean images may not show.
        sample = x[:16]
        noise = np.random.default_rng(0).uniform(-0.1, 0.1, sample.shape)
        near = np.clip(sample + noise, x.min(), x.max()).astype(x.dtype)
        seen = [look(a) for a in (sample, near) for look in (wrapped.logits, wrapped.gradient)]
        for array in (x, y, *seen, *wrapped.weights()):
            identity.update(np.ascontiguousarray(array))
        self.path = Path(folder) / f"checkpoint-attacks-{identity.hexdigest()[:12]}.npz"
        if self.path.exists():
            try:
                with np.load(self.path, allow_pickle=False) as file:
                    self.arrays = {key: file[key] for key in file.files}
            except Exception as error:
                raise ValueError(
                    f"expected a checkpoint in {self.path}, got {error}; delete the file to start "
                    "again"
                ) from error

    def get(self, key, keep):
        """(right, attacked images) of a finished batch, or None."""
        if f"right {key}" not in self.arrays or len(self.arrays[f"kept {key}"]) < keep:
            return None
        return self.arrays[f"right {key}"], self.arrays[f"kept {key}"]

    def put(self, key, right, kept):
        if self.path:
            self.arrays |= {f"right {key}": right, f"kept {key}": kept}
            with files.replacing(self.path) as file:
                np.savez(file, **self.arrays)
