"""Whatever stands in a file, looking at it ends in a view or in a sentence of ours."""

from __future__ import annotations

import json
import random

import pytest
from support.gguf_files import write_model

from quantcli.errors import QuantcliError
from quantcli.report import listing
from quantcli.report.document import model_document
from quantcli.report.facts import facts_of_metadata
from quantcli.report.opening import open_subject
from quantcli.report.overview import overview_tables
from quantcli.sources.resolve import resolve
from quantcli.types import MetaValue, text


def _look(path) -> bool:
    """Whether every view can be made; False when the file is refused."""
    try:
        subject = open_subject(resolve(str(path)), "x")
    except QuantcliError:
        return False
    with subject:
        overview_tables(subject)
        listing.tensor_table(subject, subject.tensors)
        for full in (False, True):
            listing.key_value_table(subject.metadata, full=full)
            document = model_document(subject, subject.tensors, full_values=full)
            json.dumps(document, allow_nan=False)
    return True


def test_a_gguf_with_wrong_bytes(tmp_path):
    shapes = {"token_embd.weight": (8, 32), "output_norm.weight": (32,)}
    write_model(tmp_path / "m.gguf", {name: ("F32", shape) for name, shape in shapes.items()})
    whole = (tmp_path / "m.gguf").read_bytes()
    rng = random.Random(1)
    views = 0
    for _ in range(600):
        content = bytearray(whole)
        for _ in range(rng.choice([1, 1, 2, 4])):
            content[rng.randrange(900)] = rng.choice([0, 1, 4, 8, 9, 255, rng.randrange(256)])
        (tmp_path / "f.gguf").write_bytes(content)
        views += _look(tmp_path / "f.gguf")
    assert 50 < views < 550


VALUES = [
    None, True, False, 0, -1, 1, 2**40, 1e400, float("nan"), 3.5, "x", "", [], [1, 2], {},
    {"a": 1}, {"rope_type": "yarn"}, {"rope_type": []}, {"quant_method": 3},
]  # fmt: skip
CLASSES = [
    "LlamaForCausalLM", "Qwen2ForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM",
    "Phi3ForCausalLM", "GPT2LMHeadModel", "MixtralForCausalLM", "Qwen3MoeForCausalLM", "Foo",
]  # fmt: skip
MORE_KEYS = ["text_config", "quantization_config", "rope_scaling", "head_dim", "num_experts"]


@pytest.mark.parametrize("name", CLASSES)
def test_settings_of_the_wrong_kind(name, variant):
    folder = variant(architectures=[name])
    config = json.loads((folder / "config.json").read_text())
    rng = random.Random(name)
    for _ in range(60):
        keys = rng.sample([*config, *MORE_KEYS], rng.choice([1, 2, 3]))
        changed = config | {key: rng.choice(VALUES) for key in keys}
        (folder / "config.json").write_text(json.dumps(changed))
        assert _look(folder), changed


def test_a_vocabulary_that_is_no_list():
    keys = {"general.architecture": text("x"), "tokenizer.ggml.tokens": MetaValue("u32", 5)}
    assert facts_of_metadata(keys).vocabulary is None
