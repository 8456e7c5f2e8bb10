"""Commands that run a model, as one of the ranks that torchrun or the like has started."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from quantcli.errors import UsageError

if TYPE_CHECKING:
    from quantcli.cli.output import Output
    from quantcli.ranks.share import Share


@contextmanager
def joined_ranks(out: Output, **undivided: Any) -> Iterator[Share | None]:
    """Meet the others, if RANK and WORLD_SIZE say that there are some; the first one talks.

    UsageError for an option that ranks do not divide.
    """
    from quantcli.ranks.share import ENVIRONMENT, read_share

    share = read_share(ENVIRONMENT)
    if share is None:
        yield None
        return
    for name, value in undivided.items():
        if value:
            flag = "--" + name.replace("_", "-")
            raise UsageError(
                f"ranks do not divide {flag}", hint="leave it out, or unset RANK and WORLD_SIZE"
            )
    if not share.speaks:
        out.leave_talk_to_others()
    from quantcli.layerwise.require_torch import require_torch

    require_torch()
    from quantcli.ranks.group import join

    with join(share):
        yield share
