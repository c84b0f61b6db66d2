"""Two functions by the names and at the place that scripts outside know: they are `tmexport.types`' own, which the house uses."""

from tmexport.types import decode_codes as decode_ternary
from tmexport.types import decode_values as dequantize

__all__ = ["decode_ternary", "dequantize"]
