"""Which type to take for a machine: each one's memory there, and the one that stands first."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from quantcli.errors import UsageError
from quantcli.fit.cache import STEP, cache_type, check_cache
from quantcli.fit.keys import read_keys
from quantcli.fit.machine import Machine
from quantcli.fit.needs import Memory, Needs, Run, find_needs, lay_out, read_memory
from quantcli.fit.weights import Weights, place_weights
from quantcli.formats import get_format
from quantcli.plan.filetypes import MXFP4_TYPE, TRAINED_TYPES, USUAL_TYPES, file_types
from quantcli.plan.model_hparams import read_traits
from quantcli.plan.sizes import packed_sizes
from quantcli.plan.type_requests import UnfitError
from quantcli.sources.ggml_types import GGML_TYPES
from quantcli.types import MetaValue, OutputTensor

CONTEXT = 8192
"""Tokens, where neither the user nor a model that takes fewer says otherwise."""

_ENOUGH = 9.0
"""Bits per weight above which nothing is gained: the answers of Q8_0 are the original's."""
_WHOLE, _WHOLE_EXPERTS = 3.0, 4.0
"""Bits per weight below which a better type of which a part is in memory is the better bargain;
with experts earlier, since a token needs few of them."""
_PART = "Q4_K_M"
"""The type of such a part."""


@dataclass(frozen=True)
class Candidate:
    """A type, the places and bits per weight of its tensors, and what it needs."""

    name: str
    bits: float
    needs_importance: bool
    weights: Weights
    needs: Needs

    @property
    def is_usual(self) -> bool:
        """Whether people take it."""
        return self.name in USUAL_TYPES


@dataclass(frozen=True)
class Fit:
    """Every type on a machine, finest first, and the one to take; None where nothing fits.

    ``longest`` is the context that it leaves room for; ``layers`` counts the model's and the output
    as one more. ``trained`` is the context that the model was trained for, 0 if it does not say.
    """

    machine: Machine
    run: Run
    candidates: tuple[Candidate, ...]
    best: Candidate | None
    longest: int | None
    layers: int
    trained: int
    native: bool = False
    """Whether its experts are stored as MXFP4."""


def fit_types(
    tensors: Sequence[OutputTensor],
    metadata: Mapping[str, MetaValue],
    machine: Machine,
    *,
    context: int | None = None,
    cache: str | None = None,
    flash: bool = True,
    stored: str | None = None,
    from_gguf: bool = False,
) -> Fit:
    """What each type needs on ``machine``, or the file as it is, under the name ``stored``.

    UsageError for a cache that llama.cpp refuses, PlanError for a model of which it cannot be told.
    """
    memory = read_memory(metadata, tensors)
    trained = read_keys(metadata, tensors).number("context_length")
    kind = cache_type(cache or "F16")
    check_cache(memory.cache, kind)
    if get_format(kind).block > 1 and not flash:
        raise UsageError(
            f"a {kind.lower()} cache needs flash attention", hint="leave out --no-flash-attn"
        )
    run = Run(context or min(CONTEXT, trained or CONTEXT), kind, flash)
    layers = len(memory.cache.layers)
    elements = max(1, sum(tensor.elements for tensor in tensors))
    candidates = []
    for name, sizes, needs_importance in _sizes(tensors, metadata, stored, from_gguf):
        weights = place_weights(name, sizes, layers)
        needs = find_needs(memory, run, machine, weights)
        bits = 8 * sum(sizes.values()) / elements
        candidates.append(Candidate(name, bits, needs_importance, weights, needs))
    native = has_mxfp4_experts(tensors)
    best = choose(candidates, native=native)
    longest = _longest(memory, run, machine, best, trained) if best is not None else None
    return Fit(
        machine, run, tuple(candidates), best, longest, layers + 1, trained, native
    )  # fmt: skip


def has_mxfp4_experts(tensors: Iterable[OutputTensor]) -> bool:
    """Whether experts are stored as MXFP4, which another type would round again."""
    return any("_exps." in each.name and each.dtype.startswith("MXFP4") for each in tensors)


def choose(candidates: Sequence[Candidate], *, native: bool = False) -> Candidate | None:
    """The type to take: the most accurate that fits, whole while that is not bought too dearly.

    ``native``: the experts are stored as MXFP4, which keeps them as they are.
    """
    only = len(candidates) == 1
    fitting = [
        each
        for each in candidates
        if each.needs.fits and (only or (each.bits <= _ENOUGH and _is_offered(each, native)))
    ]
    if native:
        # Another type would round what was trained in this one, and most are larger.
        fitting.sort(key=lambda each: each.name != MXFP4_TYPE)
    usual = [each for each in fitting if only or each.is_usual or each.name == MXFP4_TYPE]
    plain = [each for each in usual if not each.needs_importance]
    mixed = any(any(each.weights.experts) for each in candidates)
    least = _WHOLE_EXPERTS if mixed else _WHOLE
    whole = [each for each in plain if each.needs.whole]
    parts = [each for each in plain if each.name in (_PART, MXFP4_TYPE) or only]
    ranks = (
        [each for each in whole if each.bits >= least],
        [each for each in parts if mixed or _half(each)],
        whole,
        [each for each in fitting if each.needs.whole],
        parts,
        fitting,
    )
    return next((rank[0] for rank in ranks if rank), None)


def _is_offered(candidate: Candidate, native: bool) -> bool:
    """Whether a type is for any model, or for this one's experts."""
    return candidate.name not in TRAINED_TYPES or (native and candidate.name == MXFP4_TYPE)


def _half(candidate: Candidate) -> bool:
    """Whether at least half of the layers are on the GPU."""
    layout = candidate.needs.layout
    return layout is not None and 2 * layout.layers > len(candidate.weights.layers)


def _sizes(
    tensors: Sequence[OutputTensor],
    metadata: Mapping[str, MetaValue],
    stored: str | None,
    from_gguf: bool,
) -> Iterator[tuple[str, Mapping[str, int], bool]]:
    """Types with the bytes of each tensor, and whether they need an importance matrix."""
    if stored is not None:
        types = {each.name: each for each in GGML_TYPES.values()}
        kinds = {each.name: types[each.dtype] for each in tensors}
        yield (
            stored,
            {t.name: t.elements // kinds[t.name].block * kinds[t.name].nbytes for t in tensors},
            False,
        )
        return
    traits = read_traits(metadata)
    for file_type in file_types():
        try:
            sizes = packed_sizes(tensors, traits, file_type, from_gguf=from_gguf)
        except UnfitError:
            continue
        yield file_type.name, sizes, file_type.needs_importance


def _longest(memory: Memory, run: Run, machine: Machine, best: Candidate, trained: int) -> int:
    """The longest context with which ``best`` still fits as it is laid out."""
    low, high = run.context // STEP, max(run.context, trained or 2**20) // STEP
    while low < high:
        middle = (low + high + 1) // 2
        longer = Run(middle * STEP, run.cache, run.flash, run.ubatch)
        if lay_out(memory, longer, machine, best.weights, best.needs.layout).fits:
            low = middle
        else:
            high = middle - 1
    return max(run.context, low * STEP)
