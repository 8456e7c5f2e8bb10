"""Memory as it is told from headers, against what llama.cpp itself says that it allocates."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.published import PUBLISHED as MODELS
from support.published import build

pytest.importorskip("llama_cpp")
pytest.importorskip("transformers")

from support.llama_memory import MIB, allocate, predict, write_header

from quantcli.fit.needs import Run

CACHES = (
    "llama", "qwen2", "phi3", "gpt2", "gemma2", "gemma3", "gemma3n", "gemma4", "gemma4-moe",
    "gpt-oss", "cohere2", "cohere2-moe", "exaone4", "olmo3", "llama4", "mimo2", "laguna",
    "deepseek-v2", "deepseek-v32", "glm-moe-dsa", "minicpm3", "lfm2", "lfm2-moe", "mamba", "mamba2",
    "jamba", "falcon-h1", "granite-hybrid-dense", "nemotron-h", "nemotron-h-mtp", "qwen3-next",
    "qwen35", "afmoe", "step35",
)  # fmt: skip
"""Every way to keep what was read: heads in groups, windows, shared layers, latent, states."""

PUBLISHED = (
    "Llama-3.1-8B", "Qwen2.5-7B", "Phi-3.5-mini", "gemma-2-9b", "gemma-3-12b", "c4ai-command-r7b",
    "Qwen3-30B-A3B", "gpt-oss-20b", "DeepSeek-V2-Lite", "Falcon-H1-7B", "granite-4.0-h-tiny",
    "LFM2-1.2B", "mamba-2.8b", "starcoder2-7b", "pythia-6.9b",
)  # fmt: skip


@pytest.mark.parametrize("name", CACHES)
def test_caches_are_exact(name, checkpoint, tmp_path):
    path = write_header(checkpoint(name), tmp_path / "m.gguf", "Q8_0")
    for run in (Run(512), Run(5000, ubatch=128), Run(5000, flash=False)):
        found = allocate(path, run.context, ubatch=run.ubatch, flash=run.flash)
        assert predict(path, run).cache == pytest.approx(found.cache, abs=0.011 * MIB), run


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    def file(name: str) -> Path:
        folder = tmp_path_factory.mktemp("published")
        return write_header(build(name, folder / name), folder / f"{name}.gguf", MODELS[name].type)

    return file


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_are_told_within_five_percent(name, published):
    path = published(name)
    for run in (Run(4096), Run(32768), Run(32768, "Q8_0"), Run(8192, flash=False)):
        said = predict(path, run)
        found = allocate(path, run.context, type=run.cache, flash=run.flash)
        # Of caches below 0.1 MiB the log rounds too much away.
        assert said.cache == pytest.approx(found.cache, rel=1e-4, abs=0.02 * MIB), run
        assert said.weights == pytest.approx(found.weights, rel=1e-4), run
        assert said.compute == pytest.approx(found.compute, rel=0.2), run
        assert said.total == pytest.approx(found.total, rel=0.02), run


@pytest.mark.parametrize("name", ["llama", "gemma3", "falcon-h1"])
def test_it_is_really_allocated(name, gguf):
    """What llama.cpp says without allocating, it allocates."""
    path = gguf(name, "Q8_0")
    dry, real = (allocate(path, 2048, real=real) for real in (False, True))
    assert real.cache == pytest.approx(dry.cache, abs=0.011 * MIB)
    assert real.compute == pytest.approx(dry.compute, abs=0.011 * MIB)
    # Of each tensor's start the buffer makes a round number.
    assert real.weights == pytest.approx(dry.weights, abs=0.03 * MIB)
    assert predict(path, Run(2048)).weights == pytest.approx(real.weights, abs=0.03 * MIB)
