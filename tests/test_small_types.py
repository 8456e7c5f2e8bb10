"""Whole models in the types of one to four bits that ignore importance, against llama.cpp."""

from pathlib import Path

import numpy as np
import pytest
from support import tiny_models

from quantcli.artifacts.gguf_file import prepare_gguf
from quantcli.artifacts.write import write_artifact
from quantcli.errors import PlanError
from quantcli.model import open_model
from quantcli.plan.recipe import Recipe
from quantcli.types import row_count

llama_cpp = pytest.importorskip("llama_cpp")

from support.llama_logits import llama_logits  # noqa: E402
from support.llama_quantize import llama_quantize  # noqa: E402

MINI = Path(__file__).parent / "data" / "bookworm-mini"
TOKENS = [0, *range(300, 900, 13)]
NVFP4 = 40


def quantize(source: Path, output: Path, **recipe: object) -> Path:
    with open_model(source) as model:
        for _ in write_artifact(prepare_gguf(model, Recipe(**recipe), output), threads=2):
            pass
    return output


def tensors(path: Path) -> dict[str, tuple[str, bytes]]:
    """Type and bytes of every tensor, in the file's order; gguf's reader lacks the newest types."""
    with open_model(path) as model:
        return {
            name: (info.dtype, model.store.read_rows(name, 0, row_count(info.shape)).tobytes())
            for name, info in model.store.tensors.items()
        }


def same(ours: Path, theirs: Path) -> dict[str, str]:
    """Types by name, after the comparison."""
    mine, reference = tensors(ours), tensors(theirs)
    types = {name: kind for name, (kind, _) in mine.items()}
    assert list(types.items()) == [(name, kind) for name, (kind, _) in reference.items()]
    assert [name for name in mine if mine[name] != reference[name]] == []
    return types


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    pytest.importorskip("transformers")
    root = tmp_path_factory.mktemp("models")
    found = {name: tiny_models.build(name, root / name) for name in ("mixtral", "qwen3-moe")}
    return found | {"mini": MINI}


@pytest.fixture(scope="module")
def floats(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same models as F32 GGUF files."""
    root = tmp_path_factory.mktemp("floats")
    return {
        name: quantize(folder, root / f"{name}.gguf", type="F32")
        for name, folder in folders.items()
    }


@pytest.mark.parametrize(
    ("name", "type_name", "most"),
    [
        ("mini", "TQ1_0", "TQ1_0"),
        ("mini", "TQ2_0", "TQ2_0"),
        ("mini", "Q1_0", "Q1_0"),
        ("mini", "Q2_0", "Q2_0"),
        ("mini", "MXFP4_MOE", "Q8_0"),
        ("mixtral", "TQ2_0", "Q4_0"),
        ("mixtral", "Q2_0", "Q2_0"),
        ("mixtral", "MXFP4_MOE", "MXFP4"),
        ("qwen3-moe", "MXFP4_MOE", "MXFP4"),
    ],
)
def test_whole_model_has_llama_cpps_bytes(
    folders: dict[str, Path],
    floats: dict[str, Path],
    tmp_path: Path,
    name: str,
    type_name: str,
    most: str,
) -> None:
    """Mixtures and fallbacks included; ``most`` is the type of the feed-forward matrices."""
    theirs = tmp_path / "theirs.gguf"
    llama_quantize(floats[name], theirs, type_name)
    types = same(quantize(folders[name], tmp_path / "ours.gguf", type=type_name), theirs)
    assert most in {kind for tensor, kind in types.items() if "ffn_up" in tensor}


def test_nvfp4_by_tensor_type_has_llama_cpps_bytes(floats: dict[str, Path], tmp_path: Path) -> None:
    overrides = (llama_cpp.llama_model_tensor_override * 2)()
    overrides[0].pattern, overrides[0].type = b"ffn", NVFP4
    theirs = tmp_path / "theirs.gguf"
    llama_quantize(floats["mini"], theirs, "Q8_0", tt_overrides=overrides)
    ours = quantize(
        MINI, tmp_path / "ours.gguf", type="Q8_0", tensor_types=["ffn=NVFP4"], range="minmax"
    )
    types = same(ours, theirs)
    assert list(types.values()).count("NVFP4") == 12


def test_rows_without_a_format_to_fall_back_to_stop_both(
    folders: dict[str, Path], floats: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(RuntimeError):
        llama_quantize(floats["mixtral"], tmp_path / "theirs.gguf", "Q1_0")
    with pytest.raises(PlanError, match="Q1_0 has no format to fall back to"):
        quantize(folders["mixtral"], tmp_path / "ours.gguf", type="Q1_0")
    with pytest.raises(PlanError, match="NVFP4 has no format to fall back to"):
        quantize(folders["mixtral"], tmp_path / "ours.gguf", type="NVFP4")


def divergence(from_logits: np.ndarray, to_logits: np.ndarray) -> float:
    """Mean Kullback-Leibler divergence of next-token distributions, in nats."""

    def log_probabilities(logits: np.ndarray) -> np.ndarray:
        shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
        return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))

    p, q = log_probabilities(from_logits), log_probabilities(to_logits)
    return float((np.exp(p) * (p - q)).sum(axis=1).mean())


@pytest.mark.parametrize("type_name", ["NVFP4", "TQ1_0", "TQ2_0", "Q1_0", "Q2_0"])
def test_llama_cpp_computes_with_the_weights_that_we_decode(
    floats: dict[str, Path], tmp_path: Path, type_name: str
) -> None:
    """Its kernels round activations to 8 bits, hence the small difference."""
    packed = quantize(MINI, tmp_path / "packed.gguf", type=type_name)
    decoded = quantize(packed, tmp_path / "decoded.gguf", type="F32", allow_requantize=True)
    expected = llama_logits(decoded, TOKENS)
    assert divergence(expected, llama_logits(packed, TOKENS)) < 0.004
    assert divergence(expected, llama_logits(floats["mini"], TOKENS)) > 0.004


def test_nvfp4_stays_close_to_the_model(floats: dict[str, Path], tmp_path: Path) -> None:
    whole = llama_logits(floats["mini"], TOKENS)
    lost = {
        name: divergence(
            whole, llama_logits(quantize(MINI, tmp_path / f"{name}.gguf", type=name), TOKENS)
        )
        for name in ("NVFP4", "Q4_0")
    }
    assert lost["NVFP4"] < 2 * lost["Q4_0"] < 0.2
