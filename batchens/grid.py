"""A grid of configurations as data, and the name of a run. Imports no torch: a login node lists ten thousand runs."""

import hashlib
import itertools
import json
from collections.abc import Iterable
from dataclasses import fields, replace
from functools import cache
from typing import Any, ClassVar, Protocol, TypeVar


class Config(Protocol):
    """What a script's frozen dataclass of settings has to be, for its runs to have names."""

    __dataclass_fields__: ClassVar[dict[str, Any]]
    NAMED: ClassVar[tuple[str, ...]]  # the fields that a run's id spells out
    INCIDENTAL: ClassVar[tuple[str, ...]]  # the fields that do not decide the result: device, workers, folders


C = TypeVar("C", bound=Config)


def grid(base: C, **axes: Iterable[Any]) -> list[C]:
    """Return `base` with every combination of the `axes`, the last one varying fastest.

    >>> grid(Config(), alpha_init=[-0.5, 0.5], seed=range(3))  # doctest: +SKIP
    """
    known = {field.name for field in fields(base)}
    for axis in axes:
        if axis not in known:
            raise ValueError(
                f"an axis of a grid must be a field of the Config, however: {axis!r}; one of: {sorted(known)}"
            )
    return [replace(base, **dict(zip(axes, point, strict=True))) for point in itertools.product(*axes.values())]


def unique(configs: Iterable[C]) -> list[C]:
    """Return the configurations without repeats, in order. Two that differ only in incidental fields are the same run."""
    return list({run_id(config): config for config in configs}.values())


def run_id(config: Config) -> str:
    """Return the name of a run: a readable slug of the NAMED fields, then 8 hex digits of a SHA-256.

    The digest covers the canonical JSON of every field that decides the result, so it is the same on every machine and
    in every process, and any change that could change the numbers changes the name.
    """
    values = {}
    for name, is_float in _deciding(type(config)):
        value = getattr(config, name)
        # `--learning-rate 1` and `learning_rate=1.0` are one setting, and so are 0.0 and -0.0
        values[name] = float(value) + 0.0 if is_float and isinstance(value, (int, float)) else value
    digest = hashlib.sha256(_encode(values).encode()).hexdigest()[:8]
    return "-".join([*[_word(name, values[name]) for name in config.NAMED if values[name] is not None], digest])


_encode = json.JSONEncoder(sort_keys=True).encode  # json.dumps would make an encoder for each of ten thousand runs


@cache
def _deciding(config: type[Config]) -> list[tuple[str, bool]]:
    """Return the fields that decide the result, each with whether its numbers are floats."""
    return [(f.name, "float" in str(f.type)) for f in fields(config) if f.name not in config.INCIDENTAL]


_SHORT = {"alpha_init": "a", "gamma_init": "g", "ensemble_size": "m", "learning_rate": "lr", "epochs": "e", "seed": "s"}


def _word(name: str, value: Any) -> str:
    # a minus sign would read as a separator: n0.5 is -0.5
    text = f"{value:g}".replace("-", "n") if isinstance(value, int | float) else str(value)
    return _SHORT.get(name, "") + text.replace("/", "_")
