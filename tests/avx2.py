"""Runs a command as if this CPU had AVX2 alone, to test and to measure the kernels that such CPUs get.

    python tests/avx2.py python bench.py --shape 1b --only int4

PyTorch and oneDNN can be told by environment variables which instructions to use. ONNX Runtime asks the CPU, so the
command gets a copy of it whose CPUID instructions are replaced by breakpoints (INT3), and a signal handler that answers
them without AVX-512, VNNI and AMX. Needs Linux on x86-64, gcc and objdump.

The kernels are those of a CPU with AVX2 alone; the clock, the caches and the memory are this machine's.

Source: Intel's Software Developer's Manual, volume 2A, CPUID, for the numbers of the bits.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from extras.terminal import command_line

CPUID, BREAKPOINT = b"\x0f\xa2", b"\xcc\x90"  # INT3 and, for the second byte, NOP
SETTINGS = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
HANDLER = r"""
#define _GNU_SOURCE
#include <cpuid.h>
#include <signal.h>
#include <ucontext.h>

/* The bits of leaf 7, and of its second part: AVX-512, VNNI, AMX, and what else is newer than AVX2 */
static const int ebx[] = {16, 17, 21, 26, 27, 28, 30, 31}, ecx[] = {1, 6, 11, 12, 14};
static const int edx[] = {2, 3, 8, 22, 23, 24, 25}, eax1[] = {4, 5, 21, 22, 23}, edx1[] = {4, 5, 10};

static unsigned without(unsigned value, const int *bits, int count) {
    while (count--) value &= ~(1u << bits[count]);
    return value;
}
#define WITHOUT(value, bits) value = without(value, bits, sizeof bits / sizeof *bits)

static void answer(int number, siginfo_t *info, void *context) {
    greg_t *registers = ((ucontext_t *)context)->uc_mcontext.gregs;
    unsigned leaf = registers[REG_RAX], part = registers[REG_RCX], a, b, c, d;
    __cpuid_count(leaf, part, a, b, c, d);
    if (leaf == 7 && part == 0) { WITHOUT(b, ebx); WITHOUT(c, ecx); WITHOUT(d, edx); }
    if (leaf == 7 && part == 1) { WITHOUT(a, eax1); WITHOUT(d, edx1); }
    registers[REG_RAX] = a; registers[REG_RBX] = b; registers[REG_RCX] = c; registers[REG_RDX] = d;
}

__attribute__((constructor)) static void install(void) {
    struct sigaction action = {.sa_sigaction = answer, .sa_flags = SA_SIGINFO | SA_NODEFER};
    sigaction(SIGTRAP, &action, 0);
}
"""


def output(*command: str | Path) -> str:
    """What a command prints."""
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def patch(library: Path) -> int:
    """Replaces the CPUID instructions of a shared library by breakpoints; returns how many."""
    segments = [  # file offset, address and size
        [int(number, 16) for number in found]
        for found in re.findall(r"LOAD off +(\w+) vaddr (\w+) .*\n +filesz (\w+)", output("objdump", "-p", library))
    ]
    content, count = bytearray(library.read_bytes()), 0
    for found in re.finditer(
        r"^ *(\w+):\s+cpuid", output("objdump", "-d", "--no-show-raw-insn", library), re.MULTILINE
    ):
        address = int(found[1], 16)
        offset = next(offset - start for offset, start, size in segments if start <= address < start + size) + address
        assert content[offset : offset + 2] == CPUID
        content[offset : offset + 2] = BREAKPOINT
        count += 1
    library.write_bytes(content)
    return count


def main() -> None:
    """The command line: the exit code is that of the command."""
    package = importlib.util.find_spec("onnxruntime")
    missing = [name for name in ("gcc", "objdump") if shutil.which(name) is None]
    if package is None or package.origin is None or missing or not sys.argv[1:]:
        raise ValueError("usage: python tests/avx2.py COMMAND; needs onnxruntime, gcc and objdump")
    with tempfile.TemporaryDirectory() as folder:
        copy, handler = Path(folder, "onnxruntime"), Path(folder, "handler.so")
        shutil.copytree(Path(package.origin).parent, copy)
        [library] = copy.glob("capi/onnxruntime_pybind11_state*.so")
        if not patch(library):
            raise ValueError(f"{library.name} contains no CPUID instruction, so it cannot be told to use AVX2")
        gcc = ["gcc", "-O2", "-shared", "-fPIC", "-x", "c", "-", "-o", str(handler)]
        subprocess.run(gcc, input=HANDLER, text=True, check=True)
        paths = os.pathsep.join(filter(None, [folder, os.environ.get("PYTHONPATH")]))
        environment = os.environ | SETTINGS | {"LD_PRELOAD": str(handler), "PYTHONPATH": paths}
        sys.exit(subprocess.run(sys.argv[1:], env=environment).returncode)


if __name__ == "__main__":
    command_line("avx2.py", main)
