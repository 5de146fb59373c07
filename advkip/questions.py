"""What a diagnosis asks of a model: each question takes some of the claimed images, or none."""

from collections.abc import Iterator
from functools import partial

import numpy as np
import torch

from advkip import evaluate, hard_label, models, nets, probes, torch_attacks, verdict
from advkip.attack_names import ATTACK_PARTS, UNTARGETED_PARTS
from advkip.attacks import Threat
from advkip.verdict import CHANCE, NOTHING, ONE_ANSWER, OTHER, STEADY, Diagnosis

DRAWS = 10
"""Passes that are compared, and averaged over when they differ; points of either kind of noise."""

SWEEP_STEPS = 40
"""PGD steps, at least, in growing balls: few do not get far enough."""


class Case:
    """A model, its images, and what has been found so far."""

    def __init__(
        self, model, x, y, threat, step_size, n_steps, seed, batch_size, checkpoint_dir, progress
    ):  # fmt: skip
        self.x, self.y, self.threat, self.seed = x, y.astype("int64"), threat, seed
        self.step_size, self.n_steps = step_size, n_steps
        self.with_gradient = partial(models.with_gradient, batch_size=batch_size, x=x)
        self.measure = partial(
            evaluate.evaluate, threat=threat, step_size=step_size, seed=seed,
            batch_size=batch_size, checkpoint_dir=checkpoint_dir, progress=progress,
        )  # fmt: skip
        # Refuses what cannot be measured.
        self.measure(model, x, y, attack_names=[], checkpoint_dir=None)
        self.model, self.judged = self.with_gradient(model)
        self.pgd = partial(torch_attacks.pgd, threat=threat, n_steps=n_steps, step_size=step_size)
        self.checks, self.broken, self.sweep = [], {}, {}
        logits, *passes = (self.judged.logits(x) for _ in range(DRAWS))
        self.n_classes = logits.shape[1]
        wide = torch.tensor(logits, dtype=torch.float64)
        self.log_odds = -torch_attacks.log_odds(wide, torch.as_tensor(self.y)).numpy()
        # The softmax of the other classes may be lost one by one when they are summed.
        self.rounding = torch_attacks.ROUNDED - np.log(self.n_classes)
        same = {"rtol": 1e-3, "atol": 1e-4 * np.abs(logits).max()}
        self.random = not all(np.allclose(logits, one, **same) for one in passes)
        changed = np.any([logits.argmax(1) != one.argmax(1) for one in passes], axis=0).mean()
        self.add(
            "repeatable", len(y) if self.random else 0, len(y), 1.0,
            f"{DRAWS} passes give other logits, and {changed:.0%} of the images another class"
            if self.random else f"{DRAWS} passes give the same logits",
        )  # fmt: skip
        self.net = self.judged.net
        if self.random:
            self.net = probes.Mean(self.net, DRAWS)
            # Finished batches would draw nothing, and shift all later draws.
            self.measure = partial(self.measure, checkpoint_dir=None)
        self.precise = probes.in_float64(self.net, self.judged.tensor(x[:1]))

    # What is found

    def add(self, *arguments) -> None:
        self.checks.append(verdict.check(*arguments))

    def add_broken(self, name, found, limit, text) -> None:
        """A check of which claimed images are broken; of hardly any it says nothing."""
        few = len(self.standing) <= NOTHING * len(self.y)
        count = None if found is None or few else found.sum()
        text += " (hardly any are claimed)" * few + " (not asked)" * (found is None)
        self.add(name, count, len(self.standing), limit, text)

    def breaks(self, attack, found) -> np.ndarray:
        """Notes which claimed images an attack breaks; returns those that none broke before."""
        new = self.standing & found
        self.standing &= ~found
        self.broken[attack] = float(found.mean()) if len(found) else 0.0
        return new

    @property
    def strong(self) -> float:
        """Accuracy after every attack so far."""
        return float(self.standing.sum() / len(self.y))

    # What is asked

    def claim(self) -> None:
        """Accuracy as papers report it; is it in order?"""
        name = f"pgd{self.n_steps}"
        clean, fgsm, pgd = self.measure(self.model, self.x, self.y, attack_names=["fgsm", name])
        self.clean, self.claimed = clean.right, pgd.robust
        self.x_claimed, self.y_claimed = self.x[pgd.robust], self.y[pgd.robust]
        self.standing = np.ones(int(pgd.robust.sum()), bool)
        self.add(
            "order", (clean.right & ~fgsm.right & pgd.right).sum(), len(self.y), STEADY,
            f"images that one step of FGSM breaks and {self.n_steps} of PGD do not",
        )  # fmt: skip

    def check_gradients(self) -> None:
        """Does the cross-entropy have a gradient where the prediction is right, and is it one?"""
        right = self.clean
        zero, norms = self.gradients(self.judged.net)
        self.norms = {
            key: float(norms[part].mean()) if part.any() else None
            for key, part in (("right", right), ("wrong", ~right))
        }
        text = "correctly classified images whose gradient is exactly 0, or not finite"
        self.add("zero gradients", zero[right].sum(), right.sum(), STEADY, text)
        lost = false = None
        if self.precise:
            precisely_zero = self.gradients(self.precise, torch.float64)[0]
            lost = (zero & ~precisely_zero)[right].sum()
            if not self.random:
                false = self.false_gradients(self.precise)[right].sum()
        text = (
            "correctly classified images whose gradient is 0 as it is computed and not in float64"
        )
        self.add("vanishing gradients", lost, right.sum(), STEADY, text)
        text = (
            "correctly classified images whose margin does not grow along its gradient as that says"
        )
        self.add("true gradients", false, right.sum(), STEADY, text)

    def grow_the_ball(self) -> None:
        """Does accuracy under PGD fall to chance once every image can become grey?"""
        largest = 1.0 if self.threat.norm == "linf" else self.x[0].size ** 0.5
        radii = sorted({min(k * self.threat.epsilon, largest) for k in (0.5, 1, 2, 4)} | {largest})
        steps = max(self.n_steps, SWEEP_STEPS)
        robust, grey, blank = self.clean, 0.0, self.clean
        for radius in radii:
            step = max(2.5 / steps, self.step_size / self.threat.epsilon) * radius
            outcome = self.measure(
                self.model, self.x, self.y, attack_names=[f"pgd{steps}"],
                threat=Threat(self.threat.norm, radius, self.threat.low, self.threat.high),
                step_size=min(step, 2 * radius),
            )[-1]  # fmt: skip
            robust = robust & outcome.right
            self.sweep[radius] = float(robust.mean())
            if radius >= largest / 2 and not grey:
                grey, blank = radius, robust
        chance = np.bincount(self.y).max() / len(self.y)
        self.add(
            "large radius", blank.sum(), len(robust), float(chance + CHANCE),
            f"images that withstand PGD at radius {grey:.3g}, where each of them can become "
            f"grey and chance is {chance:.0%}",
        )  # fmt: skip

    def attack_again(self) -> None:
        """Do other losses, scales, precisions, steps or starts break claimed images?"""
        generator = torch.Generator().manual_seed(self.seed)
        pgd, net, precise = self.pgd, self.net, self.precise
        again = {
            "more steps": (partial(pgd, net, n_steps=2 * self.n_steps), STEADY),
            # Of the mean of a random model's passes it would say nothing about rounding.
            "no rounding": (
                None if self.random else partial(pgd, net, loss="log-odds"),
                STEADY,
            ),
            "float64": (precise and (lambda x, y: pgd(precise, x.double(), y)), STEADY),
            "random starts": (partial(pgd, net, n_restarts=5, generator=generator), OTHER),
            "margin loss": (partial(pgd, net, loss="margin"), OTHER),
            "DLR loss": (partial(pgd, net, loss="dlr") if self.n_classes > 2 else None, OTHER),
            "rescaled logits": (partial(pgd, probes.Rescaled(net)), OTHER),
        }
        if self.random:
            again = {"mean of passes": (partial(pgd, net), OTHER)} | again
        for name, (attack, limit) in again.items():
            found = None
            if attack:
                found = self.wrong_after(attack)
                self.breaks(name, found)
            # What the mean of a random model's passes shows is not news twice.
            limit = OTHER if self.random else limit
            text = "claimed images that PGD breaks then"
            if name == "no rounding" and found is not None:
                text += f", of log-odds above {self.rounding:.0f}, where float32 may round"
                found = found & (self.log_odds[self.claimed] > self.rounding)
            self.add_broken(name, found, limit, text)
        ever, found = self.wrong_on_the_way()
        self.breaks("on the way", ever)
        text = "claimed images that PGD breaks on its way and comes back from"
        self.add_broken("silent success", found, OTHER if self.random else STEADY, text)

    def autoattack(self, parts) -> None:
        """Do AutoAttack's parts break claimed images; Square, beyond all that see gradients?"""
        found = {}
        possible = ATTACK_PARTS if self.n_classes >= 4 else UNTARGETED_PARTS
        if self.threat.norm == "l2" and not evaluate.square_tiles(self.x.shape[1:3]):
            possible = tuple(part for part in possible if part != "square")
        parts = [part for part in parts if part in possible]
        if parts and len(self.standing):
            with probes.silent("auto-attack"):
                model = self.net if self.random else self.model
                outcomes = self.measure(model, self.x_claimed, self.y_claimed, attack_names=parts)
            found = {one.attack.removesuffix("-l2"): ~one.right for one in outcomes[1:]}
        square = found.pop("square", None)
        best = max((one.sum(), name) for name, one in found.items())[1] if found else None
        for name, one in found.items():
            self.breaks(name, one)
        text = "claimed images that the best of its white-box attacks breaks"
        asked = found.get(best)
        if asked is not None and set(possible) - {*found, "square"}:
            text += f" (only {', '.join(found)})"
            # What a part breaks is broken; what it leaves, the others may break.
            if verdict.check("", asked.sum(), len(asked), OTHER, "").passed:
                asked = None
        self.add_broken("AutoAttack", asked, OTHER, text)
        new = square if square is None else self.breaks("square", square)
        text = "claimed images that Square breaks, which sees no gradient, and no attack above"
        self.add_broken("gradient-free", new, STEADY, text)

    def transfer(self, sources) -> None:
        """Do adversarial images of other models break images that withstood all of this?"""
        new = self.breaks("from imitation", self.imitated())
        for name, source in sources.items():
            other = self.with_gradient(source)[1]

            def attack(x, y, other=other):
                start = other.like_own(x)
                return self.pgd(other.net, start, y.to(start.device)).to(x.device, x.dtype)

            new |= self.breaks(f"from {name}", self.wrong_after(attack))
        text = "claimed images that adversarial images of another model break, and no attack above"
        self.add_broken("transfer", new, STEADY, text)

    def imitated(self) -> np.ndarray:
        """Which claimed images those of a network break that has learned the model's answers."""
        seed = nets.derived_seed(self.seed, "diagnosis", 100)
        copy = hard_label.imitate(
            self.in_batches, self.whole(self.x, self.y)[0], self.threat, seed=seed
        )
        x, y = self.whole(self.x_claimed, self.y_claimed)
        self.imitations = hard_label.images(copy, x, y, self.threat, seed=seed)
        found = [self.wrong(moved, y).cpu().numpy() for moved in self.imitations]
        return np.any(found, axis=0) if found else np.zeros(0, bool)

    def by_labels(self) -> None:
        """Does an attack that sees the model's answers alone break what is left?"""
        x, y = self.whole(self.x_claimed, self.y_claimed)
        rest = torch.as_tensor(self.standing, device=x.device)
        seed = nets.derived_seed(self.seed, "diagnosis", 101)
        found = torch.zeros(len(y), dtype=torch.bool, device=x.device)
        found[rest] = hard_label.rays(
            self.in_batches, x[rest], y[rest], self.threat, seed=seed,
            towards=[moved[rest] for moved in self.imitations[:2]],
        )  # fmt: skip
        new = self.breaks("labels alone", found.cpu().numpy())
        text = "claimed images that answers alone lead to break, and no attack above"
        self.add_broken("labels alone", new, STEADY, text)

    def in_batches(self, x) -> torch.Tensor:
        """The model's logits, a batch at a time; of no images, none."""
        return torch.cat([self.net(part) for part in x.split(self.judged.batch_size)])

    def whole(self, x, y) -> tuple[torch.Tensor, torch.Tensor]:
        """All images and labels as tensors."""
        images = self.judged.tensor(x)
        return images, torch.as_tensor(y).to(images.device)

    def noise(self) -> None:
        """Does mere noise?"""
        generator = torch.Generator().manual_seed(self.seed)
        found = np.zeros(len(self.standing), bool)
        for far in (False, True) * DRAWS:
            found |= self.wrong_after(
                lambda x, y, far=far: probes.noise(x, self.threat, generator, far=far)
            )
        new = self.breaks("noise", found)
        text = f"claimed images that {2 * DRAWS} random points break, and no attack above"
        self.add_broken("noise", new, STEADY, text)

    def conclusion(self) -> Diagnosis:
        robust = self.claimed.copy()
        robust[self.claimed] = self.standing
        one_label = np.bincount(self.y[robust], minlength=1).max() > ONE_ANSWER * robust.sum()
        name, reasons, kept = verdict.judge(
            int(robust.sum()), len(self.standing), len(self.y), self.checks,
            constant=bool(one_label or self.clean.sum() <= np.bincount(self.y).max()),
        )  # fmt: skip
        sure = self.log_odds[self.clean]
        limits = {"partly": torch_attacks.ROUNDED, "wholly": torch_attacks.LOST}
        rounded = {key: float((sure > n).mean()) if len(sure) else 0.0 for key, n in limits.items()}
        return Diagnosis(
            name, reasons, len(self.y), float(self.clean.mean()), float(self.claimed.mean()),
            self.strong, kept, self.checks, self.broken, self.sweep, self.norms, rounded,
            self.log_odds, self.clean, self.claimed, robust,
        )  # fmt: skip

    # How

    def batches(self, x, y, dtype=None) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Tensors of images and labels, a batch at a time."""
        for start in range(0, len(y), self.judged.batch_size):
            part = slice(start, start + self.judged.batch_size)
            images = self.judged.tensor(x[part])
            yield images.to(dtype or images.dtype), torch.as_tensor(y[part]).to(images.device)

    def gradients(self, net, dtype=None) -> list[np.ndarray]:
        """(which gradients of the cross-entropy are exactly 0, or not finite; their l2 norms)."""
        parts = []
        for x, y in self.batches(self.x, self.y, dtype):
            flat = torch_attacks.input_gradient(net, x, y)[1].flatten(1).double()
            finite = flat.isfinite()
            parts.append([
                (flat == 0).all(1) | ~finite.all(1), flat.where(finite, 0.0).norm(dim=1)
            ])  # fmt: skip
        return [torch.cat(part).cpu().numpy() for part in zip(*parts, strict=True)]

    def false_gradients(self, net) -> np.ndarray:
        """Which images of all have a false gradient (`probes.false_gradient`), in float64."""
        batches = self.batches(self.x, self.y, torch.float64)
        return torch.cat([probes.false_gradient(net, x, y) for x, y in batches]).cpu().numpy()

    def wrong_after(self, attack) -> np.ndarray:
        """Which claimed images are misclassified after attack(images, labels), kept to the ball."""
        found = [np.zeros(0, bool)]
        for x, y in self.batches(self.x_claimed, self.y_claimed):
            moved = attack(x, y).detach().to(x.dtype)
            moved = torch_attacks.project(moved.where(moved.isfinite(), x), x, self.threat)
            found.append(self.wrong(moved, y).cpu().numpy())
        return np.concatenate(found)

    def wrong(self, x, y) -> torch.Tensor:
        """Which images are misclassified; logits that are not finite read nothing."""
        with torch.no_grad():
            logits = self.in_batches(x)
        return (logits.argmax(1) != y) & logits.isfinite().all(1)

    def wrong_on_the_way(self) -> np.ndarray:
        """Which claimed images PGD breaks at some step; which of them not at its last."""
        found = [np.zeros((2, 0), bool)]
        for x, y in self.batches(self.x_claimed, self.y_claimed):
            ever = torch.zeros(len(y), dtype=torch.bool, device=x.device)
            steps = self.threat, self.n_steps, self.step_size
            for moved in torch_attacks.ascent(self.net, x, x, y, *steps):
                wrong = self.wrong(moved, y)
                ever |= wrong
            found.append(torch.stack([ever, ever & ~wrong]).cpu().numpy())
        return np.concatenate(found, 1)
