"""``quantcli quantize --mmproj`` and ``--mmproj-only``: what is written, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader

from quantcli import quantize
from quantcli.cli.app import run

tiny_towers = pytest.importorskip("support.tiny_towers")
pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wrapper") / "tiny-gemma"
    tiny_towers.build("gemma3", folder)
    return folder


@pytest.fixture
def wrapper(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(saved, tmp_path / saved.name))


def types(path: Path) -> dict[str, str]:
    return {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(path).tensors}


def call(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    code = run(["quantize", *map(str, args)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_beside_the_text_model(wrapper: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = wrapper.parent / "out"
    folder.mkdir()
    assert call(capsys, wrapper, "-b", "8", "-q", "-o", "alone.gguf")[0] == 0
    code, out, _ = call(capsys, wrapper, "-b", "8", "-q", "--mmproj", "-o", "out/text.gguf")
    assert (code, out) == (0, "out/text.gguf\nout/mmproj-tiny-gemma-F16.gguf\n")
    assert (folder / "text.gguf").read_bytes() == Path("alone.gguf").read_bytes()
    found = types(folder / "mmproj-tiny-gemma-F16.gguf")
    assert found["v.blk.0.attn_q.weight"] == found["v.patch_embd.weight"] == "F16"
    assert found["v.position_embd.weight"] == found["v.blk.0.ln1.weight"] == "F32"
    assert not any(name.startswith(("blk.", "token_embd")) for name in found)


def test_beside_a_set(wrapper: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = wrapper, "--type", "Q8_0,Q4_0", "--mmproj", "-o", "out/"
    table = call(capsys, *args, "--dry-run")[1]
    assert [line.split()[0] for line in table.splitlines()[1:4]] == ["Q8_0", "Q4_0", "mmproj"]
    code, out, _ = call(capsys, *args, "--json")
    document = json.loads(out)
    assert code == 0
    assert document["paths"] == ["out/tiny-gemma-Q8_0.gguf", "out/tiny-gemma-Q4_0.gguf"]
    assert document["mmproj"]["paths"] == ["out/mmproj-tiny-gemma-F16.gguf"]
    assert call(capsys, wrapper, "-b", "8", "-q", "--mmproj", "-o", "alone/")[0] == 0
    for path in Path("alone").iterdir():
        assert path.read_bytes() == Path("out", path.name).read_bytes()


def test_a_tower_left_out_is_said(wrapper: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = "the tower beside the text model is left out; --mmproj writes it as well"
    assert said in call(capsys, wrapper, "--dry-run")[2]
    assert said not in call(capsys, wrapper, "--dry-run", "--mmproj")[2]
    assert said not in call(capsys, wrapper, "--dry-run", "--to", "mlx")[2]


def test_alone_and_in_a_type(wrapper: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, wrapper, "--mmproj-only", "--type", "BF16", "-q")
    assert (code, out) == (0, "mmproj-tiny-gemma-BF16.gguf\n")
    found = types(Path("mmproj-tiny-gemma-BF16.gguf"))
    assert found["v.blk.0.attn_q.weight"] == "BF16"
    assert found["v.patch_embd.weight"] == found["mm.input_projection.weight"] == "F32"


def test_the_header_tells_what_it_is(wrapper: Path) -> None:
    made = quantize(wrapper, "tower.gguf", mmproj_only=True)
    fields = {key: field.contents() for key, field in GGUFReader(made.paths[0]).fields.items()}
    assert fields["general.architecture"] == "clip"
    assert fields["general.type"] == "mmproj"
    assert fields["clip.projector_type"] == "gemma3"
    assert fields["clip.has_vision_encoder"] is True
    assert np.allclose(fields["clip.vision.image_mean"], [0.4, 0.5, 0.6])
    assert fields["quantcli.recipe"] == 'type = "F16"\nmmproj_only = true\n'


def test_one_document_for_both(wrapper: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for flags in ([], ["--dry-run"]):
        args = "--mmproj-type", "F32", "--json", "-o", "t.gguf", *flags
        code, out, _ = call(capsys, wrapper, *args)
        document = json.loads(out)
        assert code == 0
        assert document["paths"] == ["t.gguf"]
        assert document["mmproj"]["paths"] == ["mmproj-tiny-gemma-F32.gguf"]
        assert document["mmproj"]["type"] == "F32"
        Path("t.gguf").unlink(missing_ok=True)


def test_from_python(wrapper: Path) -> None:
    made = quantize(wrapper, "t.gguf", mmproj_type="Q8_0")
    assert made.paths == (Path("t.gguf"),)
    assert made.mmproj == Path("mmproj-tiny-gemma-Q8_0.gguf")
    assert made.mmproj.is_file()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--to", "gptq", "--mmproj"], "--mmproj writes a tower beside a GGUF, not with --to gptq"),
        (["--mmproj-only", "--mmproj"], "not with --mmproj-only"),
        (["--mmproj-only", "--imatrix", "x.gguf"], "--imatrix is for the text model"),
        (["--mmproj-only", "--calibrate", "x.txt"], "--calibrate runs the text model"),
        (["--mmproj-only", "--to", "mlx"], "--mmproj-only is not for --to mlx"),
        (["--mmproj-type", "Q9"], "Q9"),
    ],
)
def test_what_does_not_go_together(wrapper, capsys, args, message):
    code, out, error = call(capsys, wrapper, *args)
    assert (code, out) == (2, "")
    assert message in error


def test_a_model_without_a_tower(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    mini = Path(__file__).parent.parent / "data" / "bookworm-mini"
    output = tmp_path / "t.gguf"
    code, _, error = call(capsys, mini, "--mmproj", "-o", output)
    assert code == 1
    assert "LlamaForCausalLM has no vision or audio tower that quantcli knows" in error
    assert not output.exists()
    assert call(capsys, mini, "--bits", "8", "-q", "-o", output)[0] == 0
    code, _, error = call(capsys, output, "--mmproj-only")
    assert code == 1
    assert "holds no tower beside its text model" in error


def test_settings_of_pixels_are_needed(wrapper, capsys):
    (wrapper / "preprocessor_config.json").unlink()
    code, _, error = call(capsys, wrapper, "--mmproj-only")
    assert code == 1
    assert "image_mean of the image processor of Gemma3ForConditionalGeneration is None" in error
    nested = {"image_processor": tiny_towers.NORMALISATION}
    (wrapper / "processor_config.json").write_text(json.dumps(nested))
    assert call(capsys, wrapper, "--mmproj-only", "-q")[0] == 0


def test_a_tensor_of_the_tower_that_is_unknown(wrapper, capsys):
    from safetensors.numpy import load_file, save_file

    path = wrapper / "model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "vision_tower.extra.weight": np.ones((2, 2), np.float32)}, path)
    code, _, error = call(capsys, wrapper, "--mmproj-only")
    assert code == 1
    assert "vision_tower.extra.weight" in error
    assert "is not part of" in error
