"""``--report FOLDER``: a page and a card about what a command has just made or measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantcli.artifacts.write import ArtifactDone, default_threads
from quantcli.errors import UsageError
from quantcli.events import Show, drain, in_phase, take
from quantcli.exports.report.job import report_paths, write_report
from quantcli.run.outputs import KindsChosen, Quantized
from quantcli.run.request import Request
from quantcli.types import Event


@dataclass
class Report:
    """A report that is to be written; called with events, it keeps what kinds cost."""

    paths: tuple[Path, Path]
    force: bool
    threads: int
    chosen: list[KindsChosen] = field(default_factory=list)

    def __call__(self, event: Event) -> None:
        """Take an event of the run."""
        if isinstance(event, KindsChosen):
            self.chosen.append(event)

    def of_outputs(self, outputs: Sequence[Quantized], source: str, show: Show) -> tuple[Path, ...]:
        """Write it about what was quantized; its files."""
        made = [each.artifact.paths[0] for each in outputs if not each.is_tower]
        self.refuse_folders(made)
        return self.write(made, None, source, show)

    def refuse_folders(self, outputs: Sequence[Path | None]) -> None:
        """UsageError where an output is the report's own folder: its card would be there."""
        for path in outputs:
            if path is not None and path.absolute() == self.paths[0].parent.absolute():
                raise UsageError(
                    f"--report {path} is the output itself, which has a card of its own",
                    hint=f"name another folder, such as {path}-report",
                )

    def write(
        self, artifacts: Sequence[str | Path], evaluation: Mapping[str, Any] | None,
        against: str | None, show: Show,
    ) -> tuple[Path, ...]:  # fmt: skip
        """Write it about artifacts, with their errors against the model that they were made of."""
        writing = write_report(
            artifacts, self.paths, evaluation=evaluation, against=against, threads=self.threads,
            force=self.force, chosen=self.chosen,
        )  # fmt: skip
        return drain(in_phase("reporting", take(writing, ArtifactDone)), show).paths


def plan_report(
    folder: str | Path | None, *, force: bool, threads: int | None, check: bool = True
) -> Report | None:
    """Decide where it goes, before any work; OutputError where its files are there already."""
    if folder is None:
        return None
    paths = report_paths([], Path(folder), force=force, check=check)
    return Report(paths, force, threads or default_threads())


def plan_outputs_report(
    folder: str | Path | None, request: Request, *, check: bool = True
) -> Report | None:
    """`plan_report` for a quantization."""
    report = plan_report(folder, force=request.force, threads=request.threads, check=check)
    if report is not None:
        if all(wanted.recipe.mmproj_only for wanted in request.outputs):
            raise UsageError("--report is about text models", hint="leave it or --mmproj-only out")
        report.refuse_folders([wanted.path for wanted in request.outputs])
    return report


def files_to_push(outputs: Sequence[Quantized], pages: Sequence[Path]) -> list[Path]:
    """What was made, and the report's files where no output is a folder with a card of its own."""
    made = [path for done in outputs for path in done.artifact.paths]
    return [*made, *(() if any(path.is_dir() for path in made) else pages)]
