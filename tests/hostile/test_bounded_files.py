"""Small files that are no files, never end or stand for more than they hold end in a sentence."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from quantcli.artifacts.atomic import AtomicFiles
from quantcli.bounded_yaml import MOST_CHARACTERS, load_yaml
from quantcli.cli import app
from quantcli.whole_files import read_whole, read_whole_text

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 30)
)
MERGES = "b0: &b0 {x: 1}\n" + "".join(
    f"b{n}: &b{n} {{<<: [*b{n - 1}, *b{n - 1}]}}\n" for n in range(1, 40)
)


def make_odd(kind: str, path: Path) -> None:
    path.unlink(missing_ok=True)
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.touch()
        os.truncate(path, 1 << 40)


@pytest.mark.parametrize("kind", ["fifo", "device", "holes"])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "README.md"])
def test_odd_files_of_a_checkpoint(
    kind: str, name: str, mini: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "m"
    shutil.copytree(mini, folder)
    make_odd(kind, folder / name)
    code = app.run(["quantize", str(folder), "--type", "Q8_0", "-o", str(tmp_path / "o.gguf")])
    said = capsys.readouterr().err
    if name == "README.md":
        assert code == 0
        assert kind != "holes" or "README.md: it cannot be read" in said
        return
    reason = "larger than 262,144 KiB" if kind == "holes" else "not a regular file"
    assert code == 1
    assert f"{name}: cannot be read: it is {reason}" in said


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (BOMB, "aliases stand for more than 100,000 values"),
        (MERGES, "aliases stand for more than 100,000 values"),
        ("a: &a [*a]", "aliases stand for more than 100,000 values"),
        ("&a {type: *a}", "aliases stand for more than 100,000 values"),
        ("x" * (MOST_CHARACTERS + 1), "longer than 256 KiB"),
        ("[" * 3000 + "]" * 3000, "nested too deeply"),
        ("a: !!int x", "invalid literal"),
        ("a: !!bool x", "not what its tag says"),
        ("a: !!timestamp x", "not what its tag says"),
        ("a: 2024-99-99", "month must be in"),
        ("a: 1" + "0" * 5000, "digits"),
        ("a: [", "while parsing"),
        ("a: !!python/name:os.system", "could not determine a constructor"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else None,
)
def test_yaml(
    text: str, reason: str, mini: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As such, in a recipe, and in a model card, which then counts for nothing."""
    with pytest.raises(ValueError, match=reason):
        load_yaml(text)
    recipe, folder = tmp_path / "r.yaml", tmp_path / "m"
    recipe.write_text(text)
    assert app.run(["quantize", str(mini), "--recipe", str(recipe), "--dry-run"]) == 2
    said = capsys.readouterr().err
    assert "error: recipe" in said
    assert reason in said or "larger than 256 KiB" in said
    shutil.copytree(mini, folder)
    (folder / "README.md").write_text(f"---\n{text}\n---\n")
    run = ["quantize", str(folder), "--type", "Q8_0", "-o", str(tmp_path / "o.gguf")]
    assert app.run(run) == 0
    said = capsys.readouterr().err
    assert "front matter is not YAML" in said
    assert reason in said


def test_sound_yaml() -> None:
    assert load_yaml("a: &x [1, 2]\nb: *x\nc: {<<: {d: 1}}") == {
        "a": [1, 2],
        "b": [1, 2],
        "c": {"d": 1},
    }
    assert load_yaml("") is None


def test_many_fields_of_a_recipe_take_no_time_squared(mini: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("".join(f"x{number}: 1\n" for number in range(20_000)))
    assert app.run(["quantize", str(mini), "--recipe", str(recipe), "--dry-run"]) == 2


@pytest.mark.parametrize("text", ["a = " + "[" * 3000, "a = 1" + "0" * 5000, "a." * 3000 + "b = 1"])
def test_toml(text: str, mini: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text(text)
    assert app.run(["quantize", str(mini), "--recipe", str(recipe), "--dry-run"]) == 2
    said = capsys.readouterr().err
    assert "internal error" not in said


def test_a_sentence_has_an_end(
    mini: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text(f"type = '{'a' * 50_000}'")
    assert app.run(["quantize", str(mini), "--recipe", str(recipe), "--dry-run"]) == 2
    error = capsys.readouterr().err.splitlines()[0]
    assert len(error) < 4200
    assert "characters ...]" in error


def test_whole_files(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"a\r\nb\rc")
    assert read_whole(path) == b"a\r\nb\rc"
    assert read_whole_text(path) == "a\nb\nc"
    with pytest.raises(OSError, match="larger than 0 KiB"):
        read_whole(path, 5)


def test_an_empty_tensor_is_written(tmp_path: Path, mini: Path) -> None:
    """Nothing, in no matter what shape."""
    output = tmp_path / "f"
    with AtomicFiles({output: 0}) as files:
        files.write(output, 0, np.empty((0, 3), np.float32))
        files.publish()
    assert output.read_bytes() == b""
    folder = tmp_path / "m"
    shutil.copytree(mini, folder)
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "extra": np.empty((0, 3), np.float32)}, folder / "model.safetensors")
    run = ["quantize", str(folder), "--to", "mlx", "-o", str(tmp_path / "o"), "-t", "1"]
    assert app.run(run) == 0


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("to = ['hf', {}]", "--to lists {}, which is no text"),
        ("type = ['Q4_0', 5]", "--type lists 5, which is no text"),
        ("to = 1.5\ntype = ['Q4_0']", "--to lists 1.5, which is no text"),
        ("bits = [[4]]", "bits: expected `int | null`, got `array`"),
        (f"bits = {list(range(20_000))}", "--bits lists 20,000 values"),
        ("outputs = [{type = 'Q4_0', name = '..'}]", "name '..' is no file name"),
        ("outputs = [{type = 'Q4_0', name = ''}]", "name '' is no file name"),
        ('outputs = [{type = "Q4_0", name = "a\\tb"}]', "name 'a\\tb' is no file name"),
        ('outputs = [{type = "Q4_0", name = "a\\u0000"}]', "is no file name"),
    ],
)
def test_lists_of_outputs(
    text: str, reason: str, mini: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text(text)
    assert app.run(["quantize", str(mini), "--recipe", str(recipe), "--dry-run"]) == 2
    assert reason in capsys.readouterr().err
