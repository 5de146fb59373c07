"""Is a measured robustness real? Checks for gradient masking, and one verdict with its evidence.

The figure in question, the *claim*, is what papers report: accuracy under FGSM and PGD with the
cross-entropy loss. Everything else here asks the same of the images that make up the claim: does
one break that another attacker can reach in the same ball? Such an image was never robust. That is
proof, whatever the reason; the other checks tell the reason, or that an attack cannot see (Athalye
et al. 2018; Carlini et al. 2019; Pintor et al. 2022). `verdict` has the rule and its limits.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from advkip import evaluate, inputs, nets, probes
from advkip.attack_names import ATTACK_PARTS
from advkip.progress import tqdm
from advkip.questions import Case
from advkip.verdict import Diagnosis


@torch.inference_mode(False)
@torch.enable_grad()
def diagnose(
    model, x, y, *, threat, step_size, n_steps=40, sources=None, parts=ATTACK_PARTS, seed=0,
    batch_size=0, mean=None, std=None, checkpoint_dir=None, progress=True,
) -> Diagnosis:  # fmt: skip
    """Asks of a claimed robustness whether it is real (see the module's text).

    Args:
      model: a network or a kernel machine, as for `evaluate.evaluate`. Of one that is random the
        claim is that of single passes; all that follows attacks, and asks, the mean of DRAWS
        passes. One without gradients is attacked all the same.
      x, y: images in [0, 1], shape (n, H, W, C), and integer labels; 100 or more say something.
      threat, step_size: of the claim, as for `evaluate.evaluate`.
      n_steps: of the claim's PGD.
      sources: {name: network or kernel machine} whose adversarial images are tried on the model,
        besides those of an imitation of it that is always made (`hard_label`).
      parts: of AutoAttack (`settings.ATTACK_PARTS`), each tried on all claimed images; fewer are
        quicker, and then nothing here is AutoAttack 'standard'.
      seed: of everything random, also in the model if it draws from PyTorch, NumPy or `random`;
        the same seed gives the same verdict.
      batch_size, mean, std, checkpoint_dir, progress: as for `evaluate.evaluate`.

    Returns:
      A `Diagnosis`.

    Raises:
      ValueError, FloatingPointError: as `evaluate.evaluate`; an unknown part; a radius of 0; pixels
        of another range than [0, 1].
    """
    if set(parts) - set(ATTACK_PARTS):
        raise ValueError(f"expected parts of {ATTACK_PARTS}, got {parts!r}; pass a choice of them")
    if not (threat.epsilon > 0 and n_steps > 0):
        raise ValueError(
            f"expected epsilon > 0 and n_steps > 0, got {threat.epsilon}, {n_steps}; pass the "
            "threat and the steps of the figure in question"
        )
    inputs.check_range(threat)
    model = nets.in_pixels(model, mean, std, channels=np.shape(x)[-1])
    with nets.deterministic():
        with probes.seeded(nets.derived_seed(seed, "diagnosis")):
            case = Case(
                model, np.asarray(x), np.asarray(y), threat, step_size, n_steps, seed, batch_size,
                checkpoint_dir, progress,
            )  # fmt: skip
        with tqdm(desc="diagnosis", unit="check", disable=not progress) as bar:
            steps: tuple[Callable, ...] = (
                case.claim, case.check_gradients, case.grow_the_ball, case.attack_again,
                partial(case.autoattack, parts), partial(case.transfer, sources or {}),
                case.by_labels, case.noise,
            )  # fmt: skip
            for i, step in enumerate(steps, 1):
                # Each anew: an attack that is read back from a checkpoint draws nothing.
                with probes.seeded(nets.derived_seed(seed, "diagnosis", i)):
                    step()
                bar.update(len(case.checks) - bar.n)
                bar.set_postfix_str(f"claimed {case.claimed.mean():.1%}, robust {case.strong:.1%}")
        return case.conclusion()


def by_protocol(protocol: evaluate.Protocol, model, x, y, **options) -> Diagnosis:
    """`diagnose` with the threat, step size, seed and checkpoints of an `evaluate.Protocol`."""
    return diagnose(
        model, x, y, threat=protocol.threat, step_size=protocol.step_size, seed=protocol.seed,
        checkpoint_dir=protocol.checkpoint_dir, **options,
    )  # fmt: skip
