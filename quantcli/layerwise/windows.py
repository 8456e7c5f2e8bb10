"""Texts -> windows of token ids, cut as llama.cpp's imatrix and perplexity tools cut them.

A text is tokenised once as a whole, with BOS before it where the vocabulary adds one; special
tokens that are spelled out in it are ordinary text. It is cut into windows that do not overlap,
the rest at its end is dropped, and where the vocabulary adds BOS it takes the place of each
window's first token. At least two windows' worth of tokens is needed.

Several texts are cut one by one. With weights, windows are taken from each in that proportion.
"""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantcli.errors import MissingExtraError, SourceError, UsageError, VocabularyError
from quantcli.layerwise.texts import Text
from quantcli.model import Model
from quantcli.vocab.special import ADD_BOS

Ids = NDArray[np.int32]
SHORTEST = 16
"""Tokens of a window; llama.cpp collects nothing from fewer."""


class Tokenizer:
    """The checkpoint's own tokenizer, and whether BOS belongs before a text."""

    def __init__(self, model: Model) -> None:
        self.label = str(model.path)
        keys = {k: v.value for k, v in model.metadata.items() if k.startswith("tokenizer.ggml.")}
        adds = keys.get("tokenizer.ggml.model") in ADD_BOS
        self.bos: int | None = None
        if "tokenizer.ggml.tokens" not in keys:
            self.bos = _first_special(model.path)
        elif keys.get("tokenizer.ggml.add_bos_token", adds):
            self.bos = int(keys["tokenizer.ggml.bos_token_id"])
        self.vocabulary = model.count("vocab_size") or len(keys["tokenizer.ggml.tokens"])
        self._encode = _open(model.path)
        self._metadata = model.metadata

    def encode(self, text: str, *, spelled: bool = False) -> Ids:
        """Token ids of the text, BOS first where the vocabulary adds it.

        ``spelled``: special tokens that are spelled out in it are those tokens.
        """
        ids = np.asarray(self._encode(text, spelled), dtype=np.int32)
        if ids.size and int(ids.max()) >= self.vocabulary:
            raise VocabularyError(
                f"the tokenizer in {self.label} gives token {int(ids.max())}, but the model has "
                f"{self.vocabulary} tokens",
                hint="the tokenizer belongs to another model",
            )
        return ids if self.bos is None else np.concatenate([np.array([self.bos], np.int32), ids])

    def render(self, text: Text) -> Text:
        """The text; of conversations, what the model's chat template makes of them."""
        return text.render(self._metadata)


@dataclass(frozen=True)
class Windows:
    """Token ids, shape (windows, tokens each), and the labels of the texts they come from."""

    ids: Ids
    labels: tuple[str, ...]
    available: int
    """How many windows the texts would have given."""
    remarks: tuple[str, ...] = ()
    """What the user should know of how the texts were read."""


def cut(ids: Ids, ctx: int, bos: int | None) -> Ids:
    """Windows of ``ctx`` tokens, BOS first in each; shape (windows, ctx)."""
    windows = ids[: len(ids) // ctx * ctx].reshape(-1, ctx).copy()
    if bos is not None:
        windows[:, 0] = bos
    return windows


def cut_windows(
    model: Model, texts: Sequence[Text], ctx: int, chunks: int | None, seed: int | None
) -> Windows:
    """Windows for a run of ``model``; UsageError for a length that it does not take.

    ArchitectureError for a model that does not predict the next token.
    """
    model.require_next_token("run layer by layer")
    longest = model.count("context_length")
    if ctx < SHORTEST:
        raise UsageError(f"--ctx {ctx} is too short", hint=f"at least {SHORTEST} tokens")
    if longest and ctx > longest:
        raise UsageError(
            f"--ctx {ctx} is more than the {longest} tokens that the model takes",
            hint=f"--ctx {longest} or less",
        )
    return make_windows(Tokenizer(model), texts, ctx=ctx, chunks=chunks, seed=seed)


def make_windows(
    tokenizer: Tokenizer,
    texts: Sequence[Text],
    *,
    ctx: int = 512,
    chunks: int | None = None,
    seed: int | None = None,
) -> Windows:
    """Tokenise and cut ``texts``; at most ``chunks`` windows, the first or, with ``seed``, any.

    SourceError when there are fewer tokens than two windows take.
    """
    each = []
    texts = [tokenizer.render(text) for text in texts]
    for text in texts:
        ids = tokenizer.encode(text.content, spelled=text.spelled)
        if len(ids) < (2 * ctx if len(texts) == 1 else ctx):
            least = "two windows" if len(texts) == 1 else "one window"
            raise SourceError(
                f"{text.label} is too short: {len(ids)} tokens, but {least} of {ctx} are needed",
                hint="give more text or a smaller --ctx",
            )
        each.append(cut(ids, ctx, tokenizer.bos))
    available = sum(map(len, each))
    wanted = _shares([len(w) for w in each], [text.weight for text in texts], chunks)
    if wanted is None:
        ids = np.concatenate(each)
        ids = ids[_pick(len(ids), chunks, seed)]
    else:
        parts = zip(each, wanted, strict=True)
        ids = np.concatenate([windows[_pick(len(windows), n, seed)] for windows, n in parts])
    remarks = tuple(text.remark for text in texts if text.remark is not None)
    return Windows(ids, tuple(text.label for text in texts), available, remarks)


def _pick(count: int, wanted: int | None, seed: int | None) -> NDArray[np.int64]:
    if wanted is None or wanted >= count:
        return np.arange(count)
    if seed is None:
        return np.arange(wanted)
    # Python's generator draws the same on every version and machine.
    return np.array(sorted(random.Random(seed).sample(range(count), wanted)))


def _shares(
    counts: Sequence[int], weights: Sequence[float | None], chunks: int | None
) -> list[int] | None:
    """Windows of each text in the proportion of the weights, at least one; None without weights."""
    given = [weight for weight in weights if weight is not None]
    if not given:
        return None
    whole = sum(given)
    total = min(count * whole / weight for count, weight in zip(counts, given, strict=True))
    if chunks is not None:
        total = min(total, chunks)
    return [
        max(1, min(count, round(total * weight / whole)))
        for count, weight in zip(counts, given, strict=True)
    ]


def _first_special(folder: Path) -> int | None:
    """The token that a folder's tokenizer puts before every text, if it is one."""
    file = folder / "tokenizer.json"
    if file.is_file():
        tokenizer = _load(file)
        bare, special = (_encode(file, tokenizer, "a", special=on) for on in (False, True))
    else:
        slow = _load_slow(folder)
        bare, special = (slow.encode("a", add_special_tokens=on) for on in (False, True))
    before = special[: len(special) - len(bare)]
    return int(before[0]) if len(before) == 1 and special[1:] == bare else None


def _load(file: Path) -> Any:
    import tokenizers

    with _rust(f"{file} cannot be loaded"):
        return tokenizers.Tokenizer.from_file(str(file))


def _open(folder: Path) -> Any:
    """A function from text, and whether special tokens are spelled out in it, to token ids."""
    file = folder / "tokenizer.json"
    if file.is_file():
        tokenizer = _load(file)
        tokenizer.no_truncation()
        tokenizer.no_padding()

        def encode(text: str, spelled: bool) -> list[int]:
            tokenizer.encode_special_tokens = not spelled
            return _encode(file, tokenizer, text)

        return encode
    slow = _load_slow(folder)
    return lambda text, spelled: slow.encode(
        text, add_special_tokens=False, split_special_tokens=not spelled
    )


def _encode(file: Path, tokenizer: Any, text: str, *, special: bool = False) -> list[int]:
    with _rust(f"{file} cannot split this text"):
        # The fast form leaves out offsets, which would take most of the memory.
        ids: list[int] = tokenizer.encode_batch_fast([text], add_special_tokens=special)[0].ids
    return ids


@contextmanager
def _rust(what: str) -> Iterator[None]:
    """VocabularyError for whatever the tokenizers library raises, a panic included.

    That is no Exception, its class cannot be imported, and Rust tells of it on standard error
    itself, which therefore leads nowhere meanwhile.
    """
    with _no_standard_error():
        try:
            yield
        except BaseException as broken:
            if type(broken).__name__ != "PanicException" and not isinstance(broken, Exception):
                raise
            raise VocabularyError(f"{what}: {broken}") from broken


@contextmanager
def _no_standard_error() -> Iterator[None]:
    if sys.stderr is not None:
        sys.stderr.flush()
    try:
        kept = os.dup(2)
    except OSError:  # it is closed
        yield
        return
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 2)
        os.close(nowhere)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _load_slow(folder: Path) -> Any:
    try:
        from transformers import AutoTokenizer
    except ImportError as missing:
        raise MissingExtraError(
            f"{folder} has no tokenizer.json, and transformers, which reads the others, "
            "is not installed",
            hint="pip install transformers",
        ) from missing
    try:
        # Asked for nothing, transformers would ask the user whether to run the model's own code.
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as broken:  # whatever its many tokenizers raise
        raise VocabularyError(f"{folder}: its tokenizer cannot be loaded: {broken}") from broken
