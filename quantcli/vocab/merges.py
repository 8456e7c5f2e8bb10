"""The merges of a BPE model: pairs of tokens in the order in which they were learned."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from quantcli.errors import VocabularyError
from quantcli.vocab.files import ModelPart

Merge = tuple[str, str]


def read_merges(model: ModelPart, file: str) -> list[Merge]:
    """The pairs of ``model``; VocabularyError where one is malformed or makes no token."""
    vocab = bpe_vocab(model, file)
    result: list[Merge] = []
    for place, merge in enumerate(model.merges or ()):
        pair = tuple(merge.split(" ")) if isinstance(merge, str) else merge
        if len(pair) != 2:
            raise VocabularyError(f"{file}: merge {place} ({merge!r}) is not a pair of tokens")
        for part in (*pair, pair[0] + pair[1]):
            if part not in vocab:
                raise VocabularyError(
                    f"{file}: merge {place} ({' + '.join(map(repr, pair))}) needs the token "
                    f"{part!r}, which is not in the vocabulary"
                )
        result.append((pair[0], pair[1]))
    return result


def bpe_vocab(model: ModelPart, file: str) -> dict[str, int]:
    """The vocabulary as a mapping, checked for ids that are negative or used twice."""
    if not isinstance(model.vocab, dict):
        raise VocabularyError(f"{file}: the vocabulary of a BPE model is a list, not an object")
    seen: dict[int, str] = {}
    for text, number in model.vocab.items():
        if number < 0:
            raise VocabularyError(f"{file}: token {text!r} has the id {number}")
        if number in seen:
            raise VocabularyError(
                f"{file}: tokens {seen[number]!r} and {text!r} both have id {number}"
            )
        seen[number] = text
    return model.vocab


def write_merges(merges: Iterable[Merge]) -> list[str]:
    """Merges as GGUF has them: the two tokens with a space between.

    A space inside a token is written as byte-level BPE writes it, or the pair could not be told.
    """
    return [" ".join(part.replace(" ", "Ġ") for part in merge) for merge in merges]


def make_every_token(
    vocab: Mapping[str, int], merges: Sequence[Merge], skip: Iterable[str] = ()
) -> bool:
    """Whether each token's own text, merged by the rules, ends as that token.

    Then it is all one whether a word that is a token is taken whole or put together. Tokens in
    ``skip`` are left out: added tokens are found before the model runs.
    """
    from tokenizers.models import BPE

    model = BPE(vocab=dict(vocab), merges=list(merges))
    left_out = set(skip)
    return all(len(model.tokenize(text)) == 1 for text in vocab if text and text not in left_out)
