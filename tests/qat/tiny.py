"""What the tests of qat share: a tiny model's dimensions and a few sentences."""

from tmexport.model import mamba2_model

SENTENCES = [
    "The union of the States is the work of the people.",
    "Our commerce with all nations has grown, and our debts are paid.",
    "Fellow citizens, the state of the Union is strong — stronger than last year.",
]


def tiny_config(**changes):
    values = {"d_model": 64, "n_layer": 2, "vocab_size": 300, "d_state": 16, "headdim": 32, "expand": 2}
    return mamba2_model(**{**values, **changes})
