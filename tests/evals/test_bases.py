"""Base files: llama.cpp's 16 bits, the compact form and its bound, and broken files."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from quantcli.errors import OutputError, SourceError, UsageError
from quantcli.evals.bases import llama, topk
from quantcli.evals.bases.file import BaseFile, BaseHeader, BaseWriter
from quantcli.evals.scores import Base, LogitsBase, log_softmax

CONTEXT, VOCABULARY, CHUNKS = 16, 33, 3
ROWS = CONTEXT - 1 - CONTEXT // 2


@pytest.fixture
def logits() -> np.ndarray:
    return np.random.default_rng(1).normal(0, 4, (CHUNKS, ROWS, VOCABULARY)).astype(np.float32)


@pytest.fixture
def targets() -> np.ndarray:
    return np.random.default_rng(2).integers(0, VOCABULARY, (CHUNKS, ROWS))


def _write(path: Path, logits: np.ndarray, targets: np.ndarray, kept: int | None = None) -> Path:
    tokens = np.arange(CHUNKS * CONTEXT, dtype=np.int32)
    header = BaseHeader(CONTEXT, VOCABULARY, CHUNKS, tokens, kept)
    with BaseWriter(path, header) as writer:
        for window, true in zip(logits, targets, strict=True):
            writer.add(window, true)
        writer.publish()
    return path


def _windows(file: BaseFile) -> list[Base]:
    with file.reading() as reader:
        return [reader.read(file.header.rows) for _ in range(file.header.chunks)]


def test_the_layout_is_llama_cpps(tmp_path: Path, logits, targets) -> None:
    raw = _write(tmp_path / "b", logits, targets).read_bytes()
    assert raw[:8] == b"_logits_"
    assert struct.unpack_from("<3i", raw, 8) == (CONTEXT, VOCABULARY, CHUNKS)
    np.testing.assert_array_equal(np.frombuffer(raw, "<i4", 48, 20), np.arange(48))
    nv = 2 * ((VOCABULARY + 1) // 2) + 4
    assert len(raw) == 20 + 4 * 48 + 2 * nv * ROWS * CHUNKS
    scale, lowest = struct.unpack_from("<2f", raw, 20 + 4 * 48)
    codes = np.frombuffer(raw, "<u2", VOCABULARY, 20 + 4 * 48 + 8)
    wanted = np.maximum(log_softmax(logits[0])[0], log_softmax(logits[0])[0].max() - 16)
    np.testing.assert_allclose(scale * codes + lowest, wanted, atol=16 / 65535)
    assert codes.max() == 65535


def test_stored_logs_are_close_and_the_file_reads_back(tmp_path: Path, logits, targets) -> None:
    file = BaseFile(_write(tmp_path / "b", logits, targets))
    np.testing.assert_array_equal(file.header.tokens, np.arange(48))
    own = logits + np.random.default_rng(3).normal(0, 0.3, logits.shape).astype(np.float32)
    for window, mine, true, base in zip(logits, own, targets, _windows(file), strict=True):
        nll, found = base.compare(mine, true)
        exact_nll, exact = LogitsBase(window).compare(mine, true)
        np.testing.assert_array_equal(nll, exact_nll)
        np.testing.assert_allclose(found.divergence, exact.divergence, atol=2e-4)
        np.testing.assert_array_equal(found.same_top, exact.same_top)
        sure = np.exp(log_softmax(window)).max(axis=1)
        np.testing.assert_allclose(exact.base_top, sure, rtol=1e-9)
        np.testing.assert_allclose(found.base_top, sure, rtol=16 / 65535)


def test_equal_logits_have_no_scale() -> None:
    rows = llama.encode(np.full((2, 5), 3, np.float32), np.zeros(2, np.int64))
    assert (rows["codes"] == 0).all()
    np.testing.assert_allclose(llama.LlamaBase(rows, 5).log_probs(slice(0, 2)), -np.log(5))


@pytest.mark.parametrize("kept", [1, 4, 16, VOCABULARY - 1])
def test_the_compact_form_keeps_its_bound(tmp_path: Path, logits, targets, kept: int) -> None:
    file = BaseFile(_write(tmp_path / "b", logits, targets, kept))
    own = logits + np.random.default_rng(3).normal(0, 0.7, logits.shape).astype(np.float32)
    for window, mine, true, base in zip(logits, own, targets, _windows(file), strict=True):
        nll, found = base.compare(mine, true)
        p, q = log_softmax(window), log_softmax(mine)
        exact = (np.exp(p) * (p - q)).sum(axis=1)
        for row in range(ROWS):
            others = np.argsort(-window[row], kind="stable")[kept:]
            mass = np.exp(p[row, others]).sum()
            inner = np.exp(p[row, others]) / mass
            other = np.exp(q[row, others]) / np.exp(q[row, others]).sum()
            missing = mass * (inner * np.log(inner / other)).sum()
            assert exact[row] - found.divergence[row] == pytest.approx(missing, abs=2e-6)
            assert found.ceiling[row] >= exact[row] - 2e-6
        exact_nll, whole = LogitsBase(window).compare(mine, true)
        np.testing.assert_array_equal(nll, exact_nll)
        np.testing.assert_array_equal(found.same_top, whole.same_top)
        np.testing.assert_allclose(found.base_nll, whole.base_nll, rtol=1e-6)
        np.testing.assert_allclose(found.base_top, np.exp(p).max(axis=1), rtol=1e-5)


def test_with_every_token_kept_the_compact_form_is_exact(tmp_path: Path, logits, targets) -> None:
    base = topk.TopBase(topk.encode(logits[0], targets[0], VOCABULARY))
    _, found = base.compare(logits[1], targets[0])
    p, q = log_softmax(logits[0]), log_softmax(logits[1])
    np.testing.assert_allclose(found.divergence, (np.exp(p) * (p - q)).sum(axis=1), rtol=1e-5)


def test_an_unfinished_file_has_no_name(tmp_path: Path, logits, targets) -> None:
    header = BaseHeader(CONTEXT, VOCABULARY, CHUNKS, np.zeros(48, np.int32))
    with pytest.raises(KeyboardInterrupt), BaseWriter(tmp_path / "b", header) as writer:
        writer.add(logits[0], targets[0])
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    _write(tmp_path / "b", logits, targets)
    with pytest.raises(OutputError, match="exists already"):
        _write(tmp_path / "b", logits, targets)


def test_more_tokens_than_there_are_cannot_be_kept(tmp_path: Path, logits, targets) -> None:
    for kept in (0, VOCABULARY + 1):
        with pytest.raises(UsageError, match="cannot be kept of a vocabulary of 33"):
            _write(tmp_path / "b", logits, targets, kept)


def _changed(raw: bytes, place: int, value: int) -> bytes:
    return raw[:place] + struct.pack("<i", value) + raw[place + 4 :]


BROKEN = {
    "empty": (lambda raw: b"", "is not a file of base log-probabilities"),
    "another file": (lambda raw: b"GGUF" + raw, "is not a file of base log-probabilities"),
    "cut in the header": (lambda raw: raw[:14], "ends within its header"),
    "cut in the rows": (lambda raw: raw[:-10], "bytes, but its header makes it"),
    "too long": (lambda raw: raw + b"x", "bytes, but its header makes it"),
    "no context": (lambda raw: _changed(raw, 8, 0), "impossible sizes"),
    "negative chunks": (lambda raw: _changed(raw, 16, -3), "impossible sizes"),
    "a huge vocabulary": (lambda raw: _changed(raw, 12, 2**31 - 1), "impossible sizes"),
    "a scale below nothing": (
        lambda raw: _changed(raw, 20 + 4 * 48, 0xBF800000 - (1 << 32)), "no log-probabilities"
    ),
    "a huge scale": (
        lambda raw: _changed(raw, 20 + 4 * 48, 0x7F000000), "no log-probabilities"
    ),
    "more than certain": (
        lambda raw: _changed(raw, 24 + 4 * 48, 0x41000000), "no log-probabilities"
    ),
    "deeper than any": (
        lambda raw: _changed(raw, 24 + 4 * 48, 0xFE000000 - (1 << 32)), "no log-probabilities"
    ),
    "not a number": (
        lambda raw: _changed(raw, 20 + 4 * 48, 0x7FC00000), "are not finite numbers"
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_file_is_refused(tmp_path: Path, logits, targets, kind: str) -> None:
    change, message = BROKEN[kind]
    path = _write(tmp_path / "b", logits, targets)
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(SourceError, match=message):
        _windows(BaseFile(path))


@pytest.mark.parametrize("field", range(5))
def test_a_compact_file_without_log_probabilities_is_refused(
    tmp_path: Path, logits, targets, field: int
) -> None:
    """The target's, the other tokens' probability and their p ln p, and the first kept one's."""
    path = _write(tmp_path / "b", logits, targets, 4)
    place = 24 + 4 * 48 + (4 * field if field < 3 else 12 + 16 + 4 * (field - 3))
    path.write_bytes(_changed(path.read_bytes(), place, 0x42000000))
    with pytest.raises(SourceError, match="no log-probabilities"):
        _windows(BaseFile(path))


def test_a_compact_file_with_a_foreign_token_is_refused(tmp_path: Path, logits, targets) -> None:
    path = _write(tmp_path / "b", logits, targets, 4)
    raw = path.read_bytes()
    path.write_bytes(_changed(raw, 24 + 4 * 48 + 12, VOCABULARY))
    with pytest.raises(SourceError, match="a token beyond its vocabulary"):
        _windows(BaseFile(path))
