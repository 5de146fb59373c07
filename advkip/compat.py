"""neural_tangents 0.6.5 on a current JAX: the few names it expects, restored before its import.

neural_tangents 0.6.5 (the last release, December 2023) was written for JAX 0.4 and imports
names that JAX has since moved or removed. `load` puts each of them back *only where it is
missing*, from JAX's public API where there is one, and then imports the library. Nothing else
in JAX is touched. Only `advkip.kernels` calls this module.
"""

import sys
import types
from typing import Any

import jax

SUPPORTED_JAX = ((0, 10, 2), (0, 10, 2))
"""Oldest and newest JAX versions, both included, on which this module is known to work."""


def load() -> Any:
    """Returns the `neural_tangents` package, made importable on the installed JAX.

    Raises:
      ImportError: the JAX version is outside `SUPPORTED_JAX`, or neural_tangents is absent.
    """
    check_version(jax.__version_info__)
    _restore_names()
    try:
        import neural_tangents
    except ImportError as error:
        raise ImportError(
            "expected neural_tangents to be installed, got an import error "
            f"({error}); run `pip install --no-deps -r requirements-nodeps.txt`"
        ) from error
    return neural_tangents


def check_version(version) -> None:
    """Raises ImportError when `version`, a (major, minor, patch) tuple, was never tested."""
    low, high = SUPPORTED_JAX
    if not low <= tuple(version[:3]) <= high:
        raise ImportError(
            f"expected JAX from {_dotted(low)} to {_dotted(high)} for neural_tangents 0.6.5, got "
            f"{_dotted(version[:3])}; install `jax=={_dotted(high)}`, or use the closed-form "
            "kernels (fc1, fc2, ...), which do not need neural_tangents"
        )


def _dotted(version):
    return ".".join(map(str, version))


def _restore_names():
    import jax.extend.core
    from jax.interpreters import ad

    for name in ("Jaxpr", "JaxprEqn", "Literal", "Primitive", "Var"):
        _set_if_missing(jax.core, name, lambda name=name: getattr(jax.extend.core, name))
    # Without it, gradients of nt.predict with respect to training inputs leak tracers.
    _set_if_missing(jax.core, "eval_context", lambda: jax.ensure_compile_time_eval)
    # Used by neural_tangents as a dictionary key only, so any new Primitive serves.
    _set_if_missing(ad, "zeros_like_p", lambda: jax.extend.core.Primitive("zeros_like"))

    if not hasattr(jax, "util"):
        sys.modules["jax.util"] = jax.util = types.ModuleType("jax.util")
    _set_if_missing(jax.util, "safe_map", lambda: _safe_map)
    _set_if_missing(jax.util, "safe_zip", lambda: _safe_zip)

    # The experimental part needs TensorFlow; an empty module stands in for it.
    name = "neural_tangents.experimental"
    sys.modules.setdefault(name, types.ModuleType(name))


def _set_if_missing(module, name, make):
    try:
        getattr(module, name)
    except AttributeError:
        setattr(module, name, make())


def _safe_zip(*sequences):
    return list(zip(*map(list, sequences), strict=True))


def _safe_map(function, *sequences):
    return [function(*items) for items in _safe_zip(*sequences)]
