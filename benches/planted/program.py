"""Runs moewarden and keeps each result as a JSON file, so that a bench that was stopped goes on where it ended."""

import json
import shutil
import subprocess
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Json = dict[str, Any]


class Missing(Exception):
    """The program does not know an option or a value; the cell is skipped with this note."""


class Late(Exception):
    """The bench's time is over; the cell is left to a later run."""


class Failed(Exception):
    """The program failed."""


@dataclass
class Program:
    """The binary, and the folder for scratch files and results."""

    binary: Path
    out: Path
    threads: int = 1
    deadline: float = float("inf")  # of time.monotonic(): no cell begins later
    notes: dict[str, str] = field(default_factory=dict)
    locks: dict[Path, threading.Lock] = field(default_factory=lambda: defaultdict(threading.Lock))

    def run(self, command: str, args: list[str], folder: Path) -> float:
        """Runs a command into a fresh folder; returns its seconds."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        line = [str(self.binary), command, *args, "--output-dir", str(folder), "--device", "cpu", "--threads", str(self.threads)]
        start = time.monotonic()
        done = subprocess.run([*line, "--quiet"], capture_output=True, text=True, timeout=600)
        if done.returncode == 2:
            raise Missing(" ".join(done.stderr.strip().splitlines()[:1]))
        if done.returncode != 0:
            raise Failed(f"exit code {done.returncode}: {done.stderr.strip()[-400:]} ({' '.join(line[1:])})")
        return time.monotonic() - start

    def cell(self, model: str, name: str, compute: Callable[[Path], Json]) -> Json | None:
        """The result of a cell, computed unless it is kept; None if it was skipped or failed, with a note why."""
        file = self.out / "cells" / model / f"{name}.json"
        with self.locks[file]:
            return json.loads(file.read_text()) if file.exists() else self._compute(model, name, compute, file)

    def _compute(self, model: str, name: str, compute: Callable[[Path], Json], file: Path) -> Json | None:
        scratch = self.out / "scratch" / model / name
        try:
            if time.monotonic() > self.deadline:
                raise Late("not begun before the time of this run was over")
            result = compute(scratch / "run")
        except (Missing, Failed, Late, subprocess.TimeoutExpired, KeyError) as error:
            self.notes[f"{model} {name}"] = str(error) if isinstance(error, Late) else f"{type(error).__name__}: {error}"
            return None
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(".partial")
        partial.write_text(json.dumps(result))
        partial.rename(file)
        return result
