"""Errors of training that a user may see."""

from tmexport.errors import TmexportError


class TrainingError(TmexportError):
    """Training cannot go on: the loss is not finite, or the zero ratio collapsed."""
