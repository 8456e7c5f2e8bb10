"""Every kind of document that `--json` prints has a schema, and documents follow it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator
from support.json_schemas import infer_schema, schema_path

from quantcli.cli.app import run as run_here

CLI = Path(__file__).parents[2] / "quantcli" / "cli"
KINDS = ("calibration", "calibration-plan", "error", "eval-ppl", "export", "export-plan", "inspect",
         "plan", "quantize", "shard", "verify", "version")  # fmt: skip
TEXT = Path(__file__).parents[1] / "golden" / "calibration.txt"


def test_every_kind_has_a_schema() -> None:
    source = "".join(path.read_text() for path in CLI.glob("*.py"))
    named = set(re.findall(r'document\(\s*"([a-z-]+)"', source)) - {"plan"}
    assert named <= set(KINDS)
    for kind in KINDS:
        schema = json.loads(schema_path(kind, 1).read_text())
        Draft202012Validator.check_schema(schema)
        assert schema["properties"]["schema"] == {"const": f"quantcli.{kind}/1"}


@pytest.mark.parametrize(
    ("line", "kind", "code"),
    [
        ("--version", "version", 0),
        ("inspect {mini}", "inspect", 0),
        ("inspect {mini} --tensors --stats --fit 2G", "inspect", 0),
        ("inspect {q4} --kv", "inspect", 0),
        ("inspect {q4} --stats", "inspect", 0),
        ("quantize {mini} --bits 4 --dry-run", "plan", 0),
        ("quantize {mini} --to gptq --dry-run", "plan", 0),
        ("quantize {mini} --type Q4_0,Q8_0 --dry-run", "plan", 0),
        ("quantize {mini} --bits 3 -o three.gguf", "quantize", 0),
        ("quantize {mini} --bits 7", "error", 2),
        ("quantize nowhere", "error", 1),
        ("quantize {mini} --nonsense", "error", 2),
        ("inspect {text}", "error", 1),
        ("inspect .", "error", 1),
        ("frobnicate", "error", 2),
        ("export {q4} --to hf -o folder --dry-run", "export-plan", 0),
        ("export {q4} --to gptq -o folder --requantize", "export", 0),
        ("export {q4} --verify", "verify", 0),
        ("export {q4} --verify --against {mini}", "verify", 0),
    ],
)
def test_a_document_follows_its_schema(
    line: str, kind: str, code: int, mini: Path, gguf, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    q4 = tmp_path / "q4.gguf"
    if "{q4}" in line:
        assert run_here(["quantize", str(mini), "--type", "Q4_0", "-q", "-o", str(q4)]) == 0
        capsys.readouterr()
    words = line.format(mini=mini, q4=q4, text=TEXT).split()
    assert run_here([*words, "--json"]) == code
    found = json.loads(capsys.readouterr().out)
    schema = json.loads(schema_path(kind, 1).read_text())
    errors = list(Draft202012Validator(schema).iter_errors(found))
    assert not errors
    assert found["schema"] == f"quantcli.{kind}/1"
    # A key that the schema does not know is one that was not written down.
    assert set(found) <= set(schema["properties"])


def test_a_schema_refuses_what_is_of_another_type() -> None:
    documents = [
        {"schema": "quantcli.x/1", "bytes": 3, "parts": [{"a": None}]},
        {"schema": "quantcli.x/1", "bytes": 4, "parts": [{"a": 1.5, "b": "c"}]},
    ]
    validator = Draft202012Validator(infer_schema("x", 1, documents))
    assert not list(validator.iter_errors(documents[0]))
    for wrong in (
        {"schema": "quantcli.x/1", "parts": []},
        {"schema": "quantcli.x/2", "bytes": 3, "parts": []},
        {"schema": "quantcli.x/1", "bytes": "3", "parts": []},
        {"schema": "quantcli.x/1", "bytes": 3, "parts": [{"b": "c"}]},
        {"schema": "quantcli.x/1", "bytes": 3, "parts": [{"a": "1"}]},
    ):
        assert list(validator.iter_errors(wrong)), wrong
