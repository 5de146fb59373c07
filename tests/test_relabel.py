"""Original images with a kernel machine's answers as labels."""

import numpy as np
import pytest
import torch

from advkip import (
    data,
    distill,
    nets,
    preflight,
    recipe,
    relabel,
    search,
    sets,
    training,
)
from advkip.config import Experiment, sections
from tests.sections import SMALL_SETS, changed, experiment

SMALL = changed(SMALL_SETS, kip=None, relabelling__copies=1)


def test_labels_are_the_machines_answers(digits, splits, tmp_path):
    found = sets.load(["relabelled", "adv-kip", "original"], SMALL, splits, digits, tmp_path)
    original, made = found["original"], found["relabelled"]
    np.testing.assert_array_equal(made.x, original.x)
    answers = np.asarray(sets.machine(found["adv-kip"], SMALL)(original.x))
    np.testing.assert_allclose(made.y.std(), original.y.std(), rtol=1e-5)
    np.testing.assert_allclose(made.y / made.y.std(), answers / answers.std(), rtol=1e-3, atol=1e-4)
    assert (made.kernel, made.teacher) == (None, "fc2")
    alone = sets.load(["relabelled"], SMALL, splits, digits, tmp_path)["relabelled"]
    np.testing.assert_array_equal(alone.y, made.y)


def test_the_teacher_may_be_in_a_file(digits, splits, tmp_path):
    other = changed(SMALL, kernel__name="fc1", support__n_support=20)
    theirs = sets.load(["adv-kip"], other, splits, digits, tmp_path / "other")["adv-kip"]
    own = changed(
        SMALL, adv_kip=None, notebooks=["02_transfer"], networks__sets=["x", "relabelled"]
    )
    names = ["relabelled", str(tmp_path / "other" / "adv-kip.npz")]
    made = sets.load(names, own, splits, digits, tmp_path)["relabelled"]
    answers = np.asarray(sets.machine(theirs, own)(made.x))
    np.testing.assert_allclose(made.y / made.y.std(), answers / answers.std(), rtol=1e-3, atol=1e-4)
    assert made.teacher == "fc1"
    named = changed(SMALL, relabelling__teacher=str(tmp_path / "other" / "adv-kip.npz"))
    again = sets.load(["relabelled", "adv-kip"], named, splits, digits, tmp_path)["relabelled"]
    np.testing.assert_array_equal(again.y, made.y)
    assert again.teacher == "fc1"
    assert sets.from_path(tmp_path / "relabelled.npz")[1].teacher == "fc1"


@pytest.mark.parametrize("levels", [16, 255])
def test_a_relabelled_set_is_a_file_that_any_script_can_use(levels, digits, splits, tmp_path):
    x = np.round(splits.x_pool * levels).astype("float32") / np.float32(levels)
    made = sets.load(["relabelled"], SMALL, splits._replace(x_pool=x), digits, tmp_path)
    path = tmp_path / "relabelled.npz"
    assert np.load(path)["x_train"].dtype == ("uint8" if levels == 255 else "float32")
    name, again = sets.from_path(path)
    assert (name, again.kernel, again.teacher) == ("relabelled", None, "fc2")
    np.testing.assert_array_equal(again.x, made["relabelled"].x)
    np.testing.assert_array_equal(again.y, made["relabelled"].y)
    dataset = data.from_npz(path)  # labels are the classes of the largest answers
    np.testing.assert_array_equal(dataset.y_train, again.y.argmax(1))


def test_a_file_that_is_right_is_not_written_again(digits, splits, tmp_path):
    def load():
        sets.load(["relabelled"], SMALL, splits, digits, tmp_path)
        return (tmp_path / "relabelled.npz").stat().st_mtime_ns

    first = load()
    assert load() == first
    (tmp_path / "relabelled.npz").write_bytes(b"damaged")
    assert load() != first
    assert sets.from_path(tmp_path / "relabelled.npz")[0] == "relabelled"


def test_answers_that_do_not_fit_are_refused(splits):
    original = data.draw_original(SMALL, splits)
    with pytest.raises(
        ValueError, match=r"expected answers \(40, 10\) that differ, got \(40, 10\)"
    ):
        relabel.relabelled(original, np.ones((40, 10)), teacher="mute")
    with pytest.raises(ValueError, match=r"expected answers \(40, 10\) .* got \(40, 9\)"):
        relabel.relabelled(original, np.eye(40, 9), teacher="of nine classes")
    made = relabel.relabelled(original, 7 * np.eye(40, 10), teacher="any")
    np.testing.assert_allclose(made.y, np.eye(40, 10) * made.y.max())


def test_a_relabelled_set_needs_a_teacher():
    settings = {"notebooks": ["02_transfer"], "networks": {"sets": ["relabelled"]}}
    with pytest.raises(ValueError, match=r"expected settings of \['adv-kip'\]"):
        Experiment.from_params(settings | {"adv_kip": None})
    Experiment.from_params(settings)
    Experiment.from_params(settings | {"adv_kip": None, "relabelling": {"teacher": "x.npz"}})
    with pytest.raises(ValueError, match="expected relabelling.noise null with relabelling.kind"):
        Experiment.from_params({"relabelling": {"kind": "mixup", "noise": 0.1}})
    with pytest.raises(
        ValueError, match="expected relabelling.shift 0 with relabelling.teacher 'classes'"
    ):
        Experiment.from_params({"relabelling": {"teacher": "classes", "shift": 1}})
    for name in ("x.npz", "adv-kip"):  # which is no name here
        e = Experiment.from_params(settings | {"relabelling": {"teacher": name}})
        with pytest.raises(ValueError, match=f"got '{name}', which is not there"):
            preflight.check(e)


def test_an_adversarially_trained_network_may_answer(digits, splits, tmp_path):
    e = changed(
        SMALL, notebooks=["02_transfer"], adv_kip=None, networks__sets=["relabelled"],
        relabelling__teacher="adversarial", relabelling__rounds=1, relabelling__scout="fc1-16",
        adversarial_training__nets=["fc1-32", "fc1-16"], adversarial_training__epochs=3,
        fully_connected__epochs=2,
    )  # fmt: skip
    made = sets.load(["relabelled"], e, splits, digits, tmp_path)["relabelled"]
    watched = training.watched(splits, e.networks.n_watch, seed=e.seed)
    train = search.Trainer(e, watched, tmp_path)
    original = data.draw_original(e, splits)
    (found,) = train("fc1-32", "original", original, adversarially=True, progress=False).best
    assert found.resumed == 3  # notebook 04's, which is trained once
    with torch.no_grad():
        answers = nets.to_numpy(found.net(nets.to_tensor(made.x)))
    assert len(made.x) == 2 * len(original.x)
    np.testing.assert_allclose(made.y / made.y.std(), answers / answers.std(), rtol=1e-3, atol=1e-4)
    assert made.teacher == "adversarial fc1-32 + attacked"
    assert sets.from_path(tmp_path / "relabelled.npz")[1].teacher == "adversarial fc1-32 + attacked"
    bare = changed(SMALL, relabelling__teacher="adversarial", adversarial_training=None)
    with pytest.raises(ValueError, match="expected adversarial_training with nets, of which"):
        sets.load(["relabelled"], bare, splits, digits, tmp_path)


def test_original_images_answer_for_comparison(digits, splits, tmp_path):
    e = changed(
        SMALL, notebooks=["02_transfer"], adv_kip=None, networks__sets=["relabelled"],
        relabelling__teacher="original",
    )  # fmt: skip
    preflight.check(e)
    made = sets.load(["relabelled"], e, splits, digits, tmp_path)["relabelled"]
    machine = sets.machine(data.TrainingSet(*distill.initial_support(e, splits), e.kernel), e)
    answers = np.asarray(machine(made.x))
    np.testing.assert_allclose(made.y / made.y.std(), answers / answers.std(), rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(made.x, data.draw_original(e, splits).x)
    assert made.teacher == "original fc2"
    assert sets.from_path(tmp_path / "relabelled.npz")[1].teacher == "original fc2"


def test_such_a_network_is_asked_for_by_name_and_needs_its_settings():
    settings = {
        "notebooks": ["02_transfer"], "networks": {"sets": ["relabelled"]},
        "relabelling": {"teacher": "adversarial"}, "adv_kip": None,
    }  # fmt: skip
    e = Experiment.from_params(settings)
    preflight.check(e)
    other = e.replace(adversarial_training={"epochs": 7})
    assert other.of(*sections("02_transfer")) != e.of(*sections("02_transfer"))
    for at in (None, {"nets": []}):
        with pytest.raises(ValueError, match="expected adversarial_training with nets behind"):
            Experiment.from_params(settings | {"adversarial_training": at})
    named = settings["relabelling"] | {"teacher": "x.npz"}
    Experiment.from_params(settings | {"adversarial_training": None, "relabelling": named})


def test_a_teacher_is_a_distilled_set_of_the_same_split(digits, splits, tmp_path):
    path = tmp_path / "digits.npz"
    np.savez(path, **digits._asdict())
    e = changed(SMALL, relabelling__teacher=str(path))
    with pytest.raises(ValueError, match="relabelling.teacher: expected a distilled set with its"):
        sets.load(["relabelled"], e, splits, digits, tmp_path)
    sets.load(["adv-kip"], SMALL, splits, digits, tmp_path)
    other = changed(SMALL, seed=7, relabelling__teacher=str(tmp_path / "adv-kip.npz"))
    with pytest.raises(ValueError, match="relabelling.teacher: expected a set with seed 7, got 0"):
        sets.load(["relabelled"], other, data.split(digits, other), digits, tmp_path / "other")
    named = changed(SMALL, notebooks=["02_transfer"], networks__sets=["relabelled"])
    named = changed(named, relabelling__teacher=str(tmp_path / "adv-kip.npz"))
    assert str(tmp_path / "adv-kip.npz") in preflight.digests(named)


@pytest.mark.parametrize("levels", [16, 255])
def test_copies_differ_by_as_much_as_is_asked(levels, digits, splits, tmp_path):
    x = np.round(splits.x_pool * levels).astype("float32") / np.float32(levels)
    e = changed(SMALL, relabelling__copies=3, relabelling__noise=0.3)
    names = ["original", "adv-kip", "noisy", "relabelled"]
    found = sets.load(names, e, splits._replace(x_pool=x), digits, tmp_path)
    original, made = found["original"], found["noisy"]
    assert made.x.shape == (120, 8, 8, 1)
    assert made.x.dtype == np.float32
    np.testing.assert_array_equal(made.x[:40], original.x)
    np.testing.assert_array_equal(made.y, np.tile(original.y, (3, 1)))
    step = np.abs(made.x[40:] - np.tile(original.x, (2, 1, 1, 1)))
    rounding = 0.5 / 255 if levels == 255 else 0
    inside = (made.x[40:] > 0) & (made.x[40:] < 1)
    np.testing.assert_allclose(step[inside], 0.3, atol=rounding + 1e-6)
    assert step.max() < 0.3 + rounding + 1e-6
    assert (made.x[40:80] != made.x[80:]).any()
    whole = np.round(made.x * 255)
    assert (np.abs(whole - made.x * 255).max() < 1e-4) == (levels == 255)
    np.testing.assert_array_equal(found["relabelled"].x, made.x)
    answers = np.asarray(sets.machine(found["adv-kip"], e)(made.x))
    np.testing.assert_allclose(
        found["relabelled"].y / made.y.std(), answers / answers.std(), rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize("kind", ["noise", "mixup"])
def test_half_of_a_copy_may_be_mirrored(kind, monkeypatch):
    e = changed(SMALL, relabelling__copies=3, relabelling__kind=kind, relabelling__mirror=True)
    monkeypatch.setattr(
        relabel, "_mixed" if kind == "mixup" else "_with_noise", lambda x, y, *_: (x, y)
    )
    x = np.random.default_rng(0).integers(0, 256, (400, 4, 4, 1)).astype("float32") / 255
    made = relabel.noisy(data.TrainingSet(x, np.eye(10, dtype="float32")[np.arange(400) % 10]), e)
    same, flipped = (
        (made.x.reshape(3, *x.shape) == sides).all((2, 3, 4)) for sides in (x, x[:, :, ::-1])
    )
    assert same[0].all()
    assert (same ^ flipped)[1:].all()
    assert (abs(flipped[1:].mean(1) - 0.5) < 0.1).all()
    assert not np.array_equal(flipped[1], flipped[2])


@pytest.mark.parametrize("mirror", [False, True])
def test_copies_may_be_mixtures_of_two_images(mirror):
    e = changed(SMALL, relabelling__copies=4, relabelling__kind="mixup")
    e = changed(e, relabelling__mirror=mirror)
    x = np.zeros((50, 8, 8, 1), "float32")
    x[np.arange(50), np.arange(50) % 8, np.arange(50) // 8] = 1  # one pixel each
    y = np.eye(50, dtype="float32")
    made = relabel.noisy(data.TrainingSet(x, y), e)
    np.testing.assert_array_equal(made.x[:50], x)
    np.testing.assert_allclose(made.y.sum(1), 1, rtol=1e-6)
    assert ((made.y > 0).sum(1) <= 2).all()
    shares = made.y.max(1)[50:]
    assert shares.min() < 0.6 < 0.9 < shares.max()
    as_they_are = made.y @ x.reshape(50, -1)
    flipped = made.y @ x[:, :, ::-1].reshape(50, -1)
    pixels = made.x.reshape(200, -1)
    same = np.abs(pixels - as_they_are).max(1) < 1 / 255
    assert same[:50].all()
    assert same.all() == (not mirror)
    assert (pixels <= as_they_are + flipped + 1 / 255).all()  # each is in its place or mirrored
    copies = pixels.reshape(4, 50, -1)
    assert not np.array_equal(copies[1], copies[2])
    np.testing.assert_array_equal(relabel.noisy(data.TrainingSet(x, y), e).x, made.x)


@pytest.mark.parametrize(("norm", "epsilon", "each"), [("linf", 0.25, 0.25), ("l2", 2.0, 0.25)])
def test_copies_reach_as_far_as_the_threat(norm, epsilon, each, splits):
    e = changed(SMALL, threat__norm=norm, threat__epsilon=epsilon, relabelling__copies=4)
    original = data.draw_original(e, splits)
    original = original._replace(x=np.full_like(original.x, 0.5))  # nothing is clipped
    made = relabel.noisy(original, e)
    assert len(made.x) == 4 * len(original.x)
    np.testing.assert_allclose(np.abs(made.x[40:] - 0.5), each, rtol=1e-5)


def test_networks_take_over_the_machines_robustness(digits, tmp_path):
    """Plain training, one recipe, the same images and noisy copies: on the machine's answers a
    network withstands more than on classes, by the worst case of several losses on test images."""
    e = experiment(
        support__n_support=100, support__n_target=100, dataset__n_test=200, kernel__name="fc1",
        adv_kip__n_steps=60, adv_kip__eval_every=60, adv_kip__inner_loss="margin",
        adv_kip__outer_loss="hinge", networks__n_original=1200,
        networks__choose_by="worst-case", networks__n_watch=100, relabelling__copies=5,
        fully_connected__epochs=20, fully_connected__eval_every=10,
    )  # fmt: skip
    splits = data.split(digits, e)
    x, y = data.draw_test(splits, 200, seed=0)
    watched = training.watched(splits, 100, seed=0)
    plain = recipe.Recipe.of(e.fully_connected, e)
    left = {}
    for name, one in sets.load(["noisy", "relabelled"], e, splits, digits, tmp_path).items():
        (trained,) = search.search(
            "fc1-256", one.x, one.y, recipe=plain, learning_rates=[1e-3], watched=watched,
            seeds=[0], progress=False,
        ).best  # fmt: skip
        left[name] = training.robust_accuracies(
            trained.net, nets.to_tensor(x), torch.as_tensor(y).to(nets.device()), plain
        )
    assert left["relabelled"]["clean"] > 0.85
    assert left["relabelled"]["strong"] > left["noisy"]["strong"] + 0.1


SHIFTED = changed(SMALL, relabelling__shift=1)


def test_features_are_the_answers_to_moved_images(digits, splits, tmp_path):
    found = sets.load(["relabelled", "adv-kip"], SHIFTED, splits, digits, tmp_path)
    made, machine = found["relabelled"], sets.machine(found["adv-kip"], SHIFTED)
    still, up = made.x, np.concatenate([made.x[:, 1:], made.x[:, -1:]], 1)
    scale = made.y.std() / np.asarray(machine(still)).std()
    assert made.features.shape == (len(made.x), 4 * 10)
    assert made.teacher == "fc2 + features"
    assert made.features.dtype == np.float32
    np.testing.assert_allclose(
        made.features[:, -10:], scale * np.asarray(machine(up)), rtol=1e-3, atol=1e-4
    )
    name, again = sets.from_path(tmp_path / "relabelled.npz")
    np.testing.assert_array_equal(again.features, made.features)
    np.testing.assert_array_equal(again.y, made.y)
    assert sets.load(["relabelled"], SMALL, splits, digits, tmp_path)["relabelled"].features is None
    assert sets.from_path(tmp_path / "relabelled.npz")[1].features is None


def test_images_move_right_left_down_and_up():
    x = np.arange(12, dtype="float32").reshape(1, 3, 4, 1)
    right, left, down, up = (one[0, ..., 0] for one in relabel.moved(x, 1))
    x = x[0, ..., 0]
    np.testing.assert_array_equal(right, x[:, [0, 0, 1, 2]])
    np.testing.assert_array_equal(left, x[:, [1, 2, 3, 3]])
    np.testing.assert_array_equal(down, x[[0, 0, 1]])
    np.testing.assert_array_equal(up, x[[1, 2, 2]])


def test_networks_are_asked_for_features_in_plain_training_on_numbers(
    digits, splits, tmp_path, monkeypatch
):
    made = sets.load(["relabelled"], SHIFTED, splits, digits, tmp_path)["relabelled"]
    seen, train = [], training.train

    def spy(net, x, y, **options):
        seen.append(y)
        return train(net, x, y, **options)

    monkeypatch.setattr(training, "train", spy)
    watched = training.watched(splits, 20, seed=0)
    for changes in ({}, {"cnns__loss": "mse", "cnns__target": "labels"}):
        trainer = search.Trainer(changed(SMALL, cnns__epochs=1, **changes), watched)
        net = trainer("simple-cnn", "relabelled", made, progress=False).best[0].net
        assert net(nets.to_tensor(made.x[:3])).shape == (3, 10)
    classes, numbers = seen
    np.testing.assert_array_equal(classes, made.y)
    np.testing.assert_array_equal(numbers, np.concatenate([made.y, made.features], 1))


def test_features_want_networks_of_numbers():
    options = dict(
        notebooks=["03_cnns"], networks__sets=["relabelled"], relabelling__teacher="x.npz"
    )
    with pytest.raises(ValueError, match="expected loss 'mse' and target 'labels' for simple-cnn"):
        experiment(**options, relabelling__shift=1)
    experiment(**options, relabelling__shift=1, cnns__loss="mse", cnns__target="labels")
    with pytest.raises(ValueError, match="for simple-cnn"):  # of notebook 05
        experiment(notebooks=["05_remedies"], relabelling__shift=1, remedies__student="simple-cnn")
    with pytest.raises(ValueError, match="for simple-cnn"):  # of a scout
        experiment(
            **options | {"notebooks": ["02_transfer"]}, relabelling__shift=1,
            relabelling__rounds=1, relabelling__scout="simple-cnn",
        )  # fmt: skip
