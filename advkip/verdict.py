"""What a verdict on a claimed robustness follows from: counts of images, limits, and checks.

The *claim* is the accuracy under FGSM and PGD with the cross-entropy loss that papers report. A
claimed image that any other attack in the same ball breaks was never robust; the share of them that
is *left* decides, and the checks (`diagnose`) tell why:

    masked         the claim is not real: fewer than half of its images (MASKED) are left, and the
                   95 % interval of that share ends below GENUINE; or fewer than GENUINE are left,
                   the interval ends below SHAKEN, and a check shows that PGD cannot see the model
                   (BLINDNESS), or attacks by its answers alone find what no gradient finds
                   (ANSWERS). The reasons say whether gradients are hidden or PGD was only weak.
                   Or hardly any image is claimed (at most NOTHING of all), but only because FGSM
                   breaks what PGD does not, or PGD leaves images in a large ball (MISSED)
    genuine        at least GENUINE are left, the interval begins above MASKED, no check fails,
                   AutoAttack, an attack without gradients, the images of an imitation and an attack
                   that sees answers alone were tried (NEEDED), and what is left
                   is more than one constant answer, which withstands everything
    nothing claimed   hardly any image is claimed (at most NOTHING of all), and PGD missed none, so
                   there is nothing to be real or to hide
    inconclusive   anything else, among it fewer than FEW claimed images

Where the numbers come from. Adversarially trained networks in the paper keep 0.78 to 0.97 of their
accuracy under PGD when AutoAttack comes (Tables 5, 7), networks whose gradients are hidden 0.00 to
0.02 (Tables 6, 10): MASKED and GENUINE stand between. SHAKEN is for what is robust, and hides its
gradient as well. The limits of the checks are held against networks that were masked on purpose,
undefended ones and adversarially trained ones (tests/test_diagnose.py). A check fails when even the
lower end of its 95 % interval (Wilson) exceeds the limit, so that one image of few condemns nobody.
"""

from typing import NamedTuple

import numpy as np
from scipy.stats import binomtest

NOTHING_CLAIMED = "nothing claimed"
VERDICTS = ("genuine", "masked", "inconclusive", NOTHING_CLAIMED)

MASKED, GENUINE, SHAKEN = 0.5, 0.7, 0.9
"""Shares of the claimed images that are left."""

NOTHING, FEW = 0.05, 10
"""A share of all images that is no claim; a number of claimed images that says little."""

STEADY = 0.05
"""Share of images that more steps, exact arithmetic or PGD's own way may break, that attacks
without a gradient may break beyond the white-box attacks, or that may have a wrong gradient or
order."""

OTHER = 1 - GENUINE
"""Share of the claimed images that one other white-box attack may break: GENUINE again."""

CHANCE = 0.1
"""Accuracy above chance that PGD may leave in a ball that holds a grey image."""

ONE_ANSWER = 0.9
"""Share of the images left that may have one label; beyond it they are a constant answer's."""

BLINDNESS = {
    "zero gradients", "vanishing gradients", "true gradients", "large radius", "no rounding",
}  # fmt: skip
"""Checks that show, when they fail, that PGD's figure says nothing about the model."""

MISSED = {"order", "large radius"}
"""Checks that show, when they fail and hardly any image is claimed, that PGD alone claims many."""

ANSWERS = {"transfer", "gradient-free", "labels alone"}
"""Attacks by the model's answers: what they break and no gradient does, no gradient sees."""

UNSEEN = {"noise", *ANSWERS}
"""Attacks that look at no gradient of the model: they must not beat those that do."""

NEEDED = ("AutoAttack", "gradient-free", "transfer", "labels alone")
"""What must have been asked before a claim can be called genuine."""


class Diagnosis(NamedTuple):
    """A verdict and what it rests on. Accuracies and shares in [0, 1]."""

    verdict: str  # one of verdict.VERDICTS
    reasons: list  # sentences
    n: int  # images
    clean: float
    claimed: float  # accuracy under FGSM and PGD, worst case of each image
    strong: float  # what of it is left after every attack
    kept: (
        tuple[float, float, float] | None
    )  # strong / claimed with its 95 % interval: (share, low, high); None without claim
    checks: list  # `verdict.Check`s
    broken: dict  # {attack: share of the claimed images that it breaks}
    sweep: dict  # {radius: accuracy under PGD, worst case over the radii so far}
    gradients: dict  # {"right", "wrong"}: mean input-gradient norm of such images; None: no such
    rounded: dict  # {"partly", "wholly"}: share of correct images with log-odds > ROUNDED, LOST
    log_odds: np.ndarray  # (n,): of the right class, large where the model is sure
    right: np.ndarray  # bool (n,): images that are classified correctly
    withstood: np.ndarray  # bool (n,): the claimed ones of them
    robust: np.ndarray  # bool (n,): images that withstood everything

    def to_dict(self) -> dict:
        """Plain JSON values, without the images."""
        fields = self._asdict()
        for images in ("log_odds", "right", "withstood", "robust"):
            fields.pop(images)
        fields["checks"] = [check._asdict() for check in self.checks]
        fields["sweep"] = {f"{radius:g}": value for radius, value in self.sweep.items()}
        return fields


def findings(diagnoses: dict[str, Diagnosis]) -> list[str]:
    """A sentence about each model: what is claimed of it, what is left, what takes the most."""
    found = []
    for title, one in diagnoses.items():
        text = (
            f"**{title}** is *{one.verdict}*: of {one.n} images {one.claimed:.0%} withstand FGSM "
            f"and PGD, {one.strong:.0%} everything"
        )
        if one.verdict != NOTHING_CLAIMED and any(one.broken.values()):
            share, attack = max((share, attack) for attack, share in one.broken.items())
            text += f"; *{attack}* breaks the most, {share:.0%} of the claim"
        failed = [check.name for check in one.checks if check.passed is False]
        found.append(text + (f"; failed: {', '.join(failed)}." if failed else "."))
    return found


class Check(NamedTuple):
    """One question and its answer."""

    name: str
    value: float | None  # a share of images in [0, 1]; None: could not be asked
    limit: float
    passed: bool | None
    text: str  # what the value is a share of


def check(name, count, total, limit, text) -> Check:
    """The `Check` of count in total images; None, or a total of 0: it could not be asked."""
    if count is None or not total:
        return Check(name, None, limit, None, text)
    return Check(name, float(count / total), limit, interval(count, total)[0] <= limit, text)


def interval(count, total) -> tuple[float, float]:
    """(low, high) of a share, 95 % (Wilson 1927)."""
    found = binomtest(int(count), int(total)).proportion_ci(method="wilson")
    return float(found.low), float(found.high)


def judge(
    n_left, n_claimed, n, checks, *, constant=False
) -> tuple[str, list[str], tuple[float, float, float] | None]:
    """The verdict of the module's text.

    Args:
      n_left, n_claimed, n: images that withstood everything, that withstood FGSM and PGD, all.
      checks: a list of `Check`.
      constant: whether one constant answer to all images would withstand as much.

    Returns:
      (verdict, reasons: sentences, (share left, low, high) or None where nothing is claimed).
    """
    failed = [one.name for one in checks if one.passed is False]
    unasked = [one.name for one in checks if one.passed is None]
    fails = [f"failed: {name}" for name in failed]
    if n_claimed <= NOTHING * n:
        reason = f"{n_claimed} of {n} images are claimed"
        if MISSED & set(failed):
            return "masked", [reason, *fails, "gradients are hidden from PGD"], None
        return (
            NOTHING_CLAIMED,
            [f"{reason}, so there is nothing that could be hidden", *fails],
            None,
        )
    share, (low, high) = n_left / n_claimed, interval(n_left, n_claimed)
    reasons = [
        f"of the {n_claimed} images that withstand FGSM and PGD, {n_left} withstand every attack "
        f"({share:.0%}, 95 % interval {low:.0%} to {high:.0%})",
        *fails,
    ]
    reasons += [f"not asked: {', '.join(unasked)}"] if unasked else []
    blind = (BLINDNESS | ANSWERS) & set(failed)
    if constant:
        reasons.append("one constant answer to all images would withstand as much")
    asked = {one.name for one in checks if one.passed is not None}
    low_left, high_left = interval(n_left, n)
    known = set(NEEDED) <= asked and not UNSEEN & set(failed) and not constant
    if share < GENUINE and known and low_left > NOTHING:
        reasons.append(
            f"the claim, {n_claimed / n:.0%}, is too high; the model keeps {n_left / n:.0%} (95 % "
            f"interval {low_left:.0%} to {high_left:.0%}) of all images"
        )
    few = n_claimed < FEW
    proven = share < MASKED and high < GENUINE
    if not few and (proven or (blind and share < GENUINE and high < SHAKEN)):
        weak = "PGD with the cross-entropy is too weak to find what others find"
        if blind or UNSEEN & set(failed):
            why = "gradients are hidden from PGD"
        elif BLINDNESS & set(unasked):
            why = f"{weak}, or gradients are hidden in a way that was not asked about"
        else:
            why = f"gradients are there; {weak}"
        return "masked", [*reasons, why], (share, low, high)
    good = share >= GENUINE and low > MASKED and not failed and set(NEEDED) <= asked
    if good and not (few or constant):
        return "genuine", reasons, (share, low, high)
    if few or (low <= MASKED and high >= GENUINE):
        reasons.append(f"{n_claimed} claimed images are too few to tell")
    return "inconclusive", reasons, (share, low, high)
