"""The linear layers of a checkpoint under its own names, found through the architecture's table.

Without a table they are those that `quantcli.archs.untabled` finds. A model folder keeps the
checkpoint's tensors, names and row order; only what is a linear layer, which input it reads and
where its importance lies is looked up by the GGUF tensor that holds the same weights. A stack of
experts is taken apart into the layers that runtimes know, by the names of the layout that has a
tensor for each expert, or put together for runtimes that want it whole.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from quantcli.model import Model
from quantcli.pieces import Piece
from quantcli.plan.names import Kind, kind_of, may_be_quantized
from quantcli.types import Matrix, OutputTensor

_SUFFIX = ".weight"
_DIRECT = "ssm_dt.weight"
"""Modules multiply by this weight themselves, so that they find no packed one."""
_SWITCH = {"ffn_gate_exps": "gate_proj", "ffn_up_exps": "up_proj", "ffn_down_exps": "down_proj"}
"""What MLX calls the stacked experts, below ``switch_mlp``."""
_GATES = ("ssm_alpha.weight", "ssm_beta.weight", "ssm_ba.weight")
"""A delta net's decay and learning rate, a row for each head: hardly any weights, on which its
whole state depends. Publishers of quantized folders leave them as they are."""


def find_matrices(
    model: Model, *, embeddings: bool = False, stacked: bool = False, packed: bool = False
) -> list[Matrix]:
    """Every matrix that may be quantized, in the order of GGUF's tensors.

    ``embeddings`` includes the token embedding and the output head; ``stacked`` makes one tensor
    of a layer's experts, under MLX's names; ``packed`` leaves out what packed formats have no place
    for: `whole_stacks`, delta nets' gates and steps of Mamba. Blocks for multi-token prediction are
    left out: publishers of quantized folders leave them as they are, and some servers know no
    other.
    """
    left = set(whole_stacks(model)) if packed else set()
    patterns = model.stored_names()
    found: dict[tuple[str, int], Matrix] = {}
    apart = {tensor.name for tensor in model.mtp_tensors}
    for tensor in model.tensors:
        outer = kind_of(tensor.name) in (Kind.HEAD, Kind.EMBEDDING)
        if not tensor.pieces or not may_be_quantized(tensor.name, tensor.shape, model.arch):
            continue
        if (outer and not embeddings) or tensor.name in apart:
            continue
        if packed and tensor.name.endswith((*_GATES, _DIRECT)):
            continue
        for matrix in _matrices(model, tensor, patterns, stacked):
            if matrix.source in left:
                continue
            # Rows of one stored matrix may make several GGUF tensors; all read the same input.
            found.setdefault((matrix.source, matrix.first), matrix)
    return list(found.values())


def _matrices(
    model: Model, tensor: OutputTensor, patterns: Mapping[str, str], stacked: bool
) -> Iterator[Matrix]:
    stored = model.store.tensors[tensor.pieces[0].source]
    if len(stored.shape) < 3 and "{e}" not in patterns[tensor.name]:
        count = tensor.matrices
        for piece in tensor.pieces:
            if not piece.makes_outputs:
                # Another tensor that is made of the same stored matrix reads what it reads.
                continue
            rows, columns = model.store.tensors[piece.source].shape
            if piece.transposes:
                rows, columns = columns, rows
            yield Matrix(
                piece.source.removesuffix(_SUFFIX), piece.source, rows, columns, tensor.name,
                of=count, transpose=piece.transposes, turned=piece if piece.turns_columns else None,
            )  # fmt: skip
        return
    experts, _, columns = tensor.shape
    for index, piece in enumerate(tensor.pieces):
        first, step = (piece.start, 1) if piece.keeps_rows else _columns(piece)
        yield Matrix(
            _expert_name(tensor, patterns, index, stacked),
            piece.source,
            piece.rows,
            columns,
            tensor.name,
            first=first,
            index=index,
            of=experts,
            stack=experts if stacked else 0,
            slot=index if stacked else 0,
            transpose=not piece.keeps_rows,
            step=step,
        )


def _columns(piece: Piece) -> tuple[int, int]:
    """The stored column that the first row of a turned matrix is, and how far the next one lies."""
    columns = piece.source_columns()
    if columns is None or len(set(np.diff(columns))) > 1:
        raise ValueError(f"the rows of {piece.source} are no columns of a stack")
    return int(columns[0]), int(columns[1] - columns[0]) if len(columns) > 1 else 1


def whole_stacks(model: Model) -> list[str]:
    """Stored tensors with all experts of a layer, where no layout has a tensor for each of them.

    Runtimes read these as they were published, and a packed format has no name for their parts.
    So it is with those that are published transposed.
    """
    patterns = model.stored_names()
    stored = model.store.tensors
    return list(
        dict.fromkeys(
            piece.source
            for tensor in model.tensors
            for piece in tensor.pieces
            if len(stored[piece.source].shape) > 2
            and ("{e}" not in patterns[tensor.name] or not piece.keeps_rows)
            and may_be_quantized(tensor.name, tensor.shape, model.arch)
        )
    )


def router_names(model: Model) -> dict[str, str]:
    """What the layout with a tensor for each expert calls the routers, by stored name."""
    patterns = model.stored_names()
    return {
        tensor.pieces[0].source: _prefixed(patterns[tensor.name], tensor.pieces[0].source)
        for tensor in model.tensors
        if tensor.name.endswith("ffn_gate_inp.weight")
    }


def _prefixed(name: str, stored: str) -> str:
    """The table's ``name`` below the prefix of a ``stored`` name, which a wrapper's has."""
    mark = ".layers."
    if mark not in name or mark not in stored:
        return name
    return stored.partition(mark)[0] + mark + name.partition(mark)[2]


def _expert_name(
    tensor: OutputTensor, patterns: Mapping[str, str], index: int, stacked: bool
) -> str:
    source = _prefixed(patterns[tensor.name], tensor.pieces[index].source)
    if not stacked:
        return source.replace("{e}", str(index)).removesuffix(_SUFFIX)
    block, _, leaf = source.removesuffix(_SUFFIX).partition(".{e}.")
    kind = tensor.name.removesuffix(_SUFFIX).rpartition(".")[2]
    return f"{block.rpartition('.')[0]}.switch_mlp.{_SWITCH.get(kind, leaf)}"


def kept_modules(
    model: Model,
    matrices: Sequence[Matrix],
    dropped: Sequence[Matrix],
    names: Mapping[str, str],
    *,
    head: bool,
) -> tuple[str, ...]:
    """Linear modules that stay as they are, for the runtimes' lists of them.

    Routers, `whole_stacks`, what belongs to no language model, the ``dropped`` matrices, and with
    ``head`` the head, which may have no tensor of its own. ``names`` are the output's, by stored
    name, where they differ.
    """
    quantized = {matrix.source for matrix in (*matrices, *dropped)}
    embeddings = {
        piece.source
        for tensor in model.tensors
        if kind_of(tensor.name) is Kind.EMBEDDING or tensor.name.startswith("position_embd")
        for piece in tensor.pieces
    }
    left = whole_stacks(model)
    if model.untabled is not None:
        embeddings |= model.untabled.embeddings
        left += [n for n in model.untabled.left if len(model.store.tensors[n].shape) > 2]
    kept = {matrix.module for matrix in dropped} | ({"lm_head"} if head else set())
    kept |= {name.removesuffix(_SUFFIX) for name in left}
    for name, info in model.store.tensors.items():
        is_linear = name.endswith(_SUFFIX) and len(info.shape) == 2
        if is_linear and name not in quantized and name not in embeddings:
            kept.add(names.get(name, name).removesuffix(_SUFFIX))
    return tuple(sorted(kept, key=natural))


def natural(name: str) -> list[tuple[int, str]]:
    """A key that sorts numbers within names by value: layer 2 before layer 10."""
    return [
        (int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)
    ]
