"""Which type stands first, and where its parts go."""

from __future__ import annotations

import pytest
from support.llama_memory import write_header
from support.published import build

pytest.importorskip("transformers")

from quantcli.errors import PlanError, UsageError
from quantcli.fit.choose import fit_types
from quantcli.fit.machine import find_machine
from quantcli.model import open_model
from quantcli.plan.filetypes import TRAINED_TYPES
from quantcli.report.fit import fit_sentences, run_options
from quantcli.types import MetaValue

GIB = 2**30


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    found = {}

    def opened(name):
        if name not in found:
            folder = tmp_path_factory.mktemp("published") / name
            with open_model(str(build(name, folder))) as each:
                found[name] = each.tensors, each.metadata
        return found[name]

    return opened


@pytest.fixture
def fit(model):
    def call(name, size, on=None, ram=None, **more):
        tensors, metadata = model(name)
        return fit_types(tensors, metadata, find_machine(size, on, ram), **more)

    return call


@pytest.mark.parametrize(
    ("name", "size", "on", "context", "best", "options"),
    [
        ("Llama-3.1-8B", "24G", None, 32768, "Q8_0", ""),
        ("Llama-3.1-8B", "8G", None, 8192, "Q5_K_M", ""),
        ("Llama-3.1-8B", "8G", "mac", 4096, "Q2_K", ""),
        ("Qwen3-14B", "32G", "cpu", 32768, "Q8_0", ""),
        ("Qwen3-30B-A3B", "16G", None, 8192, "Q4_K_M", "--n-cpu-moe 9"),
        ("gemma-3-12b", "6G", None, 8192, "Q4_K_M", "-ngl 26"),
        # Its experts are MXFP4 already.
        ("gpt-oss-20b", "16G", None, 8192, "MXFP4_MOE", ""),
        ("gpt-oss-20b", "80G", None, 8192, "MXFP4_MOE", ""),
    ],
)
def test_the_type_to_take(fit, name, size, on, context, best, options):
    found = fit(name, size, on, context=context)
    assert found.best is not None
    assert found.best.name == best
    assert " ".join(run_options(found)[5:]) == options
    assert fit_sentences(found)[0].startswith(f"Take {best}")


def test_nothing_finer_would_fit(fit):
    """Of the types that people take, each finer one needs more than there is."""
    found = fit("Llama-3.1-8B", "8G", context=8192)
    for each in found.candidates:
        if each.is_usual and each.bits > found.best.bits:
            assert each.needs.total - each.weights.inputs > found.machine.usable
            assert not each.needs.whole


def test_a_cache_is_what_arithmetic_says(fit):
    """Llama 3.1 8B: 2 x 32 layers x 8 heads x 128 numbers of 2 bytes for each token."""
    found = fit("Llama-3.1-8B", "80G", context=32768)
    assert {each.needs.cache for each in found.candidates} == {2 * 32 * 8 * 128 * 2 * 32768}
    q8 = fit("Llama-3.1-8B", "80G", context=32768, cache="q8_0")
    assert q8.candidates[0].needs.cache == 2 * 32 * 8 * 128 * 32768 * 34 // 32


def test_layers_that_do_not_fit_stay_in_memory(fit):
    """What is on the GPU and beside it is all there is, and one layer more would not fit."""
    found = fit("Qwen3-14B", "8G", context=8192)
    some = next(each for each in found.candidates if each.name == "Q8_0")
    needs, weights = some.needs, some.weights
    count = needs.layout.layers - 1
    layer_cache = needs.cache // len(weights.layers)
    head = weights.total - weights.inputs - sum(weights.layers)
    on_gpu = head + sum(weights.layers[-count:]) + count * layer_cache + needs.compute
    assert needs.device == on_gpu <= found.machine.usable
    assert on_gpu + weights.layers[-count - 1] + layer_cache > found.machine.usable
    assert needs.device + needs.beside == needs.total + needs.compute


def test_little_memory_beside_the_gpu_counts(fit):
    assert fit("Mixtral-8x7B", "24G", ram="16G", context=8192).best.name == "Q4_K_M"
    assert fit("Mixtral-8x7B", "24G", ram="4G", context=8192).best.name == "Q3_K_M"


def test_memory_that_was_not_told_is_asked_for(fit):
    ask = "With less memory than that beside the GPU, add --ram SIZE."
    assert ask in fit_sentences(fit("Mixtral-8x7B", "24G"))
    assert ask not in fit_sentences(fit("Mixtral-8x7B", "24G", ram="64G"))
    assert ask not in fit_sentences(fit("Llama-3.1-8B", "24G"))


def test_the_longest_context_is_the_longest(fit):
    found = fit("Llama-3.1-8B", "8G", context=8192)
    again = fit("Llama-3.1-8B", "8G", context=found.longest)
    assert again.best.name == found.best.name
    assert fit("Llama-3.1-8B", "8G", context=found.longest + 256).best.name != found.best.name


def test_nothing_fits(fit):
    found = fit("Llama-3.1-8B", "2G", "mac")
    assert found.best is None
    (sentence,) = fit_sentences(found)
    assert sentence.startswith("Nothing fits: IQ1_S, the smallest, needs")


def test_types_of_models_trained_in_them_are_not_advised(fit):
    for size in ("3G", "4G", "5G", "6G", "8G"):
        best = fit("Llama-3.1-8B", size, "mac", context=2048).best
        assert best is None or best.name not in TRAINED_TYPES


def test_a_file_that_stays_as_it_is(model, tmp_path):
    tensors, metadata = model("LFM2-1.2B")
    folder = build("LFM2-1.2B", tmp_path / "m")
    with open_model(write_header(folder, tmp_path / "m.gguf")) as gguf:
        found = fit_types(
            gguf.tensors, gguf.metadata, find_machine("8G"), stored="Q4_K_M", from_gguf=True
        )
    (only,) = found.candidates
    planned = fit_types(tensors, metadata, find_machine("8G"))
    same = next(each for each in planned.candidates if each.name == "Q4_K_M")
    assert only.needs == same.needs
    assert found.best is only


def test_refusals(fit, model):
    with pytest.raises(UsageError, match="there is no KV cache of type q8"):
        fit("Llama-3.1-8B", "8G", cache="q8")
    with pytest.raises(UsageError, match="a q8_0 cache needs flash attention"):
        fit("Llama-3.1-8B", "8G", cache="q8_0", flash=False)
    tensors, _ = model("Llama-3.1-8B")
    keys = {
        "general.architecture": MetaValue("str", "modern-bert"),
        "modern-bert.block_count": MetaValue("u32", 2),
        "modern-bert.attention.causal": MetaValue("bool", False),
    }
    with pytest.raises(PlanError, match="reads whole texts at once"):
        fit_types(tensors, keys, find_machine("8G"))
    with pytest.raises(PlanError, match=r"no key-value bert\.block_count"):
        fit_types(tensors, {"general.architecture": MetaValue("str", "bert")}, find_machine("8G"))


@pytest.mark.parametrize(
    ("key", "kind", "value", "message"),
    [
        ("block_count", "u32", 2**31, "makes 2147483648 layers"),
        ("block_count", "u32", 0, "makes 0 layers"),
        ("block_count", "str", "many", "block_count should be a whole number, found 'many'"),
        ("nextn_predict_layers", "u32", 16, "makes 0 layers"),
        ("embedding_length", "f32", float("nan"), "embedding_length should be a whole number"),
        ("attention.head_count_kv", "[i32]", [-1] * 16, "head_count_kv should be a whole number"),
        ("attention.head_count_kv", "[i32]", [8] * 3, "has 3 entries for 16 layers"),
        ("context_length", "str", "long", "context_length should be a whole number"),
    ],
)
def test_key_values_of_a_stranger(model, key, kind, value, message):
    tensors, metadata = model("Llama-3.2-1B")
    odd = {**metadata, f"llama.{key}": MetaValue(kind, value)}
    with pytest.raises(PlanError, match=message):
        fit_types(tensors, odd, find_machine("8G"))
