"""Which entries of an importance matrix apply to which tensors; only names and lengths are read.

An entry belongs to the tensor of the same GGUF name and holds one weight per column, for stacked
experts one row of them per matrix. As in llama.cpp, include and exclude are parts of names, and an
entry of the wrong length is an error except for the token embedding, where it is not used (the
embedding is looked up, not multiplied, so collectors write odd lengths there).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from quantcli.errors import PlanError
from quantcli.formats import get_format
from quantcli.plan.names import Kind, kind_of
from quantcli.registry import near
from quantcli.types import OutputTensor

Shapes = Mapping[str, tuple[int, int]]
"""Entry name to (matrices, columns)."""


def select_entries(
    entries: Shapes, *, include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> dict[str, tuple[int, int]]:
    """The entries that the filters leave."""
    return {
        name: shape
        for name, shape in entries.items()
        if not any(part in name for part in exclude)
        and (not include or any(part in name for part in include))
    }


def refuse_foreign(entries: Shapes, tensors: Sequence[OutputTensor]) -> None:
    """PlanError when no entry belongs to any tensor: the matrix is for another model."""
    names = [tensor.name for tensor in tensors]
    if any(name in entries for name in names):
        return
    example = next(iter(entries), None)
    if example is None:
        raise PlanError("the importance matrix is empty")
    hint = f"it has {len(entries)} entries, such as {example}"
    close = near(example, names, most=1)
    if close:
        hint += f"; the model has {close[0]}"
    raise PlanError(
        "the importance matrix is for another model: no entry has the name of a tensor", hint=hint
    )


_USELESS_WITHOUT = frozenset({"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS"})


def is_required(name: str, format_name: str, file_type: str) -> bool:
    """Whether llama.cpp refuses to give the tensor this format without an entry for it.

    Q2_K needs one in a Q2_K_S file only; the head and the embedding may go without, unless the
    format cannot be encoded at all without weights.
    """
    if get_format(format_name).needs_importance:
        return True
    if kind_of(name) in (Kind.HEAD, Kind.EMBEDDING):
        return False
    return format_name in _USELESS_WITHOUT or (format_name, file_type) == ("Q2_K", "Q2_K_S")


_WITHOUT = {"IQ3_XXS": "IQ3_S", "Q2_K": "Q3_K"}
"""What stands in where a type must not be used without an entry; Q2_K for the others."""


def stand_in(format_name: str) -> str:
    """The next type that needs no entry, for a tensor whose inputs no collector sees."""
    return _WITHOUT.get(format_name, "Q2_K")


def applies(entries: Shapes, tensor: OutputTensor) -> bool:
    """Whether there is an entry for ``tensor``; PlanError when it has the wrong length."""
    found = entries.get(tensor.name)
    if found is None:
        return False
    matrices = tensor.matrices
    # The legacy file knows only the total length.
    if found in ((matrices, tensor.columns), (1, matrices * tensor.columns)):
        return True
    if kind_of(tensor.name) is Kind.EMBEDDING:
        return False
    raise PlanError(
        f"the importance matrix's entry {tensor.name} does not fit the tensor: expected "
        f"{_count(matrices, tensor.columns)}, found {_count(*found)}",
        hint="it is for another model",
    )


def _count(matrices: int, columns: int) -> str:
    return f"{columns} weights" if matrices == 1 else f"{matrices} matrices of {columns} weights"
