"""Instruction sets: each this CPU has gives the specification's bits."""

import math

import numpy as np
import pytest
from numba import config

from runtime_ref.arithmetic import PRESETS
from runtime_ref.kernels import cpu, isa
from runtime_ref.model import Model
from tests.runtime_ref.small import TOKENS, all_logits, reference_logits, sha, source
from tmexport.errors import UsageError


@pytest.mark.parametrize("name", isa.available())
@pytest.mark.parametrize("profile", PRESETS)
def test_every_set_of_this_cpu_equals_the_specification(name, profile, monkeypatch):
    monkeypatch.setenv("RUNTIME_REF_ISA", name)
    src = source()
    model = Model(src, profile, 1)
    assert isinstance(isa.select(), isa.SETS[name][0])
    assert sha(all_logits(model, TOKENS)) == sha(reference_logits(src, profile, TOKENS))


def test_a_set_this_cpu_lacks_or_nobody_knows_is_refused(monkeypatch):
    monkeypatch.setenv("RUNTIME_REF_ISA", "sse9")
    with pytest.raises(UsageError, match="sse9.*expected one of amx"):
        isa.select()
    missing = sorted(set(isa.SETS) - set(isa.available()))[0]
    monkeypatch.setenv("RUNTIME_REF_ISA", missing)
    with pytest.raises(UsageError, match=f"{missing}, which this CPU lacks"):
        isa.select()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("+avx2,+f16c,-avxvnni", ["avx2", "portable"]),
        ("+f16c", ["portable"]),
        ("+avx2", []),
        ("", []),
    ],
)
def test_the_features_numba_is_told_are_the_ones_that_count(given, expected, monkeypatch):
    monkeypatch.setattr(config, "CPU_FEATURES", given)
    monkeypatch.setattr(cpu.platform, "machine", lambda: "x86_64")
    assert isa.available() == expected
    if not expected:
        with pytest.raises(UsageError, match="no F16C"):
            isa.select()


@pytest.mark.parametrize(
    ("given", "expected"), [("+neon, +dotprod", ["neon_dotprod", "neon", "portable"]), ("", ["neon", "portable"])]
)
def test_on_arm_too_and_neon_needs_no_mention(given, expected, monkeypatch):
    monkeypatch.setattr(config, "CPU_FEATURES", given)
    monkeypatch.setattr(cpu.platform, "machine", lambda: "aarch64")
    assert isa.available() == expected


@pytest.mark.parametrize(
    ("core", "name", "hwcap", "expected"),
    [
        ("cortex-a76", None, 0x119FFB, True),
        ("cortex-a72", None, 0x8FB, False),
        ("generic", None, 0x119FFB, False),  # LLVM would not compile sdot for it
        ("cortex-a76", "cortex-a72", 0x119FFB, False),  # nor for the core that NUMBA_CPU_NAME names
    ],
)
def test_dotprod_is_found_where_the_kernel_reports_it_and_llvm_can_compile_it(core, name, hwcap, expected, monkeypatch):
    """LLVM's own search gives a Cortex-A76 no dotprod; these are the features and HWCAP that qemu's cores show."""
    monkeypatch.setattr(config, "CPU_FEATURES", None)
    monkeypatch.setattr(config, "CPU_NAME", name)
    monkeypatch.setattr(cpu.platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(cpu, "_hwcap", lambda: hwcap)
    monkeypatch.setattr(cpu.llvm, "get_host_cpu_name", lambda: core)
    monkeypatch.setattr(cpu.llvm, "get_host_cpu_features", lambda: {"neon": True, "crc": True, "sve": False})
    assert isa.available() == (["neon_dotprod"] if expected else []) + ["neon", "portable"]


@pytest.mark.parametrize(
    ("core", "given", "expected"),
    [
        ("znver4", "avx512f avx512bw avx512vl avx512vnni avx2 f16c", isa.Avx512Tables),
        ("znver5", "avx512f avx512bw avx512vl avx512vnni avx2 f16c", isa.Avx512Vnni),
        ("icelake-server", "avx512f avx512bw avx512vl avx512vnni avx2 f16c", isa.Avx512Vnni),
        ("znver4", "avx2 f16c", isa.Avx2),
    ],
)
def test_a_set_that_was_measured_faster_on_a_core_is_chosen_there(core, given, expected, monkeypatch):
    """A set the CPU lacks is never chosen."""
    monkeypatch.delenv("RUNTIME_REF_ISA", raising=False)
    monkeypatch.setattr(config, "CPU_NAME", core)
    monkeypatch.setattr(config, "CPU_FEATURES", ",".join(f"+{name}" for name in given.split()))
    monkeypatch.setattr(cpu.platform, "machine", lambda: "x86_64")
    assert isinstance(isa.select(), expected)


@pytest.mark.parametrize("core", isa.MEASURED)
def test_the_choice_follows_the_recorded_rates(core, monkeypatch):
    """The largest geometric mean of both presets, whatever a hypervisor hides; an age of the instruction set says nothing."""
    rates = isa.MEASURED[core]
    ranked = sorted(rates, key=lambda name: math.sqrt(math.prod(rates[name])), reverse=True)
    monkeypatch.delenv("RUNTIME_REF_ISA", raising=False)
    monkeypatch.setattr(isa, "core", lambda: core)
    for hidden in range(len(ranked)):
        usable = [name for name in isa.SETS if name in ranked[hidden:] or name == "portable"]
        monkeypatch.setattr(isa, "available", lambda usable=usable: usable)
        assert isinstance(isa.select(), isa.SETS[ranked[hidden]][0])


def test_every_set_of_a_recorded_core_is_recorded():
    if cpu.core() in isa.MEASURED:
        assert set(isa.available()) <= {*isa.MEASURED[cpu.core()], "portable"}
    assert all(set(rates) <= set(isa.SETS) for rates in isa.MEASURED.values())


@pytest.mark.parametrize(("permitted", "expected"), [(True, "amx"), (False, "avx512vnni")])
def test_amx_is_there_where_the_system_permits_it(permitted, expected, monkeypatch):
    given = "amx-tile amx-int8 avx512f avx512bw avx512vl avx512vnni f16c"
    monkeypatch.setattr(config, "CPU_FEATURES", ",".join(f"+{name}" for name in given.split()))
    monkeypatch.setattr(cpu.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(cpu, "_tiles_permitted", lambda: permitted)
    assert isa.available()[0] == expected


def test_byte_sums_of_a_group_fit_16_bits():
    """What the AVX2 and NEON kernels rely on: 64 pairs of codes 0..2 and int8 values never leave int16."""
    assert np.iinfo(np.int16).max >= 64 * 2 * 2 * 127
    assert np.iinfo(np.int16).min <= 64 * 2 * 2 * -128


def test_extreme_sums_equal_the_specification_with_every_set(monkeypatch):
    """All codes +1 and all activations at the limit of their levels: the sums that come nearest to overflowing."""
    src = source(embedding="f32")
    src.matrix("token_embd.weight").values[:] = -1.0
    for layer in range(2):
        src.matrix(f"blk.{layer}.ssm_in.weight").codes[:] = 1
    want = {profile: sha(reference_logits(src, profile, TOKENS[:3])) for profile in PRESETS}
    for name in isa.available():
        monkeypatch.setenv("RUNTIME_REF_ISA", name)
        for profile, expected in want.items():
            assert sha(all_logits(Model(src, profile, 1), TOKENS[:3])) == expected
