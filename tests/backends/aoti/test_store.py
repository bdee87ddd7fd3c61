"""The cache of compiled code: whole entries, of this user alone, with the hashes that were written."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from foveate.backends.aoti.store import Store, cache_folder
from foveate.errors import ArtifactError

KEY = "0123456789abcdef"


def write(folder: Path) -> None:
    (folder / "region.so").write_bytes(b"native code")
    (folder / "region.json").write_text("{}")


@pytest.fixture
def kept(tmp_path: Path) -> Store:
    found = Store(tmp_path / "cache")
    assert found.find(KEY) is None
    found.add(KEY, write)
    return found


def entry(kept: Store) -> Path:
    return kept.folder / KEY


def test_an_entry_is_found_again_and_is_private(kept: Store) -> None:
    code = kept.find(KEY)
    assert code == entry(kept) / "region.so" and code.read_bytes() == b"native code"
    for path in (kept.cache, kept.folder, kept.scratch, entry(kept)):
        assert path.stat().st_mode & 0o777 == 0o700
    for path in entry(kept).iterdir():
        assert path.stat().st_mode & 0o777 == 0o600
    assert sorted(path.name for path in kept.folder.iterdir()) == [KEY]


@pytest.mark.parametrize("name", ["", "region.so", "region.json", "manifest.json"])
def test_what_others_may_write_to_is_not_run(kept: Store, name: str) -> None:
    path = entry(kept) / name
    path.chmod(path.stat().st_mode | 0o020)
    with pytest.raises(ArtifactError, match="others may write to it"):
        kept.find(KEY)


@pytest.mark.parametrize("folder", ["cache", "folder"])
def test_nor_what_lies_in_such_a_cache(kept: Store, folder: str) -> None:
    path = getattr(kept, folder)
    path.chmod(0o777)
    with pytest.raises(ArtifactError, match=r"others may write to it \(mode 777\).*FOVEATE_CACHE"):
        kept.find(KEY)
    with pytest.raises(ArtifactError, match="others may write"):
        kept.add("another", write)


@pytest.mark.parametrize("name", ["", "region.so", "region.json", "manifest.json"])
def test_links_are_not_followed(kept: Store, name: str, tmp_path: Path) -> None:
    path = entry(kept) / name
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ArtifactError, match="it is a link"):
        kept.find(KEY)


def test_a_cache_that_is_a_link_is_not_used(kept: Store, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(kept.cache)
    with pytest.raises(ArtifactError, match="it is a link"):
        Store(tmp_path / "link").find(KEY)


def test_what_another_user_made_is_not_run(kept: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    me = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: me + 1)
    with pytest.raises(ArtifactError, match=f"it belongs to user {me}, and you are {me + 1}"):
        kept.find(KEY)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("name", ["", "region.so", "region.json", "manifest.json"])
def test_a_file_of_another_user_is_not_run(kept: Store, name: str) -> None:
    os.chown(entry(kept) / name, 12345, 12345)
    with pytest.raises(ArtifactError, match="it belongs to user 12345"):
        kept.find(KEY)


@pytest.mark.parametrize("name", ["region.so", "region.json"])
def test_another_content_is_not_run(kept: Store, name: str) -> None:
    (entry(kept) / name).write_bytes(b"native cOde")
    with pytest.raises(ArtifactError, match=rf"{name} is not what was compiled: its sha256 does not match"):
        kept.find(KEY)


def test_files_that_are_missing_or_too_many_are_refused(kept: Store) -> None:
    (entry(kept) / "more.so").write_bytes(b"")
    with pytest.raises(ArtifactError, match="holds files that foveate did not write"):
        kept.find(KEY)
    (entry(kept) / "more.so").unlink()
    (entry(kept) / "region.json").unlink()
    with pytest.raises((ArtifactError, FileNotFoundError)) as caught:
        kept.find(KEY)
    assert caught.type is ArtifactError and "region.json" in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2},
        {"key": "another"},
        {"files": {"region.json": "0"}},
        {"files": {"region.so": "0", "../region.so": "0"}},
        {"files": 3},
        None,
    ],
)
def test_a_damaged_manifest_is_one_error(kept: Store, change: dict[str, object] | None) -> None:
    path = entry(kept) / "manifest.json"
    text = "{" if change is None else json.dumps({**json.loads(path.read_text()), **change})
    path.write_text(text)
    with pytest.raises(ArtifactError, match=r"manifest.json is damaged"):
        kept.find(KEY)


def test_an_entry_under_another_name_is_refused(kept: Store) -> None:
    entry(kept).rename(kept.folder / "another")
    with pytest.raises(ArtifactError, match="it is another entry's"):
        kept.find("another")


def test_what_fails_leaves_nothing(kept: Store) -> None:
    def fail(folder: Path) -> None:
        write(folder)
        raise OSError(28, "No space left on device")

    with pytest.raises(ArtifactError, match="cannot be written: No space left on device"):
        kept.add("another", fail)
    assert sorted(path.name for path in kept.folder.iterdir()) == [KEY]


def test_of_two_that_compile_the_same_the_first_stays(kept: Store) -> None:
    def slower(folder: Path) -> None:
        (folder / "region.so").write_bytes(b"the second")

    assert kept.add(KEY, slower).read_bytes() == b"native code"
    assert sorted(path.name for path in kept.folder.iterdir()) == [KEY]


def test_a_process_killed_while_it_writes_leaves_no_entry(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path; from foveate.backends.aoti import store\n"
        "store.sha256 = lambda path: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"kept = store.Store(Path({str(tmp_path / 'cache')!r}))\n"
        f"kept.add({KEY!r}, lambda work: (work / 'region.so').write_bytes(b'code'))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False)
    assert done.returncode == -signal.SIGKILL
    kept = Store(tmp_path / "cache")
    assert kept.find(KEY) is None
    assert kept.add(KEY, write).read_bytes() == b"native code"


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FOVEATE_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("FOVEATE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "foveate"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "foveate"


def test_a_cache_that_cannot_be_written_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="cannot be written"):
        Store(tmp_path / "file").add(KEY, write)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
