"""A page in a headless Chromium."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chrome")


def open_page(
    page: Path, folder: Path, *, width: int = 1200, dark: bool = False
) -> tuple[str, str]:
    """The document as scripts leave it, and what Chromium says; ``folder`` gets its profile."""
    done = subprocess.run(
        [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
         f"--user-data-dir={folder / 'profile'}", f"--window-size={width},900",
         *(["--blink-settings=preferredColorScheme=0"] if dark else []), "--dump-dom",
         page.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    return done.stdout, done.stderr
