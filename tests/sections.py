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
