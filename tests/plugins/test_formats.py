"""Block formats from other distributions: used, and refused by name where they are broken."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.plugin import Quantcli, command, install

pytestmark = pytest.mark.slow

CODE = """
import numpy as np
from quantcli.formats import BlockFormat
def quantize(rows, importance):
    return rows.astype("<f4").view(np.uint8)
def dequantize(packed):
    return packed.copy().view("<f4")
FORK = BlockFormat("FORK", 61, 1, 4, quantize, dequantize)
TAKEN = BlockFormat("TAKEN", 2, 1, 4, quantize, dequantize)
SHORT = BlockFormat("SHORT", None, 1, 4, lambda rows, importance: rows[:, :1], dequantize)
OTHER = 4
"""
BROKEN = {
    "TAKEN": "ggml type 2 is Q4_0",
    "OTHER": "it is of type int, not a quantcli.formats.BlockFormat",
    "ABSENT": "cannot be loaded: AttributeError: module 'forks' has no attribute 'ABSENT'",
    "NOWHERE": "cannot be loaded: ModuleNotFoundError: No module named 'nowhere'",
}


@pytest.fixture(scope="session")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Quantcli:
    """The command beside formats that are a fork's, or broken."""
    names = ["FORK", "TAKEN", "SHORT", "OTHER", "ABSENT"]
    lines = "".join(f"{name} = forks:{name}\n" for name in names) + "NOWHERE = nowhere:X\n"
    folder = tmp_path_factory.mktemp("forks")
    return command(install(folder, "forks", {"forks.py": CODE}, {"quantcli.formats": lines}))


def test_a_format_without_a_ggml_id_is_decoded_to_a_folder(
    quantcli: Quantcli, mini: Path, tmp_path: Path
) -> None:
    import ml_dtypes  # noqa: F401
    from safetensors.numpy import load_file

    out = tmp_path / "out"
    quantcli("quantize", mini, "--to", "hf", "--type", "MY4", "--dtype", "F32", "-o", out)
    name = "model.layers.0.mlp.up_proj.weight"
    weights = load_file(mini / "model.safetensors")[name].astype(np.float32)
    blocks = weights.reshape(-1, 32)
    scales = (np.abs(blocks).max(axis=1, keepdims=True) / 7).astype(np.float16).astype(np.float32)
    expected = np.clip(np.rint(blocks / scales), -8, 7) * scales
    found = load_file(out / "model.safetensors")[name]
    np.testing.assert_array_equal(found, expected.reshape(found.shape))


def test_no_gguf_holds_it(quantcli: Quantcli, mini: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    done = quantcli("quantize", mini, "--tensor-type", "ffn_up=MY4", "-o", out, code=1)
    assert "blk.0.ffn_up.weight cannot be MY4 in a GGUF: the format has no ggml type" in done.stderr
    assert "--to hf" in done.stderr
    assert not out.exists()


def test_a_forks_type_goes_into_a_gguf_and_back(
    forks: Quantcli, mini: Path, tmp_path: Path
) -> None:
    out, back = tmp_path / "fork.gguf", tmp_path / "back.gguf"
    forks("quantize", mini, "--type", "fork", "-o", out)
    assert "FORK" in forks("inspect", out, "--tensors").stdout
    forks("quantize", out, "--type", "BF16", "--allow-requantize", "-o", back)
    direct = tmp_path / "direct.gguf"
    forks("quantize", mini, "--type", "BF16", "-o", direct)
    from gguf import GGUFReader

    found = {tensor.name: tensor.data for tensor in GGUFReader(back).tensors}
    for tensor in GGUFReader(direct).tensors:
        np.testing.assert_array_equal(found[tensor.name], tensor.data)


@pytest.mark.parametrize("name", BROKEN)
def test_what_breaks_the_protocol_is_named(
    forks: Quantcli, mini: Path, tmp_path: Path, name: str
) -> None:
    arguments = ["quantize", mini, "--tensor-type", f"ffn_up={name}", "-o", tmp_path / "x.gguf"]
    done = forks(*arguments, code=2)
    assert f"block format '{name}' of forks 1.0" in done.stderr
    assert BROKEN[name] in " ".join(done.stderr.split())
    assert "its entry point is" in done.stderr


def test_rows_of_the_wrong_shape_are_named(forks: Quantcli, mini: Path, tmp_path: Path) -> None:
    arguments = ["quantize", mini, "--to", "hf", "--type", "SHORT", "-o", tmp_path / "x"]
    done = forks(*arguments, code=1)
    assert "quantize of the block format SHORT gives float32" in " ".join(done.stderr.split())
    assert "internal error" not in done.stderr


def test_a_broken_plug_in_harms_nothing_else(forks: Quantcli, mini: Path, tmp_path: Path) -> None:
    forks("quantize", mini, "--bits", "4", "-o", tmp_path / "q4.gguf")
