"""The errors of the runtime a user may see."""

from __future__ import annotations

from tmexport.errors import TmexportError


class NumericsError(TmexportError):
    """An Inf or a NaN appeared; the layer is named."""


class StateError(TmexportError):
    """A saved state is damaged, or belongs to another model or profile."""
