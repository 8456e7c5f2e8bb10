"""The bytes of every method are the same for any number of threads, experts included."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch

from quantcli.cli.app import run
from quantcli.layerwise.steady import cholesky, steady, use_threads

TEXT = Path(__file__).parents[1] / "golden" / "calibration.txt"
COUNTS = (1, 2, 3)
SIZES = {"llama": "2M", "qwen3-moe": "900K"}
"""Between the least and the largest that the choice of types can make of a model."""

COMMANDS = {
    "calibrate": ["calibrate", "MODEL", "--data", "TEXT", "--collect", "hessian,abs_max"],
    "awq": ["quantize", "MODEL", "--bits", "4", "--method", "awq", "--calibrate", "TEXT"],
    "smoothquant": [
        "quantize", "MODEL", "--to", "compressed-tensors", "--scheme", "W8A8",
        "--method", "smoothquant", "--calibrate", "TEXT",
    ],
    "rotate": ["quantize", "MODEL", "--bits", "4", "--method", "rotate", "--calibrate", "TEXT"],
    "gptq": ["quantize", "MODEL", "--bits", "4", "--method", "gptq", "--calibrate", "TEXT"],
    "tune": [
        "quantize", "MODEL", "--bits", "4", "--method", "gptq,tune", "--tune-steps", "3",
        "--calibrate", "TEXT",
    ],
    "e2e": [
        "quantize", "MODEL", "--bits", "4", "--method", "gptq", "--tune", "e2e",
        "--e2e-steps", "2", "--calibrate", "TEXT",
    ],
    "allocate": [
        "quantize", "MODEL", "--bits", "4", "--method", "gptq", "--target-size", "SIZE",
        "--calibrate", "TEXT",
    ],
}  # fmt: skip


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    use_threads(before)


def _digest(path: Path) -> dict[str, str]:
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files if f.is_file()}


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", ["llama", "qwen3-moe"])
def test_bytes_do_not_depend_on_threads(
    name: str, command: str, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    words = {"MODEL": str(checkpoint(name)), "TEXT": str(TEXT), "SIZE": SIZES[name]}
    args = [words.get(arg, arg) for arg in COMMANDS[command]]
    found = []
    for count in COUNTS:
        # Not its name, which GGUFs tell of an importance matrix.
        folder = tmp_path / str(count)
        folder.mkdir()
        output = folder / "out.gguf"
        options = ["--chunks", "2", "--threads", str(count), "-q", "-o", str(output)]
        assert run([*args, *options]) == 0
        found.append({k: v for p in sorted(folder.iterdir()) for k, v in _digest(p).items()})
        assert found[-1]
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize(
    ("rows", "inner", "columns"), [(5, 64, 128), (17, 256, 512), (525, 768, 65), (65, 64, 600)]
)
def test_products_do_not_depend_on_threads(rows: int, inner: int, columns: int) -> None:
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(rows, inner, generator=draw)
    weight = torch.nn.Parameter(torch.randn(columns, inner, generator=draw))
    bias = torch.randn(columns, generator=draw)
    found = []
    for count in (1, 2, 3, 7):
        use_threads(count)
        weight.grad = None
        with steady():
            product = torch.nn.functional.linear(x, weight, bias)
            product.square().sum().backward()
            stack = torch.bmm(x.expand(9, -1, -1), weight.detach().T.expand(9, -1, -1))
            with torch.inference_mode():
                bare = torch.nn.functional.linear(x, weight)
        assert weight.grad is not None
        found.append([product.detach(), weight.grad.clone(), stack, bare])
    exact = x.double() @ weight.detach().double().T
    torch.testing.assert_close(found[0][0], (exact + bias).float(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[0][2][-1], exact.float(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        found[0][1], (2 * (exact + bias).T @ x.double()).float(), rtol=1e-4, atol=1e-2
    )
    for other in found[1:]:
        assert all(torch.equal(one, two) for one, two in zip(found[0], other, strict=True))


def test_operations_on_elements_do_not_depend_on_threads() -> None:
    """SiLU is computed otherwise where a share ends within a vector."""
    x = torch.randn(1, 517, 513, generator=torch.Generator().manual_seed(1))
    scale = torch.linspace(-2, 2, 513)
    found = []
    for count in (1, 2, 3, 7):
        use_threads(count)
        with steady():
            own = x.clone()
            assert own.mul_(scale) is own
            found.append([torch.nn.functional.silu(x), own, (x * scale).sum(0), x.exp() > 1])
    torch.testing.assert_close(found[0][0], x / (1 + torch.exp(-x)))
    assert torch.equal(found[0][1], x * scale)
    assert torch.equal(found[0][3], torch.exp(x) > 1)
    for other in found[1:]:
        assert all(torch.equal(one, two) for one, two in zip(found[0], other, strict=True))


@pytest.mark.parametrize("size", [64, 513, 1100])
def test_factors_do_not_depend_on_threads(size: int) -> None:
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(2 * size, size, generator=draw, dtype=torch.float64)
    matrix = x.T @ x
    found = []
    for count in (1, 2, 3, 7):
        use_threads(count)
        found.append(cholesky(matrix))
    torch.testing.assert_close(found[0] @ found[0].T, matrix)
    assert torch.equal(found[0], found[0].tril())
    assert all(torch.equal(found[0], other) for other in found[1:])
    with pytest.raises(torch.linalg.LinAlgError):
        cholesky(matrix - 2 * matrix.diagonal().max() * torch.eye(size, dtype=torch.float64))
