"""Windows cover a text as they promise: which tokens are scored, and after how much."""

from __future__ import annotations

import numpy as np
import pytest

from quantcli.errors import SourceError, UsageError
from quantcli.evals.windows import cut


def _tokens(count: int) -> np.ndarray:
    return np.arange(100, 100 + count, dtype=np.int32)


def test_half_of_each_window_is_scored() -> None:
    windows = cut(_tokens(70), 32, begin=None)
    assert [w.tokens[0] for w in windows] == [100, 132]
    for window in windows:
        # Positions 16 to 30 predict the 15 tokens after them.
        assert (window.first, window.last) == (16, 31)
        np.testing.assert_array_equal(window.targets, window.tokens[17:])


def test_the_beginning_token_replaces_the_first() -> None:
    tokens = _tokens(64)
    windows = cut(tokens, 32, begin=1)
    assert [w.tokens[0] for w in windows] == [1, 1]
    assert windows[1].tokens[1] == 133
    assert tokens[0] == 100


@pytest.mark.parametrize("length", [64, 70, 79, 80, 81, 200])
@pytest.mark.parametrize("stride", [1, 5, 16, 31])
def test_with_a_stride_each_token_is_scored_once(length: int, stride: int) -> None:
    windows = cut(_tokens(length), 32, begin=None, stride=stride)
    scored = np.concatenate([w.targets for w in windows])
    np.testing.assert_array_equal(scored, np.arange(117, 100 + length))
    for window in windows:
        assert len(window.tokens) == 32
        assert window.last == 31
        # What is predicted from position i is the token after it.
        np.testing.assert_array_equal(window.targets, window.tokens[window.first + 1 :])
        assert window.first >= min(16, 32 - stride) - 1


def test_chunks_limits_the_windows() -> None:
    assert len(cut(_tokens(320), 32, begin=None, chunks=3)) == 3
    assert len(cut(_tokens(320), 32, begin=None, chunks=30)) == 10


def test_a_short_text_is_refused() -> None:
    with pytest.raises(SourceError, match=r"a\.txt is too short: 63 tokens, but 2 windows of 32"):
        cut(_tokens(63), 32, begin=None, name="a.txt")


@pytest.mark.parametrize(
    "lengths", [(8, None), (0, None), (-512, None), (32, 32), (32, -1), (32, 0)]
)
def test_impossible_lengths_are_usage_errors(lengths: tuple[int, int | None]) -> None:
    with pytest.raises(UsageError):
        cut(_tokens(64), lengths[0], begin=None, stride=lengths[1])
