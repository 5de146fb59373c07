"""FGSM and PGD on PyTorch networks: the twins of `attacks`, under the same threat model.

Images are (n, C, H, W) tensors in [0, 1]; logits are (n, classes). A network is called as it is,
so put it into evaluation mode first.
"""

import math
from collections.abc import Callable, Iterator

import torch

from advkip import inputs
from advkip.attacks import check_numbers
from advkip.worst_case import N_STEPS, plans, rivals


def project(x, x_original, threat) -> torch.Tensor:
    """Nearest point of the ball around `x_original`, then of the pixel range."""
    delta = x - x_original
    if threat.norm == "linf":
        delta = delta.clamp(-threat.epsilon, threat.epsilon)
    else:
        delta = delta * (threat.epsilon / _l2(delta).clamp_min(1e-12)).clamp_max(1)
    return (x_original + delta).clamp(threat.low, threat.high)


def _l2(delta):
    # In float32 the sum over many pixels is off by more than an attack may leave its ball.
    found = delta.flatten(1).norm(dim=1, dtype=torch.float64).to(delta.dtype)
    return found.view(-1, *[1] * (delta.dim() - 1))


def cross_entropy(logits, y) -> torch.Tensor:
    """Per-image cross-entropy, shape (n,); y integers (n,) or distributions (n, C)."""
    return torch.nn.functional.cross_entropy(logits, y, reduction="none")


def mse(logits, y) -> torch.Tensor:
    """Per-image squared error |y - logits|^2 / 2, shape (n,) (paper Eq. 6), of label vectors y."""
    return ((logits - y) ** 2).sum(1) / 2


def margin(logits, y) -> torch.Tensor:
    """Largest wrong logit minus the right one, shape (n,); y integers (n,). Positive: fooled.

    It cannot saturate as the cross-entropy does (Carlini and Wagner 2017).
    """
    right = torch.nn.functional.one_hot(y, logits.shape[1]).bool()
    return logits.masked_fill(right, -torch.inf).amax(1) - logits[right]


def dlr(logits, y) -> torch.Tensor:
    """Difference of logits ratio, shape (n,): `margin` over the gap from the largest to the third
    logit, so that no factor of the logits changes it (Croce and Hein 2020). 3 classes or more."""
    if logits.shape[1] < 3:
        raise ValueError(
            f"expected logits of 3 classes for 'dlr', got {logits.shape[1]}; pass 'margin'"
        )
    top = logits.topk(3, dim=1).values
    return margin(logits, y) / (top[:, 0] - top[:, 2]).clamp_min(torch.finfo(logits.dtype).tiny)


def towards(classes) -> Callable:
    """The loss z_t - z_right towards classes t, integers (n,): a margin with a fixed target."""

    def targeted(logits, y):
        return (logits.gather(1, classes[:, None]) - logits.gather(1, y[:, None])).squeeze(1)

    return targeted


def log_odds(logits, y) -> torch.Tensor:
    """log((1 - p) / p) of the softmax p of the right class, shape (n,); y integers (n,).

    The cross-entropy is log(1 + exp(log_odds)), so both have gradients of one direction, and PGD,
    which moves by signs (l_inf) or unit vectors (l2), takes the same steps on either. But in
    float32 the cross-entropy's gradient in the right logit, p - 1, is 0 at log-odds of -ROUNDED at
    the latest, and in the others at -LOST (Carlini and Wagner 2017; Croce and Hein 2020, section
    4.1); this one's is not.
    """
    right = torch.nn.functional.one_hot(y, logits.shape[1]).bool()
    return logits.masked_fill(right, -torch.inf).logsumexp(1) - logits[right]


ROUNDED, LOST = 24 * math.log(2), 150 * math.log(2)
"""Log-odds of the right class, 17 and 104: in float32, 1 + exp(-ROUNDED) is 1, exp(-LOST) is 0."""

LOSSES = {
    "cross-entropy": cross_entropy, "mse": mse, "margin": margin, "dlr": dlr, "log-odds": log_odds,
}  # fmt: skip


def _loss(loss):
    return loss if callable(loss) else LOSSES[loss]


def input_gradient(
    net, x, y, *, loss="cross-entropy"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(losses (n,), d loss / dx of the shape of x, logits) of the images x."""
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        logits = net(x)
        losses = _loss(loss)(logits, y)
        seen = losses.requires_grad
        gradient = torch.autograd.grad(losses.sum(), x, allow_unused=True)[0] if seen else None
        if gradient is None:
            raise ValueError(
                "expected answers with a gradient in the images, got none (no_grad, detach or "
                "argmax inside?); pass a network with one, or attacks without, as 'square'; "
                "`diagnose` takes it as it is"
            )
    return losses.detach(), gradient, logits.detach()


def fgsm(net, x, y, *, threat, loss="cross-entropy") -> torch.Tensor:
    """Fast gradient sign method: one PGD step of length epsilon (Goodfellow et al. 2015)."""
    return pgd(net, x, y, threat=threat, n_steps=1, step_size=threat.epsilon, loss=loss)


def pgd(
    net, x, y, *, threat, n_steps, step_size, loss="cross-entropy", n_restarts=1, generator=None
) -> torch.Tensor:
    """Projected gradient ascent on the loss (paper Eq. 8; Madry et al. 2018), as `attacks.pgd`.

    Args:
      net: images (n, C, H, W) to logits, each row a function of its own image only.
      x: clean images in [threat.low, threat.high]; y: integers (n,) or distributions (n, C).
      threat: an `attacks.Threat`.
      n_steps, step_size: step_size in pixel units.
      loss: a key of LOSSES, or a function such as `towards` makes, what is maximised; 'margin',
        'dlr', 'log-odds' and `towards` want integers.
      n_restarts: keeps, per image, the run with a wrong prediction, else the largest loss.
      generator: a torch generator for random starts; None starts from the image itself.

    Returns:
      Attacked images, shape of x, without gradient.

    Raises:
      ValueError: bad numbers, images or labels that do not fit, restarts without a generator.
    """
    known = "margin" if callable(loss) else loss
    check_numbers(n_steps, step_size, n_restarts, known, LOSSES)
    if n_restarts > 1 and generator is None:
        raise ValueError("expected a generator for random restarts, got None; pass a torch one")
    inputs.check_label_layout(y, len(x))
    y = y if y.is_floating_point() else y.long()
    if len(x):
        inputs.check_pixels(x, threat.low, threat.high)
    best: tuple | None = None
    for _ in range(n_restarts):
        attacked = x if generator is None else random_start(x, threat, generator)
        for point in ascent(net, attacked, x, y, threat, n_steps, step_size, loss):
            attacked = point
        if n_restarts == 1:
            return attacked
        best = _worse(net, attacked, y, loss, best)
    return best[0] if best else x


def ascent(
    net, start, x, y, threat, n_steps, step_size, loss="cross-entropy"
) -> Iterator[torch.Tensor]:
    """The images after each step of `pgd`, one after another, from `start` in the ball of x."""
    attacked = start
    for _ in range(n_steps):
        _, gradient, _ = input_gradient(net, attacked, y, loss=loss)
        # One that is not finite points nowhere, and must not spread to the other pixels.
        gradient = gradient.where(gradient.isfinite(), 0)
        if threat.norm == "linf":
            direction = gradient.sign()
        else:
            direction = gradient / _l2(gradient).clamp_min(torch.finfo(x.dtype).tiny)
        attacked = project(attacked + step_size * direction, x, threat)
        yield attacked


def _worse(net, attacked, y, loss, best):
    """Per image the worse of `attacked` and `best`, as (images, wrong, loss)."""
    with torch.no_grad():
        logits = net(attacked)
        value = _loss(loss)(logits, y)
        wrong = logits.argmax(1) != (y if y.dim() == 1 else y.argmax(1))
    if best is None:
        return attacked, wrong, value
    better = (wrong & ~best[1]) | ((wrong == best[1]) & (value > best[2]))
    mask = better.view(-1, *[1] * (attacked.dim() - 1))
    return (
        torch.where(mask, attacked, best[0]),
        torch.where(better, wrong, best[1]),
        torch.where(better, value, best[2]),
    )


def random_start(x, threat, generator) -> torch.Tensor:
    """Uniform in the ball, then in the pixel range."""

    def draw(function, shape):
        return function(shape, generator=generator, dtype=x.dtype).to(x.device)

    if threat.norm == "linf":
        noise = threat.epsilon * (2 * draw(torch.rand, x.shape) - 1)
    else:
        noise = draw(torch.randn, x.shape)
        radius = draw(torch.rand, (len(x), *[1] * (x.dim() - 1)))
        noise = threat.epsilon * radius ** (1 / x[0].numel()) * noise / _l2(noise)
    return project(x + noise, x, threat)


def distance(x, x_original, norm) -> torch.Tensor:
    """Per-image distance in the given norm, shape (n,) (`attacks.distance`)."""
    delta = (x - x_original).flatten(1)
    return delta.norm(dim=1) if norm == "l2" else delta.abs().amax(1)


def withstood(net, x, y, *, threat, step_size, left=None, n_steps=N_STEPS) -> torch.Tensor:
    """Which images a network classifies correctly after every attack of `worst_case`, bool (n,).

    Args:
      net: in evaluation mode.
      x, y: images (n, C, H, W) and integers (n,).
      threat, step_size, n_steps: as of `pgd`.
      left: bool (n,), the images that are tried at all; None tries those classified correctly.
    """
    with torch.no_grad():
        logits = net(x)
    left = (logits.argmax(1) == y if left is None else left).clone()
    classes = torch.as_tensor(rivals(logits.cpu().numpy(), y.cpu().numpy())).to(x.device)
    for loss, rank in plans(logits.shape[1]):
        index = left.nonzero().squeeze(1)
        if not len(index):
            break
        attacked = pgd(
            net, x[index], y[index], threat=threat, n_steps=n_steps, step_size=step_size,
            loss=towards(classes[index, rank]) if loss == "targeted" else loss,
        )  # fmt: skip
        with torch.no_grad():
            left[index] = net(attacked).argmax(1) == y[index]
    return left
