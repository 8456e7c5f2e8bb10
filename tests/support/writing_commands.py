"""Every command that writes, on a tiny model: what is run, and what it is to leave.

``SOURCE``, ``WRAPPER`` (a model with a tower), ``TEXT``, ``PLAIN`` and ``OUT`` stand for paths.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from support import tiny_towers
from support.faults import Server
from support.tiny_models import build

TEXT = Path(__file__).parents[1] / "golden" / "calibration.txt"

_SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
_METHOD = "--calibrate TEXT --chunks 2 --threads 1"


@dataclass(frozen=True)
class Command:
    """A command line; ``resumes`` where the same with --resume goes on after it was stopped."""

    line: str
    resumes: bool = False
    older: str = ""
    """A command line that makes what is to be replaced, of the same names."""
    several: bool = False
    """Whether it has several outputs, one of which may fail."""

    @property
    def runs_model(self) -> bool:
        """Whether it runs the model on a text."""
        return "TEXT" in self.line

    def args(self, words: Mapping[str, Path], out: Path, more: str = "") -> list[str]:
        """The arguments, paths filled in, for outputs in ``out``."""
        return _fill(f"{self.line} {more}", words, out)

    def older_args(self, words: Mapping[str, Path], out: Path) -> list[str]:
        """Those of what it replaces."""
        return _fill(self.older, words, out)


def _fill(line: str, words: Mapping[str, Path], out: Path) -> list[str]:
    return [str(words.get(word, word)).replace("OUT/", f"{out}/") for word in line.split()]


COMMANDS = {
    "gguf": Command("quantize SOURCE --type Q4_0 --threads 1 -o OUT/m.gguf"),
    "gguf-replaced": Command(
        "quantize SOURCE --type Q4_0 --threads 1 -f -o OUT/m.gguf",
        older="quantize SOURCE --type Q5_0 --threads 1 -o OUT/m.gguf",
    ),
    "set": Command("quantize SOURCE --type Q4_0 --threads 1 --split-max-size 100K -o OUT/m.gguf"),
    "set-replaced": Command(
        "quantize SOURCE --type Q4_0 --threads 1 --split-max-size 100K -f -o OUT/m.gguf",
        older="quantize SOURCE --type Q4_0 --tensor-type ffn_down=Q4_1 --threads 1 "
        "--split-max-size 100K -o OUT/m.gguf",
    ),
    "hf": Command("quantize SOURCE --to hf --type Q4_0 --threads 1 -o OUT/model"),
    "gptq-folder": Command("quantize SOURCE --to gptq --group-size 32 --threads 1 -o OUT/model"),
    "awq-folder": Command("quantize SOURCE --to awq --group-size 32 --threads 1 -o OUT/model"),
    "mlx": Command("quantize SOURCE --to mlx --group-size 32 --threads 1 -o OUT/model"),
    "compressed-tensors": Command(
        "quantize SOURCE --to compressed-tensors --group-size 32 --threads 1 -o OUT/model"
    ),
    "folder-replaced": Command(
        "quantize SOURCE --to gptq --group-size 32 --threads 1 -f -o OUT/model",
        older="quantize SOURCE --to awq --group-size 32 --threads 1 -o OUT/model",
    ),
    "export-folder": Command("export PLAIN --to hf --threads 1 -o OUT/model"),
    "export-set": Command("export PLAIN --to gguf --split-max-size 100K --threads 1 -o OUT/m.gguf"),
    "export-card": Command("export PLAIN --to card -o OUT/README.md"),
    "mmproj": Command(
        "quantize WRAPPER --type Q4_0 --mmproj --threads 1 -o OUT/m.gguf", several=True
    ),
    "several": Command("quantize SOURCE --type Q4_0,Q8_0 --threads 1 -o OUT/", True, several=True),
    "several-layouts": Command(
        "quantize SOURCE --to gguf,gptq,mlx --type Q4_0 --bits 4 --group-size 32 --threads 1 "
        "-o OUT/",
        resumes=True, several=True,
    ),
    "calibrate": Command(
        "calibrate SOURCE --data TEXT --ctx 64 --chunks 2 --collect abs_max,hessian --threads 1 "
        "-o OUT/c.gguf",
        resumes=True,
    ),
    "calibrate-in-files": Command(
        "calibrate SOURCE --data TEXT --ctx 64 --chunks 2 --max-memory 1K --threads 1 "
        "-o OUT/c.gguf",
        resumes=True,
    ),
    "gptq": Command(f"quantize SOURCE --type Q4_0 --method gptq {_METHOD} -o OUT/m.gguf", True),
    "tune": Command(
        f"quantize SOURCE --type Q4_0 --method gptq,tune --tune-steps 2 {_METHOD} -o OUT/m.gguf",
        True,
    ),
    "allocate": Command(
        f"quantize SOURCE --type Q4_0 --method gptq --target-size 800K {_METHOD} -o OUT/m.gguf",
        True,
    ),
    "several-gptq": Command(
        f"quantize SOURCE --type Q4_0,Q5_0 --method gptq {_METHOD} -o OUT/", True, several=True
    ),
    "several-calibrated": Command(
        "quantize SOURCE --type Q4_0,Q5_0 --calibrate TEXT --chunks 2 --threads 1 -o OUT/", True,
        several=True,
    ),
    "awq": Command(f"quantize SOURCE --type Q4_0 --method awq {_METHOD} -o OUT/m.gguf"),
}  # fmt: skip


WARM = (
    f"quantize SOURCE --type Q4_0 --method awq,gptq,tune --target-size 800K --tune-steps 1 "
    f"{_METHOD} -o OUT/w",
    "calibrate SOURCE --data TEXT --ctx 64 --chunks 2 --threads 1 -o OUT/c",
)
"""Command lines that load what the commands of methods need."""


def warm(server: Server, words: Mapping[str, Path], folder: Path, *, methods: bool) -> None:
    """Make PLAIN and let the server load all that commands need, with ``methods`` torch too."""
    plain = f"quantize SOURCE --type F16 --threads 1 -o {words['PLAIN']}"
    for line in (plain, *(WARM if methods else ())):
        ended = server.warm(_fill(line, words, folder))
        assert ended.code == 0, ended.said


def make_words(folder: Path) -> dict[str, Path]:
    """The tiny model and the text; what is made of the model lies beside it."""
    source = folder / "source"
    source.mkdir()
    build("llama", source, changes=_SMALL)
    wrapper = folder / "wrapper"
    tiny_towers.build("gemma3", wrapper)
    text = folder / "text.txt"
    shutil.copy(TEXT, text)
    return {"SOURCE": source, "WRAPPER": wrapper, "TEXT": text, "PLAIN": folder / "plain.gguf"}


def read_all(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, the names of folders that are empty too."""
    return {
        str(path.relative_to(folder)) + ("/" if path.is_dir() else ""): b""
        if path.is_dir()
        else path.read_bytes()
        for path in sorted(folder.rglob("*"))
    }
