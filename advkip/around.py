"""Networks around a network, for the diagnosis: another scale or precision, the mean of a random
one, a gradient for one that has none; and random points of a ball."""

import copy

import torch

from advkip import bridge, torch_attacks


class Around(torch.nn.Module):
    """A network around another, in evaluation mode."""

    def __init__(self, net):
        super().__init__()
        self.net = net
        self.eval()


class WithoutGradient(Around):
    """A network that autograd cannot see through, with a gradient of 0."""

    def forward(self, x):
        return self.net(x).detach() + 0 * x.flatten(1).sum(1, keepdim=True)


class Mean(Around):
    """The mean of several passes of a random network, and its gradient (expectation over
    transformation, Athalye et al. 2018)."""

    def __init__(self, net, draws):
        super().__init__(net)
        self.draws = draws

    def forward(self, x):
        return sum(self.net(x) for _ in range(self.draws)) / self.draws


class Rescaled(Around):
    """Logits of standard deviation 1 for each image, so that no softmax of them is saturated."""

    def forward(self, x):
        logits = self.net(x)
        spread = logits.detach().std(1, keepdim=True)
        return logits / spread.clamp_min(torch.finfo(logits.dtype).tiny)


def has_gradient(net, x):
    """Whether the logits of a network depend on its input x, as far as autograd can see."""
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        logits = net(x)
    if not logits.requires_grad:
        return False
    return torch.autograd.grad(logits.sum(), x, allow_unused=True)[0] is not None


def in_float64(net, x):
    """A copy of the network in float64, or None if it does not run there on images x."""
    try:
        doubled = (
            net.in_float64() if isinstance(net, bridge.KernelNet) else copy.deepcopy(net).double()
        )
        with torch.no_grad():
            doubled(x.double())
    except (RuntimeError, TypeError, ValueError):
        return None
    return doubled


def noise(x, threat, generator, *, corners):
    """Random points of the ball around x: anywhere in it, or as far out as it reaches."""
    drawn = 2 * torch.rand(x.shape, generator=generator, dtype=x.dtype).to(x.device) - 1
    if threat.norm == "linf":
        drawn = threat.epsilon * (drawn.sign() if corners else drawn)
    else:
        length = drawn.flatten(1).norm(dim=1).view(-1, *[1] * (x.dim() - 1))
        drawn = threat.epsilon * (1.0 if corners else 0.5) * drawn / length
    return torch_attacks.project(x + drawn, x, threat)
