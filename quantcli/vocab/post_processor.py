"""Which tokens the tokenizer puts around a text: the ``post_processor`` of ``tokenizer.json``.

llama.cpp adds at most one token before (BOS) and one after (EOS) a text, so only the outermost
special tokens of a template count. ``ByteLevel`` there only moves offsets, but it tells that the
tokenizer was saved with its post-processor, hence that nothing is added.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Surround:
    """Whether BOS, EOS and a separator are added (None: not said), and the tokens' texts."""

    bos: bool | None = None
    eos: bool | None = None
    sep: bool | None = None
    first: str | None = None
    last: str | None = None


def read_surround(node: Mapping[str, Any] | None, separators: Sequence[str | None]) -> Surround:
    """What ``node`` adds; ``separators`` are the texts of the SEP and EOS tokens, where known."""
    if not node:
        return Surround()
    parts = node.get("processors") if node.get("type") == "Sequence" else [node]
    result = Surround()
    for part in parts if isinstance(parts, list) else ():
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "ByteLevel":
            result = Surround(
                bool(result.bos), bool(result.eos), result.sep, result.first, result.last
            )
        elif kind in ("RobertaProcessing", "BertProcessing"):
            first, last = _pair_text(part.get("cls")), _pair_text(part.get("sep"))
            result = Surround(True, True, True, first, last)
        elif kind == "TemplateProcessing":
            result = _read_template(part, result, separators)
    return result


def _read_template(
    part: Mapping[str, Any], before: Surround, separators: Sequence[str | None]
) -> Surround:
    single = _pieces(part.get("single"))
    bos, eos, sep = before.bos, before.eos, before.sep
    first = last = None
    if len(single) > 1:
        first, last = _special(single[0]), _special(single[-1])
        bos = True if first else bos
        eos = True if last else eos
    pair = _pieces(part.get("pair"))
    if first and pair and _special(pair[0]) == first:
        pair = pair[1:]
    if last and pair and _special(pair[-1]) == last:
        pair = pair[:-1]
    between = [_special(piece) for piece in pair[1:-1]]
    if between and _sequence(pair[0]) == "A" and _sequence(pair[-1]) == "B":
        known = {last, *separators} - {None}
        sep = (between[0] in known and not last) or (len(between) == 2 and between[1] in known)
    return Surround(bos, eos, sep, first, last)


def _pieces(value: Any) -> list[Mapping[str, Any]]:
    pieces = value if isinstance(value, list) else []
    return [piece for piece in pieces if isinstance(piece, Mapping)]


def _special(piece: Mapping[str, Any]) -> str | None:
    found = piece.get("SpecialToken")
    return found.get("id") if isinstance(found, Mapping) else None


def _sequence(piece: Mapping[str, Any]) -> str | None:
    found = piece.get("Sequence")
    return found.get("id") if isinstance(found, Mapping) else None


def _pair_text(value: Any) -> str | None:
    return value[0] if isinstance(value, list) and value and isinstance(value[0], str) else None
