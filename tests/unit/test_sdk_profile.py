"""Packing a profile is deterministic, unpacking trusts nothing."""

import gzip
import io
import os
import tarfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from muster import profile
from muster.profile import ProfileRefused, pack, unpack

NAMES = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc"), exclude_characters="/\\"), min_size=1)
SAFE_NAMES = NAMES.filter(lambda name: name not in (".", "..") and len(name.encode()) <= 200)
TREES = st.dictionaries(SAFE_NAMES, st.one_of(st.binary(max_size=2000), st.none()), max_size=8)


def plant(folder: Path, tree: dict[str, bytes | None], *, nested: bool) -> None:
    folder.mkdir(parents=True)
    for name, content in tree.items():
        place = folder / "Default" if nested else folder
        place.mkdir(exist_ok=True)
        if content is None:
            (place / name).mkdir()
        else:
            (place / name).write_bytes(content)


def harvest(folder: Path) -> dict[str, bytes | None]:
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@given(TREES, st.booleans(), st.randoms())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_unpacking_gives_back_what_was_packed_whatever_the_order_of_creation(
    tmp_path_factory: pytest.TempPathFactory, tree: dict[str, bytes | None], nested: bool, random: object
) -> None:
    home = tmp_path_factory.mktemp("profiles")
    plant(home / "one", tree, nested=nested)
    plant(home / "two", dict(reversed(tree.items())), nested=nested)
    os.utime(home / "two", (0, 0))
    packed = pack(home / "one")
    assert packed == pack(home / "two")
    unpack(packed, home / "three")
    assert harvest(home / "three") == harvest(home / "one")
    assert pack(home / "three") == packed


def test_only_files_and_folders_are_packed_and_links_are_not_followed(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_text("s")
    folder = tmp_path / "profile"
    folder.mkdir()
    (folder / "Cookies").write_bytes(b"c")
    (folder / "SingletonLock").symlink_to("nowhere-12345")
    (folder / "Other").symlink_to(outside)
    os.mkfifo(folder / "pipe")
    unpack(pack(folder), tmp_path / "back")
    assert harvest(tmp_path / "back") == {"Cookies": b"c"}


def archive(*members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    body = io.BytesIO()
    with tarfile.open(fileobj=body, mode="w") as out:
        for info, content in members:
            info.size = len(content)
            out.addfile(info, io.BytesIO(content))
    return gzip.compress(body.getvalue())


def link(name: str, target: str, kind: bytes) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (archive((tarfile.TarInfo("good"), b"g"), (tarfile.TarInfo("../evil"), b"x")), "reaches out"),
        (archive((tarfile.TarInfo("good"), b"g"), (tarfile.TarInfo("/etc/evil"), b"x")), "reaches out"),
        (archive((tarfile.TarInfo("good"), b"g"), (tarfile.TarInfo("a/../../evil"), b"x")), "reaches out"),
        (archive((tarfile.TarInfo("good"), b"g"), (tarfile.TarInfo("..\\evil"), b"x")), "reaches out"),
        (archive((link("way", "/etc", tarfile.SYMTYPE), b""), (tarfile.TarInfo("way/evil"), b"x")), "neither"),
        (archive((link("way", "../outside", tarfile.LNKTYPE), b"")), "neither"),
        (archive((link("device", "", tarfile.CHRTYPE), b"")), "neither"),
        (archive((tarfile.TarInfo("a"), b"x"), (tarfile.TarInfo("a/b"), b"y")), "inside of a file"),
        (b"", "cut short"),
        (b"this is no archive", "damaged"),
        (gzip.compress(b"this is no archive" * 100), "damaged"),
        (archive((tarfile.TarInfo("good"), os.urandom(5000)))[:-200], "cut short"),
    ],
    # Not made of the data: gzip writes the second into it, in which each process collects the tests.
    ids=[
        "above",
        "absolute",
        "above by a detour",
        "above with backslashes",
        "through a symbolic link",
        "hard link",
        "device",
        "below a file",
        "nothing",
        "plain text",
        "packed text",
        "truncated",
    ],
)
def test_what_is_not_a_plain_tree_is_refused_before_anything_is_written(tmp_path: Path, data: bytes, said: str) -> None:
    with pytest.raises(ProfileRefused, match=said):
        unpack(data, tmp_path / "into")
    assert not (tmp_path / "into").exists()
    assert list(tmp_path.iterdir()) == []


def test_a_bomb_is_refused_by_its_bound_and_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile, "MAX_BYTES", 10_000)
    with pytest.raises(ProfileRefused, match="more than 10000 bytes"):
        unpack(archive((tarfile.TarInfo("zeros"), bytes(10_001))), tmp_path / "into")
    monkeypatch.setattr(profile, "MAX_ENTRIES", 3)
    with pytest.raises(ProfileRefused, match="3 entries"):
        unpack(archive(*((tarfile.TarInfo(str(number)), b"") for number in range(4))), tmp_path / "into")
    monkeypatch.setattr(profile, "_MAX_TAR_BYTES", 50_000)
    with pytest.raises(ProfileRefused, match="unpacks to more than"):
        unpack(gzip.compress(bytes(10**8)), tmp_path / "into")
    sparse = tarfile.TarInfo("sparse")
    sparse.type = tarfile.GNUTYPE_SPARSE
    with pytest.raises(ProfileRefused):
        unpack(archive((sparse, b"")), tmp_path / "into")


def test_a_folder_over_the_bound_is_not_packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile, "MAX_BYTES", 1000)
    (tmp_path / "big").write_bytes(bytes(1001))
    with pytest.raises(ProfileRefused, match="leave its caches out"):
        pack(tmp_path)


def test_a_link_left_in_the_folder_is_never_written_through(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_text("untouched")
    folder = tmp_path / "profile"
    folder.mkdir()
    (folder / "Default").symlink_to(outside)
    with pytest.raises(ProfileRefused, match="is a link"):
        unpack(archive((tarfile.TarInfo("Default/file"), b"x")), folder)
    (folder / "Cookies").symlink_to(outside / "file")
    unpack(archive((tarfile.TarInfo("Cookies"), b"new")), folder)
    assert (outside / "file").read_text() == "untouched"
    assert (folder / "Cookies").read_bytes() == b"new"


def test_other_files_of_the_folder_stay(tmp_path: Path) -> None:
    (tmp_path / "Preferences").write_text("p")
    (tmp_path / "Cookies").write_text("old")
    unpack(archive((tarfile.TarInfo("Cookies"), b"new")), tmp_path)
    assert harvest(tmp_path) == {"Preferences": b"p", "Cookies": b"new"}
