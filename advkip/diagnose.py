"""Is a measured robustness real? Checks for gradient masking, and one verdict with its evidence.

The figure in question, the *claim*, is what papers report: accuracy under FGSM and PGD with the
cross-entropy loss. Everything else here asks the same of the images that make up the claim: does
one break that another attacker can reach in the same ball? Such an image was never robust. That is
proof, whatever the reason; the other checks tell the reason, or that an attack cannot see (Athalye
et al. 2018; Carlini et al. 2019; Pintor et al. 2022).

The verdict:

    masked         of the claimed images fewer than half (MASKED) are left, and chance does not
                   explain that: the 95 % interval of the share ends below GENUINE. Or fewer than
                   GENUINE are left, and a check shows that PGD cannot see (BLINDNESS): there is no
                   gradient, or not even a ball that holds a grey image lets it fool the model
    genuine        at least GENUINE are left, the interval begins above MASKED, and no check fails;
                   or hardly any were claimed (at most NOTHING of all images)
    inconclusive   anything else, with the checks that failed

Where the thresholds come from: adversarially trained networks in the paper keep 0.78 to 0.98 of
their accuracy under PGD when AutoAttack comes (Tables 5, 7), networks whose gradients are hidden
0.00 to 0.02 (Tables 6, 10). MASKED and GENUINE stand between; the tests hold them against networks
that were masked on purpose, undefended ones and adversarially trained ones.
"""

import logging
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from scipy.stats import binomtest
from tqdm import tqdm

from advkip import around, evaluate, nets, torch_attacks
from advkip.attacks import Threat
from advkip.config import ATTACK_PARTS

MASKED, GENUINE, NOTHING = 0.5, 0.7, 0.05
"""Shares of the claimed images that are left; see above."""

WHITE_BOX, BLIND, ZERO, CHANCE = 0.3, 0.15, 0.05, 0.1
"""Limits of the checks: claimed images that a white-box attack with another loss, scale or
precision may break; that an attack which sees no gradient may break; images without a gradient or
with accuracies in the wrong order; accuracy above chance in a ball that holds a grey image."""

BLINDNESS = {"zero gradients", "vanishing gradients", "large radius"}
"""Checks that show, when they fail, that PGD's figure says nothing about the model."""

DRAWS = 10
"""Passes that are averaged over when a model is random, and random points of the noise check."""


class Check(NamedTuple):
    """One question and its answer."""

    name: str
    value: float | None  # a share of images in [0, 1]; None: could not be asked
    limit: float
    passed: bool | None
    text: str  # what the value is


class Diagnosis(NamedTuple):
    """A verdict and what it rests on. Accuracies and shares in [0, 1]."""

    verdict: str  # "genuine", "masked" or "inconclusive"
    reasons: list  # sentences
    n: int  # images
    clean: float
    claimed: float  # accuracy under FGSM and PGD, worst case of each image
    strong: float  # what of it is left after every attack
    kept: tuple  # strong / claimed with its 95 % interval: (share, low, high); None without claim
    checks: list  # `Check`s
    broken: dict  # {attack: share of the claimed images that it breaks}
    sweep: dict  # {radius: accuracy under PGD, worst case over the radii so far}
    gradients: dict  # {"right", "wrong"}: mean input-gradient norm of such images; None: no such
    left: np.ndarray  # bool (n,): images that withstood everything

    def to_dict(self):
        """Plain JSON values, without the images."""
        fields = self._asdict()
        fields.pop("left")
        fields["checks"] = [check._asdict() for check in self.checks]
        fields["sweep"] = {f"{radius:g}": value for radius, value in self.sweep.items()}
        return fields


def diagnose(
    model, x, y, *, threat, step_size, n_steps=40, sources=None, parts=ATTACK_PARTS, seed=0,
    batch_size=0, checkpoint_dir=None, progress=True,
):  # fmt: skip
    """Asks of a claimed robustness whether it is real (see the module's text).

    Args:
      model: a network or a kernel machine, as for `evaluate.evaluate`. One that is random is also
        attacked through the mean of its logits; one without gradients is attacked all the same.
      x, y: images in [0, 1], shape (n, H, W, C), and integer labels; 100 or more say something.
      threat, step_size: of the claim, as for `evaluate.evaluate`.
      n_steps: of the claim's PGD.
      sources: {name: network or kernel machine} whose adversarial images are tried on the model.
      parts: of AutoAttack (`config.ATTACK_PARTS`), each tried on all claimed images; fewer are
        quicker, and then nothing here is AutoAttack 'standard'.
      seed: of everything random; the same seed gives the same verdict.
      batch_size, checkpoint_dir, progress: as for `evaluate.evaluate`.

    Returns:
      A `Diagnosis`.

    Raises:
      ValueError, FloatingPointError: as `evaluate.evaluate`; an unknown part; a radius of 0.
    """
    if set(parts) - set(ATTACK_PARTS):
        raise ValueError(f"expected parts of {ATTACK_PARTS}, got {parts!r}; pass a choice of them")
    if not (threat.epsilon > 0 and n_steps > 0):
        raise ValueError(
            f"expected epsilon > 0 and n_steps > 0, got {threat.epsilon}, {n_steps}; pass the "
            "threat and the steps of the figure in question"
        )
    with torch.random.fork_rng(), nets.deterministic():
        torch.manual_seed(seed)
        measure = partial(
            evaluate.evaluate, seed=seed, batch_size=batch_size, checkpoint_dir=checkpoint_dir,
            progress=progress,
        )  # fmt: skip
        case = _Case(model, np.asarray(x), np.asarray(y), threat, step_size, n_steps, seed, measure)
        with tqdm(desc="diagnosis", unit="check", disable=not progress) as bar:
            for step in (
                case.claim, case.look_at_gradients, case.grow_the_ball, case.attack_again,
                partial(case.transfer, sources or {}), partial(case.autoattack, parts),
            ):  # fmt: skip
                step()
                bar.update(len(case.checks) - bar.n)
                bar.set_postfix_str(f"claimed {case.claimed.mean():.1%}, left {case.left:.1%}")
        return case.conclusion()


def judge(n_left, n_claimed, n, failed):
    """(verdict, reasons, (share left, low, high)) of counts and the names of failed checks."""
    if n_claimed <= NOTHING * n:
        reason = f"{n_claimed} of {n} images are claimed, so there is nothing that could be hidden"
        return "genuine", [reason], None
    share = n_left / n_claimed
    interval = binomtest(n_left, n_claimed).proportion_ci(method="wilson")
    reasons = [
        f"of the {n_claimed} images that withstand FGSM and PGD, {n_left} withstand every attack "
        f"({share:.0%}, 95 % interval {interval.low:.0%} to {interval.high:.0%})"
    ]
    reasons += [f"failed: {name}" for name in failed]
    blind = BLINDNESS & set(failed)
    if (share < MASKED and interval.high < GENUINE) or (share < GENUINE and blind):
        verdict = "masked"
    elif share >= GENUINE and interval.low > MASKED and not failed:
        verdict = "genuine"
    else:
        verdict = "inconclusive"
        if not failed:
            reasons.append(
                "too few claimed images, or a share left that speaks for neither"
                if interval.high - interval.low > GENUINE - MASKED
                else "a share left that speaks for neither"
            )
    return verdict, reasons, (share, float(interval.low), float(interval.high))


class _Case:
    """A model, its images, and what has been found so far."""

    def __init__(self, model, x, y, threat, step_size, n_steps, seed, measure):
        self.x, self.y, self.threat, self.seed = x, y, threat, seed
        self.step_size, self.n_steps = step_size, n_steps
        self.measure = partial(measure, threat=threat, step_size=step_size)
        self.measure(model, x, y, attack_names=[])  # refuses what cannot be measured
        self.model, self.wrapped = _with_gradient(model, x)
        self.pgd = partial(
            torch_attacks.pgd, threat=threat, n_steps=n_steps, step_size=step_size
        )  # fmt: skip
        self.n_classes = self.wrapped.logits(x[:1]).shape[1]
        self.checks, self.broken, self.sweep = [], {}, {}

    # What is found

    def add(self, name, value, limit, text):
        value = None if value is None else float(value)
        passed = None if value is None else bool(value <= limit)
        self.checks.append(Check(name, value, float(limit), passed, text))

    def add_share(self, name, share, limit, text):
        """A check of what is broken among the claimed images; of hardly any it says nothing."""
        few = len(self.standing) <= NOTHING * len(self.y)
        self.add(name, None if few else share, limit, text + " (hardly any are claimed)" * few)

    def breaks(self, attack, found):
        """Notes which claimed images an attack breaks; returns their share."""
        self.standing &= ~found
        self.broken[attack] = float(found.mean()) if len(found) else 0.0
        return self.broken[attack]

    @property
    def left(self):
        """Accuracy that is left."""
        return float(self.standing.sum() / len(self.y))

    # What is asked

    def claim(self):
        """Accuracy as papers report it; is it one, and is it in order?"""
        name = f"pgd{self.n_steps}"
        clean, fgsm, pgd = self.measure(self.model, self.x, self.y, attack_names=["fgsm", name])
        self.clean, self.claimed = clean.right, pgd.robust
        self.x_claimed, self.y_claimed = self.x[pgd.robust], self.y[pgd.robust]
        self.standing = np.ones(int(pgd.robust.sum()), bool)
        first, second = (self.wrapped.logits(self.x) for _ in range(2))
        self.random = not np.allclose(first, second, rtol=1e-3, atol=1e-4 * np.abs(first).max())
        text = "two passes give the same logits"
        if self.random:
            changed = (first.argmax(1) != second.argmax(1)).mean()
            text = f"two passes give other logits, and {changed:.0%} of the images another class"
        self.add("repeatable", self.random, 0, text)
        self.add(
            "order", (clean.right & ~fgsm.right & pgd.right).mean(), ZERO,
            f"images that one step of FGSM breaks and {self.n_steps} of PGD do not",
        )  # fmt: skip
        self.net = around.Mean(self.wrapped.net, DRAWS) if self.random else self.wrapped.net
        self.precise = around.in_float64(self.net, self.wrapped.tensor(self.x[:1]))

    def look_at_gradients(self):
        """Does the cross-entropy have a gradient where the prediction is right?"""
        zero, norms = self.gradients(self.wrapped.net)
        right = self.clean
        self.norms = {
            key: float(norms[part].mean()) if part.any() else None
            for key, part in (("right", right), ("wrong", ~right))
        }
        share = zero[right].mean() if right.any() else None
        self.add("zero gradients", share, ZERO, "correctly read images whose gradient is exactly 0")
        lost = None
        if self.precise and right.any():
            lost = (zero & ~self.gradients(self.precise, torch.float64)[0])[right].mean()
        self.add(
            "vanishing gradients", lost, ZERO,
            "correctly read images whose gradient is 0 as it is computed and not in float64",
        )  # fmt: skip

    def grow_the_ball(self):
        """Does accuracy under PGD fall to chance when the attacker may do anything?"""
        largest = 1.0 if self.threat.norm == "linf" else self.x[0].size ** 0.5
        radii = sorted({min(k * self.threat.epsilon, largest) for k in (0.5, 1, 2, 4)} | {largest})
        robust = self.clean
        for radius in radii:
            step = max(2.5 / self.n_steps, self.step_size / self.threat.epsilon) * radius
            outcome = self.measure(
                self.model, self.x, self.y, attack_names=[f"pgd{self.n_steps}"],
                threat=Threat(self.threat.norm, radius, self.threat.low, self.threat.high),
                step_size=min(step, 2 * radius),
            )[-1]  # fmt: skip
            robust = robust & outcome.right
            self.sweep[radius] = float(robust.mean())
        chance = np.bincount(self.y).max() / len(self.y)
        self.add(
            "large radius", self.sweep[radii[-1]], chance + CHANCE,
            f"accuracy under PGD at radius {radii[-1]:.3g}, where chance is {chance:.0%}",
        )  # fmt: skip

    def attack_again(self):
        """Do other losses, scales, precisions, steps or starts, or mere noise, break them?"""
        generator = torch.Generator().manual_seed(self.seed)
        pgd, net, precise = self.pgd, self.net, self.precise
        again = {
            "more steps": partial(pgd, net, n_steps=2 * self.n_steps),
            "random starts": partial(pgd, net, n_restarts=5, generator=generator),
            "margin loss": partial(pgd, net, loss="margin"),
            "DLR loss": partial(pgd, net, loss="dlr") if self.n_classes > 2 else None,
            "rescaled logits": partial(pgd, around.Rescaled(net)),
            "float64": (lambda x, y: pgd(precise, x.double(), y)) if precise else None,
        }
        if self.random:
            again = {"mean of passes": partial(pgd, net)} | again
        for name, attack in again.items():
            share = self.breaks(name, self.wrong_after(attack)) if attack else None
            self.add_share(name, share, WHITE_BOX, "claimed images that PGD breaks then")
        self.add_share(
            "silent success", self.breaks("on the way", self.wrong_on_the_way()), BLIND,
            "claimed images that PGD breaks on its way and comes back from",
        )  # fmt: skip
        found = np.zeros(len(self.standing), bool)
        for corners in (False, True) * DRAWS:
            found |= self.wrong_after(
                lambda x, y, corners=corners: around.noise(
                    x, self.threat, generator, corners=corners
                )
            )
        self.add_share(
            "noise", self.breaks("noise", found), BLIND,
            f"claimed images that {2 * DRAWS} random points of the ball break",
        )  # fmt: skip

    def transfer(self, sources):
        """Do adversarial images of other models break claimed images?"""
        shares = [
            self.breaks(
                f"from {name}",
                self.wrong_after(partial(self.pgd, _with_gradient(source, self.x)[1].net)),
            )
            for name, source in sources.items()
        ]
        self.add_share(
            "transfer", max(shares, default=None), BLIND,
            "claimed images that adversarial images of another model break"
            + " (no other was given)" * (not shares),
        )  # fmt: skip

    def autoattack(self, parts):
        """Do AutoAttack's parts, one of which looks at no gradient, break claimed images?"""
        shares = {}
        if parts and len(self.standing) and self.n_classes > 3:
            model = self.net if self.random else self.model
            with _silent("auto-attack"):
                outcomes = self.measure(model, self.x_claimed, self.y_claimed, attack_names=parts)
            for one in outcomes[1:]:
                name = one.attack.removesuffix("-l2")
                shares[name] = self.breaks(name, ~one.right)
        white = [share for part, share in shares.items() if part != "square"]
        reason = " (it wants four classes)" * (self.n_classes < 4)
        self.add_share(
            "AutoAttack", max(white, default=None), WHITE_BOX,
            "claimed images that the best of its white-box attacks breaks" + reason,
        )  # fmt: skip
        self.add_share(
            "gradient-free", shares.get("square"), BLIND,
            "claimed images that Square breaks, which looks at no gradient" + reason,
        )  # fmt: skip

    def conclusion(self):
        failed = [check.name for check in self.checks if check.passed is False]
        verdict, reasons, kept = judge(
            int(self.standing.sum()), len(self.standing), len(self.y), failed
        )
        left = self.claimed.copy()
        left[self.claimed] = self.standing
        return Diagnosis(
            verdict, reasons, len(self.y), float(self.clean.mean()), float(self.claimed.mean()),
            self.left, kept, self.checks, self.broken, self.sweep, self.norms, left,
        )  # fmt: skip

    # How

    def batches(self, x, y, dtype=None):
        """Tensors of images and labels, a batch at a time."""
        for start in range(0, len(y), self.wrapped.batch_size):
            part = slice(start, start + self.wrapped.batch_size)
            images = self.wrapped.tensor(x[part])
            yield images.to(dtype or images.dtype), torch.as_tensor(y[part]).to(images.device)

    def gradients(self, net, dtype=None):
        """(which gradients are exactly 0, their l2 norms) of the cross-entropy of all images."""
        zero, norms = [], []
        for x, y in self.batches(self.x, self.y, dtype):
            flat = torch_attacks.input_gradient(net, x, y)[1].flatten(1)
            zero.append((flat == 0).all(1).cpu().numpy())
            norms.append(flat.double().norm(dim=1).cpu().numpy())
        return np.concatenate(zero), np.concatenate(norms)

    def wrong_after(self, attack):
        """Which claimed images are read wrongly after attack(images, labels), kept to the ball."""
        found = [np.zeros(0, bool)]
        for x, y in self.batches(self.x_claimed, self.y_claimed):
            moved = torch_attacks.project(attack(x, y).detach().to(x.dtype), x, self.threat)
            with torch.no_grad():
                found.append((self.net(moved).argmax(1) != y).cpu().numpy())
        return np.concatenate(found)

    def wrong_on_the_way(self):
        """Which claimed images PGD breaks at some step and not at its last."""
        found = [np.zeros(0, bool)]
        for x, y in self.batches(self.x_claimed, self.y_claimed):
            ever = torch.zeros(len(y), dtype=torch.bool, device=x.device)
            steps = self.threat, self.n_steps, self.step_size
            for moved in torch_attacks.ascent(self.net, x, x, y, *steps):
                with torch.no_grad():
                    wrong = self.net(moved).argmax(1) != y
                ever |= wrong
            found.append((ever & ~wrong).cpu().numpy())
        return np.concatenate(found)


def _with_gradient(model, x):
    """(the model, `evaluate.wrap` of it), with a gradient of 0 if autograd sees none."""
    wrapped = evaluate.wrap(model)
    if not around.has_gradient(wrapped.net, wrapped.tensor(x[:2])):
        model = around.WithoutGradient(wrapped.net)
        wrapped = evaluate.wrap(model)
    return model, wrapped


@contextmanager
def _silent(name):
    """Without AutoAttack's remarks on zero gradients and random models, which are checks here."""
    logger = logging.getLogger(name)
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before
