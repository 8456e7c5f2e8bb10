"""What llama.cpp does differently with a tokenizer that was converted all the same.

A GGUF has no place for some settings of ``tokenizer.json``. Where ordinary text gets other ids the
tokenizer is refused elsewhere; what is left here concerns few texts or cannot be helped, and is
said in a sentence that names the setting and what it changes. Source: llama.cpp's
src/llama-vocab.cpp (``llm_tokenizer_spm``, ``tokenizer_st_partition``, ``impl::load``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from quantcli.types import MetaValue
from quantcli.vocab.added import added_tokens, wrongly_stripped
from quantcli.vocab.files import TokenizerFiles
from quantcli.vocab.normalizer import normalizer_parts
from quantcli.vocab.special import unknown_ends
from quantcli.vocab.whitespace import prefix_scheme, read_spaces

_MARKS = frozenset({"gpt-4o", "tekken", "kimi-k2", "llama4"})
"""Pre-tokenizers whose expressions know marks (\\p{M}), which llama.cpp's own splitter lacks."""
_SHOWN = 5


def find_differences(files: TokenizerFiles, keys: Mapping[str, MetaValue]) -> Iterator[str]:
    """A sentence for each setting of ``files`` that the key-values ``keys`` do not hold."""
    yield from _added_flags(files, keys)
    yield from _prefix(files, keys)
    yield from _merged(files, keys)
    yield from _normalization(files, keys)
    yield from _ends(files, keys)
    yield from _words(keys)


def _added_flags(files: TokenizerFiles, keys: Mapping[str, MetaValue]) -> Iterator[str]:
    name = keys.get("general.name")
    met = wrongly_stripped(added_tokens(files).values(), None if name is None else name.value)
    if met:
        count = f"{len(met)} added tokens strip" if len(met) > 1 else "an added token strips"
        yield (
            f"{count} spaces or match whole words only (lstrip, rstrip, single_word), which "
            f"llama.cpp does not do, so text around them gets other ids: {_list(met)}"
        )


def _prefix(files: TokenizerFiles, keys: Mapping[str, MetaValue]) -> Iterator[str]:
    scheme = None if files.tokenizer is None else prefix_scheme(files.tokenizer)
    merged = keys.get("tokenizer.ggml.remove_extra_whitespaces")
    if scheme == "always" and not (merged and merged.value):
        yield (
            "the tokenizer puts no further space before text that begins with one (Metaspace), "
            "llama.cpp does, so such text, also after a special token, gets another first id"
        )
    if scheme != "first":
        return
    prefixed = keys.get("tokenizer.ggml.add_space_prefix")
    if prefixed is None:
        return
    if prefixed.value:
        yield (
            "the tokenizer puts a space before the first word of a text only (prepend_scheme "
            "'first'), llama.cpp also after every special token, so chats get other ids; "
            "--override-kv tokenizer.ggml.add_space_prefix=bool:false suits chats"
        )
    else:
        yield (
            "the tokenizer puts a space before the first word of a text only (prepend_scheme "
            "'first'), which llama.cpp cannot; none is put, since the chat template begins with a "
            "special token, so a plain text's first word gets another id; "
            "--override-kv tokenizer.ggml.add_space_prefix=bool:true suits plain texts"
        )


def _merged(files: TokenizerFiles, keys: Mapping[str, MetaValue]) -> Iterator[str]:
    merged = keys.get("tokenizer.ggml.remove_extra_whitespaces")
    if files.tokenizer is None or merged is None or not merged.value:
        return
    spaces = read_spaces(files.tokenizer, "tokenizer.json")
    if spaces.white and not spaces.charsmap:
        yield (
            "the tokenizer takes tabs, line ends and other white space for spaces "
            "(WhitespaceSplit), llama.cpp only where the model's normalization (Precompiled) makes "
            "spaces of them, so text with them gets other ids"
        )
    if not spaces.trimmed:
        yield (
            "the tokenizer keeps one of the spaces at the end of a text, llama.cpp none, so such "
            "text gets a token less"
        )


def _normalization(files: TokenizerFiles, keys: Mapping[str, MetaValue]) -> Iterator[str]:
    if files.tokenizer is None:
        return
    kinds = {part.get("type") for part in normalizer_parts(files.tokenizer.normalizer)}
    if "NFC" in kinds and keys["tokenizer.ggml.model"].value in ("gpt2", "gemma4"):
        yield (
            "the tokenizer normalizes text to Unicode's NFC, which llama.cpp does not do, so "
            "letters with a separate accent get other ids"
        )
    pre = keys.get("tokenizer.ggml.pre")
    if pre is not None and pre.value in _MARKS:
        yield (
            f"llama.cpp's pre-tokenizer {pre.value!r} reads marks and capitals otherwise where no "
            "English has them, so Thai, Devanagari and words such as 'делоМосква' get other ids"
        )


def _ends(files: TokenizerFiles, keys: Mapping[str, MetaValue]) -> Iterator[str]:
    texts = keys["tokenizer.ggml.tokens"].value
    left = [str(texts[number]) for number in unknown_ends(files, texts, keys)]
    if left:
        yield (
            f"generation also ends at {_list(left)}, for which a GGUF has no key left; give "
            "the runtime such a text as a stop string"
        )


def _words(keys: Mapping[str, MetaValue]) -> Iterator[str]:
    prefix = "tokenizer.ggml.normalizer."
    strips = keys.get(f"{prefix}strip_accents")
    lowers = keys.get(f"{prefix}lowercase")
    if keys["tokenizer.ggml.model"].value != "bert":
        return
    if strips is not None and strips.value:
        yield (
            "llama.cpp strips accents by a table of its own (strip_accents), so Korean and scripts "
            "with vowel signs such as Hindi get other ids"
        )
    elif lowers is not None and lowers.value:
        yield "llama.cpp lower-cases one character to one, so Turkish dotted capitals differ"


def _list(texts: list[str]) -> str:
    more = len(texts) - _SHOWN
    return ", ".join(texts[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
