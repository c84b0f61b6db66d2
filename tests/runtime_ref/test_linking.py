"""Code of one kernel is never taken for another's, whichever of them the process loads first."""

import numpy as np
from numba import njit, types

from runtime_ref.kernels.compiled import OPTIONS, kernel
from runtime_ref.kernels.linking import Whole
from runtime_ref.kernels.records import words_at


def _large_part():
    """A function that LLVM does not copy into its callers, with an argument that it drops if it may."""
    lines = ["def mixed(start, unused, words):", "    total = start"]
    for i in range(150):
        lines.append(f"    total = (total ^ words[{i % 4}]) * {2 * i + 3} + (total >> {i % 23 + 1})")
    space = {}
    exec("\n".join([*lines, "    return total"]), space)
    return space["mixed"]


_mixed = _large_part()
mixed = kernel(_mixed)


def _whole(address, count):
    words = words_at(address, count)
    words[0] = mixed(words[0], 1.5, words) + mixed(words[1], 2.5, words)


def test_a_part_of_one_kernel_is_not_anothers():
    """The engine has one table of names for all objects; a part that takes other arguments by now must not be in it."""
    words = np.array([3, -7, 1 << 62, 12345])
    with np.errstate(over="ignore"):
        want = _mixed(words[0], 1.5, words) + _mixed(words[1], 2.5, words)

    dispatcher = njit(**OPTIONS | {"no_cfunc_wrapper": False, "pipeline_class": Whole})(_whole)
    dispatcher.compile((types.int64, types.int64))
    (result,) = dispatcher.overloads.values()
    assert result.library.get_pointer_to_function(result.fndesc.llvm_cfunc_wrapper_name)  # loads it

    @njit
    def plain(words):
        return mixed(words[0], 1.5, words) + mixed(words[1], 2.5, words)

    assert plain(words) == want
