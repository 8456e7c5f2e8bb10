"""A fixed part of the campaign of hostile inputs, and that its judgement finds faults.

``scripts/fuzz`` runs as many more as one likes.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
from support.fuzz import batch, child
from support.fuzz import campaign as campaigns
from support.fuzz.campaign import Campaign, clusters
from support.fuzz.case import Case, Command, Kind
from support.fuzz.kinds import KINDS

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="measures Linux's processes"),
]

SHARED = Path("/dev/shm")


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A place for many small files: in memory where there is one."""
    if not os.access(SHARED, os.W_OK):
        yield tmp_path
        return
    from tempfile import TemporaryDirectory

    with TemporaryDirectory(dir=SHARED) as name:
        yield Path(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind.trials])
def test_no_fault(name: str, folder: Path) -> None:
    kind = KINDS[name]
    for module in kind.imports:
        pytest.importorskip(module.partition(".")[0])
    campaign = Campaign(KINDS, folder)
    outcomes = list(campaign.run(name, 0, kind.trials))
    assert [o["number"] for o in outcomes] == list(range(kind.trials))
    assert not [label for label, _ in clusters(campaign.faults)], campaign.faults[:2]
    # Inputs that are all refused, or none of them, test little.
    assert len({bool(o["code"]) for o in outcomes}) == 2


def _broken() -> None:
    raise KeyError("nobody expects me")


def _panics() -> None:
    raise BaseException("rust")


def _waits() -> None:
    time.sleep(60)


def _takes() -> None:
    bytearray(child.MEMORY + (64 << 20))


def _dies() -> None:
    os.abort()


def _leaves() -> None:
    Path(".x.gguf.partial").mkdir()


def _fails_behind_a_file() -> None:
    from quantcli.errors import SourceError

    Path("x.gguf").write_bytes(b"half")
    raise SourceError("no")


def _destroys() -> None:
    Path("../in/m").write_bytes(b"gone")


def _forgets() -> None:
    Path(os.environ["TMPDIR"], "scratch").write_bytes(b"")


def _colours() -> None:
    sys.stdout.write("\x1b[31mred")


def _warns() -> None:
    import warnings

    warnings.warn("overflow", RuntimeWarning, stacklevel=1)


PLANTED: dict[str, tuple[Callable[[], None], str]] = {
    "bug": (_broken, "internal error"),
    "panic": (_panics, "traceback: BaseException: rust"),
    "endless": (_waits, "time"),
    "memory": (_takes, "memory"),
    "crash": (_dies, "crash: SIGABRT"),
    "partial": (_leaves, "left: a partial file"),
    "half": (_fails_behind_a_file, "left: a file of a failed command"),
    "input": (_destroys, "destroyed: an input"),
    "scratch": (_forgets, "left: a temporary file scratch"),
    "control": (_colours, "control characters"),
    "warning": (_warns, "noise"),
}


@pytest.mark.parametrize("planted", PLANTED)
def test_a_planted_fault_is_found(
    planted: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trial 2 alone has it, and the trials around it are run all the same."""
    act, expected = PLANTED[planted]
    draw = Random("planted 2").random()

    def make(chance: Random, place: Path, bases: Any) -> Case:
        (place / "m").write_bytes(b"2" if chance.random() == draw else b"another")
        return Case("a number", (Command(("inspect", "../in/m")),))

    def inspect(name: str, **options: Any) -> Any:
        from quantcli.errors import SourceError

        if Path(name).read_bytes() == b"2":
            act()
        raise SourceError("no model")

    monkeypatch.setattr(batch, "SECONDS", 1)
    monkeypatch.setattr(campaigns, "warm_up", lambda folder: None)
    monkeypatch.setattr("quantcli.api.inspect.inspect", inspect)
    campaign = Campaign({"planted": Kind("planted", lambda _: None, make)}, folder)
    outcomes = list(campaign.run("planted", 0, 5))
    assert [o["number"] for o in outcomes] == list(range(5))
    assert [o["number"] for o in outcomes if o["fault"]] == [2]
    assert outcomes[2]["fault"] == expected
