"""File types: the names a user types (Q4_K_M), their ids in ``general.file_type``, their base.

A file type is a mixture: most tensors get its base block format, some another (see
`quantcli.plan.mixture`). The table holds all of llama.cpp's (``llama_ftype`` in include/llama.h)
that llama-quantize offers, and NVFP4, which it only runs; `file_types` lists those whose block
formats we can encode, so a new block format makes its file types appear by themselves. A
plug-in's block format is a file type of that format throughout.
"""

from __future__ import annotations

from dataclasses import dataclass

from quantcli.errors import UsageError
from quantcli.formats import FORMATS
from quantcli.plan.mixture import formats_of
from quantcli.registry import near


@dataclass(frozen=True, slots=True)
class FileType:
    """A file type: its name, its id in ``general.file_type`` and its base block format."""

    name: str
    id: int
    base: str
    needs_importance: bool = False
    """Its mixture gives some tensor of every model a format that needs an importance matrix."""

    @property
    def is_float(self) -> bool:
        """Whether it keeps plain floats, to which no mixture and no tensor type applies."""
        return self.base in ("F32", "F16", "BF16")


_TABLE: tuple[FileType, ...] = (
    FileType("F32", 0, "F32"),
    FileType("F16", 1, "F16"),
    FileType("BF16", 32, "BF16"),
    FileType("Q8_0", 7, "Q8_0"),
    FileType("Q6_K", 18, "Q6_K"),
    FileType("Q5_K_M", 17, "Q5_K"),
    FileType("Q5_K_S", 16, "Q5_K"),
    FileType("Q5_1", 9, "Q5_1"),
    FileType("Q5_0", 8, "Q5_0"),
    FileType("Q4_K_M", 15, "Q4_K"),
    FileType("Q4_K_S", 14, "Q4_K"),
    FileType("Q4_1", 3, "Q4_1"),
    FileType("Q4_0", 2, "Q4_0"),
    FileType("NVFP4", 39, "NVFP4"),
    FileType("IQ4_NL", 25, "IQ4_NL"),
    FileType("IQ4_XS", 30, "IQ4_XS"),
    FileType("MXFP4_MOE", 38, "MXFP4"),
    FileType("Q3_K_L", 13, "Q3_K"),
    FileType("Q3_K_M", 12, "Q3_K"),
    FileType("Q3_K_S", 11, "Q3_K"),
    FileType("IQ3_M", 27, "IQ3_S"),
    FileType("IQ3_S", 26, "IQ3_S"),
    FileType("IQ3_XS", 22, "IQ3_S", needs_importance=True),
    FileType("IQ3_XXS", 23, "IQ3_XXS", needs_importance=True),
    FileType("Q2_K", 10, "Q2_K"),
    FileType("Q2_K_S", 21, "Q2_K", needs_importance=True),
    FileType("Q2_0", 41, "Q2_0"),
    FileType("IQ2_M", 29, "IQ2_S", needs_importance=True),
    FileType("IQ2_S", 28, "IQ2_XS", needs_importance=True),
    FileType("IQ2_XS", 20, "IQ2_XS", needs_importance=True),
    FileType("IQ2_XXS", 19, "IQ2_XXS", needs_importance=True),
    FileType("TQ2_0", 37, "TQ2_0"),
    FileType("TQ1_0", 36, "TQ1_0"),
    FileType("IQ1_M", 31, "IQ1_M", needs_importance=True),
    FileType("IQ1_S", 24, "IQ1_S", needs_importance=True),
    FileType("Q1_0", 40, "Q1_0"),
)
"""Every file type, from the finest to the coarsest."""

_ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}

GUESSED = 1024
"""LLAMA_FTYPE_GUESSED: ``general.file_type`` of a file whose type llama.cpp has no number for."""

TYPE_OF_BITS = {
    2: "Q2_K", 3: "Q3_K_M", 4: "Q4_K_M", 5: "Q5_K_M", 6: "Q6_K", 8: "Q8_0", 16: "BF16",
}  # fmt: skip
"""What ``--bits`` stands for."""

USUAL_TYPES = (
    "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "IQ4_XS", "Q3_K_M", "IQ3_XXS", "Q2_K", "IQ2_M",
)  # fmt: skip
"""What people take, one for each step in size; the others lie between them."""

MXFP4_TYPE = "MXFP4_MOE"
"""The type of models whose experts are stored as MXFP4: it keeps them as they are."""

TRAINED_TYPES = frozenset({"NVFP4", MXFP4_TYPE, "Q2_0", "TQ2_0", "TQ1_0", "Q1_0"})
"""Types for models that were trained in them; others come out of them much worse."""


def file_types() -> list[FileType]:
    """The file types that can be chosen: all whose block formats we have, finest first."""
    known = set(FORMATS)
    listed = [each for each in _TABLE if each.base in known and formats_of(each.name) <= known]
    return [*listed, *(FileType(name, GUESSED, name) for name in FORMATS.plugins)]


def find_file_type(name: str) -> FileType:
    """The file type of that name, in any case; UsageError with the nearest name when none is."""
    wanted = name.strip().upper()
    wanted = _ALIASES.get(wanted, wanted)
    available = {each.name.upper(): each for each in file_types()}
    if wanted in available:
        return available[wanted]
    if any(each.name == wanted for each in _TABLE):
        raise UsageError(
            f"there is no encoder for type {wanted}", hint="known: " + ", ".join(available)
        )
    guess = near(name, available, most=1)
    hint = f"did you mean {guess[0]}?" if guess else "known: " + ", ".join(available)
    if wanted.isdigit() and int(wanted) in TYPE_OF_BITS:
        hint = f"--bits {wanted} makes a {TYPE_OF_BITS[int(wanted)]}"
    raise UsageError(f"there is no type {name}", hint=hint)


def type_of_bits(bits: int) -> str:
    """The name of the file type that ``--bits`` stands for; UsageError for other numbers."""
    if bits not in TYPE_OF_BITS:
        choices = ", ".join(map(str, TYPE_OF_BITS))
        raise UsageError(f"there is no type of {bits} bits", hint=f"choose one of {choices}")
    return TYPE_OF_BITS[bits]


def file_type_by_id(file_type: int) -> FileType | None:
    """The file type with that ``general.file_type``, available or not; None when unknown."""
    return next((each for each in _TABLE if each.id == file_type), None)
