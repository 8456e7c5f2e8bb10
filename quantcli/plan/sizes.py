"""What a model would weigh in each file type, computed from names and shapes alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from quantcli.formats import get_format
from quantcli.formats.container import ALIGNMENT_KEY, DEFAULT_ALIGNMENT, padded
from quantcli.plan.filetypes import FileType, file_types
from quantcli.plan.model_hparams import Traits, read_traits
from quantcli.plan.type_requests import TypeRequest, UnfitError, decide
from quantcli.types import MetaValue, OutputTensor


@dataclass(frozen=True, slots=True)
class TypeSize:
    """Exact bytes of tensor data, with padding, that a file type gives, and bits per weight."""

    name: str
    nbytes: int
    bits_per_weight: float
    needs_importance: bool


def size_table(
    tensors: Sequence[OutputTensor], metadata: Mapping[str, MetaValue], *, from_gguf: bool = False
) -> list[TypeSize]:
    """One line for each file type that can be chosen, finest first, without importance matrix.

    Left out are those that the model's rows do not fit and that have nothing to fall back to.
    Raises PlanError when a key-value that the mixtures need is missing.
    """
    traits = read_traits(metadata)
    alignment = metadata.get(ALIGNMENT_KEY)
    step = DEFAULT_ALIGNMENT if alignment is None else int(alignment.value)
    elements = max(1, sum(tensor.elements for tensor in tensors))
    table = []
    for file_type in file_types():
        try:
            sizes = packed_sizes(tensors, traits, file_type, from_gguf=from_gguf).values()
        except UnfitError:
            continue
        total = sum(padded(size, step) for size in sizes)
        table.append(
            TypeSize(file_type.name, total, 8 * sum(sizes) / elements, file_type.needs_importance)
        )
    return table


def packed_sizes(
    tensors: Sequence[OutputTensor], traits: Traits, file_type: FileType, *, from_gguf: bool = False
) -> dict[str, int]:
    """Bytes of each tensor in that file type, without padding.

    Raises UnfitError where the model's rows do not fit it.
    """
    decisions = decide(tensors, traits, TypeRequest(file_type), from_gguf=from_gguf)
    return {
        tensor.name: tensor.rows
        * get_format(decisions[tensor.name].format).row_bytes(tensor.columns)
        for tensor in tensors
    }
