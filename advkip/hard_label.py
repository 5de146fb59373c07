"""Attacks that see nothing of a model but its answers: an imitation's images, and rays.

A model can lead every gradient astray, and every score: by votes, by hard labels, with a
differentiable path beside them that points elsewhere. Its answers it cannot hide. `imitate` trains
a small network on them, whose adversarial images are tried on the model (Papernot et al. 2017);
`rays` searches along directions of signs for the nearest other answer (RayS, Chen and Gu 2020).
"""

import torch

from advkip import torch_attacks

COPIES, ROUNDS, EPOCHS, WIDTH = 24, 2, 15, 256
"""Noisy copies of each image; rounds of attacked images; epochs a round; width of the imitation."""

MOST = 10_000
"""Noisy copies in all, if three of each image are no more."""

RAYS = 500
"""Directions that are tried, one a pass over the images that still stand."""


def imitate(net, x, threat, *, seed) -> torch.nn.Module:
    """A network that answers as `net` does on images x, on noisy copies and where attacks go.

    Args:
      net: images (n, C, H, W) to logits, of which the largest alone is looked at.
      x: images in the range of `threat`.
      threat: an `attacks.Threat`; the copies are in its ball.
      seed: of noise, weights and order.

    Returns:
      A `torch.nn.Module` in evaluation mode.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        classes = _answers(net, x[:1])[1]
        sizes = (x[0].numel(), WIDTH, WIDTH)
        layers: list[torch.nn.Module] = [torch.nn.Flatten()]
        for before, after in zip(sizes[:-1], sizes[1:], strict=True):
            layers += [torch.nn.Linear(before, after), torch.nn.ReLU()]
        copy = torch.nn.Sequential(*layers, torch.nn.Linear(WIDTH, classes))
        copy = copy.to(x.device, torch.float32)
    start = x.detach().float()
    copies = min(COPIES, max(3, MOST // len(x)))
    points = [start, *(_noisy(start, threat, generator, i) for i in range(copies))]
    answers = [_answers(net, part.to(x.dtype))[0] for part in points]
    for round_ in range(ROUNDS + 1):
        _fit(copy, torch.cat(points), torch.cat(answers), generator)
        if round_ < ROUNDS:
            for i in range(4):
                random = torch_attacks.random_start(start, threat, generator) if i else start
                moved = attack(copy, random, start, answers[0], threat)
                points.append(moved)
                answers.append(_answers(net, moved.to(x.dtype))[0])
    return copy.eval()


def images(copy, x, y, threat, *, seed) -> list[torch.Tensor]:
    """Attacked images of an imitation, from other losses and starts: a list of tensors like x."""
    if not len(y):
        return []
    generator = torch.Generator().manual_seed(seed)
    found = []
    for loss, random in (("margin", 0), ("cross-entropy", 0), ("margin", 1), ("margin", 1)):
        begin = torch_attacks.random_start(x, threat, generator) if random else x
        moved = attack(copy, begin.float(), x.float(), y, threat, loss, 40)
        found.append(torch_attacks.project(moved.to(x.dtype), x, threat))
    return found


def attack(copy, begin, x, y, threat, loss="margin", n_steps=20) -> torch.Tensor:
    """PGD on an imitation from `begin`: the images after the last step."""
    moved = begin
    step = 2.5 * threat.epsilon / n_steps
    for point in torch_attacks.ascent(copy, begin, x, y, threat, n_steps, step, loss):
        moved = point
    return moved


def rays(net, x, y, threat, *, seed, towards=()) -> torch.Tensor:
    """Which images have another answer in the ball, found by answers alone.

    The direction of each image is a vector of signs, of which blocks are turned, coarse ones first;
    a turn is kept if the nearest other answer along the ray comes nearer.

    Args:
      net: images (n, C, H, W) to logits, of which the largest alone is looked at.
      x, y: images and integer labels, correctly classified.
      threat: an `attacks.Threat`.
      seed: of a random first direction.
      towards: images whose direction from x is tried first.

    Returns:
      A bool tensor (n,).
    """
    found = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    if not len(x):
        return found
    farthest = threat.high - threat.low if threat.norm == "linf" else x[0].numel() ** 0.5
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randn(x.shape, generator=generator).to(x).sign()
    starts = [torch.ones_like(x), -torch.ones_like(x), signs]
    starts += [torch.where(moved > x, 1.0, -1.0).to(x) for moved in towards]
    best, radius = starts[0], torch.full((len(x),), float("inf")).to(x)
    for direction in starts:
        best, radius = _nearer(net, x, y, threat, best, radius, direction, farthest)
    level, block = 1, 0
    for _ in range(RAYS):
        found = radius <= threat.epsilon
        rest = (~found).nonzero().flatten()
        if not len(rest):
            break
        turned = best[rest].flatten(1).clone()
        size = -(-turned.shape[1] // 2**level)
        turned[:, block * size : (block + 1) * size] *= -1
        direction = turned.view_as(best[rest])
        best[rest], radius[rest] = _nearer(
            net, x[rest], y[rest], threat, best[rest], radius[rest], direction, farthest
        )
        block += 1
        if block * size >= turned.shape[1]:
            level, block = (level + 1 if size > 1 else 1), 0
    return radius <= threat.epsilon


def _nearer(net, x, y, threat, best, radius, direction, farthest):
    """(direction, radius) of each image: the new ones where another answer is nearer there."""
    best, radius = best.clone(), radius.clone()

    def wrong(index, length):
        unit = direction[index]
        if threat.norm == "l2":
            unit = unit / unit[0].numel() ** 0.5
        moved = x[index] + length.view(-1, 1, 1, 1).to(x) * unit
        return _answers(net, moved.clamp(threat.low, threat.high))[0] != y[index]

    everyone = torch.arange(len(x), device=x.device)
    high = radius.clamp_max(farthest)
    rest = everyone[wrong(everyone, high)]
    if not len(rest):
        return best, radius
    low, high = torch.zeros_like(high[rest]), high[rest]
    for _ in range(8):
        middle = (low + high) / 2
        hit = wrong(rest, middle)
        low, high = torch.where(hit, low, middle), torch.where(hit, middle, high)
    best[rest], radius[rest] = direction[rest], high
    return best, radius


def _answers(net, x):
    """(the class of each image, the number of classes); NaN answers nothing, and no label is -1."""
    with torch.no_grad():
        logits = net(x)
    return torch.where(logits.isfinite().all(1), logits.argmax(1), -1), logits.shape[1]


def _noisy(x, threat, generator, i):
    """A copy with noise, at half the radius, at the whole of it, or at a corner of the ball."""
    noise = torch_attacks.random_start(x, threat, generator) - x
    if i % 3 == 0:
        noise = noise / 2
    elif i % 3 == 1 and threat.norm == "linf":
        noise = threat.epsilon * noise.sign()
    return torch_attacks.project(x + noise, x, threat)


def _fit(copy, x, y, generator):
    """Plain training on the answers; images without one are left out."""
    x, y = x[y >= 0], y[y >= 0]
    optimizer = torch.optim.Adam(copy.parameters(), lr=1e-3)
    with torch.enable_grad():
        for _ in range(EPOCHS if len(y) else 0):
            for index in torch.randperm(len(y), generator=generator).to(x.device).split(128):
                loss = torch.nn.functional.cross_entropy(copy(x[index]), y[index])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
