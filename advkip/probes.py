"""Networks around a network, for the diagnosis: another scale or precision, the mean of a random
one, a gradient for one that has none; random points of a ball; and what it all runs in."""

import copy
import logging
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from advkip import torch_attacks


class Around(torch.nn.Module):
    """A network around another, in evaluation mode."""

    def __init__(self, net):
        super().__init__()
        self.net = net
        self.training = False  # as the network is; exported ones refuse `eval`


class WithoutGradient(Around):
    """A network that autograd cannot see through, with a gradient of 0."""

    def forward(self, x) -> torch.Tensor:
        with torch.no_grad():
            logits = self.net(x.detach())
        return logits + 0 * x.flatten(1).sum(1, keepdim=True)


class Mean(Around):
    """The mean of several passes of a random network, and its gradient (expectation over
    transformation, Athalye et al. 2018)."""

    def __init__(self, net, draws):
        super().__init__(net)
        self.draws = draws

    def forward(self, x) -> torch.Tensor:
        return sum(self.net(x) for _ in range(self.draws)) / self.draws


class Rescaled(Around):
    """Logits of standard deviation 1 for each image: of ten classes no softmax is saturated then.
    Logits that are all equal stay as they are."""

    def forward(self, x) -> torch.Tensor:
        logits = self.net(x)
        spread = logits.detach().std(1, keepdim=True)
        return logits / spread.where(spread > 0, 1)


def in_float64(net, x) -> torch.nn.Module | None:
    """A copy of the network in float64, or None if it cannot be copied or does not run there.

    A kernel machine inside it follows (`bridge.KernelNet`). Whatever a network of someone's own
    raises is a question that cannot be asked, and no end.
    """
    try:
        doubled = copy.deepcopy(net).double()
        with torch.no_grad():
            doubled(x.double())
    except torch.OutOfMemoryError:
        raise
    except Exception:
        return None
    return doubled


GREY = (1, 2, 4)
"""Steps, in 255ths, that pixels of 8 bits can take."""


def false_gradient(net, x, y) -> torch.Tensor:
    """For which images the margin of the logits does not grow along its gradient as that says.

    A small step of length h along g must change it by about h |g|_2; it does not if a layer passes
    a gradient that is not its own, or jumps. (The margin, since a saturated cross-entropy changes
    by less than its own rounding.) Pixels that are rounded to 8 bits jump, and the gradient beside
    that tells all that PGD needs: so one that holds for steps of GREY levels is not false.
    Images without a gradient are not false, and float64 is needed to see anything.

    Args:
      net: images (n, C, H, W) to logits.
      x, y: images and integers.

    Returns:
      A bool tensor (n,).
    """
    _, gradient, logits = torch_attacks.input_gradient(net, x, y, loss="margin")
    norms = gradient.flatten(1).norm(dim=1)
    direction = gradient / norms.clamp_min(torch.finfo(x.dtype).tiny).view(-1, 1, 1, 1)

    def along(step):
        """(what the gradient says of a step to and fro, what the margin does)."""
        # Inside the pixel range, which some networks check.
        points = [(x + sign * step).clamp(0, 1) for sign in (1, -1)]
        with torch.no_grad():
            ahead, behind = (torch_attacks.margin(net(point), y) for point in points)
        said = ((points[0] - points[1]) * gradient).flatten(1).sum(1) / 2
        return said, (ahead - behind) / 2

    # Long enough for the margin to change in its digits, short enough for few ReLUs to switch.
    h = 1e-5
    said, change = along(h * direction)
    seen = (h * norms > 1e-12 * logits.abs().amax(1)) & (said > 0.01 * h * norms)
    false = (change - said).abs() > 0.5 * said
    if not false.any():
        return false
    grey = (along(levels / 255 * gradient.sign()) for levels in GREY)
    return seen & false & torch.stack([(c - s).abs() > 0.5 * s for s, c in grey]).any(0)


def noise(x, threat, generator, *, far) -> torch.Tensor:
    """Random points of the ball around x: uniform in it, or as far out as it reaches."""
    if not far:
        return torch_attacks.random_start(x, threat, generator)
    drawn = torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device)
    if threat.norm == "linf":
        drawn = threat.epsilon * drawn.sign()
    else:
        length = drawn.flatten(1).norm(dim=1).view(-1, *[1] * (x.dim() - 1))
        drawn = threat.epsilon * drawn / length
    return torch_attacks.project(x + drawn, x, threat)


@contextmanager
def seeded(seed) -> Iterator[None]:
    """All that is drawn inside derives from the seed; the generators go on outside as before."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            random.seed(seed)
            np.random.seed(seed % 2**32)
            torch.manual_seed(seed)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


@contextmanager
def silent(name) -> Iterator[None]:
    """Without AutoAttack's remarks on zero gradients and random models, which are checks here."""
    logger = logging.getLogger(name)
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before
