"""Experiments of tests, written flat: `experiment(adv_kip__n_steps=5)`."""

from advkip.config import Experiment


def nested(**flat):
    """{"a__b": value} as {"a": {"b": value}}."""
    found = {}
    for key, value in flat.items():
        section, _, setting = key.partition("__")
        if setting:
            found.setdefault(section, {})[setting] = value
        else:
            found[section] = value
    return found


def experiment(**flat):
    return Experiment.from_params(nested(**flat))


def changed(e, **flat):
    return e.replace(**nested(**flat))


def of_the_paper(data_set, **flat):
    """An experiment on one of the paper's data sets under its threat."""
    epsilon, step_size = {"mnist": (0.3, 0.1), "cifar10": (8 / 255, 2 / 255)}[data_set]
    threat = {"threat__epsilon": epsilon, "threat__step_size": step_size}
    return experiment(**{"dataset__name": data_set, **threat, **flat})


SMALL_SETS = experiment(
    support__n_support=30, support__n_target=25, dataset__n_validation=40, dataset__n_test=50,
    adv_kip__n_steps=2, adv_kip__pgd_steps=2, kip__n_steps=2, kernel__name="fc2",
    networks__n_original=40,
)  # fmt: skip
"""Of tests of training sets; `conftest` has its `digits` and `splits`."""
