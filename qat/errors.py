"""Errors of training that a user may see."""

from tmexport.errors import TmexportError


class DataError(TmexportError):
    """The training or evaluation text cannot be used."""


class TrainingError(TmexportError):
    """Training cannot go on: the loss is not finite, or the zero ratio collapsed."""
