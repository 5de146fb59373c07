"""Typed values of settings, and YAML that hides no mistake."""

import re
from contextlib import contextmanager

import yaml

LISTS = {tuple[kind, ...]: kind for kind in (str, int, float)}
"""Types of settings that are lists, and of what."""

_INF = float("inf")


def typed(field, value):
    """`value` if it is of the field's type; integers pass as floats, lists as tuples."""
    if kind := LISTS.get(field.type):
        if kind is float and isinstance(value, (list, tuple)):
            value = [float(item) if type(item) is int else item for item in value]
        if isinstance(value, (list, tuple)) and all(
            type(item) is kind and item == item and item not in (_INF, -_INF) for item in value
        ):
            return tuple(value)
        expected = f"a list of {'strings' if kind is str else kind.__name__ + 's'}"
    else:
        if field.type is float and type(value) is int:
            return float(value)
        if type(value) is field.type and value == value and value not in (_INF, -_INF):
            return value
        expected = f"a finite {field.type.__name__}"
    hint = (
        "; in YAML 1.0e-6 is a number and 1e-6 is text"
        if field.type in (float, tuple[float, ...])
        else ""
    )
    raise ValueError(
        f"expected {field.name} to be {expected}, got {value!r} ({type(value).__name__}); "
        f"pass for example {field.default!r}{hint}"
    )


TRAP = re.compile(
    r"[-+]?(0[0-7_]+|0b[01_]+|0x[0-9a-fA-F_]+|[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?)"
)
"""Numbers that YAML 1.1 reads otherwise than they look: 010 is 8, 1:30 is 90."""


class Loader(yaml.SafeLoader):
    """YAML without silent duplicates: a key that stands twice is an error; nor are 010 and 1:30
    numbers."""

    def construct_scalar(self, node):
        if node.tag.endswith((":int", ":float")) and TRAP.fullmatch(node.value):
            raise ValueError(
                f"expected a decimal number, got {node.value}, which YAML reads in another base; "
                "pass it without a leading 0 and without colons, or in quotes as text"
            )
        return super().construct_scalar(node)

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = sorted({str(key) for key in keys if keys.count(key) > 1})
        if twice:
            raise ValueError(f"expected each key once, got {twice} twice; pass one value for each")
        return super().construct_mapping(node, deep)


@contextmanager
def named(**names):
    """Lets the ValueErrors of the block speak of a setting by the name it has there.

    Args:
      names: setting="the caller's name for it".
    """
    try:
        yield
    except ValueError as error:
        setting = rf"\b({'|'.join(names)})\b"
        raise ValueError(re.sub(setting, lambda m: names[m[1]], str(error))) from None
