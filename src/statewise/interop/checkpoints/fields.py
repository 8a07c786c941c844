"""A config.json of somebody else's: every number that is used is checked, and every error names the field."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

_REQUIRED: Any = object()
# No published model comes near; beyond it, building one would hang the machine before any weight is looked at.
MAX_LAYERS = 10_000
MAX_SIZE = 2**31 - 1


class Fields:
    """Checked access to the fields of a configuration. An absent or null field has its default, if it has one."""

    def __init__(self, config: Mapping[str, Any], source: str) -> None:
        self._config, self.source = config, source

    def __iter__(self) -> Iterator[str]:
        return iter(self._config)

    def __contains__(self, name: str) -> bool:
        return self._config.get(name) is not None

    def fail(self, name: str, want: str) -> NoReturn:
        raise ValueError(f"{self.source}: {name}: want {want}, got {self._config.get(name)!r}")

    def get(self, name: str, default: Any = _REQUIRED) -> Any:
        value = self._config.get(name)
        if value is not None:
            return value
        if default is _REQUIRED:
            raise ValueError(f"{self.source}: {name} is missing")
        return default

    def integer(self, name: str, default: Any = _REQUIRED, *, least: int = 1, most: int = MAX_SIZE) -> int:
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            self.fail(name, f"an integer from {least} to {most}")
        return value

    def number(self, name: str, default: Any = _REQUIRED, *, above: float = -math.inf) -> float:
        """A finite number above `above`."""
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not above < value < math.inf:
            self.fail(name, "a finite number" + (f" above {above:g}" if above > -math.inf else ""))
        return value

    def flag(self, name: str, default: Any = _REQUIRED) -> bool:
        value = self.get(name, default)
        if not isinstance(value, bool):
            self.fail(name, "true or false")
        return value

    def integers(self, name: str, default: Any = _REQUIRED, *, most: int = MAX_SIZE) -> list[int]:
        """A list of integers from 0 to `most`."""
        value = self.get(name, default)
        if not isinstance(value, Sequence) or not all(type(i) is int and 0 <= i <= most for i in value):
            self.fail(name, f"a list of integers from 0 to {most}")
        return list(value)

    def choices(self, name: str, allowed: Sequence[str], length: int, default: Any = _REQUIRED) -> list[str]:
        """A list of `length` of the words in `allowed`."""
        value = self.get(name, default)
        if not isinstance(value, list) or len(value) != length or not all(v in allowed for v in value):
            self.fail(name, f"{length} of {', '.join(map(repr, allowed))}")
        return value

    def only(self, name: str, *allowed: Any, default: Any = None) -> Any:
        """Refuse a field of which only some values can be served; `default` stands for an absent one."""
        value = self._config.get(name, default)
        if value not in allowed:
            self.fail(name, " or ".join(repr(a) for a in allowed) + " (nothing else can be read)")
        return value

    def below(self, name: str) -> Fields:
        """The fields of an object inside this one; none if it is absent."""
        value = self._config.get(name)
        if value is not None and not isinstance(value, dict):
            self.fail(name, "an object")
        return Fields(value or {}, f"{self.source}: {name}")

    def layers(self, name: str) -> int:
        return self.integer(name, least=0, most=MAX_LAYERS)

    def rope(self, fraction: float = 1.0) -> tuple[float, float]:
        """Base of the rotary frequencies and the fraction of a head that turns, in the old spelling or in the new."""
        given = self.below("rope_parameters")
        for place in (given, self.below("rope_scaling")):
            for name in ("rope_type", "type"):
                place.only(name, "default", default="default")
        theta = (given if "rope_theta" in given else self).number("rope_theta", 10000.0, above=0)
        place = given if "partial_rotary_factor" in given else self
        part = place.number("partial_rotary_factor", fraction, above=0)
        if part > 1:
            place.fail("partial_rotary_factor", "a number from 0 to 1")
        return theta, part

    def time_step_limit(self, name: str = "time_step_limit") -> tuple[float, float | None] | None:
        """(low, high or None) of a clamp of the step size; None where the clamp does nothing."""
        value = self.get(name, (0.0, math.inf))
        if isinstance(value, list):
            # Infinity has no word in JSON; transformers writes it as an object since version 5.
            value = [math.inf if v == {"__float__": "Infinity"} else v for v in value]
        if (
            not isinstance(value, (list, tuple))
            or len(value) != 2
            or not all(isinstance(v, (int, float)) for v in value)
            or not 0 <= value[0] <= value[1]
        ):
            self.fail(name, "two numbers, 0 <= low <= high")
        low, high = float(value[0]), float(value[1])
        return None if (low, high) == (0.0, math.inf) else (low, None if high == math.inf else high)


def expansion(inner: int, width: int) -> int | float:
    """The factor `expand` for which int(expand * width) is exactly `inner`."""
    if inner % width == 0:
        return inner // width
    ratio = inner / width
    return ratio if int(ratio * width) == inner else math.nextafter(ratio, math.inf)
