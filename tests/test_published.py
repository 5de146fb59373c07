"""Networks of standardised images: measured in pixels, and as others print it."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from advkip import diagnose, evaluate, kernels, krr, nets, published
from advkip.attacks import Threat

MEAN, STD = (0.5, 0.4, 0.3), (0.25, 0.2, 0.3)


class Bright(torch.nn.Module):
    """Of standardised images: is the mean above that of a grey image of 0.5?"""

    def forward(self, z):
        level = z.new_tensor([(0.5 - m) / s for m, s in zip(MEAN, STD, strict=True)]).mean()
        mean = z.mean((1, 2, 3)) - level
        return torch.stack([-mean, mean], 1)


@pytest.fixture
def images():
    """Grey ones at a distance from 0.5 that grows to 0.1, above and below."""
    far = 0.001 + 0.002 * np.arange(50)
    x = 0.5 + np.concatenate([far, -far])
    y = (x > 0.5).astype(int)
    return np.broadcast_to(x[:, None, None, None], (100, 4, 4, 3)).copy(), y


def test_evaluate_measures_in_pixels(images):
    """Grey at distance d from 0.5 falls to a ball of radius d, whatever the standardisation."""
    x, y = images
    net = Bright().eval()
    options = {"threat": Threat("linf", 0.05), "step_size": 0.05, "attack_names": ["fgsm"]}
    found = evaluate.evaluate(net, x, y, mean=MEAN, std=STD, **options)
    far = np.abs(x[:, 0, 0, 0] - 0.5) > 0.05
    np.testing.assert_array_equal(found[1].robust, far)
    assert found[0].accuracy == 1.0
    same = nets.in_pixels(net, MEAN, STD, channels=3)
    again = evaluate.evaluate(same, x, y, **options)
    np.testing.assert_array_equal(again[1].robust, found[1].robust)


def test_diagnose_measures_in_pixels(images, monkeypatch):
    class Seen(Exception):
        pass

    def case(model, *rest):
        raise Seen(model)

    monkeypatch.setattr(diagnose, "Case", case)
    options = {"threat": Threat("linf", 0.05), "step_size": 0.05, "progress": False}
    with pytest.raises(Seen) as found:
        diagnose.diagnose(Bright().eval(), *images, mean=MEAN, std=STD, **options)
    (model,) = found.value.args
    x = torch.rand(4, 3, 4, 4)
    mean, std = (torch.tensor(part).view(3, 1, 1) for part in (MEAN, STD))
    torch.testing.assert_close(model(x), Bright()((x - mean) / std))


def test_as_published_is_another_radius(images):
    """0.05 in standardised units moves a grey image by 0.05 / mean(1 / std) / 1, not by 0.05."""
    x, y = images
    found = published.compare(
        Bright().eval(), x * 1.0, y, mean=MEAN, std=STD, epsilon=0.05, step_size=0.05, n_steps=3
    )
    far = np.abs(x[:, 0, 0, 0] - 0.5)
    assert found.clean == 1.0
    assert found.in_pixels == pytest.approx((far > 0.05).mean())
    assert found.radius == pytest.approx((0.05 * 0.2, 0.05 * 0.3))
    # Above 0.5, all channels are inside the clip of [0, 1], and move by epsilon each.
    above = y == 1
    least = 0.05 / np.mean([1 / s for s in STD])
    assert found.as_published > found.in_pixels + 0.2
    assert found.as_published <= (far[above] > least).mean() * 0.5 + 0.5
    assert "at a radius of 2.6 to 3.8/255 in pixels" in found.sentence()


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [
        (0.5, None, "expected mean and std, a number or 3 each, got 0.5 and None"),
        ((0.5, 0.5), 0.2, r"expected mean and std, a number or 3 each, got \(0.5, 0.5\) and 0.2"),
        (0.5, (0.2, 0.0, 0.1), r"expected std > 0, got \(0.2, 0.0, 0.1\)"),
    ],
)
def test_bad_input(images, mean, std, message):
    x, y = images
    with pytest.raises(ValueError, match=message):
        evaluate.evaluate(
            Bright().eval(), x, y, threat=Threat("linf", 0.05), step_size=0.05, attack_names=[],
            mean=mean, std=std,
        )  # fmt: skip


def test_images_labels_and_answers_that_do_not_fit(images):
    x, y = images
    options = {"mean": MEAN, "std": STD, "epsilon": 0.05, "step_size": 0.05, "n_steps": 1}
    with pytest.raises(ValueError, match="expected pixels in"):
        published.compare(Bright().eval(), 255 * x, y, **options)
    with pytest.raises(ValueError, match="expected images of float32 or float64, got uint8"):
        published.compare(Bright().eval(), (255 * x).astype("uint8"), y, **options)
    with pytest.raises(ValueError, match="expected one integer label an image"):
        published.compare(Bright().eval(), x, np.eye(2)[y], **options)
    flat = torch.nn.Sequential(Bright(), torch.nn.Softmax(1)).eval()
    with pytest.raises(ValueError, match="expected logits, got rows that are probabilities"):
        published.compare(flat, x, y, batch_size=1, **options)
    with pytest.raises(ValueError, match="expected n_steps >= 0, step_size >= 0"):
        published.compare(Bright().eval(), x, y, **options | {"step_size": -1})
    turned = published.compare(Bright().eval(), x[::-1], y[::-1].astype("int32"), **options)
    assert turned == published.compare(Bright().eval(), x, y, **options)
    with pytest.raises(ValueError, match="expected mean and std of pixels in .0, 1., got 125 and"):
        published.compare(Bright().eval(), x, y, **options | {"mean": 125, "std": 63})


def test_no_kernel_machine_and_no_standardisation(images, rng):
    x, y = images
    machine = krr.fit(kernels.by_name("fc1"), jnp.asarray(x[::10]), jnp.eye(2)[y[::10]]).machine
    with pytest.raises(ValueError, match="expected a network with mean and std, got KernelMachine"):
        nets.in_pixels(machine, 0.5, 0.2, channels=3)
    assert nets.in_pixels(machine, None, None, channels=3) is machine
    with pytest.raises(ValueError, match="expected mean and std, got None and None"):
        published.compare(Bright(), x, y, mean=None, std=None, epsilon=0.1, step_size=0.1)
    with pytest.raises(ValueError, match="evaluation mode"):
        nets.in_pixels(Bright().train(), 0.5, 0.2, channels=3)
