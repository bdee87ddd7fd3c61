"""Compiled regions of this user: folders of native code, which is run only where nobody else can have put it.

    $FOVEATE_CACHE/aoti/KEY/    region.so      what AOTInductor compiled
                                region.json    the ops that it asks torch for, if there are any
                                manifest.json  sha256 of both

KEY is a hash of what was compiled and of what for. An entry is written elsewhere in the cache and renamed, so that it
is there whole or not at all. The default of `$FOVEATE_CACHE` is `~/.cache/foveate`.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from foveate.errors import ArtifactError
from foveate.manifest import sha256

VARIABLE = "FOVEATE_CACHE"
FORMAT = 1
CODE = "region.so"
FILES = (CODE, "region.json")
MANIFEST = "manifest.json"
PRIVATE_FOLDER, PRIVATE_FILE = 0o700, 0o600
OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def cache_folder() -> Path:
    """`$FOVEATE_CACHE`, or `~/.cache/foveate`; it may not exist yet."""
    try:
        chosen = os.environ.get(VARIABLE)
        base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
        return (Path(chosen).expanduser() if chosen else base / "foveate").absolute()
    except RuntimeError:
        raise ArtifactError(f"there is no home folder to keep compiled code in: set {VARIABLE} to a folder") from None


class Store:
    """The compiled regions in a cache folder; scratch: what compilers need for more than one, such as headers."""

    def __init__(self, cache: Path) -> None:
        self.cache, self.folder, self.scratch = cache, cache / "aoti", cache / "torch"

    def find(self, key: str) -> Path | None:
        """The code of an entry, None where there is no such entry.

        Raises ArtifactError where the cache or the entry is not this user's alone, or not what was written.
        """
        for folder in (self.cache, self.folder, self.folder / key):
            if not os.path.lexists(folder):
                return None
            check_own(folder, stat.S_ISDIR)
        entry = self.folder / key
        files = _manifest(entry, key)
        for name in (MANIFEST, *files):
            check_own(entry / name, stat.S_ISREG)
        if {path.name for path in entry.iterdir()} != {MANIFEST, *files}:
            raise ArtifactError(f"{entry} holds files that foveate did not write; remove it, and it is compiled again")
        for name, expected in files.items():
            if sha256(entry / name) != expected:
                raise ArtifactError(
                    f"{entry / name} is not what was compiled: its sha256 does not match {MANIFEST}; remove {entry}, "
                    "and it is compiled again"
                )
        return entry / CODE

    def add(self, key: str, compile_into: Callable[[Path], None]) -> Path:
        """Let `compile_into` write `FILES` into a folder, and keep that as an entry; its code.

        Raises ArtifactError where the cache cannot be written or is not this user's alone.
        """
        try:
            for folder in (self.cache, self.folder, self.scratch):
                folder.mkdir(mode=PRIVATE_FOLDER, parents=True, exist_ok=True)
                check_own(folder, stat.S_ISDIR)
            work = Path(tempfile.mkdtemp(prefix=".compiling-", dir=self.folder))
        except OSError as error:
            raise ArtifactError(f"{self.folder} cannot be written: {error.strerror or error}") from None
        try:
            compile_into(work)
            _keep(work, self.folder / key, key)
        except OSError as error:
            raise ArtifactError(f"{self.folder / key} cannot be written: {error.strerror or error}") from None
        finally:
            shutil.rmtree(work, ignore_errors=True)
        found = self.find(key)
        assert found is not None  # it has just been renamed, by us or by another process
        return found


def _keep(work: Path, entry: Path, key: str) -> None:
    files = [name for name in FILES if (work / name).is_file()]
    for name in files:
        (work / name).chmod(PRIVATE_FILE)
    manifest = {"format": FORMAT, "key": key, "files": {name: sha256(work / name) for name in files}}
    (work / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    (work / MANIFEST).chmod(PRIVATE_FILE)
    try:
        work.rename(entry)
    except OSError:
        if not entry.is_dir():
            raise
        # Another process was faster, and its entry is checked as any is.


def check_own(path: Path, kind: Callable[[int], bool]) -> None:
    """Raise ArtifactError unless a path is of this kind, no link, this user's, and for nobody else to write to."""
    mend = "remove it, and it is compiled again"
    try:
        about = path.lstat()
    except OSError as error:
        raise ArtifactError(
            f"{path} cannot be read: {error.strerror}; remove its folder and compile it again"
        ) from None
    if stat.S_ISLNK(about.st_mode):
        reason = "it is a link"
    elif not kind(about.st_mode):
        reason = "it is no folder" if kind is stat.S_ISDIR else "it is no plain file"
    elif about.st_uid != os.geteuid():
        reason = f"it belongs to user {about.st_uid}, and you are {os.geteuid()}"
        mend = f"remove it, or set {VARIABLE} to a folder of yours"
    elif about.st_mode & OTHERS_WRITE:
        reason = f"others may write to it (mode {stat.S_IMODE(about.st_mode):o})"
        mend = f"remove it, or set {VARIABLE} to a folder that only you can write to"
    else:
        return
    raise ArtifactError(f"no compiled code is run from {path}: {reason}; {mend}")


def _manifest(entry: Path, key: str) -> dict[str, str]:
    """sha256 by name of an entry's files."""
    path = entry / MANIFEST
    try:
        check_own(path, stat.S_ISREG)
        read: Any = json.loads(path.read_text(encoding="utf-8"))
        files = read["files"]
        if read["format"] != FORMAT or read["key"] != key or not {CODE} <= set(files) <= set(FILES):
            raise ValueError("it is another entry's")
        return dict(files)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        text = str(error).splitlines() or [type(error).__name__]
        raise ArtifactError(f"{path} is damaged: {text[0]}; remove {entry}, and it is compiled again") from None
