"""Latent attention over chosen tokens: GLM-5's layers that take over another one's choice."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.calibrations import run
from support.gguf_models import read_config, write_model
from support.tiny_models import build

from quantcli.archs import find_architecture
from quantcli.errors import ArchitectureError

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that attends to fewer tokens than a window has."""
    return build("glm-moe-dsa", tmp_path_factory.mktemp("glm") / "m", changes={"index_topk": 128})


def test_logits_beyond_the_tokens_that_are_chosen(narrow: Path, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    from support.llama_logits import llama_logits

    tokens = np.random.default_rng(0).integers(2, 4000, 300).tolist()
    file = write_model(narrow, tmp_path / "m.gguf", dtype="F32")
    found = llama_logits(file, tokens, context=512)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        narrow, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        expected = model(torch.tensor([tokens])).logits[0].numpy()
    assert expected.std() > 1, "flat logits would hide a fault"
    assert np.abs(found - expected).max() / expected.std() < 1e-3


def test_windows_in_which_a_choice_is_not_known_beforehand_are_refused(
    narrow: Path, tmp_path: Path
) -> None:
    with pytest.raises(ArchitectureError, match="which 128 tokens another one chose") as refused:
        run(narrow, tmp_path / "c.gguf", ctx=256, chunks=2)
    assert refused.value.hint == "--ctx 128"
    assert run(narrow, tmp_path / "c.gguf", ctx=128, chunks=2).counts


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"index_head_dim": 96}, "index_head_dim 96"),
        ({"index_head_dim": 32}, "power of two that is neither below 64"),
        ({"q_lora_rank": None}, "q_lora_rank None"),
        ({"indexer_types": ["shared", "full", "full"]}, "the first of them full"),
        ({"indexer_types": ["full", "full"]}, "for each of 3 layers"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "'yarn'"),
    ],
)
def test_what_its_graph_does_not_compute_is_refused(
    narrow: Path, changes: dict[str, object], said: str
) -> None:
    config = read_config(narrow) | changes
    with pytest.raises(ArchitectureError, match=said):
        find_architecture(config).metadata(config)


@pytest.mark.parametrize(
    ("spelling", "kinds"),
    [
        ({"index_topk_pattern": "FSF"}, [True, False, True]),
        ({"index_topk_freq": 2, "index_skip_topk_offset": 1}, [True, False, True]),
        ({"index_topk_freq": 2}, [True, True, False]),
        ({}, None),
    ],
)
def test_spellings_of_which_layers_choose(
    narrow: Path, spelling: dict[str, object], kinds: list[bool] | None
) -> None:
    config = {k: v for k, v in read_config(narrow).items() if k != "indexer_types"} | spelling
    keys = find_architecture(config).metadata(config)
    found = keys.get("glm-dsa.attention.indexer.types")
    assert (found and found.value) == kinds
