"""How fast a GGUF is in llama.cpp: tokens read and written per second, and the memory it takes.

The method is llama-bench's (its defaults: a prompt of 512 tokens, 128 tokens of generation, 5 runs
after one for warmth), in the build of llama.cpp that llama-cpp-python brings, with everything on
the GPU that it can use. Medians are reported, since other programs only ever slow a run down.
llama.cpp's own clock (``llama_perf_context``) runs along.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from quantcli.errors import SourceError, UsageError
from quantcli.evals.artifacts import EvaluatedModel
from quantcli.evals.engines.llama_cpp import load_library
from quantcli.types import Event, Note, Progress

PROMPT, GENERATION, RUNS = 512, 128, 5
_CHILD = "quantcli.evals.speed_child"


@dataclass(frozen=True, slots=True)
class Speed:
    """Tokens per second of each run, by our clock and by llama.cpp's.

    ``memory`` is what the process grew by and what lies on devices, in bytes; ``repacked``
    whether weights were reordered for this processor, as llama.cpp does where it can.
    """

    prompt: tuple[float, ...]
    generation: tuple[float, ...]
    own_prompt: tuple[float, ...]
    own_generation: tuple[float, ...]
    memory: int
    threads: int
    repacked: bool

    @property
    def prompt_speed(self) -> float:
        """Tokens read per second, the median."""
        return median(self.prompt)

    @property
    def generation_speed(self) -> float:
        """Tokens written per second, the median."""
        return median(self.generation)


@dataclass(frozen=True, slots=True)
class SpeedDone(Event):
    """One model's speed."""

    artifact: EvaluatedModel
    speed: Speed


def check_speed(artifacts: Sequence[EvaluatedModel]) -> None:
    """UsageError for a checkpoint, MissingExtraError without llama-cpp-python."""
    for artifact in artifacts:
        if not artifact.model.from_gguf:
            raise UsageError(
                f"--speed is measured in llama.cpp, and {artifact.label} is a checkpoint",
                hint=f"'quantcli quantize {artifact.label} --bits 16' makes a GGUF of it",
            )
    load_library()


def measure_speed(
    artifacts: Sequence[EvaluatedModel], *, threads: int, runs: int = RUNS,
    prompt: int = PROMPT, generation: int = GENERATION,
) -> Iterator[Event]:  # fmt: skip
    """Run every model by itself, yielding a `SpeedDone` for each; SourceError where it fails."""
    for number, artifact in enumerate(artifacts):
        asked = {"path": str(artifact.model.path), "prompt": prompt, "generation": generation}
        asked |= {"threads": threads, "runs": runs, "repack": True}
        for line in _lines(asked, artifact.label):
            if isinstance(line, Speed):
                yield SpeedDone(artifact, line)
            elif isinstance(line, Note):
                yield line
            else:
                done = number * runs + line
                yield Progress(done, len(artifacts) * runs, artifact.label, "runs")


def _lines(asked: dict[str, Any], label: str) -> Iterator[int | Note | Speed]:
    """Runs done so far, remarks, and at last the result."""
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryFile() as said:
        child = subprocess.Popen(
            [sys.executable, "-m", _CHILD],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, text=True,
        )  # fmt: skip
        with child:
            assert child.stdin is not None
            assert child.stdout is not None
            try:
                child.stdin.write(json.dumps(asked))
                child.stdin.close()
                for line in child.stdout:
                    found.append(json.loads(line))
                    yield min(len(found), asked["runs"])
            finally:
                if child.poll() is None and len(found) <= asked["runs"]:
                    child.kill()
        said.seek(0)
        reason = said.read().decode(errors="replace").strip().rpartition("\n")[2]
    if child.returncode < 0 and asked["repack"]:
        yield Note(
            f"llama.cpp crashed on {label} with its weights reordered for this processor, so its "
            "speed is measured without",
            "warning",
        )
        yield from _lines(asked | {"repack": False}, label)
        return
    if child.returncode != 0 or len(found) != asked["runs"] + 1:
        raise SourceError(
            f"{label}: llama.cpp cannot run it ({reason or f'status {child.returncode}'})",
            hint=f"'quantcli inspect {label}' shows what it holds",
        )
    *each, last = found
    yield Speed(
        tuple(run["prompt"] for run in each),
        tuple(run["generation"] for run in each),
        tuple(run["own_prompt"] for run in each),
        tuple(run["own_generation"] for run in each),
        memory=last["resident"] + last["device"],
        threads=asked["threads"],
        repacked=asked["repack"],
    )
