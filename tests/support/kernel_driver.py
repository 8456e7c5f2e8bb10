"""The kernels as a program of their own: built by any compiler, given cases, read back.

`tests/native/driver.c` is linked with the kernels, the dispatcher and the row driver as they lie in
``native/`` (every file, so a new family needs no entry here). It serves where the installed
extension cannot: under sanitizers, from another compiler, for another machine.
"""

from __future__ import annotations

import os
import shlex
import struct
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from support.kernel_cases import DECODE, ENCODE, Case, Kernel

from quantcli.formats import format_by_id

TESTS = Path(__file__).resolve().parents[1]
DRIVER = TESTS / "native" / "driver.c"
NATIVE = TESTS.parent / "native"

STRICT = ("-std=gnu11", "-ffp-contract=off", "-fno-fast-math", "-Wno-psabi")
_V3 = ("-mavx2", "-mf16c", "-mbmi", "-mbmi2")
_V4 = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl")
ISAS: dict[str, tuple[int, tuple[str, ...]]] = {
    "baseline": (4, ()),
    "neon": (4, ()),
    "avx2": (8, _V3),
    "avx512": (16, _V3 + _V4),
}
"""Lanes and flags of each instruction set, as in native/CMakeLists.txt."""


@dataclass(frozen=True)
class Run:
    """What a driver gave: the result and the output bytes of each case that it came to."""

    code: int
    report: str
    results: list[tuple[int, bytes]]


def compiler() -> list[str]:
    """The C compiler that CMake takes for the extension."""
    return shlex.split(os.environ.get("CC", "cc"))


def build(folder: Path, cc: Sequence[str], isas: Sequence[str], flags: Sequence[str]) -> Path:
    """An executable with those instruction sets' kernels; CalledProcessError when it fails."""
    folder.mkdir(parents=True, exist_ok=True)
    common = [*cc, *STRICT, *flags, f"-I{NATIVE}"]
    have = [f"-DQK_HAVE_{isa.upper()}" for isa in isas]
    jobs = [("driver", source, have) for source in (DRIVER, *NATIVE.glob("*.c"))]
    for isa in isas:
        lanes, machine = ISAS[isa]
        only = [f"-DQK_ISA={isa}", f"-DQK_LANES={lanes}", *machine]
        jobs += [(isa, source, only) for source in (NATIVE / "kernels").glob("*.c")]

    def compile_one(job: tuple[str, Path, list[str]]) -> Path:
        part, source, only = job
        made = folder / f"{part}-{source.stem}.o"
        subprocess.run([*common, *only, "-c", source, "-o", made], check=True)
        return made

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, jobs))
    subprocess.run([*common, *objects, "-o", folder / "driver", "-lm"], check=True)
    return folder / "driver"


def list_kernels(command: Sequence[str | Path]) -> tuple[list[str], list[Kernel]]:
    """The instruction sets that run there, best first, and every type that has a kernel."""
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    names, *lines = done.stdout.splitlines()
    found = []
    for line in lines:
        type_id, block, nbytes, encodes, decodes = map(int, line.split())
        if encodes or decodes:
            found.append(Kernel(type_id, block, nbytes, bool(encodes), bool(decodes)))
    return names.split(), found


def run(command: Sequence[str | Path], isa: str, cases: Sequence[Case]) -> Run:
    """Put all cases through one process."""
    stream = b"".join(case.packed() for case in cases)
    done = subprocess.run([*command, isa], input=stream, capture_output=True, check=False)
    results: list[tuple[int, bytes]] = []
    at = 0
    for case in cases:
        end = at + 8 + case.output_bytes
        if end > len(done.stdout):
            break
        results.append((struct.unpack_from("<q", done.stdout, at)[0], done.stdout[at + 8 : end]))
        at = end
    return Run(done.returncode, done.stderr.decode(errors="replace"), results)


def differences(cases: Sequence[Case], one: Run, other: Run) -> list[str]:
    """The cases in which two runs gave different results.

    The sign of a NaN is the machine's own: x86 makes negative ones, aarch64 positive ones. So a
    value that is decoded to NaN may be any NaN, and a block's float16 scale that is NaN (the
    binding's caller refuses such a block) may have either sign.
    """
    pairs = zip(cases, one.results, other.results, strict=True)
    return [case.label for case, a, b in pairs if not _same(case, a, b)]


def _same(case: Case, a: tuple[int, bytes], b: tuple[int, bytes]) -> bool:
    if a == b or case.operation not in (ENCODE, DECODE):
        return a == b
    x, y = np.frombuffer(a[1], np.uint8), np.frombuffer(b[1], np.uint8)
    if case.operation == ENCODE:
        return a[0] == b[0] and np.array_equal(_unsigned(case, x), _unsigned(case, y))
    both_nan = np.isnan(x.view(np.float32)) & np.isnan(y.view(np.float32))
    return bool(((x.view(np.uint32) == y.view(np.uint32)) | both_nan).all())


def _unsigned(case: Case, packed: np.ndarray) -> np.ndarray:
    """The blocks, with every NaN scale made positive."""
    fmt = format_by_id(case.options[0])
    if fmt is None:
        return packed
    blocks = packed.reshape(-1, fmt.nbytes).copy()
    for offset in fmt.half_scales:
        sign_byte = blocks[:, offset + 1]
        nan = np.isnan(np.ascontiguousarray(blocks[:, offset : offset + 2]).view(np.float16)[:, 0])
        sign_byte[nan] &= 0x7F
    if fmt.first_infinite is not None:  # IQ1_M: the sign is the block's last bit
        for block in blocks:
            block[-1] &= 0x7F if fmt.first_infinite(block) == 0 else 0xFF
    return blocks
