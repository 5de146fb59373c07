"""Names of attacks, as settings and tables have them, and what they say."""

import re
from typing import NamedTuple

ATTACK_PARTS = ("apgd-ce", "apgd-t", "fab-t", "square")
"""What AutoAttack 'standard' runs, in its order."""

UNTARGETED_PARTS = ("apgd-ce", "square")
"""Those that work with two classes; the others need four."""

ATTACKED = " + attacked"
"""Follows the name of a teacher that has labelled attacked images, too (`aggregate`)."""


class Attack(NamedTuple):
    """What an attack's name says: 'fgsm', 'pgd40', 'pgd40x5', 'autoattack', a part of it; '-l2'."""

    name: str
    kind: str  # "clean", "fgsm", "pgd", "autoattack" or one of ATTACK_PARTS
    n_steps: int = 0  # of PGD
    n_restarts: int = 0  # random starts of PGD; 0 starts from the image itself
    l2: bool = False  # in the l2 ball beside an l_inf threat

    @classmethod
    def parse(cls, name: str) -> "Attack":
        """Raises ValueError: not such a name."""
        kinds = "|".join(("clean", "fgsm", "autoattack", *ATTACK_PARTS))
        pattern = rf"({kinds}|(pgd)([1-9]\d*)(?:x([1-9]\d*))?)(-l2)?"
        found = re.fullmatch(pattern, name)
        if not found:
            raise ValueError(
                f"expected attacks 'fgsm', 'pgd10', 'pgd40x5', 'autoattack' or one of "
                f"{ATTACK_PARTS}, with '-l2' behind it or not, got {name!r}; pass one of them"
            )
        whole, pgd, steps, restarts, l2 = found.groups()
        return cls(name, pgd or whole, int(steps or 0), int(restarts or 0), bool(l2))

    @property
    def targeted(self) -> bool:
        """Whether it has losses towards each of three other classes or more."""
        return self.kind in ("autoattack", "apgd-t", "fab-t")


def named_attack(name: str) -> str:
    """The name itself; raises ValueError as `Attack.parse`."""
    return Attack.parse(name).name
