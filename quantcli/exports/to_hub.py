"""Files and folders into a repository of the Hugging Face Hub, in one commit.

``huggingface_hub`` does the work: files go up one by one, those whose content the Hub has already
(an interrupted run's, say) are skipped, and the commit that makes them visible comes last, so the
repository never holds half a set. A repository that is not there is created, private unless said
otherwise. The token is the library's own (HF_TOKEN, or ``hf auth login``), and no message shows it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from quantcli import __version__
from quantcli.errors import SourceError, UsageError
from quantcli.events import Events, in_phase, take
from quantcli.interrupts import wait_unless_interrupted
from quantcli.sources.card import CARD
from quantcli.sources.gguf import open_gguf
from quantcli.sources.hub import dark, first_line, network_errors
from quantcli.types import Event, Note, Progress


@dataclass(frozen=True, slots=True)
class Upload:
    """What goes where: each file's name in the repository, and the file."""

    repo: str
    private: bool
    files: tuple[tuple[str, Path], ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(path.stat().st_size for _, path in self.files)


@dataclass(frozen=True, slots=True)
class Uploaded(Event):
    """The end of an upload: the repository's address, and the commit's."""

    url: str
    commit: str


def plan_upload(artifacts: Sequence[str | Path], repo: str, *, public: bool = False) -> Upload:
    """The files of ``artifacts``: of a folder all that is in it, of a split GGUF all its files.

    A folder's own files stand at the repository's top. UsageError or SourceError for a name that is
    no repository's, for what is not there, and for two files of one name.
    """
    check_repo(repo)
    found: dict[str, Path] = {}
    for artifact in map(Path, artifacts):
        for name, path in _files(artifact):
            if found.setdefault(name, path) != path:
                raise UsageError(
                    f"{path} and {found[name]} would both be {name} in {repo}",
                    hint="rename one, or push them into repositories of their own",
                )
    return Upload(repo, not public, tuple(sorted(found.items())))


def check_repo(repo: str) -> None:
    """UsageError unless ``repo`` is a name such as org/name."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UsageError(f"{repo!r} is not a repository's name: {error}") from None
    if repo.count("/") != 1:
        raise UsageError(f"{repo!r} names no owner", hint=f"say whose it is: your-name/{repo}")


def check_push(repo: str | None, *, public: bool, dry_run: bool) -> None:
    """Before hours of work: UsageError for a name or an option, SourceError without a token."""
    from huggingface_hub import get_token

    if repo is None:
        if public:
            raise UsageError("--public is for uploads", hint="add --push your-name/your-model")
        return
    check_repo(repo)
    if not dry_run and get_token() is None:
        raise SourceError(
            f"{repo}: there is no token of an account that may write there",
            hint="hf auth login, or set HF_TOKEN",
        )


def _files(artifact: Path) -> Iterator[tuple[str, Path]]:
    if artifact.is_dir():
        inside = [path for path in sorted(artifact.rglob("*")) if path.is_file()]
        # Unfinished output and whatever else is hidden stays here.
        names = [(path.relative_to(artifact), path) for path in inside]
        shown = [(each, path) for each, path in names if not any(p[0] == "." for p in each.parts)]
        if not shown:
            raise SourceError(f"{artifact}: there is no file in it")
        yield from ((each.as_posix(), path) for each, path in shown)
        return
    if not artifact.is_file():
        raise SourceError(f"{artifact}: there is no such file or folder")
    if artifact.suffix != ".gguf":
        yield artifact.name, artifact
        return
    store = open_gguf(artifact)
    store.close()
    yield from ((path.name, path) for path in store.files)


def upload_artifacts(
    artifacts: Sequence[str | Path], repo: str, *, public: bool = False
) -> Events[str]:
    """Upload what was made as a phase of a run; returns the repository's address."""
    wanted = plan_upload(artifacts, repo, public=public)
    done = yield from in_phase("uploading", take(upload(wanted), Uploaded))
    return done.url


def upload(wanted: Upload) -> Iterator[Event]:
    """Do it; yields notes, `Progress` in bytes and at last `Uploaded`.

    SourceError, in one sentence, for whatever the Hub or the way to it refuses. What was sent
    before is not sent again by the next run.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    api, total, done = HfApi(library_name="quantcli", library_version=__version__), wanted.nbytes, 0
    if CARD not in dict(wanted.files):
        yield Note(f"there is no {CARD} among the files: --to card writes a model card")
    with _explaining(wanted.repo), dark():
        before = api.repo_exists(wanted.repo)
        if not before:
            _wait(api.create_repo, wanted.repo, private=wanted.private, exist_ok=True)
            kind = "private" if wanted.private else "public"
            yield Note(f"{wanted.repo} was created as a {kind} repository")
        additions = []
        for name, path in wanted.files:
            yield Progress(done, total, name)
            additions.append(CommitOperationAdd(path_in_repo=name, path_or_fileobj=path))
            _wait(api.preupload_lfs_files, wanted.repo, additions=additions[-1:], num_threads=2)
            done += path.stat().st_size
        yield Progress(done, total, "commit")
        message = (
            f"Upload {wanted.files[0][0] if len(wanted.files) == 1 else 'files'} with quantcli"
        )
        made = _wait(api.create_commit, wanted.repo, operations=additions, commit_message=message)
    yield Uploaded(str(made.repo_url), str(made.oid))


def _wait(call: Any, *given: Any, **named: Any) -> Any:
    """The call's result; Ctrl-C does not wait for the network."""
    return wait_unless_interrupted(partial(call, *given, **named), threading.Event())


@contextmanager
def _explaining(repo: str) -> Iterator[None]:
    """Turns what ``huggingface_hub`` raises inside into a SourceError without the token in it."""
    refusals: tuple[type[Exception], ...] = (*network_errors(), RuntimeError, ValueError)
    try:
        yield
    except refusals as error:
        raise _explain(error, repo) from None


def _explain(error: Exception, repo: str) -> SourceError:
    reason: BaseException = error
    while reason.__cause__ is not None and not hasattr(reason, "response"):
        reason = reason.__cause__
    status = getattr(getattr(reason, "response", None), "status_code", None)
    said = first_line(reason)
    if status in (401, 403):
        return SourceError(
            f"{repo}: the Hub does not let this account write there",
            hint="hf auth login with a token that may write (or set HF_TOKEN), and check the owner",
        )
    if status is not None:
        hint = "run it again: what was sent is not sent again" if status >= 500 else None
        return SourceError(f"{repo}: the Hub answered: {said}", hint=hint)
    return SourceError(
        f"{repo}: the Hub cannot be reached: {said}",
        hint="run it again: what was sent is not sent again",
    )
