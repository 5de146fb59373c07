"""Every setting is typed and checked; params files say what is wrong with them."""

import dataclasses

import optax
import pytest
import yaml

from advkip import attacks, config, values
from advkip.config import Experiment


def test_defaults_are_valid_and_json():
    settings = Experiment().to_dict()
    assert Experiment.from_params(settings) == Experiment()
    assert settings["methods"] == ["adv-kip", "kip"]


def test_integers_pass_as_floats_and_lists_as_tuples():
    e = Experiment(epsilon=1, notebooks=["01_kernels"])
    assert type(e.epsilon) is float
    assert e.notebooks == ("01_kernels",)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"learning_rate": "1e-6"}, "learning_rate to be a finite float, got '1e-6'.*1.0e-6"),
        ({"learning_rate": float("nan")}, "expected learning_rate to be a finite float"),
        ({"epsilon": float("inf")}, "expected epsilon to be a finite float"),
        ({"n_steps": 10.0}, "expected n_steps to be a finite int, got 10.0"),
        ({"n_steps": True}, "expected n_steps to be a finite int, got True"),
        ({"learn_labels": 1}, "expected learn_labels to be a finite bool, got 1"),
        ({"notebooks": "01_kernels"}, "expected notebooks to be a list of strings"),
        ({"name": "a/b"}, "expected name of letters"),
        ({"dataset": "../mnist"}, "expected dataset to be a data set's name"),
        ({"notebooks": []}, "expected notebooks not empty"),
        ({"methods": ["rfd"]}, "expected methods a choice of"),
        ({"kernel": "resnet"}, "expected kernel such as 'fc3'"),
        ({"dtype": "float16"}, "expected dtype in"),
        ({"norm": "l1"}, "expected norm in"),
        ({"optimizer": "lbfgs"}, "expected optimizer in"),
        ({"outer_loss": "hinge"}, "expected outer_loss in"),
        ({"pgd_steps": -1}, "expected pgd_steps >= 0"),
        ({"pgd_steps": 0}, "expected pgd_steps >= 1 for the method 'adv-kip'"),
        ({1: 2, "foo": 3}, r"expected known settings, got \['1', 'foo'\]"),
        ({"n_support": 0}, "expected n_support >= 1"),
        ({"learning_rate": 0.0}, "expected learning_rate > 0"),
        ({"diag_reg": -1e-6}, "expected diag_reg >= 0"),
        ({"epsilon": 8.0, "step_size": 2.0}, r"expected epsilon in \[0, 1\] pixel units"),
        ({"epsilon": 0.1, "step_size": 0.3}, "expected step_size <= 2 epsilon"),
        ({"net_sets": ["kip"]}, "expected net_sets a choice of"),
        ({"fc_nets": ["fc3"]}, "expected fc_nets to be known names"),
        ({"cnns": ["resnet18"]}, "expected cnns to be known names"),
        ({"net_attacks": ["fgsm", "cw"]}, "expected net_attacks to be known names"),
        ({"net_learning_rates": []}, "expected net_learning_rates to be positive numbers"),
        ({"at_learning_rates": [0.1, 0]}, "expected at_learning_rates to be positive numbers"),
        ({"net_learning_rates": ["1e-3"]}, "to be a list of floats, got .* 1e-6 is text"),
        ({"net_learning_rates": 1e-3}, "to be a list of floats, got 0.001"),
        ({"net_milestones": [0.5]}, "expected net_milestones to be a list of ints"),
        ({"net_optimizer": "lion"}, "expected net_optimizer in"),
        ({"net_loss": "hinge"}, "expected net_loss in"),
        ({"net_target": "hard"}, "expected net_target in"),
        ({"net_target": "labels"}, "expected net_target 'softmax' or 'argmax' with cross-entropy"),
        ({"net_seeds": 0}, "expected net_seeds >= 1"),
        ({"at_epochs": -1}, "expected at_epochs >= 0"),
        ({"n_suport": 10}, r"expected known settings, got \['n_suport'\]"),
    ],
)
def test_bad_values(change, match):
    with pytest.raises(ValueError, match=match):
        Experiment.from_params(change)


def test_l2_radius_may_exceed_one():
    assert Experiment(norm="l2", epsilon=1.5, step_size=0.2).epsilon == 1.5


def test_files(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("name: x\nepsilon: 0.3\nstep_size: 0.1\n")
    assert Experiment.from_file(path).epsilon == 0.3
    overridden = Experiment.from_file(path, ["seed=3", "methods=[kip]", "epsilon=0.25"])
    assert (overridden.seed, overridden.methods, overridden.epsilon) == (3, ("kip",), 0.25)
    for text, match in (
        ("epsilon: 1e-2", "x.yaml: expected epsilon to be a finite float, got '1e-2'"),
        ("epsilom: 0.1", r"x.yaml: expected known settings, got \['epsilom'\]"),
        ("seed: 1\nseed: 2", r"x.yaml: expected each key once, got \['seed'\] twice"),
        ("- seed", "x.yaml: expected 'key: value' lines, got list"),
        ("seed: [", "x.yaml: "),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=match):
            Experiment.from_file(path)
    path.write_text("seed: 3")
    assert Experiment.from_file(path).name == "x"
    with pytest.raises(ValueError, match="x.yaml --set epsilom=1: expected known settings"):
        Experiment.from_file(path, ["epsilom=1"])
    with pytest.raises(ValueError, match="expected key=value, got 'seed'"):
        Experiment.from_file(path, ["seed"])


def test_from_notebook_takes_settings_alone():
    namespace = {"seed": 4, "kernel": "fc5", "np": config, "output": "here"}
    assert Experiment.from_notebook(namespace) == Experiment(seed=4, kernel="fc5")


def test_kip_has_no_inner_maximum_and_its_own_steps():
    kip = Experiment(kip_steps=7, kip_learning_rate=0.5, logit_scale=10, patience=3).as_kip()
    assert (kip.pgd_steps, kip.n_steps, kip.learning_rate, kip.label_learning_rate) == (
        0, 7, 0.5, 0.5,
    )  # fmt: skip
    assert (kip.outer_loss, kip.logit_scale, kip.patience) == ("mse", 1.0, 0)


def test_fingerprint_changes_with_what_matters():
    e = Experiment()
    for same in ({"n_steps": 500}, {"name": "y"}, {"n_test": 7}, {"data_dir": "d"}):
        assert e.replace(**same).fingerprint() == e.fingerprint()
    for other in ({"seed": 1}, {"learning_rate": 0.5}, {"kernel": "fc5"}, {"epsilon": 0.25}):
        assert e.replace(**other).fingerprint() != e.fingerprint()
    assert e.as_kip().fingerprint() != e.fingerprint()


def test_same_results():
    e = Experiment(seed=1)
    assert e.same_results(e.replace(notebooks=["02"], data_dir="d").to_dict())
    assert e.same_results({"seed": 1})  # a record from before the other settings existed
    assert not e.same_results(e.replace(seed=2).to_dict())
    with pytest.raises(ValueError, match="expected known settings"):
        e.same_results({"gone": 1})


def test_robust_features_need_a_source(tmp_path):
    asked = {"diagnosed_sets": ["robust-features"]}
    for missing in ({"at_epochs": 0}, {"at_nets": []}):
        e = Experiment.from_params(asked | missing)
        assert e.same_results(e.to_dict())  # other notebooks do not mind
        with pytest.raises(ValueError, match="expected adversarial training behind"):
            e.check_diagnosis()
        e.replace(robust_features="a").check_diagnosis()
        path = tmp_path / "a.yaml"
        path.write_text(yaml.safe_dump(missing | {"notebooks": ["04_shortcomings"]}))
        with pytest.raises(ValueError, match="a.yaml: expected adversarial training behind"):
            Experiment.from_file(path)
        assert Experiment.from_file(path, ["notebooks=[03_cnns]"])
    with pytest.raises(ValueError, match="expected pgd_steps >= 1 for the diagnosed set 'adv-kip'"):
        Experiment(methods=["kip"], pgd_steps=0).check_diagnosis()
    with pytest.raises(ValueError, match="expected diagnosed_sets a choice of"):
        Experiment(diagnosed_sets=["rfd"])
    with pytest.raises(ValueError, match="expected at_nets to be known names"):
        Experiment(at_nets=["resnet"])
    with pytest.raises(ValueError, match="expected at_sets a choice of"):
        Experiment(at_sets=["rfd"])
    with pytest.raises(ValueError, match=r"at_sets among diagnosed_sets, got \['kip'\] besides"):
        Experiment(diagnosed_sets=["adv-kip"], at_sets=["original", "kip"]).check_diagnosis()


def test_settings_of_convolutional_networks():
    e = Experiment(net_epochs=50, net_learning_rates=[0.1, 0.2], net_patience=3)
    assert e.for_cnns() == e
    e = e.replace(cnn_epochs=7, cnn_learning_rates=[0.3], cnn_patience=2)
    found = e.for_cnns()
    assert (found.net_epochs, found.net_learning_rates, found.net_patience) == (7, (0.3,), 2)
    plain = Experiment(net_epochs=50, net_learning_rates=[0.1, 0.2], net_patience=3)
    assert e.same_results(plain.to_dict(), "02_transfer")
    assert not e.same_results(plain.to_dict(), "03_cnns")
    with pytest.raises(ValueError, match="expected cnn_learning_rates to be positive"):
        Experiment(cnn_learning_rates=[0.1, -0.1])


def test_settings_of_networks_touch_no_distilled_set():
    plain, changed = Experiment(), Experiment(net_epochs=7, at_epochs=0, cnns=["vgg11"])
    assert plain.fingerprint() == changed.fingerprint()
    assert not changed.same_results(plain.to_dict())
    assert changed.same_results(plain.to_dict(), "01_kernels")
    assert not changed.same_results(Experiment(seed=1).to_dict(), "01_kernels")
    later = Experiment(n_diagnose=7, diagnosed_sets=["kip"])
    assert later.fingerprint() == plain.fingerprint()
    assert later.same_results(plain.to_dict(), "03_cnns")
    assert not later.same_results(plain.to_dict(), "04_shortcomings")
    assert not changed.same_results(plain.to_dict(), "03_cnns")
    assert Experiment(seed=2, net_seeds=3).net_seed_list() == [2000, 2001, 2002]


def test_names_exist_where_they_are_used():
    assert set(config.LOSSES) == set(attacks.LOSSES)
    for name in config.OPTIMIZERS:
        getattr(optax, name)(1e-3)


def test_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Experiment().seed = 1


@pytest.mark.parametrize(
    "text", ["seed: 010", "net_milestones: [1:30]", "seed: 0x10", "n_test: 0_7"]
)
def test_numbers_that_yaml_reads_otherwise_are_refused(tmp_path, text):
    file = tmp_path / "p.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match="p.yaml: expected a decimal number, got"):
        Experiment.from_file(file)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_steps": 0}, "expected outer_steps >= 1, got 0"),
        ({"epsilon": 0.1, "step_size": 0.3}, "step_size .* 2 radius"),
    ],
)
def test_errors_speak_of_a_setting_by_the_callers_name(settings, message):
    names = values.named(n_steps="outer_steps", epsilon="radius")
    with pytest.raises(ValueError, match=message), names:
        Experiment(**settings)
