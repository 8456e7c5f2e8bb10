"""The plan: for every tensor its block format, why, and its size, before one weight is read.

`make_plan` turns a recipe and a model's headers into a `Plan` or refuses in one sentence. Since
block sizes are fixed, the plan's sizes are exact.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from functools import cached_property

from quantcli.errors import PlanError, UsageError
from quantcli.formats import FORMATS, get_format
from quantcli.formats.container import ALIGNMENT_KEY, DEFAULT_ALIGNMENT, padded
from quantcli.plan.filetypes import GUESSED, find_file_type
from quantcli.plan.importance import (
    Shapes,
    applies,
    is_required,
    refuse_foreign,
    select_entries,
    stand_in,
)
from quantcli.plan.layer_overrides import Kept, resolve_keep
from quantcli.plan.model_hparams import read_traits
from quantcli.plan.notes import (
    NEARLY_LOSSLESS,
    fallback_notes,
    importance_notes,
    request_notes,
    source_notes,
    unseen_note,
)
from quantcli.plan.override import resolve_overrides
from quantcli.plan.patterns import parse_format, parse_tensor_type
from quantcli.plan.recipe import Recipe
from quantcli.plan.recipe_check import check_recipe
from quantcli.plan.type_requests import Decision, TypeRequest, decide
from quantcli.types import MetaValue, Note, OutputTensor, PackedType

_SOURCE_DTYPES = frozenset({"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"})


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """What becomes of one tensor: its block format, a sentence why, and its packed bytes.

    ``importance`` tells that the importance matrix has weights for it.
    """

    tensor: OutputTensor
    format: str
    reason: str
    nbytes: int
    importance: bool = False

    @property
    def type_id(self) -> int:
        """ggml's id of the block format, which the plan of a GGUF has made sure of."""
        found = get_format(self.format).type_id
        if found is None:
            raise ValueError(f"{self.format} has no ggml type id")
        return found


@dataclass(frozen=True)
class Plan:
    """Every decision about one output; ``items`` are in the order in which they are written.

    ``overrides`` are the key-values that the recipe sets, with their types.
    """

    recipe: Recipe
    file_type: int
    items: tuple[TensorPlan, ...]
    notes: tuple[Note, ...] = ()
    overrides: Mapping[str, MetaValue] = field(default_factory=dict)
    alignment: int = DEFAULT_ALIGNMENT

    @property
    def label(self) -> str:
        """What the quantized tensors become."""
        return self.recipe.type

    def aligned(self, nbytes: int) -> int:
        """``nbytes`` with the padding that follows them in the file."""
        return padded(nbytes, self.alignment)

    @cached_property
    def data_bytes(self) -> int:
        """Bytes of all tensors with their padding."""
        return sum(self.aligned(item.nbytes) for item in self.items)

    @cached_property
    def elements(self) -> int:
        """Weights of all tensors."""
        return sum(item.tensor.elements for item in self.items)

    @property
    def bits_per_weight(self) -> float:
        """Bits per weight over all tensors, padding not counted."""
        return 8 * sum(item.nbytes for item in self.items) / max(1, self.elements)


def make_plan(
    tensors: Sequence[OutputTensor],
    metadata: Mapping[str, MetaValue],
    recipe: Recipe,
    *,
    importance: Shapes | None = None,
    from_gguf: bool = False,
) -> Plan:
    """Decide everything about quantizing a model of these tensors and key-values.

    ``importance`` maps the names in the recipe's importance matrix to (matrices, columns), before
    its filters. ``from_gguf`` keeps the stored type of what is never quantized; tensors of a
    checkpoint get the one that llama.cpp's converter gives them. Key-values that the recipe sets
    count for the decisions, as in llama.cpp. Raises UsageError for a recipe that is wrong by
    itself, PlanError for one that cannot be carried out with this model.
    """
    check_recipe(recipe)
    request = _request(recipe, tensors)
    overrides = resolve_overrides(recipe.override_kv, metadata)
    entries: Shapes = {}
    if importance is not None:
        refuse_foreign(importance, tensors)
        entries = select_entries(
            importance, include=recipe.include_weights, exclude=recipe.exclude_weights
        )
    elif recipe.include_weights or recipe.exclude_weights:
        raise UsageError("include_weights and exclude_weights need an importance matrix")
    traits = read_traits({**metadata, **overrides})
    decisions = decide(
        tensors,
        traits,
        request,
        has_importance=bool(entries),
        from_gguf=from_gguf,
    )
    notes = request_notes(request, decisions) + fallback_notes(decisions)
    notes += source_notes(tensors, decisions)
    by_name = {tensor.name: tensor for tensor in tensors}
    unseen = [t for t in tensors if traits.predicts_further(t.name) and not applies(entries, t)]
    if entries:
        decisions |= {
            tensor.name: _without_entry(decisions[tensor.name], request) for tensor in unseen
        }
    items = tuple(
        _plan_tensor(by_name[name], decision, recipe, request, entries)
        for name, decision in decisions.items()
    )
    if importance is not None:
        notes += _coverage(items, importance, entries, {tensor.name for tensor in unseen})
    alignment = metadata.get(ALIGNMENT_KEY)
    return Plan(
        recipe, request.file_type.id, items, tuple(notes), overrides,
        DEFAULT_ALIGNMENT if alignment is None else int(alignment.value),
    )  # fmt: skip


def _request(recipe: Recipe, tensors: Sequence[OutputTensor]) -> TypeRequest:
    kept = resolve_keep(recipe.keep, tensors) if recipe.to == "gguf" else Kept()
    output, embedding = recipe.output_tensor_type, recipe.token_embedding_type
    file_type = find_file_type(recipe.type)
    return TypeRequest(
        file_type=file_type,
        tensor_types=(*map(parse_tensor_type, recipe.tensor_types), *kept.tensor_types),
        output_type=kept.head if output is None else parse_format(output),
        embedding_type=kept.embeddings if embedding is None else parse_format(embedding),
        leave_output=recipe.leave_output_tensor,
        pure=recipe.pure or file_type.id == GUESSED,
    )


def _without_entry(decision: Decision, request: TypeRequest) -> Decision:
    """The decision for a tensor whose inputs no collector sees, with a type that needs none."""
    if not is_required("", decision.format, request.file_type.name):
        return decision
    name = stand_in(decision.format)
    why = f"multi-token prediction, without importance: {name} in place of {decision.format}"
    return replace(decision, format=name, reason=why)


def _plan_tensor(
    tensor: OutputTensor, decision: Decision, recipe: Recipe, request: TypeRequest, entries: Shapes
) -> TensorPlan:
    target = get_format(decision.format)
    weighted = False
    if target.type_id is None and recipe.to == "gguf":
        raise PlanError(
            f"{tensor.name} cannot be {target.name} in a GGUF: the format has no ggml type id",
            hint="--to hf writes the weights that it decodes to",
        )
    if decision.format != tensor.dtype:
        _check_source(tensor, decision, recipe)
        weighted = applies(entries, tensor) and target.block > 1
        if not weighted and is_required(tensor.name, target.name, request.file_type.name):
            lack = "the one given has no entry for it" if entries else "none was given"
            raise PlanError(
                f"{request.file_type.name} makes {tensor.name} {target.name}, which needs an "
                f"importance matrix, and {lack}",
                hint="make one with: quantcli calibrate MODEL --data TEXT -o model.calib.gguf, "
                "then give it with --imatrix model.calib.gguf",
            )
    if decision.instead_of is not None and recipe.on_fallback == "error":
        raise PlanError(
            f"{tensor.name} cannot be {decision.instead_of}: its {decision.reason} would be used",
            hint="--on-fallback warn accepts that",
        )
    nbytes = tensor.rows * target.row_bytes(tensor.columns)
    return TensorPlan(tensor, target.name, decision.reason, nbytes, weighted)


def _check_source(tensor: OutputTensor, decision: Decision, recipe: Recipe) -> None:
    if tensor.dtype in _SOURCE_DTYPES or isinstance(tensor.dtype, PackedType):
        return
    if tensor.dtype not in FORMATS:
        raise PlanError(f"{tensor.name} is stored as {tensor.dtype}, which holds no weights")
    if tensor.dtype != NEARLY_LOSSLESS and not recipe.allow_requantize:
        raise PlanError(
            f"{tensor.name} is stored as {tensor.dtype}, so making it {decision.format} would "
            "quantize it a second time",
            hint="use the original model, or accept the loss with --allow-requantize",
        )


def _coverage(
    items: Sequence[TensorPlan], given: Shapes, kept: Shapes, unseen: Set[str]
) -> list[Note]:
    """Notes on what the matrix as ``given`` lacks; what its filters took away was asked for.

    The ``unseen`` are the tensors of multi-token prediction.
    """
    could = [
        item.tensor.name
        for item in items
        if get_format(item.format).block > 1 and item.format != item.tensor.dtype
    ]
    used = {item.tensor.name for item in items if item.importance}
    unfit = [name for name in could if name in kept and name not in used]
    missing = [name for name in could if name not in given and name not in unseen]
    notes = importance_notes(missing, unfit, len(could))
    further = [name for name in could if name not in given and name in unseen]
    if further:
        notes.append(unseen_note(further))
    if not kept:
        notes.append(Note("the filters leave nothing of the importance matrix", level="warning"))
    return notes
