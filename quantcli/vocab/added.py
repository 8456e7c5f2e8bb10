"""Added tokens: found in the text before the model runs, whatever the model would make of them.

They come from ``tokenizer.json``, from ``added_tokens_decoder`` in tokenizer_config.json and, in
old folders, from added_tokens.json; the first that has an id decides. In GGUF a special one is
CONTROL (parsed only when the caller wants special tokens parsed), any other USER_DEFINED (always
parsed). Some models leave "special" off tokens that no text should produce; those that look like
it are CONTROL, by the same rules as in llama.cpp's converter.

llama.cpp has no ``lstrip``, ``rstrip`` and ``single_word``, except that after the added tokens
of a model whose name contains "phi-3" it drops spaces (`name_by_stripping`); the rest is said by
`quantcli.vocab.differences`. An added token without a row in the
embedding table is dropped when it is special (as the image placeholder of text-only Gemma 3), and
an error otherwise, because text would be tokenized differently without it.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Iterable, Mapping

from quantcli.errors import VocabularyError
from quantcli.vocab.files import AddedToken, TokenizerFiles
from quantcli.vocab.tokens import ADDED_SCORE, TokenList, TokenType, check_size

SPACE = "▁"
"""The sign that SentencePiece writes for a space."""

_LOOK_SPECIAL = frozenset({"<pad>", "<mask>", "<2mass>", "[@BOS@]"})
_LOOK_SPECIAL_AROUND = (("<|", "|>"), ("<｜", "｜>"), ("<unused", ">"))


def looks_special(text: str) -> bool:
    """Whether ``text`` is written like a token that only a program puts into a prompt."""
    return text in _LOOK_SPECIAL or any(
        text.startswith(start) and text.endswith(end) for start, end in _LOOK_SPECIAL_AROUND
    )


def added_tokens(files: TokenizerFiles) -> dict[int, AddedToken]:
    """Every added token of the folder by id, in the order of the ids."""
    found = {token.id: token for token in _from_tokenizer_json(files)}
    for token in _from_tokenizer_config(files):
        found.setdefault(token.id, token)
    for content, number in files.added_tokens.items():
        if number < 0:
            name = files.path("added_tokens.json")
            raise VocabularyError(f"{name}: token {content!r} has the id {number}")
        found.setdefault(number, AddedToken(number, content))
    return dict(sorted(found.items()))


_PHI3 = re.compile("phi-?3", re.IGNORECASE)
_PHI3_PLAIN = frozenset({"<unk>", "<s>", "<|endoftext|>"})


def wrongly_stripped(added: Iterable[AddedToken], name: str | None) -> list[str]:
    """Added tokens whose neighbours llama.cpp reads otherwise, in a model called ``name``.

    It has no ``lstrip`` and ``single_word``, and ``rstrip`` only where ``general.name`` contains
    "phi-3" or "phi3": then for every added token but three, which have to be there.
    """
    strips = name is not None and _PHI3.search(name) is not None
    return [
        token.content
        for token in added
        if token.lstrip
        or token.single_word
        or token.rstrip != (strips and token.content not in _PHI3_PLAIN)
    ]


def name_by_stripping(name: str, added: Collection[AddedToken]) -> str:
    """``general.name`` under which llama.cpp reads the fewest added tokens otherwise."""
    plain = _PHI3.sub("Phi 3", name)
    strict = re.sub("phi[ _]3", "Phi-3", name, flags=re.IGNORECASE)
    if not _PHI3.search(strict):
        strict = f"{name} (Phi-3)"
    loads = {token.content for token in added} >= _PHI3_PLAIN
    better = len(wrongly_stripped(added, strict)) < len(wrongly_stripped(added, plain))
    return strict if loads and better else plain


def _from_tokenizer_json(files: TokenizerFiles) -> Iterable[AddedToken]:
    """The tokens of ``tokenizer.json``, whose ids have to be those that the library gives.

    The tokenizers library does not read the ids: a token has its id in the vocabulary or the next
    one that is free, so a file that says otherwise runs with other ids than it says.
    """
    if files.tokenizer is None:
        return
    vocab = files.tokenizer.model.vocab
    ids = vocab if isinstance(vocab, dict) else {text: n for n, (text, _) in enumerate(vocab)}
    free = len(ids)
    for token in files.tokenizer.added_tokens or ():
        number = ids.get(token.content, free)
        free = max(free, number + 1)
        if number != token.id:
            raise VocabularyError(
                f"{files.path('tokenizer.json')}: added token {token.content!r} has id {token.id}, "
                f"but the tokenizers library gives it {number}"
            )
        yield token


def _from_tokenizer_config(files: TokenizerFiles) -> Iterable[AddedToken]:
    decoder = files.tokenizer_config.get("added_tokens_decoder") or {}
    name = files.path("tokenizer_config.json")
    if not isinstance(decoder, Mapping):
        raise VocabularyError(f"{name}: added_tokens_decoder is not an object")
    for number, entry in decoder.items():
        content = entry.get("content") if isinstance(entry, Mapping) else None
        if not number.isdigit() or not isinstance(content, str):
            raise VocabularyError(
                f"{name}: added_tokens_decoder[{number!r}] is not a token with a content"
            )
        flags = {name: bool(entry.get(name)) for name in ("lstrip", "rstrip", "single_word")}
        normalized = bool(entry.get("normalized", True))
        yield AddedToken(int(number), content, bool(entry.get("special")), normalized, **flags)


def put_added(
    tokens: TokenList,
    added: Mapping[int, AddedToken],
    *,
    nfc: bool = False,
    sentencepiece: bool = False,
    replace: bool = False,
) -> None:
    """Set the type of each added token, and put in those that the vocabulary has not.

    ``nfc`` says that text is normalized so, ``sentencepiece`` that ▁ stands for a space.
    ``replace`` lets an added token take the place of a piece with another text, as a fine-tune
    does that renames a reserved piece of ``tokenizer.model``.
    """
    known = tokens.ids()
    for number, token in added.items():
        if number >= tokens.size and token.special:
            continue
        check_size(number, tokens.size, tokens.file)
        before = tokens.text(number)
        elsewhere = known.get(token.content, number)
        if elsewhere != number:
            raise VocabularyError(
                f"{tokens.file}: added token {token.content!r} has id {number}, but the "
                f"vocabulary has it at {elsewhere}"
            )
        if before not in (None, token.content) and not replace:
            raise VocabularyError(
                f"{tokens.file}: added token {token.content!r} has id {number}, where the "
                f"vocabulary has {before!r}"
            )
        if before is not None and tokens.kind(number) is TokenType.UNKNOWN:
            kind = TokenType.UNKNOWN
        elif token.special or looks_special(token.content):
            kind = TokenType.CONTROL
        else:
            kind = TokenType.USER_DEFINED
        text = _as_in_text(token, kind, nfc, sentencepiece)
        tokens.put(number, text, kind, ADDED_SCORE)


def _as_in_text(token: AddedToken, kind: TokenType, nfc: bool, sentencepiece: bool) -> str:
    """The token as it stands in text that was not normalized, which is where llama.cpp looks."""
    if sentencepiece and kind is TokenType.USER_DEFINED:
        return token.content.replace(SPACE, " ")
    if nfc and token.normalized:
        return unicodedata.normalize("NFC", token.content)
    return token.content
