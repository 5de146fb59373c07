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

import dataclasses
import importlib.metadata
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import advkip
from advkip import answers, attacks, files, inputs, krr, nets, store
from advkip.attack_names import Attack
from advkip.config import Experiment
from advkip.models import judged
from advkip.progress import tqdm

TOLERANCE = 1e-5
"""How far an attacked image may leave the ball: rounding of float32 pixels and their norms."""


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


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How all models of an experiment are judged; calling it is `evaluate`."""

    threat: attacks.Threat
    step_size: float
    attack_names: tuple[str, ...]
    threat_l2: attacks.Threat | None = None
    step_size_l2: float | None = None
    seed: int = 0
    checkpoint_dir: str | Path | None = None

    @classmethod
    def of(cls, experiment: Experiment, folder=None) -> "Protocol":
        """The experiment's threats, steps and `evaluation.attacks`."""
        e = experiment
        return cls(
            attacks.Threat(e.threat.norm, e.threat.epsilon), e.threat.step_size,
            e.evaluation.attacks, attacks.Threat("l2", e.threat_l2.epsilon), e.threat_l2.step_size,
            e.seed, folder,
        )  # fmt: skip

    def with_attacks(self, *names: str) -> "Protocol":
        """The same with other attacks."""
        return dataclasses.replace(self, attack_names=names)

    def __call__(self, model, x, y, *, keep: int = 0, progress: bool = True) -> list[Outcome]:
        return evaluate(model, x, y, keep=keep, progress=progress, **vars(self))


@torch.inference_mode(False)
@torch.enable_grad()
def evaluate(
    model, x, y, *, threat, attack_names, step_size, threat_l2=None, step_size_l2=None, seed=0,
    batch_size=0, keep=0, mean=None, std=None, checkpoint_dir=None, progress=True,
) -> list[Outcome]:  # fmt: skip
    """Measures accuracy under attacks that accumulate (the accuracies of all tables).

    Args:
      model: a `krr.KernelMachine`, or a `torch.nn.Module` of images (n, C, H, W) in [0, 1] to
        logits, in evaluation mode. It is given copies of the images; the attacks' pixels are
        float32 (float64 for a network in float64), also where its own are float16 or bfloat16.
      x, y: images in [0, 1], shape (n, H, W, C), and integer labels (n,).
      threat: an `attacks.Threat`, of all attacks but those whose name ends in '-l2'.
      attack_names: see the module's text; 'clean' comes first by itself.
      step_size: of PGD, in pixel units.
      threat_l2, step_size_l2: of the attacks that end in '-l2'.
      seed: of random starts and of AutoAttack.
      batch_size: images at a time; 0 chooses.
      keep: how many attacked images to return of each attack, for figures.
      mean, std: of a network that was trained on standardised images, (x - mean) / std, a number
        or one for each channel; it is attacked in pixels all the same (see `published`).
      checkpoint_dir: folder that finished batches are written to, and continued from when the
        model, the images and the seed are the same; None for none.
      progress: shows a bar.

    Returns:
      A list of `Outcome`, 'clean' first.

    Raises:
      ValueError: an unknown attack, labels or images that do not fit (see `inputs`), a radius
        that looks like one of pixels in 0..255, a network in training mode, or whose answers depend
        on the batch, probabilities, sigmoids or a single number instead of logits, Square in an l2
        ball on images that it cannot tile, a checkpoint that cannot be read.
      FloatingPointError: logits that are not finite, or an attack that left the ball.
    """
    if isinstance(attack_names, str):
        raise ValueError(
            f"expected a list of attack_names, got {attack_names!r}; pass [{attack_names!r}]"
        )
    x = np.asarray(x)
    inputs.images(x)
    y = inputs.labels(y, len(x), vectors=False)
    plans = [(Attack("clean", "clean"), threat, None)]
    for attack in map(Attack.parse, dict.fromkeys(attack_names)):
        plans.append(_plan(attack, x, threat, step_size, threat_l2, step_size_l2))
    for _, ball, _ in plans:
        inputs.check_range(ball)
    model = nets.in_pixels(model, mean, std, channels=x.shape[3])
    net = judged(model, seed=seed, batch_size=batch_size, shape=x.shape[1:])
    size = net.batch_size
    some = x[: max(size, answers.ASKED)]
    first = net.logits(some)
    answers.check_logits(first, y, machine=isinstance(model, krr.KernelMachine))
    answers.check_order_of_images(net, some, first)
    done = _Checkpoint(checkpoint_dir, net, x, y)

    outcomes, robust = [], {}
    starts = range(0, len(y), size)
    with tqdm(
        total=len(plans) * len(starts), desc="attacks", unit="batch", disable=not progress
    ) as bar:
        for attack, ball, step in plans:
            name = attack.name
            kept, right = [], np.zeros(len(y), bool)
            for start in starts:
                part = slice(start, start + size)
                key = f"{name} {ball} {step} {start} {size}"
                needed = max(0, min(keep - start, size))
                found = done.get(key, needed)
                if found is None:
                    with nets.deterministic():
                        found = _attack(net, attack, x[part], y[part], ball, step)
                    found = found[0], found[1][:needed]
                    done.put(key, *found)
                right[part] = found[0]
                kept.append(found[1][:needed])
                bar.update()
                bar.set_postfix_str(f"{name} {right[: start + size].mean():.1%}", refresh=False)
            norm = ball.norm
            robust[norm] = robust.get(norm, outcomes[0].right if outcomes else right) & right
            plain = name == "clean" or attack.l2 or norm != "l2"
            outcomes.append(
                Outcome(
                    name if plain else name + "-l2", norm, 0.0 if name == "clean" else ball.epsilon,
                    float(robust[norm].mean()), float(right.mean()), robust[norm], right,
                    np.concatenate(kept),
                )
            )  # fmt: skip
    check_order(outcomes)
    return outcomes


def check_order(outcomes) -> None:
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


def check_inside(outcomes: list[Outcome], x: np.ndarray) -> None:
    """Raises FloatingPointError unless kept attacked images are in the ball around images x."""
    for one in outcomes:
        moved = attacks.distance(one.x_attacked, x[: len(one.x_attacked)], one.norm)
        if not (moved <= one.epsilon + TOLERANCE).all():
            raise FloatingPointError(
                f"expected {one.attack} to stay within {one.epsilon:g} ({one.norm}), got "
                f"{moved.max():g}; report this as a bug"
            )


def without_autoattack(names) -> list[str]:
    """Those of attacks' names that are quick on a kernel machine: FGSM and PGD."""
    return [name for name in names if Attack.parse(name).kind in ("fgsm", "pgd")]


def _plan(attack, x, threat, step_size, threat_l2, step_size_l2):
    """(attack, threat, step size)."""
    name = attack.name
    if attack.l2:
        if threat.norm == "l2":
            raise ValueError(
                f"expected attacks of one l2 ball, got {name!r} beside an l2 threat; pass "
                f"{name.removesuffix('-l2')!r}, or an l_inf threat beside threat_l2"
            )
        if threat_l2 is None or threat_l2.norm != "l2":
            raise ValueError(f"expected threat_l2 for {name!r}, got {threat_l2}; pass an l2 Threat")
        threat, step_size = threat_l2, step_size_l2
    inputs.check_radius(threat.norm, threat.epsilon, x.shape[1:])
    tiled = attack.kind in ("square", "autoattack") and threat.norm == "l2"
    if tiled and not square_tiles(x.shape[1:3]):
        raise ValueError(
            f"expected images that Square can tile in an l2 ball for {name!r}, got "
            f"{x.shape[1]} x {x.shape[2]}; pass other attacks ('apgd-ce', 'apgd-t', 'fab-t'), an "
            "l_inf threat, or images padded to 16, 20, 28 or 32 pixels"
        )
    if attack.kind == "pgd" and step_size is None:
        missing = "step_size_l2" if attack.l2 else "step_size"
        raise ValueError(f"expected {missing} for {name!r}, got None; pass one in pixel units")
    if attack.kind == "pgd" and not 0 <= step_size <= 2 * threat.epsilon:
        raise ValueError(
            f"expected a step size in [0, {2 * threat.epsilon:g}] for {name!r} with radius "
            f"{threat.epsilon:g}, got {step_size:g}; pass 2/255 for what is sometimes written 2"
        )
    return attack, threat, step_size


def square_tiles(shape) -> bool:
    """Whether the official Square's start in an l2 ball fits on images of shape (H, W).

    It puts H // s by W // s squares of side s = H // 5 side by side from an offset of
    (H - 5 s) // 2, and runs over the edge of some (fra31/auto-attack, issue 95).
    """
    side = shape[0] // 5
    if side < 2:
        return side == 1
    offset = (shape[0] - 5 * side) // 2
    return all(offset + size // side * side <= size for size in shape)


def _attack(net, attack, x, y, threat, step_size):
    """(which are right after the attack, attacked images), both checked."""
    name = attack.name
    attacked = x if name == "clean" else net.attacked(attack, x, y, threat, step_size)
    check_inside([Outcome(name, threat.norm, threat.epsilon, 0, 0, x, x, attacked)], x)
    attacks.check_images(attacked, threat)
    logits = net.logits(attacked)
    if not np.isfinite(logits).all():
        raise FloatingPointError(
            f"expected finite logits under {name}, got NaN or infinity; fit the machine with a "
            "larger diag_reg or in float64, or train the network with a smaller learning rate"
        )
    return logits.argmax(1) == y, attacked


class _Checkpoint:
    """Finished batches of an evaluation in one .npz, named after what was evaluated."""

    def __init__(self, folder, net, x, y):
        self.path, self.arrays = None, {}
        if not folder:
            return
        # Logits and gradients tell models apart whose difference is in no weight, as a rounded
        # input, which clean images may not show.
        sample = x[:16]
        noise = np.random.default_rng(0).uniform(-0.1, 0.1, sample.shape)
        near = np.clip(sample + noise, x.min(), x.max()).astype(x.dtype)
        seen = [see(a) for a in (sample, near) for see in (net.logits, net.gradient)]
        self.about = {
            "version": advkip.__version__, "seed": net.seed, "model": net.model,
            "packages": [importlib.metadata.version(name) for name in ("torch", "pyautoattack")],
            "images and weights": files.digest_of_arrays(x, y, *seen, *net.weights()),
        }  # fmt: skip
        self.path = Path(folder) / f"attacks-{store.digest(self.about)}.npz"
        if self.path.exists():
            self.arrays, _ = store.load(self.path, about=self.about)

    def get(self, key, keep):
        """(right, attacked images) of a finished batch, or None."""
        if f"right {key}" not in self.arrays or len(self.arrays[f"kept {key}"]) < keep:
            return None
        return self.arrays[f"right {key}"], self.arrays[f"kept {key}"]

    def put(self, key, right, kept):
        if self.path:
            self.arrays |= {f"right {key}": right, f"kept {key}": kept}
            store.save(self.path, self.arrays, about=self.about)
