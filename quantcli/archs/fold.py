"""Which tensors meet at which channels, so that a change of one can be undone in the others.

A *fold group* is a vector of channels between linear operations: whoever makes them (a norm's
weight, the rows of v, the rows of the MLP's linear half) and every matrix that reads them. Scaling
the channels at the producers and the consumers' columns inversely leaves the model's function
alone. A family declares its groups as rules, and what writes to its residual stream; nothing
here knows what the scales are for.

A group exists only where each of its consumers is known: a tensor of the model that no rule names
is refused by `fold_groups`, since it might read the channels and be left behind.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from quantcli.errors import ArchitectureError
from quantcli.types import MetaValue, OutputTensor

FoldKind = Literal["norm", "values", "gated"]
"""What makes a group's channels: a norm, attention's values, or an MLP's linear half."""


@dataclass(frozen=True, slots=True)
class FoldRule:
    """One group of every layer, or of the model where no name has ``{i}``.

    ``producers`` and ``consumers`` are names without their ending; a producer's ".bias" counts
    where there is one. Of a producer whose matrix fuses several, ``part`` tells which rows hold the
    channels: "v" the last kv rows, "up" the last half. Of alternatives (a dense MLP's matrices
    or the experts') those count that the model has; of consumers with "|" between them the first,
    where the others read what that one makes.
    """

    kind: FoldKind
    producers: tuple[str, ...]
    consumers: tuple[str, ...]
    part: str = ""
    stream: bool = True
    """Whether a norm's channels are the residual stream's; latent attention norms others too."""


@dataclass(frozen=True, slots=True)
class Folds:
    """What a family declares.

    ``writers`` add their output to the residual stream; of several with "|" between them the first
    that there is does, and the others hand it theirs. ``basis`` is empty where the stream may
    be turned by any rotation; else it completes the sentence "cannot be rotated, because ...".
    ``apart`` are matrices that read channels which are no group.
    """

    rules: tuple[FoldRule, ...] = ()
    writers: tuple[str, ...] = ()
    basis: str = "quantcli does not know what reads and writes its residual stream"
    apart: tuple[str, ...] = ()

    @property
    def final_norm(self) -> str:
        """The norm before the head."""
        return next(f"{r.producers[0]}.weight" for r in self.rules if "output" in r.consumers)


@dataclass(frozen=True, slots=True)
class Producer:
    """Rows ``first:last`` of each matrix of ``tensor``; elements of a tensor with one axis."""

    tensor: str
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class FoldGroup:
    """The channels of one place in the model.

    There are ``channels`` of them for each of ``matrices`` (more than 1 where every expert has
    channels of its own). ``heads`` key-value heads make ``channels`` of values, and ``sharers``
    query heads read each; so a consumer has ``channels * sharers`` columns.
    """

    name: str
    kind: FoldKind
    channels: int
    matrices: int
    producers: tuple[Producer, ...]
    consumers: tuple[str, ...]
    heads: int = 1
    sharers: int = 1
    stream: bool = False
    """Whether the channels are the residual stream's."""


_NORMED_ATTENTION = FoldRule(
    "norm",
    ("blk.{i}.attn_norm",),
    ("blk.{i}.attn_q", "blk.{i}.attn_k", "blk.{i}.attn_v", "blk.{i}.attn_qkv"),
)
NORMED_MLP = FoldRule(
    "norm",
    ("blk.{i}.ffn_norm",),
    (
        "blk.{i}.ffn_gate", "blk.{i}.ffn_up",
        "blk.{i}.ffn_gate_inp", "blk.{i}.ffn_gate_exps", "blk.{i}.ffn_up_exps",
        "blk.{i}.ffn_gate_shexp", "blk.{i}.ffn_up_shexp",
    ),
)  # fmt: skip
VALUES = FoldRule("values", ("blk.{i}.attn_v",), ("blk.{i}.attn_output",))
GATED = FoldRule("gated", ("blk.{i}.ffn_up",), ("blk.{i}.ffn_down",))
GATED_EXPERTS = FoldRule("gated", ("blk.{i}.ffn_up_exps",), ("blk.{i}.ffn_down_exps",))
GATED_SHARED = FoldRule("gated", ("blk.{i}.ffn_up_shexp",), ("blk.{i}.ffn_down_shexp",))
_NORMED_HEAD = FoldRule("norm", ("output_norm",), ("output",))
WRITERS = ("token_embd", "blk.{i}.attn_output", "blk.{i}.ffn_down", "blk.{i}.ffn_down_exps")

DECODER = Folds(
    rules=(
        _NORMED_ATTENTION,
        NORMED_MLP,
        VALUES,
        GATED,
        GATED_EXPERTS,
        _NORMED_HEAD,
    ),
    writers=WRITERS,
    basis="",
)
"""RMSNorm before attention and MLP, gated MLP or experts: Llama and most that came after."""

HYBRID = Folds(
    rules=(
        FoldRule(
            "norm",
            ("blk.{i}.attn_norm",),
            ("blk.{i}.attn_q", "blk.{i}.attn_k", "blk.{i}.attn_v", "blk.{i}.ssm_in"),
        ),
        NORMED_MLP,
        VALUES,
        GATED,
        GATED_EXPERTS,
        GATED_SHARED,
        _NORMED_HEAD,
    ),
    writers=(*WRITERS, "blk.{i}.ffn_down_shexp", "blk.{i}.ssm_out"),
    basis="",
    apart=tuple(f"blk.{{i}}.{name}" for name in ("ssm_conv1d", "ssm_x", "ssm_dt", "ssm_out")),
)
"""The same with state-space mixers in the place of attention, and experts that all tokens visit."""

POST_NORMED = Folds(
    rules=DECODER.rules,
    writers=WRITERS,
    basis="the norms after its attention and MLP weigh the stream's channels one by one",
)
"""The same with norms after attention and MLP as well (Gemma 2 and 3)."""

FUSED = Folds(
    rules=(
        _NORMED_ATTENTION,
        NORMED_MLP,
        FoldRule("values", ("blk.{i}.attn_qkv",), ("blk.{i}.attn_output",), part="v"),
        FoldRule("gated", ("blk.{i}.ffn_up",), ("blk.{i}.ffn_down",), part="up"),
        _NORMED_HEAD,
    ),
    writers=WRITERS,
    basis="",
)
"""q, k and v in one matrix, gate above up in another (Phi-3)."""

CENTRED = Folds(
    rules=(
        _NORMED_ATTENTION,
        NORMED_MLP,
        FoldRule("values", ("blk.{i}.attn_qkv",), ("blk.{i}.attn_output",), part="v"),
        _NORMED_HEAD,
    ),
    basis="its LayerNorm subtracts the mean over the stream's channels",
    apart=("blk.{i}.ffn_down",),
)
"""LayerNorm and an MLP without a linear half (GPT-2)."""

LAYER_NORMED = Folds(
    rules=(_NORMED_ATTENTION, NORMED_MLP, VALUES, _NORMED_HEAD),
    basis="its LayerNorm subtracts the mean over the stream's channels",
    apart=("blk.{i}.ffn_down",),
)
"""The same with q, k and v apart (StarCoder2, Nemotron)."""

GATED_LAYER_NORMED = Folds(
    rules=(_NORMED_ATTENTION, NORMED_MLP, VALUES, GATED, _NORMED_HEAD),
    basis="its LayerNorm subtracts the mean over the stream's channels",
)
"""LayerNorm and a gated MLP (StableLM)."""


def fold_groups(
    folds: Folds, arch: str, metadata: Mapping[str, MetaValue], tensors: Sequence[OutputTensor]
) -> list[FoldGroup]:
    """The groups of the model with these key-values and tensors, layer by layer, the head last.

    A head that is tied to the embeddings has no group, since the embeddings would change as
    well, and none has one where a block for multi-token prediction reads behind the final norm, as
    its own matrices ("nextn") do. ArchitectureError when the family declares no groups or a matrix
    is not in its rules.
    """
    if not folds.rules:
        raise ArchitectureError(f"quantcli knows no fold groups of {arch} models")
    model = _Model(arch, metadata, {tensor.name: tensor for tensor in tensors})
    predicts = {name for name in model.tensors if is_prediction(name)}
    known = {"token_embd.weight", "position_embd.weight", "output.weight", *predicts}
    found: list[FoldGroup] = []
    for layer in (*range(model.count("block_count", 0)), None):
        for rule in folds.rules:
            if predicts and "output" in rule.consumers:
                continue
            if (layer is None) == ("{i}" not in rule.producers[0]):
                found += model.resolve(rule, layer)
                names = "|".join(rule.consumers).split("|")
                known |= {f"{_at(name, layer)}.weight" for name in names}
        known |= {f"{_at(name, layer)}.weight" for name in folds.apart}
    for name in model.tensors:
        if name.endswith(".weight") and not _is_vector(name) and name not in known:
            raise ArchitectureError(
                f"{name} is not among the tensors that quantcli knows of {arch} models, "
                "so it cannot tell which channels it reads"
            )
    return found


def is_prediction(name: str) -> bool:
    """Whether a tensor joins a block for multi-token prediction to the model, or ends it."""
    return ".nextn." in name


def writer_tensors(folds: Folds, tensors: Sequence[OutputTensor], layers: int) -> Iterator[str]:
    """The tensors, biases included, whose output is added to the residual stream."""
    present = {tensor.name for tensor in tensors}
    for pattern in folds.writers:
        for layer in range(layers) if "{i}" in pattern else (None,):
            names = _at(pattern, layer).split("|")
            stem = next((name for name in names if f"{name}.weight" in present), names[0])
            yield from (stem + end for end in (".weight", ".bias") if stem + end in present)


@dataclass(frozen=True)
class _Model:
    arch: str
    metadata: Mapping[str, MetaValue]
    tensors: Mapping[str, OutputTensor]

    def count(self, key: str, layer: int) -> int:
        """A size among the key-values, one for all layers or one for each."""
        found = self.metadata.get(f"{self.arch}.{key}")
        if found is None:
            raise ArchitectureError(f"the model has no key-value {self.arch}.{key}")
        return int(found.value[layer] if found.kind.startswith("[") else found.value)

    def resolve(self, rule: FoldRule, layer: int | None) -> Iterator[FoldGroup]:
        """The rule's group in ``layer``, if the model has its producers and consumers."""
        either = [_at(name, layer).split("|") for name in rule.consumers]
        present = [
            [f"{n}.weight" for n in names if f"{n}.weight" in self.tensors] for names in either
        ]
        consumers = tuple(names[0] for names in present if names)
        stems = [_at(name, layer) for name in rule.producers]
        if not consumers or not all(f"{stem}.weight" in self.tensors for stem in stems):
            return
        columns = self.tensors[consumers[0]].columns
        heads = sharers = 1
        if rule.kind == "values":
            queries = self.count("attention.head_count", layer or 0)
            heads = queries
            if f"{self.arch}.attention.head_count_kv" in self.metadata:
                heads = self.count("attention.head_count_kv", layer or 0)
            held = self.tensors[f"{stems[0]}.weight"].shape
            if len(held) == 3:
                # Latent attention: a matrix for each head, and nothing shared.
                heads = held[0]
            sharers = queries // heads
        channels = columns // sharers
        producers = tuple(self._producers(rule, stems, channels))
        matrices = 1
        if rule.kind == "gated" and len(self.tensors[consumers[0]].shape) == 3:
            matrices = self.tensors[consumers[0]].shape[0]
        stream = rule.kind == "norm" and rule.stream
        yield FoldGroup(
            stems[0], rule.kind, channels, matrices, producers, consumers, heads, sharers, stream
        )

    def _producers(self, rule: FoldRule, stems: list[str], channels: int) -> Iterator[Producer]:
        for stem in stems:
            for name in (f"{stem}.weight", f"{stem}.bias"):
                tensor = self.tensors.get(name)
                if tensor is None:
                    continue
                size = tensor.shape[-1] if len(tensor.shape) == 1 else tensor.shape[-2]
                if rule.kind == "values" and len(tensor.shape) == 3:
                    size = tensor.rows
                first = size - channels if rule.part else 0
                if size - first != channels or (rule.part == "up" and size != 2 * channels):
                    raise ArchitectureError(
                        f"{name} has {size} rows, which do not fit the {channels} channels "
                        f"that the matrices after it read"
                    )
                yield Producer(name, first, size)


def _at(pattern: str, layer: int | None) -> str:
    return pattern.replace("{i}", str(layer))


def _is_vector(name: str) -> bool:
    """Whether it scales or rotates single channels: norms and rotary factors read no group."""
    return name.endswith("norm.weight") or name.startswith("rope_f")
