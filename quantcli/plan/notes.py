"""What a user should hear about a plan although it can be carried out."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence

from quantcli.plan.names import HEAD_NAME, Kind, kind_of
from quantcli.plan.type_requests import Decision, TypeRequest
from quantcli.registry import near
from quantcli.types import Note, OutputTensor, PackedType

NEARLY_LOSSLESS = "Q8_0"
"""The quantized source that is taken without --allow-requantize, though not without a word."""


_FLOATS = ("F32", "F16", "BF16")


def source_notes(tensors: Sequence[OutputTensor], decisions: Mapping[str, Decision]) -> list[Note]:
    """A warning for each type in which weights were rounded before they come here."""
    again: dict[str, int] = defaultdict(int)
    for tensor in tensors:
        to = decisions[tensor.name].format
        if to == tensor.dtype:
            continue
        if tensor.dtype == NEARLY_LOSSLESS or (_is_packed(tensor) and to not in _FLOATS):
            again[tensor.dtype] += 1
    return [
        Note(
            f"{number} tensors are stored as {dtype} and are rounded a second time; "
            f"{_better(dtype)}",
            level="warning",
        )
        for dtype, number in again.items()
    ]


def _better(dtype: str) -> str:
    if dtype == "MXFP4":
        return "--type MXFP4_MOE copies them as they are"
    slightly = "slightly " if dtype == NEARLY_LOSSLESS else ""
    return f"the original model gives a {slightly}better result"


def _is_packed(tensor: OutputTensor) -> bool:
    """Whether the checkpoint holds the tensor quantized."""
    return isinstance(tensor.dtype, PackedType) or tensor.dtype.startswith("F8_")


def fallback_notes(decisions: Mapping[str, Decision]) -> list[Note]:
    """One warning for each format whose blocks did not divide some rows."""
    names: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name, decision in decisions.items():
        if decision.instead_of is not None:
            names[decision.instead_of, decision.format].append(name)
    return [
        Note(f"{taken} instead of {meant}, whose blocks do not divide the rows: {_list(who)}",
             level="warning")
        for (meant, taken), who in names.items()
    ]  # fmt: skip


def request_notes(request: TypeRequest, decisions: Mapping[str, Decision]) -> list[Note]:
    """A warning for each part of the request that has no effect on this model."""
    notes = []
    if request.leave_output and HEAD_NAME not in decisions:
        notes.append(f"leave_output_tensor has no effect: the model has no {HEAD_NAME}")
    used = {decision.asked_by for decision in decisions.values()}
    for pattern in request.tensor_types:
        if pattern.text in used:
            continue
        found = [name for name in decisions if pattern.matches(name)]
        if request.file_type.is_float:
            why = f"{request.file_type.name} files hold nothing but floats"
        elif not found:
            why = "it is found in no tensor's name" + _suggest(pattern.text, decisions)
        else:
            why = f"{_list(found)} is never quantized or decided by an earlier option"
        notes.append(f"tensor type {pattern.text!r} has no effect: {why}")
    return [Note(note, level="warning") for note in notes]


def importance_notes(missing: Sequence[str], unfit: Sequence[str], total: int) -> list[Note]:
    """What the importance matrix does not cover, of ``total`` tensors that could use it.

    The head and the embedding are seldom covered, so that is worth no warning.
    """
    notes = []
    if unfit:
        notes.append(
            Note(f"the importance matrix's entry for {_list(unfit)} has another length; not used")
        )
    if missing:
        usual = all(kind_of(name) in (Kind.HEAD, Kind.EMBEDDING) for name in missing)
        text = f"no importance for {len(missing)} of {total} tensors: {_list(missing)}"
        notes.append(Note(text, level="info" if usual else "warning"))
    return notes


def unseen_note(names: Sequence[str]) -> Note:
    """What no calibration covers: matrices of blocks that no forward pass meets."""
    return Note(
        f"no importance for the {len(names)} matrices of multi-token prediction, which "
        f"transformers does not run: they are rounded without it ({_list(names)})"
    )


def _suggest(text: str, names: Mapping[str, Decision]) -> str:
    plain = re.sub(r"[^\w.]+", "", text.rpartition("=")[0])
    stems = {re.sub(r"^blk\.\d+\.|\.(weight|bias)$", "", name) for name in names}
    guesses = near(plain, [*sorted(stems), *names], most=2)
    return f" (did you mean {' or '.join(guesses)}?)" if guesses else ""


def _list(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
