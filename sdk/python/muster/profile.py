"""A browser's profile folder as one part of a bundle: packed the same way every time, unpacked without trust.

Packing is deterministic, so that a profile that did not change has the hash it had, and is not stored again: entries
are sorted, and owners, modes and times are left out. Equal folders give equal bytes on the same zlib.
"""

from __future__ import annotations

import gzip
import io
import os
import stat
import tarfile
import zlib
from pathlib import Path, PurePosixPath

MAX_BYTES = 64 * 2**20
"""The most that a packed profile, and the files in it together, may have: the contract's bound on the part."""

MAX_ENTRIES = 10_000
"""The most files and folders of a profile; a browser's own has a few hundred."""

# What a tar of MAX_BYTES and MAX_ENTRIES has at most: headers, long names and padding are under 4 KiB an entry.
_MAX_TAR_BYTES = MAX_BYTES + 4096 * MAX_ENTRIES


class ProfileRefused(ValueError):
    """The folder or archive is larger than the bounds, or the archive is damaged or reaches out of its folder."""


def pack(folder: Path) -> bytes:
    """Returns the folder as the bytes of a `cookies.tar.gz`.

    Only regular files and folders are taken: links, sockets and pipes (a browser's locks) are left out, and links are
    not followed. A file that grows meanwhile is taken as it was read. Blocks; call it in a thread.

    Raises:
        ProfileRefused: it is larger than `MAX_BYTES` or `MAX_ENTRIES`.
        OSError: a file cannot be read.
    """
    body = io.BytesIO()
    total = count = 0
    with tarfile.open(fileobj=body, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for path in _entries(folder):
            info = tarfile.TarInfo(path.relative_to(folder).as_posix())
            count += 1
            data = b""
            if path.is_dir():
                info.type, info.mode = tarfile.DIRTYPE, 0o755
            else:
                room = MAX_BYTES - total
                with path.open("rb") as file:
                    data = file.read(room + 1)
                info.size, info.mode = len(data), 0o644
            total += len(data)
            if total > MAX_BYTES or count > MAX_ENTRIES:
                raise ProfileRefused(
                    f"{folder} has more than {MAX_BYTES} bytes or {MAX_ENTRIES} entries: leave its caches out"
                )
            archive.addfile(info, io.BytesIO(data))
    packed = io.BytesIO()
    # No name and no time in the header; gzip.compress would put the platform into it.
    with gzip.GzipFile(filename="", mode="wb", fileobj=packed, mtime=0, compresslevel=6) as out:
        out.write(body.getbuffer())
    if packed.tell() > MAX_BYTES:
        raise ProfileRefused(f"{folder} packs to {packed.tell()} bytes; at most {MAX_BYTES}")
    return packed.getvalue()


def unpack(data: bytes, folder: Path) -> None:
    """Writes the files of a `cookies.tar.gz` into a folder, which is made if need be; other files in it stay.

    Everything is checked before anything is written. Blocks; call it in a thread.

    Raises:
        ProfileRefused: the archive is damaged, larger than the bounds, or holds anything but files and folders inside.
        OSError: a file cannot be written.
    """
    entries = _checked(data)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in entries.items():
        if content is None:
            _real_folder(folder, name)
        else:
            _write(_real_folder(folder, name.parent) / name.name, content)


def _entries(folder: Path) -> list[Path]:
    found = []
    for parent, folders, files in os.walk(folder, onerror=_raise):
        here = Path(parent)
        folders[:] = [name for name in folders if not (here / name).is_symlink()]
        found += [here / name for name in folders]
        found += [here / name for name in files if stat.S_ISREG((here / name).lstat().st_mode)]
    return sorted(found, key=lambda path: path.relative_to(folder).parts)


def _raise(error: OSError) -> None:
    raise error


def _checked(data: bytes) -> dict[PurePosixPath, bytes | None]:
    """Returns the archive's files, and None for its folders, by name; every name lies inside."""
    entries: dict[PurePosixPath, bytes | None] = {}
    total = 0
    try:
        with tarfile.open(fileobj=io.BytesIO(_inflated(data)), mode="r:") as archive:
            for info in archive:
                name = _safe_name(info)
                if len(entries) >= MAX_ENTRIES or total + info.size > MAX_BYTES:
                    raise ProfileRefused(f"the archive has more than {MAX_BYTES} bytes or {MAX_ENTRIES} entries")
                if info.isdir():
                    entries.setdefault(name, None)
                    continue
                file = archive.extractfile(info)
                content = file.read() if file else b""
                if len(content) != info.size:
                    raise ProfileRefused("the archive is cut short")
                total += len(content)
                entries[name] = content
    except (tarfile.TarError, EOFError, UnicodeError, ValueError, OverflowError) as error:
        if isinstance(error, ProfileRefused):
            raise
        raise ProfileRefused(f"the archive is damaged: {error}") from None
    for name in entries:
        if any(entries.get(parent) is not None for parent in name.parents):
            raise ProfileRefused(f"the archive has {str(name)[:200]!r} inside of a file")
    return entries


def _inflated(data: bytes) -> bytes:
    inflater = zlib.decompressobj(wbits=31)
    try:
        # One byte over the bound shows a bomb without unpacking it.
        tar = inflater.decompress(data, _MAX_TAR_BYTES + 1)
    except zlib.error as error:
        raise ProfileRefused(f"the archive is damaged: {error}") from None
    if len(tar) > _MAX_TAR_BYTES:
        raise ProfileRefused(f"the archive unpacks to more than {_MAX_TAR_BYTES} bytes")
    if not inflater.eof:
        raise ProfileRefused("the archive is cut short")
    return tar


def _safe_name(info: tarfile.TarInfo) -> PurePosixPath:
    shown = info.name[:200]
    if not (info.isreg() or info.isdir()) or info.issparse():
        raise ProfileRefused(f"the archive holds {shown!r}, which is neither a plain file nor a folder")
    name = PurePosixPath(info.name)
    if name.is_absolute() or ".." in name.parts or not name.parts or "\\" in info.name or "\0" in info.name:
        raise ProfileRefused(f"the archive reaches out of its folder with {shown!r}")
    if ":" in name.parts[0] and os.name == "nt":
        raise ProfileRefused(f"the archive names a drive with {shown!r}")
    return name


def _real_folder(root: Path, name: PurePosixPath) -> Path:
    """Makes a folder below `root`; a link on the way, which an earlier run may have left, is refused."""
    here = root
    for part in name.parts:
        here = here / part
        if here.is_symlink():
            raise ProfileRefused(f"{here} is a link: unpack into a folder without links")
        here.mkdir(exist_ok=True)
    return here


def _write(path: Path, content: bytes) -> None:
    # A new file each time: writing through a link, or into a file that others have open, never happens.
    path.unlink(missing_ok=True)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    with os.fdopen(os.open(path, flags, 0o600), "wb") as file:
        file.write(content)
