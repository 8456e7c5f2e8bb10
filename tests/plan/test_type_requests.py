"""Types and order of whole models against the real llama.cpp, decided by its own dry run."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
from support.llama_plan import Shape, dry_run, write_hollow
from support.llama_quantize import FILE_TYPES
from support.model_shapes import MODELS

from quantcli.errors import PlanError
from quantcli.formats import get_format
from quantcli.plan.filetypes import find_file_type
from quantcli.plan.model_hparams import read_traits
from quantcli.plan.names import may_be_quantized
from quantcli.plan.patterns import parse_tensor_type
from quantcli.plan.type_requests import TypeRequest, decide
from quantcli.types import MetaValue

Hollow = Callable[[str], tuple[Shape, Path]]
NOT_SELECTABLE = {"NVFP4", "GUESSED"}
TYPES = sorted(set(FILE_TYPES) - NOT_SELECTABLE)
BLOCKS_OF_256 = ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]
SMALL_BLOCKS = ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]

DEEP = {"llama-80-gqa", "qwen2-80"}
NAMES = [
    pytest.param(name, marks=pytest.mark.slow if depth >= 60 and name not in DEEP else ())
    for name, depth in ((name, MODELS[name]().keys["block_count"]) for name in MODELS)
]

pytestmark = pytest.mark.usefixtures("every_format")


def ours(model: Shape, type_name: str, *, importance: bool = False, **request: object) -> object:
    try:
        decisions = decide(
            model.output_tensors(),
            read_traits(model.metadata()),
            TypeRequest(find_file_type(type_name), **request),
            has_importance=importance,
            from_gguf=True,
        )
    except PlanError as error:
        return str(error)
    return [(name, decision.format) for name, decision in decisions.items()]


def theirs(path: Path, type_name: str, *, importance: bool = False, **options: object) -> object:
    try:
        return dry_run(path, type_name, imatrix={"x": 1} if importance else None, **options)
    except RuntimeError as error:
        return str(error)


def same(mine: object, real: object) -> bool:
    """Equal plans, or a refusal on both sides."""
    return mine == real if isinstance(real, list) else isinstance(mine, str)


def difference(mine: object, real: object) -> object:
    if isinstance(mine, list) and isinstance(real, list):
        return [pair for pair in zip(mine, real, strict=False) if pair[0] != pair[1]][:5]
    return mine, real


@pytest.mark.parametrize("importance", [False, True], ids=["", "imatrix"])
@pytest.mark.parametrize("name", NAMES)
def test_every_file_type_gives_every_tensor_llama_cpps_type_in_its_order(
    hollow: Hollow, name: str, importance: bool
) -> None:
    model, path = hollow(name)
    wrong = {}
    for type_name in TYPES:
        mine = ours(model, type_name, importance=importance)
        real = theirs(path, type_name, importance=importance)
        if not same(mine, real):
            wrong[type_name] = difference(mine, real)
    assert not wrong


def test_the_models_reach_both_plans_and_refusals(hollow: Hollow) -> None:
    assert isinstance(theirs(hollow("llama-12")[1], "Q4_K_M"), list)
    assert isinstance(theirs(hollow("llama-odd")[1], "Q1_0"), str)


@pytest.mark.parametrize("name", NAMES)
def test_options_act_as_in_llama_cpp(hollow: Hollow, name: str) -> None:
    model, path = hollow(name)
    width = model.tensors["token_embd.weight"][-1]
    explicit = [
        each for each in SMALL_BLOCKS + BLOCKS_OF_256 if get_format(each).fits(width)
    ]  # a type that does not fit makes llama.cpp abort
    patterns = [
        "attn_v=Q8_0", r"blk\.1\.=Q4_0", "ffn_(gate|up)=Q3_K", "ffn_down=Q2_K", "OUTPUT=Q5_1",
        r"blk\.(0|1|2|5)\.ffn_down=Q6_K", r"^blk\.[0-9]+[02468]\.attn_v=Q5_K", "embd=F16",
        r"[[:digit:]]\.attn_k=BF16", "output.weight=Q4_K", "norm=Q8_0", "attn_qkv=Q6_K",
    ]  # fmt: skip
    dice = random.Random(name)
    for _ in range(12):
        type_name = dice.choice(TYPES)
        chosen = dice.sample(patterns, dice.choice([0, 0, 1, 2, 3]))
        output = dice.choice([None, None, *explicit])
        embedding = dice.choice([None, None, *explicit])
        pure, leave = dice.random() < 0.2, dice.random() < 0.2
        importance = dice.random() < 0.3
        mine = ours(
            model, type_name, importance=importance, pure=pure, leave_output=leave,
            output_type=output, embedding_type=embedding,
            tensor_types=tuple(map(parse_tensor_type, chosen)),
        )  # fmt: skip
        real = theirs(
            path, type_name, importance=importance, pure=pure, leave_output_tensor=leave,
            output_tensor_type=output, token_embedding_type=embedding,
            tensor_types=[tuple(entry.rsplit("=", 1)) for entry in chosen],
        )  # fmt: skip
        options = (type_name, chosen, output, embedding, pure, leave, importance)
        assert same(mine, real), (options, difference(mine, real))


def test_types_for_the_per_layer_embedding_of_gemma_3n(tmp_path: Path, hollow: Hollow) -> None:
    base, _ = hollow("llama-4-gqa")
    extra = {
        "per_layer_token_embd.weight": (320, 512),
        "per_layer_model_proj.weight": (512, 256),
        "blk.0.altup_correct_coef.weight": (4, 4),
        "blk.0.laurel_l.weight": (256, 256),
    }
    for tied in (False, True):
        tensors = {**base.tensors, **extra}
        if tied:
            del tensors["output.weight"]
        model = Shape("llama", base.keys, tensors)
        path = write_hollow(tmp_path / f"{tied}.gguf", model)
        for tensor_types in ((), ("per_layer_token=Q8_0",), ("token_embd=Q5_0",)):
            for embedding in (None, "Q3_K"):
                mine = ours(
                    model, "Q4_K_M", embedding_type=embedding,
                    tensor_types=tuple(map(parse_tensor_type, tensor_types)),
                )  # fmt: skip
                real = theirs(
                    path, "Q4_K_M", token_embedding_type=embedding,
                    tensor_types=[tuple(entry.split("=")) for entry in tensor_types],
                )  # fmt: skip
                assert mine == real


@pytest.mark.parametrize("dtype", ["F16", "BF16", "Q8_0"])
def test_a_gguf_source_of_another_dtype_keeps_what_is_never_quantized(
    tmp_path: Path, hollow: Hollow, dtype: str
) -> None:
    base, _ = hollow("mixtral-4")
    dtypes = {name: "F32" for name, shape in base.tensors.items() if len(shape) == 1}
    dtypes["blk.3.ffn_gate_inp.weight"] = "F16"
    model = Shape("llama", base.keys, base.tensors, dtypes, dtype)
    path = write_hollow(tmp_path / "model.gguf", model)
    for type_name in ("Q4_K_M", "Q8_0", "F16", "BF16", "F32"):
        assert ours(model, type_name) == theirs(path, type_name)
        mine = ours(model, type_name, leave_output=True)
        assert mine == theirs(path, type_name, leave_output_tensor=True)


def test_the_order_of_the_checkpoint_has_no_influence(hollow: Hollow) -> None:
    model, _ = hollow("llama-32-gqa")
    names = list(model.tensors)
    random.Random(0).shuffle(names)
    shuffled = Shape(model.arch, model.keys, {name: model.tensors[name] for name in names})
    assert ours(shuffled, "Q4_K_M") == ours(model, "Q4_K_M")


def test_block_10_comes_after_block_2(hollow: Hollow) -> None:
    model, _ = hollow("llama-12")
    plan = ours(model, "Q4_K_M")
    assert isinstance(plan, list)
    blocks = [int(name.split(".")[1]) for name, _ in plan if name.startswith("blk.")]
    assert blocks == sorted(blocks)
    assert max(blocks) == 11


def test_reasons_say_why() -> None:
    model = MODELS["llama-32-gqa"]()
    request = TypeRequest(
        find_file_type("Q4_K_S"),
        tensor_types=(parse_tensor_type("attn_q=Q8_0"),),
        embedding_type="Q6_K",
    )
    found = decide(model.output_tensors(), read_traits(model.metadata()), request, from_gguf=True)
    reasons = {name: decision.reason for name, decision in found.items()}
    assert reasons["blk.0.ffn_down.weight"] == "ffn_down in the first eighth of the layers: Q5_K"
    assert reasons["blk.3.attn_v.weight"] == "attn_v in the first four layers: Q5_K"
    assert reasons["blk.4.attn_v.weight"] == "base of Q4_K_S: Q4_K"
    assert reasons["blk.4.attn_q.weight"] == "tensor type attn_q=Q8_0"
    assert reasons["token_embd.weight"] == "token embedding type: Q6_K"
    assert reasons["output.weight"] == "the output head: Q6_K"
    assert reasons["blk.4.attn_norm.weight"] == "never quantized: F32"


def test_a_row_that_does_not_divide_says_what_was_meant() -> None:
    model = MODELS["llama-narrow"]()
    found = decide(
        model.output_tensors(), read_traits(model.metadata()), TypeRequest(find_file_type("Q6_K"))
    )
    decision = found["blk.0.attn_q.weight"]
    assert (decision.format, decision.instead_of) == ("Q8_0", "Q6_K")
    assert decision.reason == "rows of 320 do not divide into blocks of 256: Q8_0"


def test_a_layer_that_cannot_be_told_is_refused_where_the_mixture_needs_it() -> None:
    model = MODELS["mixtral-4"]()
    tensors = {**model.tensors, "mtp.ffn_down_exps.weight": (4, 256, 512)}
    odd = Shape("llama", model.keys, tensors)
    with pytest.raises(PlanError, match=r"mtp\.ffn_down_exps\.weight.*blk\.11"):
        decide(
            odd.output_tensors(), read_traits(odd.metadata()), TypeRequest(find_file_type("Q4_K_M"))
        )


@pytest.mark.parametrize(
    ("name", "shape", "dtype", "expected"),
    [
        ("blk.0.attn_norm.weight", (256,), "BF16", "F32"),
        ("output_norm.weight", (256,), "F64", "F32"),
        ("blk.0.attn_q.bias", (256,), "F16", "F32"),
        ("blk.0.ffn_up_exps.bias", (4, 256), "BF16", "F32"),
        ("blk.0.ffn_gate_inp.weight", (4, 256), "BF16", "F32"),
        ("position_embd.weight", (128, 256), "BF16", "F32"),
        ("token_types.weight", (2, 256), "F16", "F32"),
        ("blk.0.laurel_l.weight", (64, 256), "BF16", "BF16"),
        ("blk.0.laurel_l.weight", (64, 256), "F64", "F32"),
        ("output.weight", (320, 256), "BF16", "BF16"),
        ("output.weight", (320, 256), "F64", "F32"),
        ("output.weight", (320, 256), "F8_E4M3", "F32"),
    ],
)
def test_what_stays_float_in_a_checkpoint(
    name: str, shape: tuple[int, ...], dtype: str, expected: str
) -> None:
    model = Shape("llama", MODELS["llama-2"]().keys, {name: shape}, {name: dtype})
    request = TypeRequest(find_file_type("Q4_K_M"), leave_output=True)
    found = decide(model.output_tensors(), read_traits(model.metadata()), request)
    assert found[name].format == expected


def test_an_integer_tensor_is_refused() -> None:
    name = "blk.0.ffn_gate_tid2eid.weight"
    model = Shape("llama", MODELS["llama-2"]().keys, {name: (4, 4)}, {name: "I32"})
    with pytest.raises(PlanError, match=f"{name} is stored as I32"):
        decide(
            model.output_tensors(),
            read_traits(model.metadata()),
            TypeRequest(find_file_type("F16")),
        )


def test_key_values_that_are_missing_are_named() -> None:
    with pytest.raises(PlanError, match=r"general\.architecture"):
        read_traits({})
    with pytest.raises(PlanError, match=r"llama\.block_count"):
        read_traits({"general.architecture": MetaValue("str", "llama")})


def test_dimensions_are_counted_as_ggml_does() -> None:
    assert not may_be_quantized("blk.0.ffn_up.weight", (1, 256), "llama")
    assert may_be_quantized("blk.0.ffn_up.weight", (1, 2, 256), "llama")
    assert may_be_quantized("blk.0.ffn_up.weight", (2, 1), "llama")
    assert not may_be_quantized("blk.0.ffn_up.weight", (0,), "llama")
