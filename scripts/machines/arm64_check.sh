#!/usr/bin/env bash
# The runtime on two 64-bit Arm boards, emulated: does it give x86's bits?
#
# Example: scripts/machines/arm64_check.sh ~/.cache/tmexport-arm64 small.gguf
#
# CACHE keeps everything that is downloaded and compiled: Debian's arm64 packages with Python 3.11, the aarch64 wheels of the
# runtime's dependencies (without torch), the compiled kernels. Two boards are shown to the programs, by qemu's model of the
# core and by /proc/cpuinfo: a Raspberry Pi 5 (Cortex-A76, has sdot) and a Raspberry Pi 4 (Cortex-A72, lacks it). On each
# run scripts/machines/logit_hashes.py and runtime_ref.generate with MODEL.gguf, whose logits must be those of this machine, and
# the exactness tests. A model with a Q8_0 embedding shares its compiled kernels with the tests, any other takes longer.
# The last line on stdout is one JSON object; exit code 1 if anything differs or fails. Needs no root and no binfmt.
set -euo pipefail

fail() { echo "error: $*" >&2; exit 2; }

if [ "${1:-}" = --help ] || [ $# -ne 2 ]; then
    sed -n '2,/^set /p' "$0" | sed '$d; s/^# \{0,1\}//'
    echo "Usage: scripts/machines/arm64_check.sh CACHE MODEL.gguf"
    [ "${1:-}" = --help ] && exit 0 || exit 2
fi
repo=$(cd "$(dirname "$0")/../.." && pwd)
model=$(realpath "$2")
[ -f "$model" ] || fail "$2: no such file; expected a GGUF file"
python=${PYTHON:-$repo/.venv/bin/python}
command -v "$python" > /dev/null || fail "$python: not found; run \`make test\` once, or set PYTHON to an interpreter that has tmexport"
export PATH=$PATH:/usr/sbin # where debootstrap is
for tool in debootstrap qemu-aarch64-static dpkg-deb; do
    command -v $tool > /dev/null || fail "$tool is not installed; on Debian: apt-get install debootstrap qemu-user-static dpkg"
done
mkdir -p "$1"
cache=$(realpath "$1")
started=$SECONDS
say() { echo "== $((SECONDS - started)) s: $*"; }

# 1. Debian's packages, unpacked: nothing of them is run but Python
if [ ! -d "$cache/root" ]; then
    say "downloading Debian's arm64 packages (85 MB)"
    debootstrap --arch=arm64 --variant=minbase --include=python3.11 --download-only bookworm "$cache/debs" \
        "${MIRROR:-http://deb.debian.org/debian}" > "$cache/debootstrap.log" 2>&1 ||
        fail "debootstrap failed: $(grep '^[EW]:' "$cache/debootstrap.log" | tail -1)"
    say "unpacking them"
    rm -rf "$cache/root.part"
    for folder in bin lib sbin; do # /bin is a link to /usr/bin, and so on
        mkdir -p "$cache/root.part/usr/$folder"
        ln -s "usr/$folder" "$cache/root.part/$folder"
    done
    for package in "$cache"/debs/var/cache/apt/archives/*.deb; do
        dpkg-deb --fsys-tarfile "$package" | tar -x --keep-directory-symlink --no-same-owner -C "$cache/root.part"
    done
    mv "$cache/root.part" "$cache/root"
fi

# 2. what `pip install tmexport` brings to an aarch64 machine, wheels only, and the test runner
mapfile -t wanted < <("$python" -c "import sys, tomllib
print(*tomllib.load(open(sys.argv[1], 'rb'))['project']['dependencies'], sep='\n')" "$repo/pyproject.toml")
wanted+=(pytest hypothesis)
site=$cache/site-$(echo "${wanted[@]}" | sha256sum | cut -c1-12)
if [ ! -d "$site" ]; then
    say "downloading the aarch64 wheels (300 MB unpacked)"
    rm -rf "$site.part"
    "$python" -m pip install -qq --disable-pip-version-check --no-compile --target "$site.part" --only-binary=:all: \
        --implementation cp --python-version 3.11 --platform manylinux_2_28_aarch64 --platform manylinux_2_27_aarch64 \
        --platform manylinux_2_17_aarch64 --platform manylinux2014_aarch64 "${wanted[@]}" >&2
    mv "$site.part" "$site"
fi

# 3. two boards: links to the packages, and a /proc/cpuinfo as Linux writes it there, from which LLVM takes the core's name
board() {
    mkdir -p "$cache/$1/proc"
    for folder in bin lib sbin usr etc; do ln -sfn "../root/$folder" "$cache/$1/$folder"; done
    printf 'processor\t: 0\nBogoMIPS\t: 108.00\nFeatures\t: %s\nCPU implementer\t: 0x41\nCPU architecture: 8\nCPU part\t: %s\n\n' \
        "$3" "$2" > "$cache/$1/proc/cpuinfo"
}
board cortex-a76 0xd0b "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp"
board cortex-a72 0xd08 "fp asimd evtstrm crc32 cpuid"

emulated() { # CORE SET, then the arguments of Python; each core and set has its own cache of compiled kernels
    local core=$1 cache_of=$1-$2
    shift 2
    env PYTHONPATH="$repo:$site" NUMBA_CACHE_DIR="$cache/numba/$cache_of" PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 \
        qemu-aarch64-static -cpu "$core" -L "$cache/$core" "$cache/$core/usr/bin/python3.11" "$@"
}

out=$cache/results
rm -rf "$out"
mkdir -p "$out"
generate=(-m runtime_ref.generate "$model" --prompt "Fellow citizens" -n 16 --json)
tests=(-m pytest -q -p no:cacheprovider "$repo/tests/runtime_ref/test_equal.py" "$repo/tests/runtime_ref/test_isa.py"
    -k "ternary256 or split or threads or longer or batch or saved or features or dotprod or lacks")
products=(-m pytest -q -p no:cacheprovider "$repo/tests/runtime_ref/test_tiles.py") # takes seconds

logits() { # CORE SET
    RUNTIME_REF_ISA=$2 emulated "$1" "$2" "$repo/scripts/machines/logit_hashes.py" "$model" > "$out/hashes-$1-$2.json"
}

# CORE SET: everything with the set that the runtime must choose there by itself
board_checks() {
    local chosen
    chosen=$(emulated "$1" "$2" -c "from runtime_ref.kernels.isa import available; print(available()[0])")
    [ "$chosen" = "$2" ] || fail "the runtime chose $chosen; expected $2"
    echo "the runtime chooses $chosen by itself"
    tested products "$1" "$2" "${products[@]}"
    logits "$1" "$2"
    emulated "$1" "$2" "${generate[@]}" > "$out/generate-$1.json"
    echo "generated"
    tested exactness "$1" "$2" "${tests[@]}"
}

tested() { # WHAT CORE SET, then the arguments of Python
    local log=$out/tests-$2-$1.log
    (cd "$repo" && emulated "${@:2}") > "$log" 2>&1 || { tail -20 "$log"; return 1; }
    echo "$1: $(tail -1 "$log")"
}

labelled() { # LABEL COMMAND...: its output, each line with the label and the time
    local label=$1
    shift
    "$@" 2>&1 | while IFS= read -r line; do say "$label: $line"; done
}

code=0
say "this machine: logits with every instruction set"
"$python" "$repo/scripts/machines/logit_hashes.py" "$model" > "$out/hashes-here.json" || code=1
(cd "$repo" && "$python" "${generate[@]}" > "$out/generate-here.json") || code=1
say "the boards, all at once; compiling the kernels takes minutes the first time"
labelled "Cortex-A76" board_checks cortex-a76 neon_dotprod & jobs=($!)
labelled "Cortex-A72" board_checks cortex-a72 neon & jobs+=($!)
labelled "Cortex-A72, portable" logits cortex-a72 portable & jobs+=($!)
for job in "${jobs[@]}"; do wait "$job" || code=1; done

# 4. one line
"$python" - "$out" "$code" "$((SECONDS - started))" << 'END'
import json, sys
from pathlib import Path

out, failed, seconds = Path(sys.argv[1]), sys.argv[2] != "0", int(sys.argv[3])
hashes: dict[str, dict[str, str]] = {}
for path in sorted(out.glob("hashes-*.json")):
    found = json.loads(path.read_text() or "{}")
    for profile, by_set in found.get("hashes", {}).items():
        for name, digest in by_set.items():
            hashes.setdefault(profile, {})[f"{found['cpu']} {name}"] = digest
generated = {p.stem[9:]: json.loads(p.read_text() or "{}").get("logits_sha256") for p in sorted(out.glob("generate-*.json"))}
tests = {p.stem[6:]: p.read_text().strip().split("\n")[-1].strip("= ") for p in sorted(out.glob("tests-*.log"))}
agree = not failed and all(len(set(d.values())) == 1 for d in [*hashes.values(), generated])
print(json.dumps({"agree": agree, "hashes": hashes, "generated": generated, "tests": tests, "seconds": seconds}))
sys.exit(0 if agree else 1)
END
