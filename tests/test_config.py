"""Every setting is checked; params files say all that is wrong with them, in one message."""

import json
import typing

import optax
import pydantic
import pytest
import yaml

from advkip import attack_names, checked, config, losses, method_settings, records, settings
from advkip.config import Experiment
from tests.sections import changed, experiment, nested


def test_defaults_are_valid_and_json():
    found = Experiment().to_dict()
    assert Experiment.from_params(json.loads(json.dumps(found))) == Experiment()
    assert Experiment().changes() == {}
    assert Experiment().methods == ("adv-kip", "kip")


def test_numbers_as_people_write_them():
    e = experiment(threat__epsilon="8/255", threat__step_size="2/255", kernel__diag_reg="1e-6")
    assert (e.threat.epsilon, e.threat.step_size) == (8 / 255, 2 / 255)
    assert e.kernel.diag_reg == 1e-6
    assert type(experiment(threat__epsilon=1).threat.epsilon) is float
    assert experiment(cnns__learning_rates=["1e-3", 0.1]).cnns.learning_rates == (1e-3, 0.1)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"adv_kip__learning_rate": "fast"}, "adv_kip.learning_rate: expected a valid number, got"),
        ({"adv_kip__learning_rate": "1/0"}, "expected a valid number, got '1/0'"),
        ({"adv_kip__learning_rate": float("nan")}, "adv_kip.learning_rate: expected a finite"),
        ({"threat__epsilon": float("inf")}, "threat.epsilon: expected a finite number, got inf"),
        ({"adv_kip__n_steps": 10.0}, r"adv_kip.n_steps: expected a valid integer, got 10.0 \(fl"),
        ({"adv_kip__n_steps": True}, r"adv_kip.n_steps: expected a valid integer, got True \(bool"),
        ({"adv_kip__n_steps": "10"}, r"expected a valid integer, got '10' \(str\); pass for exam"),
        ({"support__learn_labels": 1}, "support.learn_labels: expected a valid boolean, got 1"),
        ({"notebooks": "01_kernels"}, "notebooks: expected a valid tuple, got '01_kernels'"),
        ({"name": "a/b"}, "name: expected text of the form"),
        ({"dataset__name": "../mnist"}, "dataset.name: expected text of the form"),
        ({"dataset__n_test": 0}, "dataset.n_test: expected greater than or equal to 1, got 0"),
        ({"notebooks": []}, r"notebooks: expected at least 1 item, got \[\]"),
        ({"kernel__name": "resnet"}, r"kernel.name: .*got 'resnet' .* pass for example 'fc3'"),
        ({"kernel__dtype": "float16"}, "kernel.dtype: expected 'float32' or 'float64', got"),
        ({"adv_kip__attack_precision": "tf32"}, "adv_kip.attack_precision: expected 'full', "),
        ({"adv_kip__attack_precision": "bfloat16", "kernel__dtype": "float64"},
         "expected adv_kip.attack_precision 'full' with kernel.dtype 'float64', got 'bfloat16'"),
        ({"adv_kip__schedule": "step"}, "adv_kip.schedule: expected 'constant', .* got 'step'"),
        ({"kip__final_rate": 0}, "kip.final_rate: expected greater than 0, got 0"),
        ({"kip__final_rate": 1.5}, "kip.final_rate: expected less than or equal to 1, got 1.5"),
        ({"threat__norm": "l1"}, "threat.norm: expected 'linf' or 'l2', got 'l1'"),
        ({"adv_kip__optimizer": "lbfgs"}, "adv_kip.optimizer: expected 'adabelief', .* got 'lbf"),
        ({"adv_kip__outer_loss": "dlr"}, "adv_kip.outer_loss: expected 'cross-.* got 'dlr'"),
        ({"adv_kip__restarts": 2}, "adv_kip: expected random_start with 2 restarts, got false"),
        ({"adv_kip__clean_weight": 1.5}, "adv_kip.clean_weight: expected less than or equal to 1"),
        ({"support__copies": 3}, "support: expected n_support to be a multiple of copies, got 100"),
        ({"support__copies": 2}, "support: expected copy_noise > 0 with 2 copies, .* got 0"),
        ({"support__copies": 4, "support__mirror": True}, "expected copy_noise > 0 with 4 copies"),
        ({"adv_kip__pgd_steps": -1}, "adv_kip.pgd_steps: expected greater than or equal to 0"),
        ({"adv_kip__pgd_steps": 0}, "expected adv_kip.pgd_steps >= 1, got 0; pass adv_kip: null"),
        ({"kip__pgd_steps": 2}, "expected kip.pgd_steps 0, got 2"),
        ({"support__n_support": 0}, "support.n_support: expected greater than or equal to 1, got"),
        ({"adv_kip__learning_rate": 0.0}, "adv_kip.learning_rate: expected greater than 0"),
        ({"adv_kip__patience": 0}, "adv_kip.patience: expected greater than or equal to 1, got 0"),
        ({"kernel__diag_reg": -1e-6}, "kernel.diag_reg: expected greater than or equal to 0"),
        ({"threat__epsilon": 8.0}, r"threat: expected epsilon in \[0, 1\] .* pass 8/255 for what"),
        ({"threat__epsilon": 0.1, "threat__step_size": 0.3}, "threat: expected step_size <= 2 eps"),
        ({"threat_l2__step_size": 9.0}, "threat_l2: expected step_size <= 2 epsilon"),
        ({"fully_connected__nets": ["fc3"]}, "fully_connected.nets.0: expected text of the form"),
        ({"cnns__nets": ["resnet18"]}, "cnns.nets.0: expected text .*got 'resnet18'"),
        ({"evaluation__attacks": ["fgsm", "cw"]}, "evaluation.attacks.1: expected attacks 'fgsm'"),
        ({"cnns__learning_rates": []}, "cnns.learning_rates: expected at least 1 item, got"),
        ({"cnns__learning_rates": [0.1, 0]}, "cnns.learning_rates.1: expected greater than 0"),
        ({"cnns__learning_rates": 1e-3}, "cnns.learning_rates: expected a valid tuple, got 0.001"),
        ({"cnns__milestones": [0.5]}, "cnns.milestones.0: expected a valid integer, got 0.5"),
        ({"cnns__optimizer": "lion"}, "cnns.optimizer: expected 'adam' or 'sgd'"),
        ({"cnns__loss": "hinge"}, "cnns.loss: expected 'cross-entropy' or 'mse'"),
        ({"cnns__target": "hard"}, "cnns.target: expected 'labels', 'softmax' or 'argmax'"),
        ({"cnns__target": "labels"}, "cnns: expected target 'softmax' or 'argmax' with cross-ent"),
        ({"networks__n_seeds": 0}, "networks.n_seeds: expected greater than or equal to 1"),
        (
            {"adversarial_training__sets": ["original", "a/mine.npz"]},
            r"expected names in adversarial_training.sets, got \['a/mine.npz'\]",
        ),
        ({"adversarial_training__epochs": 0}, "adversarial_training.epochs: expected greater than"),
        ({"robust_features__noise": 2.0}, "noise: expected less than or equal to 1, got 2"),
        ({"support__n_suport": 10}, "support.n_suport: expected a known .* pass 'n_support'"),
        ({"n_support": 10}, "n_support: expected a known .* pass 'support.n_support'"),
        ({"sed": 10}, "sed: expected a known setting, got 'sed'; pass 'seed'"),
        ({"kernel__zzz": 1}, r"kernel.zzz: expected a known .* pass one of \['name', 'W_std'"),
        ({"threat": 5}, "threat: expected a valid dictionary .* got 5 .* a mapping of its"),
    ],
)  # fmt: skip
def test_bad_values(change, match):
    with pytest.raises(ValueError, match=match):
        experiment(**change)


def test_all_faults_come_in_one_message(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("threat: {epsilom: 0.1}\nkernel: {name: fc}\nadv_kip: {n_steps: many}\n")
    with pytest.raises(ValueError, match="x.yaml: ") as error:
        Experiment.from_file(path)
    lines = [line.strip() for line in str(error.value).removeprefix(f"{path}: ").splitlines()]
    assert [line.split(":")[0] for line in lines] == [
        "kernel.name", "threat.epsilom", "adv_kip.n_steps",
    ]  # fmt: skip
    for line in lines:
        assert "expected" in line
        assert "got" in line
        assert "pass" in line


def test_l2_radius_may_exceed_one():
    e = experiment(threat__norm="l2", threat__epsilon=1.5, threat__step_size=0.2)
    assert e.threat.epsilon == 1.5


def test_files(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("name: x\nthreat: {epsilon: 0.3, step_size: 1e-1}\n")
    assert Experiment.from_file(path).threat.step_size == 0.1
    overridden = Experiment.from_file(path, ["seed=3", "kip=null", "threat.epsilon=64/255"])
    assert (overridden.seed, overridden.methods) == (3, ("adv-kip",))
    assert overridden.threat == settings.Threat(epsilon=64 / 255, step_size=0.1)
    for text, match in (
        ("epsilom: 0.1", "x.yaml: epsilom: expected a known setting"),
        ("seed: 1\nseed: 2", r"x.yaml: expected each key once, got \['seed'\] twice"),
        ("- seed", "x.yaml: expected 'key: value' lines, got list"),
        ("seed: [", "x.yaml: "),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=match):
            Experiment.from_file(path)
    path.write_text("seed: 3")
    assert Experiment.from_file(path).name == "x"
    with pytest.raises(ValueError, match="x.yaml --set threat.epsilom=1: threat.epsilom: expected"):
        Experiment.from_file(path, ["threat.epsilom=1"])
    with pytest.raises(ValueError, match="expected key=value, got 'seed'"):
        Experiment.from_file(path, ["seed"])


def test_from_notebook_takes_sections_alone():
    namespace = {"seed": 4, "kernel": {"name": "fc5"}, "np": config, "output": "here"}
    found = Experiment.from_notebook(namespace, "01_kernels")
    assert found == experiment(seed=4, kernel__name="fc5", notebooks=["01_kernels"])


def test_sections_that_are_instances_of_one_model():
    """What is left out keeps the instance's values, not the model's."""
    assert type(Experiment().kip) is type(Experiment().adv_kip)
    kip = experiment(kip__n_steps=7, adv_kip__patience=3).kip
    assert (kip.n_steps, kip.pgd_steps, kip.outer_loss, kip.patience) == (7, 0, "mse", None)
    assert kip.learning_rate == kip.label_learning_rate == 1e-3
    assert type(Experiment().cnns) is type(Experiment().fully_connected)
    assert experiment(fully_connected__epochs=3).fully_connected.loss == "mse"
    assert experiment(cnns__epochs=3).cnns.loss == "cross-entropy"


def test_of_takes_the_settings_of_some_sections_that_matter():
    found = experiment(kip=None).of("seed", "kip", "dataset", "kernel")
    assert found["seed"] == 0
    assert found["kip"] is None
    assert found["kernel.name"] == "fc3"
    assert not {"dataset.folder", "kernel.block_size"} & set(found)
    assert "kernel.name" not in experiment().of("kernel", without=["kernel.name"])
    assert set(config.FREE) <= set(Experiment().of(*Experiment.model_fields)) | {*config.FREE}


def test_every_section_is_named_where_it_is_used():
    for notebook, parts in config.SECTIONS.items():
        assert set(parts) <= set(Experiment.model_fields), notebook
    assert config.sections("01_kernels", "00_walkthrough") == config.sections("01_kernels")
    every = set(Experiment.model_fields)
    assert set(config.sections("mine")) == every
    assert every - set(config.sections("04_shortcomings")) == {"name", "notebooks", "remedies"}


def test_a_scout_of_either_kind_matters_to_relabelled_sets():
    asked = {"networks__sets": ["relabelled"], "relabelling__rounds": 2}
    for notebook, scout, section in (
        ("03_cnns", "fc3-1024", "fully_connected"), ("02_transfer", "simple-cnn", "cnns"),
    ):  # fmt: skip
        e = experiment(notebooks=[notebook], relabelling__scout=scout, **asked)
        other = changed(e, **{f"{section}__epochs": 7})
        assert not records.same_results(other, e.to_dict(), notebook)
        plain = [changed(one, relabelling__rounds=0) for one in (e, other)]
        assert records.same_results(plain[0], plain[1].to_dict(), notebook)
        assert records.same_results(e, e.to_dict(), notebook)


def test_more_epochs_ask_for_more_patience():
    section = experiment(cnns__patience=20, cnns__eval_every=5, cnns__milestones=[3]).cnns
    longer = section.longer(4)
    assert (longer.patience, longer.eval_every, longer.milestones) == (80, 20, (12,))
    assert experiment().cnns.longer(2).patience is None


def test_sets_that_cannot_be_had(tmp_path):
    asked = {"diagnosis__sets": ["robust-features"], "notebooks": ["04_shortcomings"]}
    for missing in (
        {"adversarial_training": None},
        {"adversarial_training__nets": []},
    ):
        with pytest.raises(ValueError, match="expected adversarial training behind"):
            experiment(**asked | missing)
        experiment(**asked | missing | {"diagnosis__sets": ["some/folder"]})
        experiment(**asked | missing | {"notebooks": ["03_cnns"]})  # others do not mind
        path = tmp_path / "a.yaml"
        path.write_text(yaml.safe_dump(nested(**missing | {"notebooks": ["04_shortcomings"]})))
        with pytest.raises(ValueError, match="a.yaml: expected adversarial training behind"):
            Experiment.from_file(path)
        assert Experiment.from_file(path, ["notebooks=[03_cnns]"])
    with pytest.raises(ValueError, match="of .'adv-kip'., which 04_shortcomings trains on, got nu"):
        experiment(adv_kip=None, notebooks=["04_shortcomings"])
    with pytest.raises(ValueError, match="of .'kip'., which 02_transfer trains on"):
        experiment(kip=None, notebooks=["02_transfer"], networks__sets=["kip"])
    with pytest.raises(ValueError, match="expected adv_kip or kip, got null for both"):
        experiment(adv_kip=None, kip=None)
    with pytest.raises(ValueError, match=r"among diagnosis.sets, got \['kip'\] besides"):
        experiment(
            notebooks=["04_shortcomings"], diagnosis__sets=["adv-kip"],
            adversarial_training__sets=["original", "kip"],
        )  # fmt: skip


def test_replace_merges_and_checks():
    e = changed(experiment(adv_kip__n_steps=7), adv_kip__patience=3)
    assert (e.adv_kip.n_steps, e.adv_kip.patience) == (7, 3)
    assert changed(e, kip=None).kip is None
    with pytest.raises(ValueError, match="adv_kip.patience: expected greater"):
        changed(e, adv_kip__patience=0)


def test_seeds_of_networks():
    assert experiment(seed=2, networks__n_seeds=3).net_seeds() == [2000, 2001, 2002]


def test_names_exist_where_they_are_used():
    assert set(typing.get_args(settings.Loss)) <= set(losses.LOSSES)
    inner = {*typing.get_args(method_settings.InnerLoss)} - {"mixture"}
    assert inner == {*losses.LOSSES, "targeted"} >= set(method_settings.MIXTURE)
    assert set(typing.get_args(method_settings.OuterLoss)) == set(losses.OUTER)
    for name in typing.get_args(method_settings.OPTIMIZERS):
        getattr(optax, name)(1e-3)
    assert typing.get_args(settings.Method) == (*settings.METHODS, "unrolled")


def test_is_frozen():
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        Experiment().seed = 1
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        Experiment().threat.epsilon = 0.1


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("fgsm", ("fgsm", 0, 0, False)),
        ("pgd40", ("pgd", 40, 0, False)),
        ("pgd40x5-l2", ("pgd", 40, 5, True)),
        ("autoattack", ("autoattack", 0, 0, False)),
        ("apgd-t-l2", ("apgd-t", 0, 0, True)),
    ],
)
def test_names_of_attacks(name, parts):
    found = attack_names.Attack.parse(name)
    assert found == (name, *parts)
    assert found.targeted == (found.kind in ("autoattack", "apgd-t"))


@pytest.mark.parametrize("name", ["pgd", "pgd0", "pgd5x0", "fgsm5", "l2", "cw", "FGSM", "pgd5-l1"])
def test_other_names_of_attacks(name):
    with pytest.raises(ValueError, match="expected attacks 'fgsm', 'pgd10'"):
        attack_names.Attack.parse(name)


@pytest.mark.parametrize(
    "text", ["seed: 010", "cnns: {milestones: [1:30]}", "seed: 0x10", "dataset: {n_test: 0_7}"]
)
def test_numbers_that_yaml_reads_otherwise_are_refused(tmp_path, text):
    file = tmp_path / "p.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match="p.yaml: expected a decimal number, got"):
        Experiment.from_file(file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"adv_kip__n_steps": 0}, "outer_steps: expected .* 1, got 0"),
        ({"threat__epsilon": 0.1, "threat__step_size": 0.3}, "step_size .* 2 radius"),
    ],
)
def test_errors_speak_of_a_setting_by_the_callers_name(change, message):
    names = checked.named({"adv_kip.n_steps": "outer_steps", "epsilon": "radius"})
    with pytest.raises(ValueError, match=message), names:
        experiment(**change)


def variant(**changes):
    return experiment(
        notebooks=["05_remedies"], remedies__variants=[{"name": "a b"} | changes],
        remedies__hand_on="a b",
    )  # fmt: skip


def test_variants_are_experiments_of_their_own():
    e = variant(kernel={"name": "fc1"}, adv_kip={"inner_loss": "margin"})
    ((title, found),) = e.variants().items()
    assert title == "a b"
    assert (found.kernel.name, found.adv_kip.inner_loss) == ("fc1", "margin")
    assert (found.adv_kip.n_steps, found.support) == (e.adv_kip.n_steps, e.support)
    assert found.notebooks == ("01_kernels",)
    # Checkpoints belong to the settings of the distillation, and to nothing else.
    same = e.replace(evaluation={"n_test": 3}, name="x").variants()["a b"]
    assert (found.name.startswith("a-b-"), same.name) == (True, found.name)
    assert e.replace(adv_kip={"n_steps": 7}).variants()["a b"].name != found.name
    none = e.replace(remedies={"variants": [], "hand_on": "as given"})
    assert none.variants() == {}
    assert Experiment.from_params(e.to_dict()) == e


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"adv_kip": {"inner": 1}},
            "^expected remedies.variants to be .* 'a b': adv_kip.inner: exp",
        ),
        (
            {"kernel": {"name": "fc0"}},
            "^expected remedies.variants to be .* 'a b': kernel.name: exp",
        ),
        ({"kernel": {"dtype": "float64"}}, "without a dtype of its own, got 'a b'"),
        ({"name": "as given"}, "expected a variant whose name is not 'as given'"),
        ({"name": "original images for a"}, "and does not begin with 'original images'"),
        (
            {"name": "c"},
            "expected hand_on to be one of the variants.*got 'a b' and .'as given', 'c'",
        ),
        ({"seed": 1}, "seed: expected a known setting"),
    ],
)
def test_variants_that_are_none(changes, message):
    with pytest.raises(ValueError, match=message):
        variant(**changes)


def test_numbers_of_copies_that_no_number_of_epochs_makes_equal():
    assert experiment(remedies__copies=[1, 2, 6]).remedies.copies == (1, 2, 6)
    with pytest.raises(ValueError, match=r"divide the largest, 4, .* got \[3\]"):
        experiment(remedies__copies=[1, 3, 4])


def test_remedies_without_adversarial_kip():
    with pytest.raises(ValueError, match="^expected settings of adv_kip, which 05_remedies varies"):
        experiment(notebooks=["05_remedies"], adv_kip=None)
