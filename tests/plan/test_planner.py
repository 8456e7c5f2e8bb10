"""Whole plans: sizes and order against files that the real llama-quantize wrote, and refusals."""

from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader
from support.llama_plan import Shape, write_hollow
from support.llama_quantize import llama_quantize
from support.model_shapes import MODELS, delta_net

from quantcli.errors import PlanError, UsageError
from quantcli.formats import get_format
from quantcli.plan.filetypes import file_types, find_file_type
from quantcli.plan.planner import Plan, make_plan
from quantcli.plan.recipe import Recipe
from quantcli.types import MetaValue, Note, OutputTensor, PackedType

WHOLE = ["llama-2", "llama-4-gqa", "llama-narrow", "mixtral-4", "gpt2-12"]


def plan(
    model: Shape, *, importance: object = None, from_gguf: bool = True, **recipe: object
) -> Plan:
    return make_plan(
        model.output_tensors(), model.metadata(), Recipe(**recipe),
        importance=importance, from_gguf=from_gguf,
    )  # fmt: skip


def entries(model: Shape, *, without: str = "token_embd") -> dict[str, tuple[int, int]]:
    return {
        name: (shape[-3] if len(shape) > 2 else 1, shape[-1])
        for name, shape in model.tensors.items()
        if len(shape) > 1 and without not in name
    }


def ones(shapes: dict[str, tuple[int, int]]) -> dict[str, np.ndarray]:
    return {name: np.ones(a * b, np.float32) for name, (a, b) in shapes.items()}


READABLE = GGMLQuantizationType.__members__


@pytest.mark.slow
@pytest.mark.parametrize(
    "type_name",
    # llama.cpp runs NVFP4 files but its quantizer writes none; gguf's reader lacks some types.
    [t.name for t in file_types() if t.name != "NVFP4" and t.base in READABLE],
)
def test_order_types_and_sizes_of_a_written_file(type_name: str, tmp_path: Path) -> None:
    for name in WHOLE[:2] if type_name not in ("Q4_K_M", "Q8_0", "BF16") else WHOLE:
        model = MODELS[name]()
        shapes = entries(model)
        source = write_hollow(tmp_path / f"{name}.gguf", model)
        output = tmp_path / f"{name}.out.gguf"
        llama_quantize(source, output, type_name, imatrix=ones(shapes))
        reader = GGUFReader(output)
        found = plan(model, type=type_name, importance=shapes)
        assert [
            (item.tensor.name, item.format, item.type_id, item.nbytes) for item in found.items
        ] == [
            (tensor.name, tensor.tensor_type.name, int(tensor.tensor_type), int(tensor.n_bytes))
            for tensor in reader.tensors
        ]
        assert found.data_bytes == output.stat().st_size - reader.data_offset
        assert found.elements == sum(int(tensor.n_elements) for tensor in reader.tensors)
        assert found.bits_per_weight == pytest.approx(
            8 * sum(int(tensor.n_bytes) for tensor in reader.tensors) / found.elements
        )
        field = reader.get_field("general.file_type")
        assert field is not None
        assert field.contents() == found.file_type


def test_a_model_is_quantized_from_f32_rather_than_twice(tmp_path: Path) -> None:
    base = MODELS["llama-2"]()
    floats = {name: "F32" for name, shape in base.tensors.items() if len(shape) == 1}
    model = Shape("llama", base.keys, base.tensors, floats, "Q4_0")
    source = write_hollow(tmp_path / "in.gguf", model)
    with pytest.raises(RuntimeError):
        llama_quantize(source, tmp_path / "out.gguf", "Q4_K_M")
    with pytest.raises(PlanError, match=r"stored as Q4_0.*second time.*--allow-requantize"):
        plan(model, type="Q4_K_M")
    llama_quantize(source, tmp_path / "out.gguf", "Q4_K_M", allow_requantize=True)
    assert plan(model, type="Q4_K_M", allow_requantize=True).items[0].format == "Q6_K"


def test_eight_bits_are_taken_as_a_source_with_a_warning() -> None:
    base = MODELS["llama-2"]()
    floats = {name: "F32" for name, shape in base.tensors.items() if len(shape) == 1}
    found = plan(Shape("llama", base.keys, base.tensors, floats, "Q8_0"), type="Q4_K_M")
    assert [note.message for note in found.notes if "stored as Q8_0" in note.message]
    assert found.items[0].format == "Q6_K"


def test_a_tensor_that_has_its_type_already_is_copied() -> None:
    base = MODELS["llama-2"]()
    floats = {name: "F32" for name, shape in base.tensors.items() if len(shape) == 1}
    model = Shape("llama", base.keys, base.tensors, floats, "Q8_0")
    found = plan(model, type="Q8_0", importance=entries(model))
    assert {item.format for item in found.items} == {"Q8_0", "F32"}
    assert not any(item.importance for item in found.items)


def test_integers_are_no_weights() -> None:
    base = MODELS["llama-2"]()
    model = Shape("llama", base.keys, base.tensors, {"output.weight": "I64"})
    with pytest.raises(PlanError, match=r"output\.weight is stored as I64, which holds no weights"):
        plan(model, type="Q8_0")


def test_fp8_can_be_quantized() -> None:
    base = MODELS["llama-2"]()
    model = Shape("llama", base.keys, base.tensors, {}, "F8_E4M3")
    found = plan(model, type="Q4_0", from_gguf=False)
    assert {item.format for item in found.items} == {"Q4_0", "Q6_K", "F32"}


@pytest.mark.parametrize("stored", ["F8_E4M3", PackedType("GPTQ int4, groups of 128")])
def test_a_second_quantization_is_warned_of(stored: str) -> None:
    """Once, of the tensors that are rounded again; nothing else is asked of the user."""
    base = MODELS["llama-2"]()
    model = Shape("llama", base.keys, base.tensors, {"token_embd.weight": "BF16"}, stored)
    found = plan(model, type="Q4_0", from_gguf=False)
    rounded = sum(item.format != "F32" and item.tensor.dtype == stored for item in found.items)
    (note,) = [note for note in found.notes if note.level == "warning"]
    assert note.message.startswith(f"{rounded} tensors are stored as {stored} and are rounded a")
    for kind in ("F32", "F16", "BF16"):
        assert not plan(model, type=kind, from_gguf=False).notes


def test_importance_is_used_where_there_is_an_entry() -> None:
    model = MODELS["llama-2"]()
    shapes = entries(model, without="attn_k")
    found = plan(model, type="Q4_K_M", importance=shapes)
    used = {item.tensor.name for item in found.items if item.importance}
    assert used == {
        name for name, shape in model.tensors.items() if len(shape) > 1 and "attn_k" not in name
    }
    assert found.notes == (
        Note(
            "no importance for 2 of 16 tensors: blk.0.attn_k.weight, blk.1.attn_k.weight",
            level="warning",
        ),
    )


def test_a_missing_entry_for_the_embedding_is_no_warning() -> None:
    model = MODELS["llama-2"]()
    (note,) = plan(model, type="Q4_K_M", importance=entries(model)).notes
    assert note == Note("no importance for 1 of 16 tensors: token_embd.weight")


def test_plain_floats_use_no_importance() -> None:
    model = MODELS["llama-2"]()
    found = plan(model, type="BF16", importance=entries(model))
    assert not any(item.importance for item in found.items)
    assert not found.notes


def test_filters_change_what_is_used_and_how_the_mixture_decides() -> None:
    model = MODELS["llama-12"]()
    shapes = entries(model)
    found = plan(model, type="Q4_0", importance=shapes, include_weights=("attn_v",))
    assert {item.tensor.name for item in found.items if item.importance} == {
        f"blk.{block}.attn_v.weight" for block in range(12)
    }
    formats = {item.tensor.name: item.format for item in found.items}
    assert formats["blk.0.ffn_down.weight"] == "Q4_1"
    assert [note.level for note in found.notes] == ["info"], "only the embedding is missing"
    none = plan(model, type="Q4_0", importance=shapes, exclude_weights=("weight",))
    formats = {item.tensor.name: item.format for item in none.items}
    assert formats["blk.0.ffn_down.weight"] == "Q4_0", "as without an importance matrix"
    assert none.notes[-1].message == "the filters leave nothing of the importance matrix"


def test_an_entry_of_the_wrong_length_is_refused_as_llama_quantize_does(tmp_path: Path) -> None:
    model = MODELS["llama-2"]()
    source = write_hollow(tmp_path / "in.gguf", model)
    for name, fails in (("blk.1.ffn_down.weight", True), ("token_embd.weight", False)):
        shapes = entries(model) | {name: (1, 100)}
        if fails:
            with pytest.raises(RuntimeError):
                llama_quantize(source, tmp_path / "out", "Q4_0", imatrix=ones(shapes))
            with pytest.raises(PlanError, match=f"entry {name} does not fit.*512.*100"):
                plan(model, type="Q4_0", importance=shapes)
        else:
            llama_quantize(source, tmp_path / "out", "Q4_0", imatrix=ones(shapes))
            found = plan(model, type="Q4_0", importance=shapes)
            assert [note.message for note in found.notes] == [
                f"the importance matrix's entry for {name} has another length; not used"
            ]


def test_the_number_of_experts_is_checked() -> None:
    model = MODELS["mixtral-4"]()
    name = "blk.0.ffn_up_exps.weight"
    with pytest.raises(PlanError, match=f"{name}.*expected 4 matrices of 256.*found 8 matrices"):
        plan(model, type="Q4_K_M", importance=entries(model) | {name: (8, 256)})


def test_a_matrix_of_another_model() -> None:
    with pytest.raises(PlanError, match="for another model: no entry has the name"):
        plan(MODELS["llama-2"](), importance={"h.0.mlp.weight": (1, 256)})


def test_types_that_need_an_importance_matrix(tmp_path: Path) -> None:
    model = MODELS["llama-2"]()
    source = write_hollow(tmp_path / "in.gguf", model)
    with pytest.raises(RuntimeError):
        llama_quantize(source, tmp_path / "out", "Q2_K_S")
    with pytest.raises(
        PlanError, match=r"Q2_K_S makes blk.0.attn_k.weight Q2_K.*and none was given"
    ):
        plan(model, type="Q2_K_S")
    partial = entries(model, without="blk.1.ffn_up")
    with pytest.raises(RuntimeError):
        llama_quantize(source, tmp_path / "out", "Q2_K_S", imatrix=ones(partial))
    with pytest.raises(
        PlanError, match=r"blk.1.ffn_up.weight Q2_K.*the one given has no entry for it"
    ):
        plan(model, type="Q2_K_S", importance=partial)
    plan(model, type="Q2_K_S", importance=entries(model))


def test_rows_that_do_not_divide_are_warned_about_or_refused() -> None:
    model = MODELS["llama-narrow"]()
    found = plan(model, type="Q4_K_M")
    assert {note.level for note in found.notes} == {"warning"}
    assert any(
        note.message.startswith("Q5_0 instead of Q4_K, whose blocks do not divide the rows: "
                                "token_embd.weight, blk.0.attn_k.weight, ")
        for note in found.notes
    )  # fmt: skip
    with pytest.raises(PlanError, match=r"token_embd.weight cannot be Q4_K: its rows of 320"):
        plan(model, type="Q4_K_M", on_fallback="error")
    plan(model, type="Q8_0", on_fallback="error")


def test_a_type_for_the_head_that_does_not_fit_falls_back_too() -> None:
    model = MODELS["llama-narrow"]()
    found = plan(model, type="Q8_0", output_tensor_type="Q4_K", token_embedding_type="Q6_K")
    formats = {item.tensor.name: item.format for item in found.items}
    assert (formats["output.weight"], formats["token_embd.weight"]) == ("Q5_0", "Q8_0")
    assert len(found.notes) == 2


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"tensor_types": ("attn_w=Q8_0",)},
         "tensor type 'attn_w=Q8_0' has no effect: it is found in no tensor's name "
         "(did you mean attn_"),
        ({"tensor_types": (r"blk\.2\.attn_v=Q8_0",)}, "it is found in no tensor's name"),
        ({"tensor_types": ("norm=Q8_0",)}, "is never quantized or decided by an earlier option"),
        ({"tensor_types": ("attn=Q8_0", "attn_v=Q6_K")}, "decided by an earlier option"),
        ({"tensor_types": ("token_embd=Q8_0",), "token_embedding_type": "Q6_K"},
         "token_embd.weight is never quantized or decided by an earlier option"),
        ({"tensor_types": ("attn=Q8_0",), "type": "BF16"}, "BF16 files hold nothing but floats"),
    ],
)  # fmt: skip
def test_options_without_effect_are_warned_about(recipe: dict[str, object], message: str) -> None:
    (note,) = plan(MODELS["llama-2"](), **recipe).notes
    assert message in note.message
    assert note.level == "warning"


def test_leaving_a_head_that_is_tied() -> None:
    (note,) = plan(MODELS["llama-12-tied"](), leave_output_tensor=True).notes
    assert note.message == "leave_output_tensor has no effect: the model has no output.weight"


def test_a_converted_checkpoint() -> None:
    base = MODELS["mixtral-4"]()
    model = Shape("llama", base.keys, base.tensors, {}, "BF16")
    found = plan(model, type="Q8_0", from_gguf=False, leave_output_tensor=True)
    formats = {item.tensor.name: item.format for item in found.items}
    assert formats["output.weight"] == "BF16"
    assert formats["blk.0.ffn_gate_inp.weight"] == "F32"
    assert formats["blk.0.attn_norm.weight"] == "F32"
    reasons = {item.tensor.name: item.reason for item in found.items}
    assert reasons["output.weight"] == "left as it is: BF16"
    assert reasons["blk.0.ffn_gate_inp.weight"] == "kept in full precision: F32"


def test_nothing_is_read(tmp_path: Path) -> None:
    """Output tensors without pieces have no weights that could be read."""
    model = MODELS["llama-2"]()
    bare = [OutputTensor(name, shape, "F32") for name, shape in model.tensors.items()]
    assert make_plan(bare, model.metadata(), Recipe()).elements == plan(model).elements


def test_filters_need_an_importance_matrix() -> None:
    with pytest.raises(UsageError, match="need an importance matrix"):
        plan(MODELS["llama-2"](), include_weights=("attn",))
    with pytest.raises(UsageError, match="cannot be used together"):
        plan(MODELS["llama-2"](), include_weights=("a",), exclude_weights=("b",))


def test_the_models_alignment_counts() -> None:
    model = MODELS["llama-2"]()
    metadata = model.metadata() | {"general.alignment": MetaValue("u32", 4096)}
    found = make_plan(model.output_tensors(), metadata, Recipe())
    assert found.data_bytes == sum(-(-item.nbytes // 4096) * 4096 for item in found.items)


@pytest.mark.parametrize("type_name", [each.name for each in file_types()])
def test_nbytes_are_rows_of_whole_blocks(type_name: str) -> None:
    model = MODELS["llama-narrow"]()
    base = get_format(find_file_type(type_name).base)
    if base.fallback is None and base.block > 32:
        with pytest.raises(PlanError, match="no format to fall back to"):
            plan(model, type=type_name)
        return
    for item in plan(model, type=type_name, importance=entries(model, without="-")).items:
        block_format = get_format(item.format)
        assert item.nbytes * block_format.block == item.tensor.elements * block_format.nbytes


@pytest.mark.parametrize(
    ("kind", "base", "instead"),
    [
        ("IQ1_S", "IQ1_S", "Q2_K"), ("IQ2_XXS", "IQ2_XXS", "Q2_K"), ("Q2_K_S", "Q2_K", "Q3_K"),
        ("IQ3_XXS", "IQ3_XXS", "IQ3_S"), ("Q4_K_M", "Q4_K", "Q4_K"),
    ],
)  # fmt: skip
def test_multi_token_prediction_takes_a_type_that_needs_no_importance(
    kind: str, base: str, instead: str
) -> None:
    """No collector sees its inputs: llama.cpp refuses such a file."""
    model = delta_net("qwen35", 9, mtp=1)
    seen = {
        tensor.name: (1, tensor.columns)
        for tensor in model.output_tensors()
        if len(tensor.shape) == 2 and not tensor.name.startswith("blk.8.")
    }
    made = make_plan(model.output_tensors(), model.metadata(), Recipe(type=kind), importance=seen)
    types = {item.tensor.name: item.format for item in made.items}
    assert types["blk.0.ssm_out.weight"] == types["blk.7.ffn_gate.weight"] == base
    assert types["blk.8.nextn.eh_proj.weight"] == types["blk.8.ffn_gate.weight"] == instead
    assert types["blk.8.nextn.enorm.weight"] == "F32"
    said = [note for note in made.notes if "matrices of multi-token prediction" in note.message]
    assert len(said) == 1
    assert said[0].message.startswith("no importance for the 8 matrices")
    assert not any("no importance for 8 of" in note.message for note in made.notes)
    reasons = {item.tensor.name: item.reason for item in made.items}
    assert ("multi-token" in reasons["blk.8.ffn_gate.weight"]) == (base != instead)


def test_a_layer_without_importance_is_refused_beside_multi_token_prediction() -> None:
    model = delta_net("qwen35", 9, mtp=1)
    seen = {name: (1, shape[1]) for name, shape in model.tensors.items() if len(shape) == 2}
    del seen["blk.7.attn_q.weight"]
    with pytest.raises(PlanError, match=r"makes blk\.7\.attn_q\.weight IQ2_XXS, which needs"):
        make_plan(model.output_tensors(), model.metadata(), Recipe(type="IQ2_XXS"), importance=seen)
