"""`export FILES --to report`: the page and the card, written together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from quantcli.artifacts.atomic import refuse_existing, write_file
from quantcli.artifacts.write import ArtifactDone
from quantcli.errors import OutputError
from quantcli.exports.report.facts import gather
from quantcli.exports.report.page import render_page
from quantcli.exports.report.plots import require_matplotlib
from quantcli.exports.report.set_card import render_set_card
from quantcli.run.outputs import KindsChosen
from quantcli.sources.card import CARD
from quantcli.types import Event

PAGE = "report.html"


def report_paths(
    artifacts: Sequence[str | Path], output: Path | None, *, force: bool, check: bool
) -> tuple[Path, Path]:
    """The page and the card: in ``output``, by default in the first artifact's folder."""
    require_matplotlib()
    folder = output if output is not None else Path(artifacts[0]).resolve().parent
    paths = folder / PAGE, folder / CARD
    if check:
        if folder.exists() and not folder.is_dir():
            raise OutputError(f"{folder} is a file", hint="name a folder with -o")
        if folder.is_dir():
            refuse_existing(paths, force=force)
    return paths


def write_report(
    artifacts: Sequence[str | Path],
    paths: tuple[Path, Path],
    *,
    evaluation: Mapping[str, Any] | None,
    against: str | None,
    threads: int,
    force: bool,
    chosen: Sequence[KindsChosen] = (),
) -> Iterator[Event]:
    """Read the artifacts and write both files; yields progress and at last `ArtifactDone`.

    ``evaluation`` is what `eval-ppl --json` prints.
    """
    files = [Path(name) for name in artifacts]
    facts = yield from gather(files, evaluation, against, chosen=chosen, threads=threads)
    page, card = render_page(facts), render_set_card(facts)
    paths[0].parent.mkdir(parents=True, exist_ok=True)
    write_file(paths[0], page, force=force)
    write_file(paths[1], card, force=force)
    yield ArtifactDone(paths, len(page) + len(card))
