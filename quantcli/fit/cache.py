"""What llama.cpp keeps of the tokens before: keys and values, windows of them, recurrent states.

Every layer by itself: grouped heads, latent attention (keys alone), layers that share the cache of
others, windows, indexers, and states that do not grow with the text. Source: ``create_memory`` in
src/llama-model.cpp, src/llama-kv-cache*.cpp, src/llama-memory-recurrent.cpp and the sizes in
src/llama-hparams.cpp. One sequence, as llama-cli runs it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from quantcli.errors import PlanError, UsageError
from quantcli.fit.keys import Keys, read_keys
from quantcli.fit.windows import window_size, windowed_layers
from quantcli.formats import get_format
from quantcli.registry import near
from quantcli.types import MetaValue, OutputTensor

CACHE_TYPES = ("F16", "BF16", "F32", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0", "IQ4_NL")
"""llama.cpp's ``--cache-type-k`` and ``--cache-type-v``."""

STEP = 256
"""The context is rounded up to a multiple of this."""

_ATTENTION = ("attn_k.", "attn_k_b.", "attn_kv_a", "attn_kv_b.", "attn_k_v.")
_FUSED = "attn_qkv."
_RECURRENT = ("ssm_", "shortconv.", "time_mix")
_OTHER = ("deepseek4", "minimax-m3", "dots3note", "glm5-next", "qwen4exp", "hy_v4", "kimi-k3")
"""Architectures whose caches have parts that are not counted here."""
_ENCODERS = ("t5", "bert")
_GEMMA3N_OWNERS = 20


@dataclass(frozen=True, slots=True)
class LayerCache:
    """What one layer keeps: numbers for each token, and float32 numbers once.

    ``indexer`` keys choose the tokens of sparse attention. ``windowed`` layers keep a window.
    """

    keys: int = 0
    values: int = 0
    indexer: int = 0
    state: int = 0
    windowed: bool = False


@dataclass(frozen=True)
class CacheShape:
    """The caches of all layers; ``window`` is the sliding window in tokens, 0 without one.

    ``head`` is the length of a head, which the blocks of a cache's type must divide.
    """

    layers: tuple[LayerCache, ...]
    window: int = 0
    head: int = 0

    def cells(self, context: int, ubatch: int, *, windowed: bool) -> int:
        """Tokens that a cache has room for."""
        whole = pad(context)
        if not windowed:
            return whole
        # The window of the last token of a batch must outlive the batch.
        return pad(min(whole, self.window + ubatch))

    def layer_bytes(
        self, context: int, *, type: str = "F16", ubatch: int = 512, flash: bool = True
    ) -> list[int]:
        """Bytes of each layer; without flash attention values are as wide as the widest layer's."""
        form = get_format(type)
        widest = max((layer.values for layer in self.layers), default=0)
        found = []
        for layer in self.layers:
            values = layer.values if flash or not layer.values else widest
            row = sum(form.row_bytes(width) for width in (layer.keys, values, layer.indexer))
            cells = self.cells(context, ubatch, windowed=layer.windowed)
            found.append(row * cells + 4 * layer.state)
        return found


def pad(count: int) -> int:
    """The next multiple of `STEP`."""
    return -(-count // STEP) * STEP


def cache_type(name: str) -> str:
    """A type of the cache by any spelling; UsageError for one that llama.cpp does not take."""
    wanted = name.strip().upper()
    if wanted not in CACHE_TYPES:
        guess = near(wanted, CACHE_TYPES, most=1)
        known = ", ".join(CACHE_TYPES).lower()
        hint = f"did you mean {guess[0].lower()}?" if guess else f"llama.cpp takes {known}"
        raise UsageError(f"there is no KV cache of type {name}", hint=hint)
    return wanted


def check_cache(shape: CacheShape, type: str) -> None:
    """UsageError where llama.cpp refuses the type: its blocks must divide a head."""
    form = get_format(type)
    if shape.head and not form.fits(shape.head):
        raise UsageError(
            f"llama.cpp has no {type.lower()} cache for heads of {shape.head} numbers, which "
            f"blocks of {form.block} do not divide",
            hint="--kv-type f16",
        )


def read_cache(metadata: Mapping[str, MetaValue], tensors: Sequence[OutputTensor]) -> CacheShape:
    """The caches of the model with these key-values and tensors.

    PlanError for an architecture whose cache is not known, or that writes no text.
    """
    keys = read_keys(metadata, tensors)
    if keys.arch in _OTHER:
        raise PlanError(f"what llama.cpp keeps for each token of a {keys.arch} model is not known")
    if keys.arch.startswith(_ENCODERS) or not keys.number("attention.causal", 1):
        raise PlanError(
            f"a {keys.arch} model reads whole texts at once and keeps no tokens, so --fit, which "
            "is about writing, does not apply"
        )
    heads = keys.by_layer("attention.head_count")
    key_heads = keys.by_layer("attention.head_count_kv", keys.number("attention.head_count"))
    windowed = windowed_layers(keys)
    sizes = _head_sizes(keys, windowed)
    latent = keys.number("attention.key_length_mla") and keys.number("attention.value_length_mla")
    owners = _owners(keys)
    indexer = keys.number("attention.indexer.key_length")
    chosen = _indexing(keys)
    layers = []
    for layer in range(keys.layers):
        recurrent = keys.has(layer, *_RECURRENT)
        attends = keys.has(layer, *_ATTENTION) or (keys.has(layer, _FUSED) and not recurrent)
        attends &= layer < owners and heads[layer] > 0
        count = key_heads[layer] if attends else 0
        key_size, value_size = sizes[layer]
        layers.append(
            LayerCache(
                count * key_size,
                0 if latent else count * value_size,
                indexer if attends and chosen[layer] else 0,
                _state(keys, heads[layer]) if recurrent else 0,
                windowed[layer],
            )
        )
    if not any(layer.keys or layer.state for layer in layers):
        raise PlanError(f"no layer of this {keys.arch} model keeps anything of the tokens before")
    return CacheShape(tuple(layers), window_size(keys), max(size for size, _ in sizes))


def _head_sizes(keys: Keys, windowed: Sequence[bool]) -> list[tuple[int, int]]:
    """Lengths of a key's and a value's head, for each layer."""
    heads, width = keys.number("attention.head_count"), keys.number("embedding_length")
    usual = width // heads if heads else 0
    found = []
    for swa in windowed:
        pair = []
        for name in ("attention.key_length", "attention.value_length"):
            full = keys.number(name, usual)
            pair.append(keys.number(f"{name}_swa", full) if swa else full)
        found.append((pair[0], pair[1]))
    return found


def _owners(keys: Keys) -> int:
    """Layers with a cache of their own; those behind them read an earlier one's."""
    usual = keys.layers - _GEMMA3N_OWNERS if keys.arch == "gemma3n" else 0
    return keys.layers - keys.number("attention.shared_kv_layers", max(0, usual))


def _indexing(keys: Keys) -> list[bool]:
    """Layers with an indexer's cache: those that choose tokens by themselves."""
    if keys.arch == "deepseek32":
        return [True] * keys.layers
    if keys.arch != "glm-dsa":
        return [False] * keys.layers
    return [keys.has(layer, "indexer.") for layer in range(keys.layers)]


def _state(keys: Keys, heads: int) -> int:
    """Numbers of a recurrent layer's state, that of its convolution included."""
    width = keys.number("embedding_length")
    if size := keys.number("wkv.head_size"):
        return keys.number("token_shift_count", 2) * width + width * size
    if short := keys.number("shortconv.l_cache"):
        return width * (short - 1)
    before = max(0, keys.number("ssm.conv_kernel") - 1)
    if size := keys.number("kda.head_dim"):
        return 3 * before * heads * size + size * size * heads
    inner, state = keys.number("ssm.inner_size"), keys.number("ssm.state_size")
    groups = keys.number("ssm.group_count")
    return before * (inner + 2 * groups * state) + state * inner
