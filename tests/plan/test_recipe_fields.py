"""What every field of a recipe declares, and what follows from it."""

from __future__ import annotations

from typing import Any

import pytest
from typer.main import get_command

from quantcli.cli.app import app
from quantcli.errors import UsageError
from quantcli.plan.recipe import FIELDS, Recipe, make_recipe
from quantcli.plan.recipe_check import check_recipe
from quantcli.plan.recipe_field import SECTIONS, Field
from quantcli.plan.schemes import find_output_layout, is_taken, output_formats, targets_of
from quantcli.run.request import Request, Wanted, check_request

TEMPLATE = __file__
"""Any text will do."""

VALUES: dict[str, Any] = {
    "type": "Q8_0", "tensor_types": ("a=Q8_0",), "output_tensor_type": "Q8_0",
    "token_embedding_type": "Q8_0", "leave_output_tensor": True, "pure": True,
    "imatrix": "m.gguf", "include_weights": ("a",), "exclude_weights": ("a",),
    "allow_requantize": True, "override_kv": ("a=int:1",), "on_fallback": "error",
    "split_max_size": "2G", "pre": "llama-bpe", "to": "mlx", "bits": 4, "group_size": 64,
    "symmetric": False, "activations": "int8", "range": "mse", "keep": ("head=Q8_0",),
    "dtype": "F16", "method": "gptq", "damping": 0.1, "column_order": "activation", "sweeps": 2,
    "fisher_windows": 8, "random_share": 0.1, "propagate": True, "tune_steps": 5,
    "allocate": True, "target_size": "2G", "tune": "e2e", "e2e_steps": 5,
    "mmproj_only": True, "no_mtp": True, "ignore_tensors": ("a",), "chat_template": TEMPLATE,
    "scheme": ["W4A16"], "strict": True, "kv_cache": "fp8", "statistics": "m.stats.safetensors",
    "target_bpw": 4.5, "allocate_from": "Q4_K,Q6_K", "sample_share": 0.2,
    "correct_bias": True,
}  # fmt: skip
"""A value of every field that is not its default."""

each_field = pytest.mark.parametrize("field", [pytest.param(f, id=n) for n, f in FIELDS.items()])


@each_field
def test_a_field_is_an_option_and_belongs_somewhere(field: Field) -> None:
    options = {param.name: param for param in get_command(app).commands["quantize"].params}
    assert set(options[field.name].opts) <= set("/".join(field.flags).split("/"))
    assert field.section in SECTIONS
    assert targets_of(field)
    assert VALUES[field.name] != field.default


@each_field
@pytest.mark.parametrize("to", output_formats())
def test_a_target_refuses_what_it_does_not_take(field: Field, to: str) -> None:
    if is_taken(field, find_output_layout(to)) or field.name == "to":
        return
    with pytest.raises(UsageError, match=f"not for --to {to}") as caught:
        check_recipe(make_recipe({"to": to, field.name: VALUES[field.name]}))
    assert caught.value.hint == f"for: {', '.join(targets_of(field))}"


@each_field
def test_what_belongs_to_a_method_is_refused_without_one(field: Field) -> None:
    request = Request("model", [Wanted(make_recipe({field.name: VALUES[field.name]}))])
    if field.section.calibrated and field.name != "method":
        with pytest.raises(UsageError, match=f"^{field.flag} belongs to a method"):
            check_request(request)
        return
    said = ""
    try:
        check_request(request)
    except UsageError as error:
        said = str(error)
    assert "belongs to a method" not in said


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"damping": 0.0}, r"--damping 0 is out of range \(more than 0, at most 1\)"),
        ({"damping": 1.5}, "--damping 1.5 is out of range"),
        ({"sweeps": -1}, r"--sweeps -1 is out of range \(0 or more, at most 1000\)"),
        ({"sweeps": 2199023255552}, r"--sweeps 2199023255552 is out of range"),
        ({"fisher_windows": 10**9}, r"--fisher-windows 1000000000 is out of range"),
        ({"tune_steps": 10**9}, r"--tune-steps 1000000000 is out of range"),
        ({"e2e_steps": 10**9}, r"--e2e-steps 1000000000 is out of range"),
        ({"fisher_windows": -1}, "--fisher-windows -1 is out of range"),
        ({"random_share": 1.0}, r"--random-share 1 is out of range \(0 or more, less than 1\)"),
        ({"tune_steps": 0}, r"--tune-steps 0 is out of range \(1 or more, at most 100000\)"),
        ({"e2e_steps": 0}, "--e2e-steps 0 is out of range"),
        ({"target_size": "much"}, "'much' is not a size"),
    ],
)
def test_a_value_outside_its_limits_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check_recipe(make_recipe({"method": "gptq"} | fields))


def test_limits_themselves_are_taken() -> None:
    check_recipe(Recipe(damping=1.0, sweeps=0, fisher_windows=0, random_share=0.0))
