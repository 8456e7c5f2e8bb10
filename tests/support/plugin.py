"""Plug-ins as distributions: a wheel made of given files, installed by pip into a folder."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

Quantcli = Callable[..., "subprocess.CompletedProcess[str]"]


def install(
    folder: Path, name: str, files: Mapping[str, str], entry_points: Mapping[str, str]
) -> Path:
    """The site folder in which the distribution ``name`` 1.0 was installed.

    ``entry_points`` are lines "NAME = MODULE:ATTRIBUTE" by their group.
    """
    info = f"{name}-1.0.dist-info"
    points = "".join(f"[{group}]\n{lines}\n" for group, lines in entry_points.items())
    contents = {
        **files,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/entry_points.txt": points,
    }
    record = "".join(f"{path},,\n" for path in [*contents, f"{info}/RECORD"])
    wheel = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, text in {**contents, f"{info}/RECORD": record}.items():
            archive.writestr(path, text)
    site = folder / "site"
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index"]
    subprocess.run([*command, "--target", str(site), str(wheel)], check=True, timeout=60)
    return site


def command(site: Path) -> Quantcli:
    """Runs the command line with the distributions of ``site``."""

    def run(*arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, "-m", "quantcli", *map(str, arguments)],
            env={**os.environ, "PYTHONPATH": str(site)},
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == code, done.stderr
        return done

    return run
