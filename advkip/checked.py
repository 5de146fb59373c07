"""Settings that are checked: frozen sections, what is wrong with one, and YAML that hides nothing.

Every fault of a params file comes in one message: path of the key, what was expected, what came,
what to pass.
"""

import difflib
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any, Self

import pydantic
import yaml
from pydantic import BeforeValidator, Field, WithJsonSchema


def number(value) -> Any:
    """A float from a number or its text, '1e-6' or '8/255'; anything else as it is."""
    if isinstance(value, str):
        above, slash, below = value.partition("/")
        try:
            return float(above) / float(below) if slash else float(above)
        except (ValueError, ZeroDivisionError):
            return value
    return value


def listed(value) -> Any:
    """A tuple from a list; anything else as it is."""
    return tuple(value) if isinstance(value, list) else value


Number = Annotated[
    float,
    BeforeValidator(number),
    WithJsonSchema({"type": ["number", "string"], "pattern": r"^[-+.\deE/ ]+$"}),
]  # fmt: skip
"""A number, or the text of one: 1e-6, or a fraction of two numbers, 8/255."""

Positive = Annotated[Number, Field(gt=0)]
NotNegative = Annotated[Number, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
Rates = Annotated[tuple[Positive, ...], BeforeValidator(listed), Field(min_length=1)]
Epochs = Annotated[tuple[Count, ...], BeforeValidator(listed)]
Strings = Annotated[tuple[str, ...], BeforeValidator(listed)]


class Section(pydantic.BaseModel):
    """Settings of one concern, frozen; an integer passes as a float, nothing else as another."""

    model_config = pydantic.ConfigDict(
        frozen=True, strict=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )

    def to_dict(self) -> dict[str, Any]:
        """All settings as plain JSON values."""
        return self.model_dump(mode="json")

    def replace(self, **changes: Any) -> Self:
        """A copy with other values, checked like new ones; a mapping changes a part of a section.

        Raises:
          ValueError: see `Experiment.from_params`.
        """
        return type(self).from_params(merged(self.to_dict(), changes))

    def at_default(self, *names: str) -> tuple[str, ...]:
        """Those of the settings that have their default values."""
        fields = type(self).model_fields
        return tuple(name for name in names if getattr(self, name) == fields[name].default)

    @classmethod
    def from_params(cls, params: Mapping[str, Any]) -> Self:
        """From a mapping of sections (or settings) to values.

        Raises:
          ValueError: every unknown key, value of another type and impossible value in one message.
        """
        try:
            return cls.model_validate(dict(params))
        except pydantic.ValidationError as error:
            raise ValueError("\n".join(_faults(error, cls().to_dict()))) from None


def merged(old: Mapping, changes: Mapping) -> dict:
    """A mapping with other values; mappings inside are merged, too."""
    both = dict(old)
    for key, value in changes.items():
        if isinstance(value, Mapping) and isinstance(both.get(key), Mapping):
            value = merged(both[key], value)
        both[key] = value
    return both


def _faults(error: pydantic.ValidationError, defaults: dict) -> Iterator[str]:
    """A line for each fault of settings whose defaults are given, as nested dicts."""
    known = set(_paths(defaults))
    for fault in error.errors():
        unknown = fault["type"] == "extra_forbidden"
        path = ""
        for part in map(str, fault["loc"]):  # what is no setting is pydantic's own
            longer = f"{path}.{part}".strip(".")
            last = part.isdigit() or (unknown and part == str(fault["loc"][-1]))
            path = longer if longer in known or last else path
        text, got = str(fault.get("ctx", {}).get("error", "")), fault["input"]
        if unknown:
            text = f"expected a known setting, got {path!r}; pass {_nearest(path, defaults)}"
        elif not text.startswith("expected"):
            expected = fault["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
            expected = re.sub("String should match pattern", "text of the form", expected)
            expected = re.sub(r"\w+ should have (.*?)( after validation)?, not.*", r"\1", expected)
            text = f"expected {expected}, got {got!r} ({type(got).__name__}); pass "
            example = _default(path, defaults)
            example = "a mapping of its settings" if isinstance(example, dict) else repr(example)
            text += f"for example {example}"
        yield f"{path}: {text}" if path else text


def _paths(settings: dict, above: str = "") -> Iterator[str]:
    for key, value in settings.items():
        yield above + key
        if isinstance(value, dict):
            yield from _paths(value, f"{above}{key}.")


def _default(path, defaults):
    for part in path.split("."):
        defaults = defaults[part] if isinstance(defaults, dict) and part in defaults else defaults
    return defaults


def _nearest(path: str, defaults: dict) -> str:
    """The known settings nearest to a name that is not known."""
    *above, key = path.split(".")
    beside = _default(".".join(above), defaults) if above else defaults
    elsewhere = [one for one in _paths(defaults) if "." in one and one.split(".")[-1] == key]
    near = difflib.get_close_matches(key, beside, n=3, cutoff=0.6)
    return " or ".join(map(repr, elsewhere[:3] or near)) or f"one of {list(beside)}"


@contextmanager
def named(names: Mapping[str, str]) -> Iterator[None]:
    """Lets the ValueErrors of the block speak of a setting by the name it has there.

    Args:
      names: {path of a setting, or its last part: the caller's name for it}.
    """
    try:
        yield
    except ValueError as error:
        settings = "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
        text = re.sub(rf"\b({settings})\b", lambda m: names[m[1]], str(error))
        raise ValueError(text) from None


TRAP = re.compile(
    r"[-+]?(0[0-7_]+|0b[01_]+|0x[0-9a-fA-F_]+|[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?)"
)
"""Numbers that YAML 1.1 reads otherwise than they look: 010 is 8, 1:30 is 90."""


class Loader(yaml.SafeLoader):
    """YAML without silent duplicates: a key that stands twice is an error; nor are 010 and 1:30
    numbers."""

    def construct_scalar(self, node) -> Any:
        if node.tag.endswith((":int", ":float")) and TRAP.fullmatch(node.value):
            raise ValueError(
                f"expected a decimal number, got {node.value}, which YAML reads in another base; "
                "pass it without a leading 0 and without colons, or in quotes as text"
            )
        return super().construct_scalar(node)

    def construct_mapping(self, node, deep=False) -> dict:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = sorted({str(key) for key in keys if keys.count(key) > 1})
        if twice:
            raise ValueError(f"expected each key once, got {twice} twice; pass one value for each")
        return super().construct_mapping(node, deep)
