"""A network or a kernel machine as `evaluate` and `diagnose` need it: arrays in, arrays out.

The official AutoAttack is called here, too.
"""

import sys
from typing import Any

import jax
import numpy as np
import torch

from advkip import attacks, bridge, krr, nets, probes, torch_attacks
from advkip.attack_names import UNTARGETED_PARTS, Attack


def judged(model, *, seed=0, batch_size=0, shape=()) -> "_Network":
    """A network or kernel machine with `net`, `tensor` and `logits`; for `diagnose`.

    `shape` is that of an image, (H, W, C), on which the number of images at a time depends.
    """
    kind = _Machine if isinstance(model, krr.KernelMachine) else _Network
    return kind(model, seed, batch_size, shape)


class _Network:
    """A PyTorch network as `evaluate` needs it: arrays in, arrays out."""

    def __init__(self, net, seed, batch_size, shape=()):
        if not isinstance(net, torch.nn.Module):
            raise ValueError(
                f"expected a krr.KernelMachine or a torch.nn.Module, got {type(net).__name__}; "
                "pass one of them"
            )
        nets.check_evaluated(net)
        self.net, self.seed = nets.Logits(net), seed
        self.batch_size = batch_size or nets.batch_size(net, shape)
        self.model = f"{type(net).__qualname__} {net!r}"
        self.like = self.net.own()
        if self.like is not None and self.like.dtype in nets.HALF:
            self.like = torch.empty(0, dtype=torch.float32, device=self.like.device)

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

    def attacked(self, attack: Attack, x, y, threat, step_size):
        """Attacked images."""
        x = self.tensor(x)
        y = torch.as_tensor(y).to(x.device)
        if attack.kind == "fgsm":
            return nets.to_array(torch_attacks.fgsm(self.net, x, y, threat=threat))
        if attack.kind != "pgd":
            return nets.to_array(_autoattack(self.net, attack.kind, x, y, threat, self.seed))
        restarts = attack.n_restarts
        attacked = torch_attacks.pgd(
            self.net, x, y, threat=threat, n_steps=attack.n_steps, step_size=step_size,
            n_restarts=restarts or 1,
            generator=torch.Generator().manual_seed(self.seed) if restarts else None,
        )  # fmt: skip
        return nets.to_array(attacked)


class _Machine(_Network):
    """A kernel machine; what JAX has of attacks runs there, the rest through the bridge."""

    def __init__(self, machine, seed, batch_size, shape=()):
        net = bridge.KernelNet(machine, batch_size=batch_size)
        super().__init__(net, seed, net.batch_size)
        self.bridge, self.machine, self.model = net, machine, f"{machine.kernel}"

    def weights(self):
        return [np.asarray(self.machine.x_support), np.asarray(self.machine.alpha)]

    def logits(self, x):
        n, x = len(x), np.asarray(x)
        if self.bridge.fewest > 1:  # on a small support compiling takes longer than more rows
            fill = -n % self.bridge.rows(n)
            x = np.concatenate([x, np.zeros((fill, *x.shape[1:]), x.dtype)])
        return np.asarray(attacks.predict(self.machine, x, batch_size=self.batch_size))[:n]

    def attacked(self, attack: Attack, x, y, threat, step_size):
        if attack.kind == "fgsm":
            return np.asarray(attacks.fgsm(self.machine, x, y, threat=threat))
        if attack.kind != "pgd":
            return super().attacked(attack, x, y, threat, step_size)
        restarts = attack.n_restarts
        found = attacks.pgd(
            self.machine, x, y, threat=threat, n_steps=attack.n_steps, step_size=step_size,
            n_restarts=restarts or 1, key=jax.random.key(self.seed) if restarts else None,
        )  # fmt: skip
        return np.asarray(found)


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
    traced = sys.gettrace()  # its checks of the model end a debugger's or coverage's tracing
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        attacked = adversary.run_standard_evaluation(x.float(), y, batch_size=len(x))[0]
    finally:
        sys.settrace(traced)
        torch.set_default_dtype(default)
    return attacked.to(x.dtype)


def with_gradient(model, *, x, batch_size) -> tuple[Any, "_Network"]:
    """(the model, `judged` of it), with a gradient of 0 if autograd sees none on images x."""
    found = judged(model, batch_size=batch_size, shape=x.shape[1:])
    if not found.gradient(x[:2]).size:
        model = probes.WithoutGradient(found.net)
        found = judged(model, batch_size=batch_size, shape=x.shape[1:])
    return model, found
