"""The tensor types of llama.cpp and its forks, as of 2026: ggml.h, ik_llama.cpp, BitNet (bitnet.cpp) and PrismML's fork."""

from __future__ import annotations

from dataclasses import dataclass

STOCK, BITNET, IK, PRISM = "stock llama.cpp", "bitnet.cpp", "ik_llama.cpp", "PrismML's llama.cpp"


@dataclass(frozen=True)
class TypeFact:
    """A tensor type: name, weights and bytes a block (0: not a number of bytes a block), who loads it, is it ternary."""

    name: str
    block: int
    bytes: int
    loads: str = STOCK
    ternary: bool = False
    note: str = ""


_SCALE_A_ROW = "its scales are fp32, one a row; no stock type holds that exactly"
TYPES = {
    0: TypeFact("F32", 1, 4), 1: TypeFact("F16", 1, 2), 2: TypeFact("Q4_0", 32, 18), 3: TypeFact("Q4_1", 32, 20),
    6: TypeFact("Q5_0", 32, 22), 7: TypeFact("Q5_1", 32, 24), 8: TypeFact("Q8_0", 32, 34), 9: TypeFact("Q8_1", 32, 36),
    10: TypeFact("Q2_K", 256, 84), 11: TypeFact("Q3_K", 256, 110), 12: TypeFact("Q4_K", 256, 144), 13: TypeFact("Q5_K", 256, 176),
    14: TypeFact("Q6_K", 256, 210), 15: TypeFact("Q8_K", 256, 292), 16: TypeFact("IQ2_XXS", 256, 66), 17: TypeFact("IQ2_XS", 256, 74), 18: TypeFact("IQ3_XXS", 256, 98),
    19: TypeFact("IQ1_S", 256, 50), 20: TypeFact("IQ4_NL", 32, 18), 21: TypeFact("IQ3_S", 256, 110), 22: TypeFact("IQ2_S", 256, 82),
    23: TypeFact("IQ4_XS", 256, 136), 24: TypeFact("I8", 1, 1), 25: TypeFact("I16", 1, 2), 26: TypeFact("I32", 1, 4),
    27: TypeFact("I64", 1, 8), 28: TypeFact("F64", 1, 8), 29: TypeFact("IQ1_M", 256, 56), 30: TypeFact("BF16", 1, 2),
    34: TypeFact("TQ1_0", 256, 54, ternary=True), 35: TypeFact("TQ2_0", 256, 66, ternary=True), 39: TypeFact("MXFP4", 32, 17), 40: TypeFact("NVFP4", 64, 36),
    41: TypeFact("Q1_0", 128, 18), 42: TypeFact("Q2_0", 64, 18, ternary=True),
    36: TypeFact("I2_S", 0, 0, BITNET, True, "one fp32 scale a tensor, and an order of codes that depends on the machine that wrote it; export it again from the checkpoint"),
    38: TypeFact("TL1", 0, 0, BITNET, True, "laid out for one machine's tables; export it again from the checkpoint"),
    134: TypeFact("IQ1_BN", 0, 0, IK, True, _SCALE_A_ROW), 135: TypeFact("IQ2_BN", 0, 0, IK, True, _SCALE_A_ROW),
    335: TypeFact("IQ2_BN_R4", 0, 0, IK, True, _SCALE_A_ROW),
    142: TypeFact("id 142", 0, 0, f"{PRISM} (PQ2_0), or an old {IK} (IQ2_TN)", True, "two forks use this id; its layout is not known here"),
    143: TypeFact("id 143", 0, 0, f"{PRISM} (PTQ1_0), or an old {IK} (IQ1_TN)", True, "two forks use this id; its layout is not known here"),
}  # fmt: skip
Q2_0, Q2_0_G128 = 42, TypeFact("Q2_0 of 128", 128, 34, PRISM, True, "the same id as the stock Q2_0 with blocks of 64; --fix writes those")  # fmt: skip
NO_WEIGHTS = {"Q8_1", "Q8_K", "I8", "I16", "I32", "I64", "F64"}  # of sums, and of indices
