"""Ranks that run a model together: torch.distributed, and sums in an order that does not change.

Whoever starts them (torchrun, srun with the same variables) says where they meet, in MASTER_ADDR
and MASTER_PORT. Sums are of arrays in the host's memory, through gloo: an accelerator's leave it
once a layer anyway. A rank that ends closes its connections, so the others end with it at once; one
that hangs is given up after a time. What all compute alike is not exchanged.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from quantcli.errors import UsageError
from quantcli.ranks.joined import active_group, set_active
from quantcli.ranks.meeting import RankEndedError, read_timeout
from quantcli.ranks.share import Share

T = TypeVar("T")

_PATIENCE = 30
"""Times the time without a sign of life that one rank's share of a layer may take."""
_PART = 1 << 23
"""Values that are exchanged at once: 64 MB of float64."""


class Group:
    """Number ``index`` of ``count`` ranks that run one model; every method is called by all."""

    def __init__(self, share: Share) -> None:
        self.index, self.count = share.index, share.count

    def gather(self, value: T) -> list[T]:
        """Each rank's value, in the order of the ranks."""
        found: list[Any] = [None] * self.count
        self._call(lambda: dist.all_gather_object(found, value))
        return found

    def wait(self) -> None:
        """Until all ranks are here."""
        self._call(dist.barrier)

    def agree(self, facts: Mapping[str, object]) -> None:
        """UsageError, on the first rank that differs, where they have not the same facts."""
        for index, theirs in enumerate(self.gather(dict(facts))):
            for what, value in facts.items():
                if theirs.get(what) == value:
                    continue
                if self.index == 0 or index != 0:
                    raise RankEndedError(
                        f"rank {self.index} ends, since the ranks differ in {what}"
                    )
                raise UsageError(
                    f"rank {self.index} and rank 0 differ in {what}",
                    hint="give all of them the same command, model and version",
                )

    def add_up(self, array: NDArray[Any], takers: Sequence[int] | None = None) -> None:
        """Put the sum over all ranks into the ``array`` of the ``takers``, None for all.

        Of the others it is left as it was. float64, float32 or int64, with an axis at least.
        """
        if takers is not None and not takers:
            return
        values = array.reshape(-1)
        for start in range(0, len(values), _PART):
            part = torch.from_numpy(np.array(values[start : start + _PART]))
            if takers is None:
                self._call(lambda part=part: dist.all_reduce(part))  # type: ignore[misc]
            else:
                self._call(lambda part=part: dist.reduce(part, takers[0]))  # type: ignore[misc]
                self._pass_on(part, takers)
            if takers is None or self.index in takers:
                values[start : start + _PART] = part.numpy()

    def _pass_on(self, part: torch.Tensor, takers: Sequence[int]) -> None:
        """From the first of the takers to the others."""
        for taker in takers[1:]:
            if self.index == takers[0]:
                self._call(lambda taker=taker: dist.send(part, taker))  # type: ignore[misc]
            elif self.index == taker:
                self._call(lambda: dist.recv(part, takers[0]))

    def hand_over(self, array: NDArray[Any] | None, owner: int) -> NDArray[Any] | None:
        """The array of ``owner``, on rank 0; None on the others."""
        if owner == 0:
            return array if self.index == 0 else None
        if self.index == owner:
            if array is None:
                raise ValueError("there is nothing to hand over")
            header = torch.tensor([*array.shape, *[1] * (2 - array.ndim)])
            whole = torch.from_numpy(np.ascontiguousarray(array))
            self._call(lambda: dist.send(header, 0))
            self._call(lambda: dist.send(whole, 0))
        elif self.index == 0:
            header = torch.zeros(2, dtype=torch.int64)
            self._call(lambda: dist.recv(header, owner))
            whole = torch.empty(tuple(header.tolist()), dtype=torch.uint8)
            self._call(lambda: dist.recv(whole, owner))
            found: NDArray[Any] = whole.numpy()
            return found
        return None

    def give_all(self, array: NDArray[np.uint8] | None) -> NDArray[np.uint8]:
        """The array of rank 0, uint8 of two axes, on all; the others' is not looked at."""
        header = torch.tensor(array.shape if array is not None and self.index == 0 else (0, 0))
        self._call(lambda: dist.broadcast(header, 0))
        if array is not None and self.index == 0:
            whole = torch.from_numpy(np.ascontiguousarray(array))
        else:
            whole = torch.empty(tuple(header.tolist()), dtype=torch.uint8)
        self._call(lambda: dist.broadcast(whole, 0))
        found: NDArray[np.uint8] = whole.numpy()
        return found

    def _call(self, work: Callable[[], object]) -> None:
        try:
            work()
        except (RuntimeError, ValueError) as error:
            raise RankEndedError(
                f"rank {self.index} ends, since another rank has ended or answers no more",
                hint="what the other says tells why; the same command with --resume goes on",
            ) from error


@contextmanager
def join(share: Share | None) -> Iterator[Group | None]:
    """Meet the other ranks; None where there are none.

    UsageError where nothing says where they meet, RankEndedError where they do not come.
    """
    if share is None or not share.together:
        yield None
        return
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise UsageError(
            f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not set, by which "
            f"{share.count} ranks would find each other to run a model",
            hint="torchrun sets them; for srun set the first node's name and a free port",
        )
    seconds = read_timeout()
    try:
        store = dist.TCPStore(
            os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), share.count,
            share.index == 0 and not _has_agent(), timeout=timedelta(seconds=seconds),
            wait_for_workers=False,
        )  # fmt: skip
        dist.init_process_group(
            "gloo", store=dist.PrefixStore(f"quantcli/{_attempt()}", store), rank=share.index,
            world_size=share.count, timeout=timedelta(seconds=seconds),
        )  # fmt: skip
        dist.barrier()
    except (RuntimeError, ValueError) as error:
        raise RankEndedError(
            f"rank {share.index} has waited {seconds:g} s for the other {share.count - 1} at "
            f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}",
            hint="start all of them; what those say that have ended tells why",
        ) from error
    try:
        _set_patience(seconds * _PATIENCE)
        group = Group(share)
        set_active(group)
        yield group
    finally:
        set_active(None)
        dist.destroy_process_group()


def local_rank() -> int | None:
    """This rank's number on its machine, as torchrun tells it; None without ranks."""
    text = os.environ.get("LOCAL_RANK", "")
    return int(text) if active_group() is not None and text.isdecimal() else None


def _has_agent() -> bool:
    """Whether torchrun's agent serves the store already."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _attempt() -> str:
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")


def was_restarted() -> bool:
    """Whether torchrun has started the ranks again, after one of them had ended."""
    return _attempt() != "0"


def _set_patience(seconds: float) -> None:
    """Once all have come, a rank waits for another's share of the work as long as this."""
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), dist.group.WORLD)
