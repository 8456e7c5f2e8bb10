"""Scores for a SentencePiece BPE that is only known as merges, from ``tokenizer.json``.

llama.cpp joins any two neighbours whose joint text is a token, highest score first; a BPE of
``tokenizer.json`` joins the pairs that are listed, first pair first. Both give the same ids when
every pair of tokens that makes a token is listed, and the pairs that make one token stand
together: then the place of a token is its score. transformers writes the merges of a converted
``tokenizer.model`` in this way. A BPE that was trained as merges has one pair for each token and
is not of this kind.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from quantcli.vocab.merges import Merge


def piece_scores(
    vocab: Mapping[str, int], merges: Sequence[Merge], special: Collection[str]
) -> dict[str, float] | None:
    """A score for each token outside ``special``, or None where scores cannot say the same.

    As SentencePiece's own: 0, -1, -2 ... in the order of the merges, then the tokens that no
    merge makes, by id. ``special`` are tokens that are found in other ways: added and byte tokens.
    """
    order: dict[str, int] = {}
    last = None
    for left, right in merges:
        token = left + right
        if token in special:
            continue
        if token != last and token in order:
            return None
        order.setdefault(token, len(order))
        last = token
    pairs = set(merges)
    for token in vocab:
        if token in special or len(token) < 2:
            continue
        # A character that is no token is still joined by its text in llama.cpp.
        if any(character not in vocab for character in token):
            return None
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if (
                left in vocab
                and right in vocab
                and not (left in special or right in special)
                and (left, right) not in pairs
            ):
                return None
    for token in sorted(vocab, key=vocab.__getitem__):
        if token not in special:
            order.setdefault(token, len(order))
    return {token: -float(place) for token, place in order.items()}
