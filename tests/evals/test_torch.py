"""The torch engine against a plain loop over transformers' model, and against llama.cpp."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quantcli.errors import VocabularyError, WeightError
from quantcli.evals.artifacts import open_artifact
from quantcli.evals.run import EvaluationDone, EvaluationJob, evaluate
from quantcli.evals.windows import Window
from quantcli.layerwise.texts import read_texts

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

DATA = Path(__file__).parents[1] / "data"
CHECKPOINT = DATA / "bookworm-mini"
TEXT = DATA / "pride-and-prejudice.txt"
CONTEXT, WINDOWS = 128, 3


def _measure(target: Path, engine: str, **options: Any) -> EvaluationDone:
    with (artifact := open_artifact(str(target), engine=engine, **options)).model:
        job = EvaluationJob(
            [artifact], read_texts([str(TEXT)]), context=CONTEXT, chunks=WINDOWS, threads=1
        )
        return next(e for e in evaluate(job) if isinstance(e, EvaluationDone))


@pytest.fixture(scope="module")
def plain() -> float:
    """The perplexity, as anyone would compute it."""
    model = transformers.AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(CHECKPOINT)
    text = TEXT.read_text(encoding="utf-8").removesuffix("\n")
    ids = tokenizer(text, add_special_tokens=True, return_tensors="pt").input_ids
    losses = []
    for start in range(0, CONTEXT * WINDOWS, CONTEXT):
        window = ids[:, start : start + CONTEXT].clone()
        if ids[0, 0] == tokenizer.bos_token_id:
            window[0, 0] = tokenizer.bos_token_id
        with torch.no_grad():
            logits = model(window).logits[0, CONTEXT // 2 : -1].double()
        true = window[0, CONTEXT // 2 + 1 :]
        losses.append(torch.nn.functional.cross_entropy(logits, true, reduction="none"))
    return math.exp(torch.cat(losses).mean())


def test_a_checkpoint_equals_a_plain_loop(plain: float) -> None:
    found = _measure(CHECKPOINT, "auto")
    assert found.artifact.engine == "torch"
    assert found.summary.positions == WINDOWS * (CONTEXT // 2 - 1)
    assert found.summary.perplexity.value == pytest.approx(plain, rel=1e-6)


def test_a_gguf_of_the_same_weights_equals_the_checkpoint(
    plain: float, gguf: Callable[[str], Path]
) -> None:
    pytest.importorskip("llama_cpp")
    found = _measure(gguf("BF16"), "torch")
    assert found.summary.perplexity.value == pytest.approx(plain, rel=1e-6)


def test_a_folder_gives_a_gguf_its_tokenizer(plain: float, gguf: Callable[[str], Path]) -> None:
    found = _measure(gguf("BF16"), "torch", folder=CHECKPOINT)
    assert found.summary.perplexity.value == pytest.approx(plain, rel=1e-6)


@pytest.mark.parametrize(("kind", "bound"), [("F32", 1e-4), ("BF16", 2e-3), ("Q4_K_M", 5e-3)])
def test_llama_cpp_agrees(kind: str, bound: float, gguf: Callable[[str], Path]) -> None:
    pytest.importorskip("llama_cpp")
    ours, theirs = (
        _measure(gguf(kind), engine).summary.perplexity.value for engine in ("torch", "llama.cpp")
    )
    # llama.cpp rounds activations too, to bfloat16 or to 8 bits.
    assert ours == pytest.approx(theirs, rel=bound)


def _engine(memory: int | None = None) -> Any:
    from quantcli.evals.engines.torch import TorchEngine, find_config, open_tokenizer

    source = open_artifact(str(CHECKPOINT)).source
    words = open_tokenizer(source)
    return TorchEngine(source.model, find_config(source), words, label=source.label, memory=memory)


def test_without_memory_it_goes_layer_by_layer_to_the_same_logits() -> None:
    tokens = np.random.default_rng(0).integers(2, 4000, (5, 32)).astype(np.int32)
    windows = [Window(row, 16, row[17:].astype(np.int64)) for row in tokens]
    # Room for the hidden states of two windows: three batches.
    layered, resident = _engine(4 * 2 * 4 * 32 * 256), _engine()
    assert not layered.resident
    assert resident.resident
    found = [logits.copy() for logits in layered.run(windows)]
    assert all(p.is_meta for p in layered._model.module.parameters())
    for a, b in zip(found, resident.run(windows), strict=True):
        assert a.shape == (15, 4096)
        np.testing.assert_array_equal(a, b)


def test_logits_that_are_no_numbers_are_refused() -> None:
    engine = _engine()
    with torch.no_grad():
        engine._model.module.get_output_embeddings().weight[5, 0] = float("nan")
    window = Window(np.arange(32, dtype=np.int32), 16, np.arange(17, 32, dtype=np.int64))
    with pytest.raises(WeightError, match="not finite numbers, first for scored position 1 of"):
        list(engine.run([window]))


def test_capped_attention_agrees_with_llama_cpp(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    from support.gguf_models import write_model
    from support.tiny_models import build

    folder = build("gemma2", tmp_path / "m")
    path = write_model(folder, tmp_path / "m.gguf", dtype="F32")
    ours, theirs = (
        _measure(path, engine).summary.perplexity.value for engine in ("torch", "llama.cpp")
    )
    # ggml's GELU is a table over float16; without the cap it is off by a third.
    assert ours == pytest.approx(theirs, rel=0.01)


def test_a_gguf_without_any_tokenizer_is_refused(
    gguf: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from quantcli.errors import MissingExtraError
    from quantcli.evals.engines import llama_cpp

    def missing() -> None:
        raise MissingExtraError("no llama.cpp")

    monkeypatch.setattr(llama_cpp, "load_library", missing)
    with pytest.raises(VocabularyError, match=r"tokenizer runs in llama\.cpp, which is not"):
        _measure(gguf("BF16"), "torch")
