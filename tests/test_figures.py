"""Every figure draws what it is given, and is saved as a PNG."""

import matplotlib.pyplot as plt
import numpy as np
import pytest

from advkip import figures, pictures

HISTORY = [
    {"step": 10 * i, "loss": 2.0, "clean": 0.9 - 0.01 * i, "fgsm": 0.1 * i, "pgd": 0.05 * i,
     "gradient_norm": 0.3 - 0.01 * i, "seconds": 1.0 * i}
    for i in range(5)
]  # fmt: skip


@pytest.fixture(autouse=True)
def close():
    yield
    plt.close("all")


def test_training_curves_show_the_history():
    figure = figures.training_curves({"adv-kip": HISTORY, "kip": HISTORY[:2]})
    first, second = figure.axes
    assert [line.get_label() for line in first.lines] == ["clean", "FGSM", "PGD"]
    np.testing.assert_allclose(first.lines[2].get_xydata(), [(10 * i, 5 * i) for i in range(5)])
    assert len(second.lines[0].get_xdata()) == 2


def test_curves_of_networks():
    history = [{"epoch": i, "test_clean": 0.9, "test_fgsm": 0.5, "test_pgd": 0.1} for i in (1, 2)]
    figure = figures.training_curves(
        {str(i): history for i in range(4)}, against="epoch", images="test"
    )
    assert len([axis for axis in figure.axes if axis.axison]) == 4
    np.testing.assert_allclose(figure.axes[3].lines[2].get_xydata(), [(1, 10), (2, 10)])
    assert figure.axes[0].get_ylabel() == "test accuracy (%)"

    class Run:
        def __init__(self, score, clean):
            self.score, self.clean, self.history = score, clean, []

    class Search:
        learning_rate, runs = 0.1, {0.1: Run(0.4, 0.8), 0.01: Run(0.2, 0.9)}
        best = list(runs.values())

    (axis,) = figures.learning_rates({"net": Search}).axes
    np.testing.assert_allclose(axis.lines[0].get_xydata(), [(0.01, 90), (0.1, 80)])
    np.testing.assert_allclose(axis.lines[1].get_xydata(), [(0.01, 20), (0.1, 40)])
    assert axis.lines[1].get_label() == "PGD"
    Search.best[0].history = [line | {"strong": 0.1} for line in HISTORY]
    (axis,) = figures.learning_rates({"net": Search}).axes
    assert axis.lines[1].get_label() == "worst of several losses"
    (axis,) = figures.training_curves({"adv-kip": Search.best[0].history}).axes
    np.testing.assert_allclose(axis.lines[3].get_ydata(), 10)


def test_gradient_norms_and_trade_off_show_the_history():
    (axis,) = figures.gradient_norms({"adv-kip": HISTORY}).axes
    np.testing.assert_allclose(axis.lines[0].get_ydata(), [0.3, 0.29, 0.28, 0.27, 0.26])
    (axis,) = figures.trade_off({"adv-kip": HISTORY}).axes
    np.testing.assert_allclose(axis.lines[0].get_xydata()[1], [89, 5])


@pytest.mark.parametrize("channels", [1, 3])
def test_images(rng, channels):
    x, labels = rng.uniform(0, 1, (25, 6, 6, channels)), np.eye(10)[np.arange(25) % 10]
    figure = pictures.before_and_after(x, labels, x + 0.2, labels - 0.1)
    assert len(figure.axes) == 40
    assert [axis.get_title() for axis in figure.axes[:10]] == [str(c) for c in range(10)]
    named = pictures.before_and_after(x, labels, x, labels, dataset="cifar10")
    assert [axis.get_title() for axis in named.axes[2:4]] == ["bird", "cat"]
    difference = figure.axes[20].images[0]
    np.testing.assert_allclose(difference.get_array(), 0.2, rtol=1e-12)
    assert difference.get_clim() == pytest.approx((-0.2, 0.2))
    figure = pictures.attacked_images(x[:3], x[:3], ["a", "b", "c"])
    assert [axis.get_title() for axis in figure.axes[:3]] == ["a", "b", "c"]


def test_curves():
    (axis,) = figures.kernel_profile(np.array([1.0, 0.0]), {"fc3": np.array([1.0, 0.4])}).axes
    np.testing.assert_allclose(axis.lines[0].get_xydata(), [(0, 1), (90, 0.4)], atol=1e-12)
    (axis,) = figures.accuracy_against([0, 0.3], {"original": [0.9, 0.1]}, label="radius").axes
    np.testing.assert_allclose(axis.lines[0].get_ydata(), [90, 10])
    assert (axis.get_xlabel(), axis.get_xscale()) == ("radius", "linear")
    figure = figures.accuracy_against(
        [64, 4096], {"clean": [0.9, 0.95], "robust": [np.nan, 0.2]}, label="width", log=True,
        levels={"the kernel, clean": 1.0, "the kernel, robust": 0.3},
    )  # fmt: skip
    (axis,) = figure.axes
    assert [text.get_text() for text in axis.get_xticklabels()] == ["64", "4,096"]
    clean, robust, *levels = axis.lines
    assert [line.get_ydata()[0] for line in levels] == [100, 30]
    assert [line.get_color() for line in levels] == [clean.get_color(), robust.get_color()]
    assert len(figure.legends[0].get_texts()) == 4


def test_encoding_shows_each_piece():
    values = np.linspace(0, 1, 5)
    parts = np.stack([values / 2, values**2, 1 - values], 1)
    (axis,) = figures.encoding(values, parts).axes
    assert [line.get_label() for line in axis.lines] == ["piece 1", "piece 2", "piece 3"]
    for line, part in zip(axis.lines, parts.T, strict=True):
        np.testing.assert_array_equal(line.get_ydata(), part)


def test_one_legend_has_what_any_panel_has():
    line = {"step": 0, "clean": 0.9, "fgsm": 0.5, "pgd": 0.4}
    figure = figures.training_curves({"a": [line], "b": [line | {"strong": 0.1}]})
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["clean", "FGSM", "PGD", "worst of several losses"]


def test_loss_and_gradient_by_right_and_wrong():
    history = [
        {"epoch": i, "loss_right": 10.0**-i, "loss_wrong": None if i == 2 else 5.0,
         "gradient_right": 0.0, "gradient_wrong": 3.0}
        for i in (1, 2, 3)
    ]  # fmt: skip
    figure = figures.loss_and_gradient({"a": history, "b": history})
    loss, _, gradient, _ = figure.axes
    np.testing.assert_allclose(loss.lines[0].get_xydata(), [(i, 10.0**-i) for i in (1, 2, 3)])
    np.testing.assert_allclose(loss.lines[1].get_xydata(), [(1, 5), (3, 5)])
    assert (
        gradient.lines[0].get_ydata() > 0
    ).all()  # 0 has no logarithm, and is drawn all the same
    figure.canvas.draw()


def test_evidence_shows_attacks_and_the_sweep():
    class Found:
        verdict, broken, sweep = "masked", {"noise": 0.0, "square": 0.75}, {0.1: 0.9, 1.0: 0.9}

    class Other(Found):
        verdict, broken = "genuine", {"noise": 0.1, "from kernel": 0.2}
        sweep = {0.1: 0.5}

    left, right = figures.evidence({"net": Found, "other": Other}).axes
    assert [label.get_text() for label in left.get_xticklabels()] == [
        "noise", "square", "from kernel",
    ]  # fmt: skip
    assert left.get_yticklabels()[0].get_text() == "net\nmasked"
    cells = sorted(text.get_text() for text in left.texts)
    assert cells == ["0%", "10%", "20%", "75%", "–", "–"]  # not asked is not 0 %
    assert [label.get_text() for label in right.get_xticklabels()] == ["0.1", "1"]
    np.testing.assert_allclose(right.images[0].get_array().filled(-1), [[0.9, 0.9], [0.5, -1]])


def test_rounding_shows_how_sure_of_what_pgd_leaves():
    class Found:
        verdict, n = "masked", 4
        log_odds = np.array([-0.5, 50, 200, 0.2])  # right with a softmax below 1/2, and wrong above
        right = np.array([True, True, True, False])
        withstood = np.array([False, True, True, False])

    figure = figures.rounding({"net": Found, "other": Found}, rounded=17, lost=104)
    (axis,) = figure.axes
    falls, other_falls, stays, _ = (points.get_offsets() for points in axis.collections)
    np.testing.assert_allclose(falls[:, 0], [-0.5])
    np.testing.assert_allclose(stays[:, 0], [50, 200])
    assert abs(stays[:, 1]).max() < 0.4 < other_falls[:, 1].min()
    assert axis.get_yticklabels()[1].get_text() == "other\nmasked"
    assert axis.get_xlim()[0] < -0.5 < 200 < axis.get_xlim()[1]
    figure.canvas.draw()


def test_inverted_images(rng):
    images = rng.random((3, 5, 8, 8, 1))
    figure = pictures.inverted_images(*images)
    assert len(figure.axes) == 15
    np.testing.assert_allclose(figure.axes[10].images[0].get_array(), images[2, 0].squeeze())


def test_save(tmp_path):
    figure = figures.trade_off({"kip": HISTORY})
    assert figures.save(figure, tmp_path / "new", "trade_off") is figure
    assert (tmp_path / "new" / "trade_off.png").read_bytes()[:4] == b"\x89PNG"
    assert not plt.get_fignums()
