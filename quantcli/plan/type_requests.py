"""Which block format each tensor gets, and why: llama.cpp's decisions, taken from names alone.

The steps are those of ``llama_tensor_get_type`` in src/llama-quant.cpp: what is never quantized
stays float; types that were asked for by name win over the mixture; a type that does not divide the
rows falls back. Two things differ, both where llama.cpp would abort or leave the choice to another
tool: a type asked for the head or the embedding falls back like any other when it does not fit, and
tensors that stay float in a checkpoint get the type that llama.cpp's converter gives them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from quantcli.errors import PlanError
from quantcli.formats import FORMATS, BlockFormat, get_format
from quantcli.plan.filetypes import FileType
from quantcli.plan.layer_position import Places
from quantcli.plan.mixture import VALUE_LIFT_70B, Case, choose, is_low
from quantcli.plan.model_hparams import PROJECTOR, Traits
from quantcli.plan.names import (
    HEAD_NAME,
    PER_LAYER_EMBEDDING,
    VALUE_LIKE,
    Kind,
    is_always_f32,
    kind_of,
    may_be_quantized,
    output_order,
    tower_type,
)
from quantcli.plan.patterns import TensorType, first_match
from quantcli.types import OutputTensor, PackedType

_EXACT = {"F64": "F32", "F8_E4M3": "F32", "F8_E5M2": "F32"}
"""Stored dtypes that no tensor of a GGUF model has, and what holds their values instead."""


class UnfitError(PlanError):
    """A row that a format's blocks do not divide, and no format to fall back to."""


@dataclass(frozen=True, slots=True)
class TypeRequest:
    """What the user asked for; block formats by their canonical names."""

    file_type: FileType
    tensor_types: tuple[TensorType, ...] = ()
    output_type: str | None = None
    embedding_type: str | None = None
    leave_output: bool = False
    pure: bool = False


@dataclass(frozen=True, slots=True)
class Decision:
    """The block format of one tensor.

    ``instead_of`` is the format that was meant, where its blocks do not divide the rows;
    ``asked_by`` the REGEX=TYPE that asked for it.
    """

    format: str
    reason: str
    instead_of: str | None = None
    asked_by: str | None = None


def decide(
    tensors: Sequence[OutputTensor],
    traits: Traits,
    request: TypeRequest,
    *,
    has_importance: bool = False,
    from_gguf: bool = False,
) -> dict[str, Decision]:
    """A decision for every tensor, in the order in which llama-quantize writes them.

    Raises PlanError for a tensor whose stored dtype cannot be used, whose layer cannot be told
    where the mixture needs it, or that fits no format.
    """
    ordered = output_order(tensors)
    fixed: dict[str, Decision] = {}
    for tensor in ordered:
        found = _left_alone(tensor, traits, request, from_gguf) or _asked_for(tensor, request)
        if found is not None:
            fixed[tensor.name] = found
    names = [tensor.name for tensor in ordered]
    low = is_low(request.file_type.name)
    places = Places([name for name in names if name not in fixed], names, traits, low=low)
    tied = HEAD_NAME not in names

    decisions = {}
    for tensor in ordered:
        decision = fixed.get(tensor.name)
        if decision is None:
            kind = kind_of(tensor.name)
            if tied and kind is Kind.EMBEDDING:
                kind = Kind.HEAD
            place = partial(places.find, tensor.name, kind)
            base = get_format(request.file_type.base)
            decision = _mix(Case(tensor, kind, base, traits, has_importance, place), request)
        decisions[tensor.name] = _fit(tensor, decision)
    return decisions


def _left_alone(
    tensor: OutputTensor, traits: Traits, request: TypeRequest, from_gguf: bool
) -> Decision | None:
    if traits.arch == PROJECTOR and not from_gguf:
        kept = tower_type(tensor.name, tensor.shape, request.file_type.base)
        if kept is not None:
            return Decision(kept, f"a convolution's kernel: {kept}")
    left = request.leave_output and tensor.name == HEAD_NAME
    if not left and may_be_quantized(tensor.name, tensor.shape, traits.arch):
        return None
    if not from_gguf and is_always_f32(tensor.name, tensor.shape):
        return Decision("F32", "kept in full precision: F32")
    dtype = _EXACT.get(tensor.dtype, tensor.dtype)
    if isinstance(dtype, PackedType):
        dtype = "F32"
    if dtype not in FORMATS:
        raise PlanError(
            f"{tensor.name} is stored as {tensor.dtype}, which cannot be written to a GGUF",
            hint="known: " + ", ".join(FORMATS),
        )
    if not from_gguf and not left and request.file_type.is_float:
        return None  # The converter gives it the file's type, which quantizes nothing.
    why = "left as it is" if left else "never quantized"
    return Decision(dtype, f"{why}: {dtype}")


def _asked_for(tensor: OutputTensor, request: TypeRequest) -> Decision | None:
    kind = kind_of(tensor.name)
    base = request.file_type.base
    pattern = first_match(request.tensor_types, tensor.name)
    if kind is Kind.EMBEDDING and request.embedding_type is not None:
        named = pattern is not None and tensor.name == PER_LAYER_EMBEDDING
        if not named:
            return Decision(
                request.embedding_type, f"token embedding type: {request.embedding_type}"
            )
    if kind is Kind.HEAD and request.output_type is not None:
        return Decision(request.output_type, f"output tensor type: {request.output_type}")
    if request.file_type.is_float:
        return Decision(base, f"every weight: {base}")
    if pattern is not None:
        return Decision(pattern.format, f"tensor type {pattern.text}", asked_by=pattern.text)
    if request.pure:
        return Decision(base, f"pure: {base}")
    return None


def _mix(case: Case, request: TypeRequest) -> Decision:
    file_type = request.file_type.name
    if case.kind is Kind.HEAD and request.output_type is not None:
        return Decision(
            request.output_type, f"output tensor type, tied head: {request.output_type}"
        )
    found = choose(file_type, case)
    name, reason = found or (case.base.name, f"base of {file_type}: {case.base.name}")
    if case.kind in VALUE_LIKE and case.traits.is_70b and not is_low(file_type):
        lifted = VALUE_LIFT_70B.get(name)
        if lifted is not None:
            return Decision(lifted, f"{case.kind.value} in a 70B model: {lifted}")
    return Decision(name, reason)


def _fit(tensor: OutputTensor, decision: Decision) -> Decision:
    wanted = get_format(decision.format)
    if wanted.fits(tensor.columns):
        return decision
    found = _fallback(tensor, wanted)
    reason = f"rows of {tensor.columns} do not divide into blocks of {wanted.block}: {found.name}"
    return replace(decision, format=found.name, reason=reason, instead_of=wanted.name)


def _fallback(tensor: OutputTensor, wanted: BlockFormat) -> BlockFormat:
    """The format named by ``wanted``; F16 where there is none with blocks small enough."""
    if wanted.fallback is not None:
        second = get_format(wanted.fallback)
        return second if second.fits(tensor.columns) else get_format("F16")
    if wanted.block <= 32:
        return get_format("F16")
    raise UnfitError(
        f"{tensor.name} has rows of {tensor.columns} weights, which blocks of {wanted.block} "
        f"({wanted.name}) do not divide, and {wanted.name} has no format to fall back to",
        hint="give it another type with --tensor-type",
    )
