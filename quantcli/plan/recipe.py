"""A recipe: everything that decides a quantized file besides the model, as data.

Each field is declared once, with its default, its check, its help and who takes it; the options
of ``quantcli quantize``, the refusals and the reference page come from here. Paths are relative to
the current folder, as on the command line, so a recipe means the same wherever it is saved.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_type_hints

from quantcli.errors import UsageError
from quantcli.layouts import code_layouts
from quantcli.plan.recipe_field import (
    ACTIVATIONS,
    ALLOCATION,
    BITS,
    GGUF,
    GRID,
    IMPORTANCE,
    METHOD,
    OUTPUT,
    TRAINING,
    TYPES,
    Field,
    declare,
    read_fields,
)

_FORMAT = "quantcli.plan.patterns:parse_format"
_SIZE = "quantcli.plan.size_text:parse_size"


def _type_name(text: str) -> str:
    """The type's own spelling, such as Q4_K_M for q4_k; what is none is left for the check."""
    from quantcli.plan.filetypes import find_file_type

    try:
        return find_file_type(text).name
    except UsageError:
        return text


def _group_size(text: Any) -> Any:
    return int(text) if isinstance(text, str) and text.isdigit() else text


@dataclass(frozen=True)
class Recipe:
    """What to make; all but the type default to what llama-quantize does.

    The order of the fields is the order in which a written recipe, and so every output file, has
    them: new ones go to the end.
    """

    type: str = declare(
        TYPES,
        "The exact type, such as Q4_K_S or Q5_K_M; of several (Q4_K_M,Q8_0) each makes a file. "
        "Default: Q4_K_M.",
        "NAME[,NAME]",
        default="Q4_K_M",
        check="quantcli.plan.filetypes:find_file_type",
        normalize=_type_name,
        several=True,
    )
    tensor_types: tuple[str, ...] = declare(
        TYPES,
        "The type of tensors whose name matches; the first match wins. Repeatable.",
        "REGEX=TYPE",
        default=(),
        flags=("--tensor-type",),
        check="quantcli.plan.patterns:parse_tensor_type",
    )
    output_tensor_type: str | None = declare(
        TYPES, "Type of output.weight, the output head.", "TYPE", check=_FORMAT
    )
    token_embedding_type: str | None = declare(
        TYPES, "Type of the token embeddings.", "TYPE", check=_FORMAT
    )
    leave_output_tensor: bool = declare(TYPES, "Do not quantize output.weight.", default=False)
    pure: bool = declare(TYPES, "The same type for every tensor, no mixture.", default=False)
    imatrix: str | None = declare(
        IMPORTANCE, "Importance matrix (GGUF or .dat): how much each input column matters.", "FILE"
    )
    include_weights: tuple[str, ...] = declare(
        IMPORTANCE,
        "Use the importance matrix only for tensors whose name contains TEXT. Repeatable.",
        "TEXT",
        default=(),
    )
    exclude_weights: tuple[str, ...] = declare(
        IMPORTANCE,
        "Do not use the importance matrix for tensors whose name contains TEXT. Repeatable.",
        "TEXT",
        default=(),
    )
    allow_requantize: bool = declare(
        OUTPUT, "Accept a source that is already quantized; this costs quality.", default=False
    )
    override_kv: tuple[str, ...] = declare(
        GGUF,
        "Set a key-value of the file; TYPE is int, float, bool or str, and str:@FILE takes a "
        "file's text. Repeatable.",
        "KEY=TYPE:VALUE",
        default=(),
        check="quantcli.plan.override:split_override",
    )
    on_fallback: Literal["warn", "nearest", "error"] = declare(
        TYPES,
        "When a type's blocks or a folder's groups do not divide a row: warn and use the next "
        "larger type, in a folder keep the matrix as it is; take the nearest smaller group "
        "(folders); or stop with an error. Default: warn.",
        "warn|nearest|error",
        default="warn",
    )
    split_max_size: str | None = declare(
        OUTPUT,
        "Split into files of at most SIZE, such as 4G or 500M. Model folders: 5G.",
        "SIZE",
        flags=("--split-max-size", "--max-shard-size"),
        check=_SIZE,
    )
    pre: str | None = declare(GGUF, "Name the pre-tokenizer, where it is not recognised.", "NAME")
    to: str = declare(
        OUTPUT,
        f"gguf (the default), or a model folder: {', '.join(code_layouts())}, or "
        "hf (any --type, dequantized again, to try a type in any runtime). Several make one each.",
        "FORMAT[,FORMAT]",
        default="gguf",
        normalize=str.lower,
        several=True,
    )
    bits: int | None = declare(
        BITS,
        "2, 3, 4, 5, 6, 8 or 16: short for the types Q2_K, Q3_K_M, Q4_K_M, Q5_K_M, Q6_K, Q8_0 and "
        "BF16; in a model folder the bits of an integer weight. Several (2,4,8) make one each. "
        "Default: 4, with int8 activations 8.",
        "N[,N]",
        flags=("--bits", "-b"),
        several=True,
    )
    group_size: int | str | None = declare(
        GRID,
        "How many weights of a row share a scale, 'channel' for the whole row, or 'tensor'. "
        "Default: 128, 64 for mlx, channel with int8 activations.",
        "N",
        normalize=_group_size,
    )
    symmetric: bool | None = declare(
        GRID,
        "Weights without zero points, or with one per group. Default: symmetric where the format "
        "can be.",
        flags=("--symmetric/--asymmetric",),
    )
    activations: str | None = declare(
        ACTIVATIONS,
        "Let the runtime quantize activations too, with a dynamic scale per token: int8 with 8 or "
        "4 bits of weights (W8A8, W4A8), fp8 likewise (FP8_DYNAMIC, W4AFP8). With :static one "
        "scale for all of them, found on the text of --calibrate (8 bits); int8 with :asymmetric "
        "has zero points.",
        "int8|fp8[:static][:asymmetric]",
    )
    range: str | None = declare(
        GRID,
        "How each group's range is chosen: its extremes, the least squared error, or the least "
        "error weighted by --imatrix; in a GGUF of NVFP4 alone, where minmax is llama.cpp's rule. "
        "Default: imatrix if one is given, else mse.",
        "minmax|mse|imatrix",
    )
    keep: tuple[str, ...] = declare(
        GRID,
        "In a GGUF: another type for some of first, last (block), head, embeddings, such as "
        "first,last=Q8_0. In a model folder: linear modules whose name matches are not quantized. "
        "Repeatable.",
        "PLACES=TYPE|REGEX",
        default=(),
    )
    dtype: str | None = declare(
        GRID,
        "Float type of the tensors that are not quantized. Default: as stored.",
        "BF16|F16|F32",
        normalize=str.upper,
    )
    method: str | None = declare(
        METHOD,
        "Calibrated methods, applied in order, with commas between them: awq, smoothquant and "
        "rotate transform the weights, gptq rounds with error feedback, tune then trains each "
        "layer's codes and scales. 'best' is what --quality high uses.",
        "NAME",
    )
    damping: float | None = declare(
        METHOD,
        "Dampening of the Hessian, as a fraction of its mean diagonal (percdamp, dampening_frac).",
        "FRACTION",
        usual=0.05,
        within="(0, 1]",
    )
    column_order: Literal["natural", "activation"] | None = declare(
        METHOD,
        "Order in which error feedback rounds columns: natural is left to right, activation the "
        "largest Hessian diagonal first (act-order, desc_act).",
        "natural|activation",
        usual="natural",
    )
    sweeps: int | None = declare(
        METHOD,
        "Sweeps of coordinate descent over codes and scales after error feedback.",
        "N",
        usual=1,
        within="[0, 1000]",
    )
    fisher_windows: int | None = declare(
        METHOD,
        "Windows of the text that are also run backward, to weight each output by its Fisher "
        "information, four times as many of a mixture of experts; 0 weights all outputs alike.",
        "N",
        usual=40,
        within="[0, 100000]",
    )
    random_share: float | None = declare(
        METHOD,
        "Fraction of the calibration windows that are random tokens, so that the result also "
        "holds on other kinds of text.",
        "FRACTION",
        usual=0.3,
        within="[0, 1)",
    )
    propagate: bool = declare(
        METHOD,
        "Calibrate each layer on the outputs of the quantized layers before it, not of the "
        "original ones.",
        default=False,
    )
    tune_steps: int | None = declare(
        METHOD,
        "Training steps per layer, with --method tune.",
        "N",
        usual=150,
        within="[1, 100000]",
    )
    allocate: bool = declare(
        ALLOCATION,
        "Mixed precision: choose each tensor's type, in a model folder each module's scheme, by "
        "its cost, within the size that the output has without. Costs are measured by a method's "
        "calibration, or taken from --imatrix.",
        default=False,
    )
    target_size: str | None = declare(
        ALLOCATION,
        "Like --allocate, for an output of at most SIZE, such as 4G or 500M.",
        "SIZE",
        check=_SIZE,
    )
    tune: Literal["e2e", "e2e-scales"] | None = declare(
        TRAINING,
        "After the method, train the whole model to minimise the KL divergence from the original: "
        "codes, block scales, norms and biases, or with e2e-scales all but the codes. The file "
        "keeps its size.",
        "e2e|e2e-scales",
    )
    e2e_steps: int | None = declare(
        TRAINING,
        "Steps of that end-to-end training.",
        "N",
        usual=120,
        within="[1, 100000]",
        of_field="tune",
    )
    mmproj_only: bool = declare(
        GGUF,
        "Make the vision or audio tower alone, a file for llama.cpp's --mmproj, and not the text "
        "model. Its type is F16 unless --type or --bits names one.",
        default=False,
    )
    no_mtp: bool = declare(
        OUTPUT,
        "Leave out the blocks behind the last layer that predict further tokens (multi-token "
        "prediction, NextN). Without it a GGUF has them quantized, a model folder as they are.",
        default=False,
    )
    ignore_tensors: tuple[str, ...] = declare(
        OUTPUT,
        "Leave out stored tensors whose name matches, such as those that a family does not know. "
        "Repeatable.",
        "REGEX",
        default=(),
        flags=("--ignore-tensor",),
        check="quantcli.plan.patterns:check_pattern",
    )
    chat_template: str | None = declare(
        OUTPUT,
        "Put this chat template (Jinja) in place of the model's own.",
        "FILE",
        check="quantcli.plan.text_file:read_template",
    )
    scheme: tuple[str, ...] = declare(
        ACTIVATIONS,
        "A scheme by its name, such as FP8_DYNAMIC or NVFP4A16, for all linear modules or for "
        "those whose name matches; the first match wins, and modules without one, or with "
        "UNQUANTIZED, stay as they are. Static ones (FP8, NVFP4) need --calibrate or "
        "--statistics. Repeatable.",
        "NAME|REGEX=NAME",
        default=(),
        flags=("--scheme", "--mode"),
        check="quantcli.plan.schemes:split_scheme",
    )
    strict: bool = declare(
        GRID,
        "Stop where a remark would say that a known reader (vLLM, SGLang, transformers, "
        "GPTQModel) refuses or misreads the folder, or that --keep or --scheme was widened to "
        "what servers run as one matrix.",
        default=False,
    )
    kv_cache: Literal["fp8"] | None = declare(
        ACTIVATIONS,
        "Write scales for a key-value cache of FP8, from the largest key and value of each layer "
        "on the text of --calibrate. Goes with any scheme, and with --scheme UNQUANTIZED.",
        "fp8",
    )
    statistics: str | None = declare(
        ACTIVATIONS,
        "Take static scales from this file of 'quantcli calibrate --collect min_max,kv_max' "
        "(NAME.stats.safetensors) instead of a run on --calibrate, or with --correct-bias the "
        "inputs' means from one of --collect mean.",
        "FILE",
    )
    target_bpw: float | None = declare(
        ALLOCATION,
        "Like --allocate, for at most X bits for each weight: the bits of all tensors, scales, "
        "zero points and what stays unquantized included, over the number of weights.",
        "X",
        within="(0, 32]",
    )
    allocate_from: str | None = declare(
        ALLOCATION,
        "The types, or schemes, to choose from; 'keep' leaves modules of a folder as they are. "
        "Default: IQ2_XXS to Q8_0 (with --type IQ1_S or IQ1_M, these two as well), or the family "
        "of --scheme or --bits, and keep.",
        "NAME,NAME",
    )
    sample_share: float | None = declare(
        METHOD,
        "Fraction of the calibration windows that the unquantized model writes itself, all its "
        "weights in memory.",
        "FRACTION",
        usual=0.0,
        within="[0, 1)",
    )
    correct_bias: bool = declare(
        GGUF,
        "Add biases that give back what rounding takes from the mean of each output on the text "
        "of --calibrate, or in --statistics ('quantcli calibrate --collect mean'). For llama, "
        "mistral3, granite, qwen2 and qwen3, whose graphs in llama.cpp take them, and for rounding "
        "to nearest: a method minimizes the error on the inputs as they are, mean included.",
        default=False,
    )


FIELDS: Mapping[str, Field] = read_fields(Recipe, get_type_hints(Recipe))
"""What each field declares, in the recipe's order."""


def given_fields(recipe: Recipe) -> Iterator[tuple[Field, Any]]:
    """The fields that were given, with their values, in order.

    Of a text this is so even if it equals the default, as long as it is another object: what was
    spelled out stays spelled out in the recipe that an output file records.
    """
    for name, field in FIELDS.items():
        value = getattr(recipe, name)
        if value is not field.default:
            yield field, value


KEPT = "keep"
"""The scheme, of those to choose from, of modules that are not quantized."""


def is_allocated(recipe: Recipe) -> bool:
    """Whether types or schemes are to be chosen by their costs."""
    return recipe.allocate or recipe.target_size is not None or recipe.target_bpw is not None


def list_wanted(recipe: Recipe) -> tuple[str, ...]:
    """The types or schemes to choose from, where the recipe names some."""
    parts = (part.strip() for part in (recipe.allocate_from or "").split(","))
    return tuple(KEPT if part.lower() == KEPT else part for part in parts if part)


def usual(name: str) -> Any:
    """What a field stands for when a recipe leaves it out."""
    field = FIELDS[name]
    return field.default if field.usual is None else field.usual


def value_of(recipe: Recipe, name: str) -> Any:
    """The field's value, or what it stands for when it is left out."""
    value = getattr(recipe, name)
    return usual(name) if value is None else value


def merge_recipe(base: Recipe, **fields: Any) -> Recipe:
    """``base`` with the given fields replaced; None or an empty list means: not given.

    Of the lists, tensor_types are put before the recipe's, so that they win; an override_kv
    replaces the recipe's for the same key; include_weights or exclude_weights replace both lists of
    the recipe. Raises UsageError for a name that is no field.
    """
    from quantcli.plan.override import split_override

    refuse_unknown(fields)
    given = {
        name: convert(value) if (convert := FIELDS[name].normalize) else value
        for name, value in fields.items()
        if value not in (None, (), [])
    }
    if "tensor_types" in given:
        given["tensor_types"] = (*given["tensor_types"], *base.tensor_types)
    if "override_kv" in given:
        keys = {split_override(entry)[0] for entry in given["override_kv"]}
        kept = (entry for entry in base.override_kv if split_override(entry)[0] not in keys)
        given["override_kv"] = (*kept, *given["override_kv"])
    if "include_weights" in given or "exclude_weights" in given:
        given = {"include_weights": (), "exclude_weights": ()} | given
    return make_recipe(vars(base) | given)


def refuse_unknown(names: Iterable[Any]) -> None:
    """UsageError, with the nearest field, for the first name that is no field of a recipe."""
    from quantcli.registry import near

    for name in names:
        if name not in FIELDS:
            guess = near(str(name).replace("-", "_"), FIELDS, most=1)
            hint = f"did you mean {guess[0]}?" if guess else "known: " + ", ".join(FIELDS)
            raise UsageError(f"a recipe has no field {name}", hint=hint)


def make_recipe(fields: Mapping[str, Any]) -> Recipe:
    """A recipe of plain data; UsageError that names the field when a type does not fit."""
    import msgspec

    try:
        return msgspec.convert(fields, Recipe)
    except msgspec.ValidationError as error:
        what, _, where = str(error).partition(" - at `$")
        field = where.strip("`.") or "recipe"
        raise UsageError(f"{field}: {what[:1].lower()}{what[1:]}") from None
    except UnicodeEncodeError:
        raise UsageError("a value has half of a surrogate pair, which is no text") from None
