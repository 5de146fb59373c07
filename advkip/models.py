"""A network or a kernel machine as `evaluate` and `diagnose` need it: arrays in, arrays out.

The official AutoAttack is called here, too.
"""

from functools import partial

import jax
import numpy as np
import torch

from advkip import around, attacks, bridge, krr, nets, torch_attacks
from advkip.config import UNTARGETED_PARTS

BATCH = 100 if nets.device().type == "cpu" else 500
"""Images that a network is given at a time."""


def wrap(model, *, seed=0, batch_size=0):
    """A network or kernel machine with `net`, `tensor` and `logits`; for `diagnose`."""
    kind = _Machine if isinstance(model, krr.KernelMachine) else _Network
    return kind(model, seed, batch_size)


class _Network:
    """A PyTorch network as `evaluate` needs it: arrays in, arrays out."""

    def __init__(self, net, seed, batch_size):
        if not isinstance(net, torch.nn.Module):
            raise ValueError(
                f"expected a krr.KernelMachine or a torch.nn.Module, got {type(net).__name__}; "
                "pass one of them"
            )
        nets.check_evaluated(net)
        self.net, self.seed, self.batch_size = nets.Logits(net), seed, batch_size or BATCH
        self.model = f"{type(net).__qualname__} {net!r}"
        self.like = self.net.own()
        if self.like is not None and self.like.dtype in nets.HALF:
            self.like = torch.empty(0, device=self.like.device)

    def weights(self):
        """What the model is, as arrays."""
        state = self.net.net.state_dict().values()
        return [nets.to_numpy(tensor) for tensor in state if isinstance(tensor, torch.Tensor)]

    def tensor(self, x):
        """Images for the attacks: on the network's device, in its dtype or float32."""
        return nets.to_tensor(x, like=self.like)

    def like_own(self, x):
        """A tensor of images on the network's device, in its dtype."""
        return x if self.like is None else x.to(self.like.device, self.like.dtype)

    def gradient(self, x):
        """d(sum of the logits)/dx, or an empty array where autograd sees none."""
        x = self.tensor(x).requires_grad_()
        try:
            with torch.enable_grad(), nets.deterministic():
                (found,) = torch.autograd.grad(self.net(x).sum(), x, allow_unused=True)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, BufferError, TypeError):
            found = None  # detached, or computed elsewhere (NumPy and DLPack refuse such a tensor)
        return np.zeros(0) if found is None else found.cpu().numpy()

    def logits(self, x):
        with torch.no_grad(), nets.deterministic():
            parts = [self.net(a) for a in self.tensor(x).split(self.batch_size)]
        return torch.cat(parts).detach().cpu().numpy()

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


def wrap_seen(model, *, x, batch_size):
    """(the model, `wrap` of it), with a gradient of 0 if autograd sees none on images x."""
    wrapped = wrap(model, batch_size=batch_size)
    if not wrapped.gradient(x[:2]).size:
        model = around.WithoutGradient(wrapped.net)
        wrapped = wrap(model, batch_size=batch_size)
    return model, wrapped
