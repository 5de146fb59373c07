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


SMALL_SETS = experiment(
    support__n_support=30, support__n_target=25, dataset__n_validation=40, dataset__n_test=50,
    adv_kip__n_steps=2, adv_kip__pgd_steps=2, kip__n_steps=2, kernel__name="fc2",
    networks__n_original=40,
)  # fmt: skip
"""Of tests of training sets; `conftest` has its `digits` and `splits`."""
