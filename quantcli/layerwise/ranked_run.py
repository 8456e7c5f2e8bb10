"""A run of a model by several ranks: the windows of each, and the one checkpoint of all."""

from __future__ import annotations

import secrets
import time
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from quantcli.artifacts.fingerprint import sample_model
from quantcli.artifacts.staging import own_folder
from quantcli.errors import OutputError, UsageError
from quantcli.layerwise.checkpoint import Checkpoint
from quantcli.layerwise.hidden_states import WindowsOfRank
from quantcli.layerwise.model_run import ModelRun, RunRanks
from quantcli.ranks.group import Group, was_restarted
from quantcli.ranks.joined import active_group
from quantcli.ranks.meeting import read_timeout


def share_windows(run: ModelRun, first: Collection[int] = ()) -> ModelRun:
    """The run's part of the windows, where this process has joined other ranks.

    Of those that are dealt ``first`` each rank gets its part as well.
    UsageError where there are not enough for all.
    """
    group = active_group()
    if group is None:
        return run
    total = len(run.windows.ids)
    if total < group.count:
        raise UsageError(
            f"{total} windows of text are too few for {group.count} ranks",
            hint="give more text, or start fewer ranks",
        )
    order = sorted(range(total), key=lambda number: (number not in first, number))
    numbers = tuple(sorted(order[group.index :: group.count]))
    own = run.folder / f"rank-{group.index}-of-{group.count}"
    return replace(
        run, folder=own, ranks=RunRanks(group, WindowsOfRank(numbers, total), run.folder)
    )


def begin_checkpoint(checkpoint: Checkpoint, run: ModelRun, *, resume: bool, force: bool) -> None:
    """Take the checkpoint's folder into use, by the first of several ranks for all of them."""
    ranks = run.ranks
    if ranks is None:
        checkpoint.begin(resume=resume, force=force)
        return
    group = ranks.group
    facts = dict(checkpoint.identity) | {"model": sample_model(run.model)}
    group.agree({f"the {what}": value for what, value in facts.items() if what != "device"})
    checkpoint.writes = group.index == 0
    if checkpoint.writes:
        checkpoint.begin(resume=resume or was_restarted(), force=force)
    checkpoint.done, checkpoint.turn = group.gather((checkpoint.done, checkpoint.turn))[0]
    _see_folder(checkpoint.folder, group)
    own_folder(run.folder, empty=False)


def leads() -> bool:
    """Whether this process does what one does for all: it is alone, or the first of the ranks."""
    group = active_group()
    return group is None or group.index == 0


def wait_until_seen(path: Path) -> None:
    """Until a file that the first rank has written is seen here; OutputError where it never is."""
    began = time.monotonic()
    while not leads() and not path.exists():
        if time.monotonic() - began > read_timeout():
            raise OutputError(
                f"{path}, which rank 0 has written, does not appear here",
                hint="-o in a folder that all machines share",
            )
        time.sleep(0.05)


def begin_folder(folder: Path, *, empty: bool) -> None:
    """Take a folder into use, by the first of several ranks for all of them.

    OutputError as `own_folder`, and on a rank that does not see it.
    """
    if leads():
        own_folder(folder, empty=empty)
    group = active_group()
    if group is not None:
        _see_folder(folder, group)


def _see_folder(folder: Path, group: Group) -> None:
    """OutputError on a rank that does not see what the first one writes into the folder."""
    token = group.gather(secrets.token_hex(8))[0]
    path = folder / f"token-{token}"
    if group.index == 0:
        path.write_text(token)
    group.wait()
    began = time.monotonic()
    while not path.exists():
        if time.monotonic() - began > read_timeout():
            raise OutputError(
                f"rank {group.index} does not see in {folder} what rank 0 has written there",
                hint="-o in a folder that all machines share",
            )
        time.sleep(0.05)
    group.wait()
    if group.index == 0:
        path.unlink()
