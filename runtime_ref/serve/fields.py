"""Values out of a JSON body. Every mistake is a `BadRequest` that names the field, what it is and what was expected."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import Any

from tmexport.errors import TmexportError, one_line

_SHOWN = 80  # characters of a wrong value in a message


class BadRequest(TmexportError):
    """A request that cannot be answered; `status` is its HTTP status, `field` what is wrong in its body."""

    def __init__(self, message: str, status: int = 400, field: str | None = None) -> None:
        super().__init__(message)
        self.status, self.field = status, field


def parse_object(body: bytes) -> dict[str, Any]:
    """The JSON object in a body.

    Raises:
        BadRequest: it is not one, or holds a number that JSON does not have.
    """
    try:
        value = json.loads(body.decode("utf-8"), parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise BadRequest(f"the body is not UTF-8 ({error.reason} at byte {error.start})") from None
    except RecursionError:
        raise BadRequest("the body is nested too deeply") from None
    except ValueError as error:
        raise BadRequest(f"the body is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise BadRequest(f"the body is {_shown(value)}; expected a JSON object")
    return value


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


class Fields:
    """The fields of one object. `null` counts as absent, as it does for OpenAI."""

    def __init__(self, values: dict[str, Any], where: str = "") -> None:
        self._values, self._where = values, where

    def check_names(self, known: Iterable[str]) -> None:
        """Raises BadRequest for a field that nobody will look at: leaving it out silently would change the answer."""
        unknown = sorted(set(self._values) - set(known))
        if unknown:
            raise self.wrong(unknown[0], "is not a field of this request")

    def wrong(self, name: str, what: str) -> BadRequest:
        return BadRequest(f"{one_line(self._where + name)} {what}", field=self._where + name)

    def get(self, name: str) -> Any:
        return self._values.get(name)

    def whole(self, name: str, default: int, low: int, high: int) -> int:
        """A whole number from low to high."""
        value = self._values.get(name)
        if value is None:
            return default
        if type(value) is not int or not low <= value <= high:
            raise self.wrong(name, f"is {_shown(value)}; expected a whole number from {low} to {high}")
        return value

    def number(self, name: str, default: float, low: float, high: float) -> float:
        """A number from low to high."""
        value = self._values.get(name)
        if value is None:
            return default
        if type(value) not in (int, float) or not low <= value <= high or not math.isfinite(value):
            raise self.wrong(name, f"is {_shown(value)}; expected a number from {low:g} to {high:g}")
        return float(value)

    def flag(self, name: str) -> bool:
        """true or false; false by default."""
        value = self._values.get(name)
        if value not in (None, True, False) or (isinstance(value, int | float) and not isinstance(value, bool)):
            raise self.wrong(name, f"is {_shown(value)}; expected true or false")
        return bool(value)

    def text(self, name: str, longest: int) -> str | None:
        """A text; None if it is absent."""
        value = self._values.get(name)
        if value is None:
            return None
        if not isinstance(value, str):
            raise self.wrong(name, f"is {_shown(value)}; expected a text")
        return self._whole_text(name, value, longest)

    def _whole_text(self, name: str, value: str, longest: int) -> str:
        if len(value) > longest:
            raise self.wrong(name, f"has {len(value)} characters; expected at most {longest}")
        if any("\ud800" <= c <= "\udfff" for c in value):
            raise self.wrong(name, "holds half of a surrogate pair, which is no character")
        return value

    def texts(self, name: str, most: int, longest: int) -> tuple[str, ...]:
        """A text or a list of texts, none of them empty."""
        value = self._values.get(name)
        values = [] if value is None else value if isinstance(value, list) else [value]
        if len(values) > most or not all(isinstance(v, str) and v for v in values):
            raise self.wrong(
                name, f"is {_shown(value)}; expected a text, or a list of at most {most} of them, not empty"
            )
        return tuple(self._whole_text(name, v, longest) for v in values)

    def object(self, name: str) -> dict[str, Any] | None:
        """An object; None if it is absent."""
        value = self._values.get(name)
        if value is not None and not isinstance(value, dict):
            raise self.wrong(name, f"is {_shown(value)}; expected an object")
        return value

    def absent(self, *names: str, unless: tuple[Any, ...] = ()) -> None:
        """Raises BadRequest if one of these is given that this server does not do; `unless`: values that change nothing."""
        for name in names:
            value = self._values.get(name)
            if value is not None and not any(value == u and type(value) is not bool for u in (*unless, [], {})):
                raise self.wrong(name, f"is {_shown(value)}; this server does not do that")


def _shown(value: Any) -> str:
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (ValueError, RecursionError):
        text = type(value).__name__
    return one_line(text if len(text) <= _SHOWN else text[:_SHOWN] + "...")
