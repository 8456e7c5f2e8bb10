"""On a system without POSIX: every module can be imported, and a plain run gives the same bytes.

Windows is not at hand, so a process is stripped of what Windows lacks, before anything is imported:
modules, flags, functions and signals; folders cannot be opened, and open files cannot be renamed.
"""

from __future__ import annotations

import ast
import hashlib
import subprocess
import sys
from pathlib import Path

import pytest

import quantcli

STRIP = """
import asyncio, concurrent.futures, ctypes, errno, importlib, multiprocessing, os, pathlib
import shutil, signal, subprocess, sys, tempfile, threading

# Other libraries have editions of their own for Windows.
for name in '''numpy ml_dtypes msgspec tokenizers huggingface_hub rich typer click tqdm httpx yaml
        jinja2 safetensors gguf fsspec'''.split():
    try:
        importlib.import_module(name)
    except ImportError:
        pass

for name in ("fcntl", "resource", "termios", "tty", "pty", "pwd", "grp", "posix", "syslog"):
    sys.modules[name] = None
GONE = '''O_DIRECTORY O_NOFOLLOW O_CLOEXEC O_NONBLOCK pread preadv pwrite pwritev geteuid getuid
    getgid getegid sysconf sched_getaffinity fchmod fchown chown posix_fallocate
    posix_fadvise mkfifo fork killpg setsid uname getloadavg sendfile copy_file_range sync
    set_blocking'''
for name in GONE.split():
    if hasattr(os, name):
        delattr(os, name)
SIGNALS = "SIGHUP SIGALRM SIGKILL SIGQUIT SIGUSR1 SIGPIPE setitimer getitimer ITIMER_REAL"
for name in SIGNALS.split():
    delattr(signal, name)
os.supports_dir_fd = set()
shutil._use_fd_functions = False

real_open, real_replace, real_unlink, real_cdll = os.open, os.replace, os.unlink, ctypes.CDLL

def open_no_folder(path, flags, mode=0o777, *, dir_fd=None):
    if dir_fd is not None:
        raise NotImplementedError("dir_fd unavailable on this platform")
    if os.path.isdir(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))
    return real_open(path, flags, mode)

def refuse_open(path):
    for entry in os.listdir("/proc/self/fd"):
        try:
            held = os.readlink(f"/proc/self/fd/{entry}")
        except OSError:
            continue
        if held == os.path.realpath(path):
            raise PermissionError(errno.EACCES, "it is used by another process", str(path))

def replace_closed(source, target, **options):
    refuse_open(source)
    refuse_open(target)
    return real_replace(source, target, **options)

def unlink_closed(path, **options):
    refuse_open(path)
    return real_unlink(path, **options)

def library(name, *more, **named):
    if name is None:
        raise TypeError("bad argument type for built-in operation")
    return real_cdll(name, *more, **named)

os.open, ctypes.CDLL = open_no_folder, library
os.replace = os.rename = replace_closed
os.unlink = os.remove = unlink_closed
"""
IMPORT_ALL = """
import pkgutil, importlib, quantcli
failed = []
for found in pkgutil.walk_packages(quantcli.__path__, "quantcli."):
    if found.name.endswith("__main__"):
        continue
    try:
        importlib.import_module(found.name)
    except ImportError as error:
        if getattr(error, "name", None) not in sys.argv[1:]:
            failed.append((found.name, repr(error)))
    except Exception as error:
        failed.append((found.name, repr(error)))
assert not failed, failed
"""
RUN = "from quantcli.cli.app import run\nsys.exit(run(sys.argv[1:]))\n"
MAY_BE_MISSING = (
    "torch", "triton", "transformers", "llama_cpp", "matplotlib", "pyarrow", "datasets", "lm_eval",
    "jinja2",
)  # fmt: skip


def _stripped(code: str, *words: str, before: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", before + STRIP + code, *words],
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip


@pytest.mark.slow
def test_every_module_can_be_imported() -> None:
    tried = (f"try:\n import {name}\nexcept ImportError:\n pass\n" for name in MAY_BE_MISSING)
    done = _stripped(IMPORT_ALL, *MAY_BE_MISSING, before="".join(tried))
    assert done.returncode == 0, done.stderr[-2000:]


def test_no_module_imports_what_windows_lacks_at_its_top() -> None:
    lacking = {"fcntl", "resource", "termios", "tty", "pty", "pwd", "grp", "syslog", "readline"}
    for path in Path(quantcli.__path__[0]).rglob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Import):
                names = {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names = {(node.module or "").partition(".")[0]}
            else:
                continue
            assert not names & lacking, path


@pytest.mark.parametrize(
    "words",
    [
        ["--type", "Q8_0", "--split-max-size", "2M"],
        ["--to", "gptq", "--bits", "4"],
    ],
)
def test_a_plain_run_gives_the_same_bytes(words: list[str], mini: Path, tmp_path: Path) -> None:
    from quantcli.cli.app import run as run_here

    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there):
        folder.mkdir()
    assert run_here(["quantize", str(mini), *words, "-q", "-o", f"{here}/"]) == 0
    done = _stripped(RUN, "quantize", str(mini), *words, "-q", "-o", f"{there}/")
    assert done.returncode == 0, done.stderr[-2000:]
    assert _digests(there) == _digests(here)
    # Nothing is replaced unasked, and with --force it is.
    done = _stripped(RUN, "quantize", str(mini), *words, "-q", "-o", f"{there}/")
    assert done.returncode == 1
    assert "exist" in done.stderr
    done = _stripped(RUN, "quantize", str(mini), *words, "-q", "-o", f"{there}/", "--force")
    assert done.returncode == 0, done.stderr[-2000:]
    assert _digests(there) == _digests(here)


def test_a_foreign_folder_is_left_alone(mini: Path, tmp_path: Path) -> None:
    partial = tmp_path / ".a.gguf.partial"
    partial.mkdir()
    (partial / "mine").write_text("keep")
    done = _stripped(RUN, "quantize", str(mini), "--bits", "4", "-o", str(tmp_path / "a.gguf"))
    assert done.returncode == 1
    assert "is not quantcli's" in done.stderr.replace("\n", " ")
    assert (partial / "mine").read_text() == "keep"


def test_other_commands_run(mini: Path, tmp_path: Path) -> None:
    made = tmp_path / "m.gguf"
    for words in (
        ["--version"],
        ["inspect", str(mini), "--fit", "2G"],
        ["quantize", str(mini), "--bits", "4", "--dry-run"],
        ["quantize", str(mini), "--bits", "4", "-q", "-o", str(made)],
        ["export", str(made), "--verify", "--against", str(mini)],
        ["export", str(made), "--to", "hf", "-o", str(tmp_path / "hf")],
    ):
        done = _stripped(RUN, *words)
        assert done.returncode == 0, (words, done.stderr[-2000:])


def _digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
