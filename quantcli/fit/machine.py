"""A machine to run a model on, and how much of its memory a model may have.

Memory is sold in powers of two, so "24G" is 24 GiB here, as nvidia-smi and the box have it. What is
kept back:

- of a graphics card 1 GiB, the margin that llama.cpp's own ``--fit`` leaves (``--fit-target``);
- of a Mac what Metal does not let the GPU wire, which leaves two thirds of memories below 36 GiB
  and three quarters of larger ones (``recommendedMaxWorkingSetSize``, as llama.cpp prints it:
  10,923 MiB of 16 GiB, 49,152 of 64), less the same margin; ``sudo sysctl iogpu.wired_limit_mb=N``
  changes it;
- of plain memory 2 GiB for the system.

Both margins are at most a quarter of the memory.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from quantcli.errors import UsageError
from quantcli.registry import near

GIB = 2**30
_UNITS = {"M": 2**20, "": GIB, "G": GIB, "T": 2**40}
_MARGIN = GIB
_SYSTEM = 2 * GIB
_LARGE_MAC = 36 * GIB

KINDS = ("gpu", "mac", "cpu")


@dataclass(frozen=True, slots=True)
class Machine:
    """Memory in bytes: all of it, and what a model may have of it.

    ``ram`` is the memory beside a GPU that a model may have, None if it does not matter.
    """

    kind: str
    size: int
    usable: int
    ram: int | None = None

    @property
    def label(self) -> str:
        """What it is called in a sentence."""
        names = {"gpu": "a GPU", "mac": "a Mac", "cpu": "a CPU"}
        size = gib(self.size).removesuffix(".0")
        return f"{names[self.kind]} with {size} GiB"


def find_machine(fit: str, on: str | None = None, ram: str | None = None) -> Machine:
    """The machine that ``--fit``, ``--on`` and ``--ram`` describe; UsageError for none."""
    kind = (on or "gpu").strip().lower()
    if kind not in KINDS:
        guess = near(kind, KINDS, most=1)
        hint = f"did you mean {guess[0]}?" if guess else "gpu, mac or cpu"
        raise UsageError(f"there is no machine {on!r} to fit", hint=hint)
    size = parse_memory(fit)
    if ram is not None and kind != "gpu":
        raise UsageError(
            "--ram is the memory beside a GPU", hint=f"leave it out: --fit {fit} is all of it"
        )
    usable = _without(size, _SYSTEM if kind == "cpu" else _MARGIN)
    if kind == "mac":
        usable -= size // 4 if size >= _LARGE_MAC else size // 3
    beside = _without(parse_memory(ram), _SYSTEM) if ram is not None else None
    return Machine(kind, size, usable, beside)


def _without(size: int, margin: int) -> int:
    return size - min(margin, size // 4)


def parse_memory(text: str) -> int:
    """Bytes of "24G", "24 GB", "512M" or "24", all in powers of two; UsageError otherwise."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([MGT]?)(?:I?B)?", text.strip().upper())
    nbytes = round(float(found[1]) * _UNITS[found[2]]) if found else 0
    if nbytes <= 0:
        raise UsageError(f"{text!r} is no size of a memory", hint="such as 24G or 512M")
    return nbytes


def parse_context(text: str | int) -> int:
    """Tokens of "32k", "32768" or "128K", k being 1024; UsageError otherwise."""
    found = re.fullmatch(r"(\d+)\s*(K|M)?", str(text).strip().upper())
    tokens = int(found[1]) * {None: 1, "K": 1024, "M": 2**20}[found[2]] if found else 0
    if tokens <= 0:
        raise UsageError(f"{text!r} is no number of tokens", hint="such as 8192 or 32k")
    return tokens


def gib(nbytes: float) -> str:
    """GiB with as many digits as matter: "0.04", "4.6", "125"."""
    number = nbytes / GIB
    digits = 0 if number >= 99.95 else 1 if number >= 0.995 else 2
    return f"{number:.{digits}f}"
