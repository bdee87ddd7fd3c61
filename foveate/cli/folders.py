"""Output folders: refused before the work if they are in the way, and never half-written."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from foveate.cli.errors import UseError


@contextmanager
def new_folder(name: str) -> Iterator[Path]:
    """A path beside the folder `name` to write to; it becomes that folder when everything went well.

    Raises UseError if the folder exists or cannot be made; after any error nothing is left behind.
    """
    target = Path(name).expanduser()
    if target.exists() or target.is_symlink():
        raise UseError(f"output folder {name} exists already; give a new one, or remove it")
    parent = target.absolute().parent
    if not parent.is_dir():
        raise UseError(f"output folder {name}: there is no folder {parent} to make it in")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UseError(f"output folder {name}: {parent} is not writable")
    part = parent / f".{target.name}.{os.getpid()}.part"
    try:
        yield part
        part.rename(target)
    except OSError as error:
        raise UseError(f"output folder {name} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def own_folder(name: str, marker: str) -> Path:
    """A folder that may be written to again and again: missing, empty, or holding our `marker` file."""
    target = Path(name).expanduser()
    if target.exists() and not target.is_dir():
        raise UseError(f"output folder {name} is a file; give a folder")
    if target.is_dir() and any(target.iterdir()) and not (target / marker).is_file():
        raise UseError(f"output folder {name} exists and holds other files; give an empty or new one")
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UseError(f"output folder {name} cannot be made: {error.strerror or error}") from None
    return target


def check_file(name: str, ending: str | None = None) -> Path:
    """Where a file is to be written; UseError before the work where it cannot be, or has another ending than asked."""
    path = Path(name).expanduser()
    if ending and path.suffix != ending:
        raise UseError(f"output file {name} must end in {ending}")
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise UseError(f"output file {name}: there is no folder {path.absolute().parent} to write a file in")
    return path
