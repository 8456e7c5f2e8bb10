"""A GGUF as a folder: transformers loads the weights it was made from, and llama.cpp's logits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader, dequantize
from support.tiny_models import MODELS

import quantcli
from quantcli.errors import OutputError, QuantcliError, SourceError, UsageError, VocabularyError

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("llama_cpp")

F32_BOUND = 1e-3
"""Of the logits' deviation, as in tests/archs; arithmetic in another order."""
GELU_BOUND = 6e-3
"""ggml's GELU is a table over float16."""
_TOWERS = (
    "vision_",
    "visual.",
    "multi_modal",
    "projector",
    "audio_tower",
    "embed_vision",
    "embed_audio",
)


def load(folder: Path, **options: Any) -> Any:
    config = json.loads((folder / "config.json").read_text())
    model = getattr(transformers, config["architectures"][0])
    return model.from_pretrained(folder, attn_implementation="eager", **options).eval()


def state(folder: Path) -> dict[str, Any]:
    model = load(folder, dtype=torch.float32)
    return {
        name.replace("language_model.", ""): value
        for name, value in model.state_dict().items()
        if not any(part in name for part in _TOWERS)
    }


@pytest.mark.parametrize("name", MODELS)
def test_round_trip_through_float32_is_the_identity(
    name: str, checkpoint: Callable[..., Path], gguf: Callable[..., Path], tmp_path: Path
) -> None:
    from support.llama_logits import llama_logits

    source, file = checkpoint(name), gguf(name, "F32")
    done = quantcli.export(file, tmp_path / "hf", to="hf", threads=2)
    assert done.paths == (tmp_path / "hf",)
    wanted, found = state(source), state(tmp_path / "hf")
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        assert torch.equal(found[key], value) or MODELS[name].folded, key
    tokens = np.random.default_rng(0).integers(2, 4000, 48).tolist()
    model = load(tmp_path / "hf")
    assert model.dtype == torch.float32
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0].numpy()
    expected = llama_logits(file, tokens)
    assert expected.std() > 1, "flat logits would hide a fault"
    gelu = any("gelu" in type(part).__name__.lower() for part in model.modules())
    bound = GELU_BOUND if gelu else F32_BOUND
    assert np.abs(logits - expected).max() / expected.std() < bound


def test_bytes_of_a_round_trip_through_gguf(
    checkpoint: Callable[..., Path], gguf: Callable[..., Path], tmp_path: Path
) -> None:
    """GGUF -> checkpoint -> GGUF gives the same tensors and the model's same key-values."""
    file = gguf("llama-llama3", "BF16")
    quantcli.export(file, tmp_path / "hf", to="hf")
    again = quantcli.export(tmp_path / "hf", tmp_path / "again.gguf", to="gguf").paths[0]
    one, other = GGUFReader(file), GGUFReader(again)
    assert [t.name for t in one.tensors] == [t.name for t in other.tensors]
    for ours, theirs in zip(one.tensors, other.tensors, strict=True):
        assert ours.tensor_type == theirs.tensor_type
        if ours.name != "rope_freqs.weight":  # found again to a few units of float32
            assert np.array_equal(ours.data, theirs.data), ours.name
    for key in one.fields:
        if key.startswith(("llama.", "tokenizer.")):
            assert one.get_field(key).contents() == other.get_field(key).contents(), key


def test_quantized_weights_are_decoded_as_gguf_decodes_them(
    gguf: Callable[..., Path], tmp_path: Path
) -> None:
    file = gguf("llama", "Q4_K_M")
    quantcli.export(file, tmp_path / "f32", to="hf", dtype="f32")
    quantcli.export(file, tmp_path / "auto", to="hf")
    stored = {tensor.name: tensor for tensor in GGUFReader(file).tensors}
    whole, half = state(tmp_path / "f32"), load(tmp_path / "auto")
    assert half.dtype == torch.float16
    names = {
        "model.layers.1.mlp.down_proj.weight": "blk.1.ffn_down.weight",
        "model.layers.0.self_attn.v_proj.weight": "blk.0.attn_v.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    for name, source in names.items():
        values = dequantize(stored[source].data, stored[source].tensor_type)
        assert np.array_equal(whole[name].numpy(), values.reshape(whole[name].shape)), name
        assert torch.equal(half.state_dict()[name], whole[name].half()), name


def test_sixteen_bits_stay_sixteen_bits(gguf: Callable[..., Path], tmp_path: Path) -> None:
    quantcli.export(gguf("gemma3", "BF16"), tmp_path / "hf", to="hf")
    assert load(tmp_path / "hf").dtype == torch.bfloat16


def test_norms_that_sixteen_bits_do_not_hold_stay_float32(mini: Path, tmp_path: Path) -> None:
    file = quantcli.quantize(mini, tmp_path / "m.gguf", type="F16").paths[0]
    # bfloat16 norms near 1 are float16 numbers as well; one that is far away is not.
    reader = GGUFReader(file, "r+")
    norm = next(t for t in reader.tensors if t.name == "blk.0.attn_norm.weight")
    norm.data[3] = 1e-9
    reader.data.flush()
    quantcli.export(file, tmp_path / "hf", to="hf")
    model = load(tmp_path / "hf")
    assert model.dtype == torch.float32
    assert model.state_dict()["model.layers.0.input_layernorm.weight"][3] == np.float32(1e-9)
    with pytest.raises(QuantcliError, match=r"blk\.0\.attn_norm\.weight.*overflows F16"):
        norm.data[3] = 1e9
        reader.data.flush()
        quantcli.export(file, tmp_path / "half", to="hf", dtype="f16")
    with pytest.raises(QuantcliError, match="is not a finite number") as caught:
        norm.data[3] = np.nan
        reader.data.flush()
        quantcli.export(file, tmp_path / "half", to="hf")
    assert "--verify names all such tensors" in str(caught.value.hint)
    assert not (tmp_path / "half").exists()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_the_tokenizer_gives_llama_cpps_ids(mini: Path, tmp_path: Path) -> None:
    import llama_cpp
    from support.tokenizers_text import PAGE

    file = quantcli.quantize(mini, tmp_path / "m.gguf", type="Q8_0").paths[0]
    quantcli.export(file, tmp_path / "hf", to="hf")
    loaded = llama_cpp.Llama(str(file), vocab_only=True, verbose=False)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    original = transformers.AutoTokenizer.from_pretrained(mini)
    for text in (*PAGE.values(), "<|begin_of_text|>Once<|end_of_text|>"):
        ids = loaded.tokenize(text.encode(), add_bos=True, special=True)
        assert tokenizer(text)["input_ids"] == ids == original(text)["input_ids"], text
        assert tokenizer.decode(ids) == original.decode(ids)


@pytest.mark.parametrize("name", ["qwen2", "gemma3", "mistral", "gpt2", "phi3"])
def test_every_family_loads_the_tokenizer_as_it_is_written(
    name: str, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """transformers has a class of its own for the tokenizer of each of these families."""
    import shutil

    import llama_cpp

    from quantcli.vocab.regexes import QWEN2

    source = tmp_path / "model"
    shutil.copytree(checkpoint(name), source)
    if name == "qwen2":
        # transformers splits as Qwen does whatever the files of such a model say.
        made = json.loads((source / "tokenizer.json").read_text())
        made["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = QWEN2
        made["model"]["ignore_merges"] = False
        (source / "tokenizer.json").write_text(json.dumps(made))
    file = quantcli.quantize(source, tmp_path / "m.gguf", type="F32").paths[0]
    quantcli.export(file, tmp_path / "hf", to="hf")
    loaded = llama_cpp.Llama(str(file), vocab_only=True, verbose=False)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    text = "It's a dark and stormy night — 1859!\n\n  東京 <|end_of_text|>"
    assert tokenizer(text)["input_ids"] == loaded.tokenize(text.encode(), special=True)


def test_shards_and_their_index(mini: Path, tmp_path: Path) -> None:
    file = quantcli.quantize(mini, tmp_path / "m.gguf", type="BF16").paths[0]
    quantcli.export(file, tmp_path / "hf", to="hf", split_max_size="3M")
    names = sorted(path.name for path in (tmp_path / "hf").glob("*.safetensors"))
    assert names[0] == f"model-00001-of-{len(names):05d}.safetensors"
    assert len(names) >= 3
    assert all(path.stat().st_size < 3_100_000 for path in (tmp_path / "hf").glob("*.safetensors"))
    original = state(mini)
    for key, value in state(tmp_path / "hf").items():
        assert torch.equal(value, original[key])


def test_settings_come_back(mini: Path, tmp_path: Path) -> None:
    import shutil

    source = tmp_path / "source"
    shutil.copytree(mini, source)
    settings = {"eos_token_id": [1, 7], "temperature": 0.6, "top_p": 0.95, "top_k": 20}
    (source / "generation_config.json").write_text(json.dumps(settings))
    (source / "chat_template.jinja").write_text("{{ messages[0].content }}")
    (source / "README.md").write_text("---\nlicense: mit\nlanguage:\n- en\n---\n# A model\n")
    file = quantcli.quantize(source, tmp_path / "m.gguf", type="Q8_0").paths[0]
    quantcli.export(file, tmp_path / "hf", to="hf")
    found = transformers.GenerationConfig.from_pretrained(tmp_path / "hf")
    assert (found.temperature, found.top_p, found.top_k) == (0.6, 0.95, 20)
    assert found.eos_token_id == [1, 7]
    assert (tmp_path / "hf" / "chat_template.jinja").read_text() == "{{ messages[0].content }}"
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "license: mit" in card
    assert 'type = "Q8_0"' in card


def test_what_is_refused_before_the_work(
    gguf: Callable[..., Path], checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    file = gguf("llama", "F32")
    bare = tmp_path / "bare.gguf"
    from quantcli.artifacts.gguf_set import prepare_gguf_set
    from quantcli.artifacts.write import write_artifact
    from quantcli.sources.gguf import open_gguf

    store = open_gguf(file)
    for key in [key for key in store.metadata if key.startswith("tokenizer.")]:
        del store.metadata[key]
    list(write_artifact(prepare_gguf_set(store, bare)))
    cases = [
        (bare, {}, VocabularyError, r"bare\.gguf has no tokenizer"),
        (checkpoint("llama"), {}, SourceError, "is stored in floats already"),
        (file, {"dtype": "int4"}, UsageError, "there is no dtype 'int4'"),
        (file, {"split_max_size": "many"}, UsageError, "'many' is not a size"),
        (file, {"tokenizer": tmp_path / "none"}, SourceError, "none is not a folder"),
        (file, {"card": True}, UsageError, "--card does nothing for --to hf"),
    ]
    for artifact, options, kind, message in cases:
        with pytest.raises(kind, match=message):
            quantcli.export(artifact, tmp_path / "hf", to="hf", **options)
        assert not (tmp_path / "hf").exists()
    quantcli.export(bare, tmp_path / "hf", to="hf", tokenizer=checkpoint("llama"))
    with pytest.raises(OutputError, match="hf exists already"):
        quantcli.export(file, tmp_path / "hf", to="hf")
    quantcli.export(file, tmp_path / "hf", to="hf", force=True)
    (tmp_path / "mine").mkdir()
    with pytest.raises(OutputError, match="is not a folder that quantcli wrote"):
        quantcli.export(file, tmp_path / "mine", to="hf", force=True)


def test_files_of_the_original_are_taken(
    gguf: Callable[..., Path], checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    source = checkpoint("llama-llama3")
    quantcli.export(
        gguf("llama-llama3", "BF16"), tmp_path / "hf", to="hf", config=source, tokenizer=source
    )
    one, other = (
        json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path / "hf")
    )
    assert other == one
    tokenizer = (tmp_path / "hf" / "tokenizer.json").read_bytes()
    assert tokenizer == (source / "tokenizer.json").read_bytes()
    with pytest.raises(SourceError, match="of a model that does not only read text"):
        quantcli.export(
            gguf("gemma3-images", "F32"),
            tmp_path / "g",
            to="hf",
            config=checkpoint("gemma3-images"),
        )


def test_an_unknown_architecture_is_refused(gguf: Callable[..., Path], tmp_path: Path) -> None:
    from quantcli.artifacts.gguf_set import prepare_gguf_set
    from quantcli.artifacts.write import write_artifact
    from quantcli.sources.gguf import open_gguf
    from quantcli.types import text

    store = open_gguf(gguf("llama", "F32"))
    store.metadata["general.architecture"] = text("zebra")
    list(write_artifact(prepare_gguf_set(store, tmp_path / "zebra.gguf")))
    with pytest.raises(SourceError, match="configuration of a zebra model cannot be told"):
        quantcli.export(tmp_path / "zebra.gguf", tmp_path / "hf", to="hf")
    assert not (tmp_path / "hf").exists()
