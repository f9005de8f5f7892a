"""Upstream files on this machine: copied in pieces that an interrupted attempt leaves behind, and out of archives."""

from __future__ import annotations

import shutil
import zipfile
import zlib
from pathlib import Path
from urllib.parse import urlsplit

from common.config import fingerprint
from common.errors import ModelError
from common.logs import Progress, logger
from common.models.files import cache_folder
from common.models.spec import ModelSpec
from common.storage import Storage, absolute_address, without_secrets

CHUNK_BYTES = 8 << 20
ZIPPED = (".zip",)


def downloads_folder() -> Path:
    """Where files on their way into a store are kept, so that nothing is fetched or converted twice."""
    return cache_folder().parent / "downloads"


def gather(spec: ModelSpec, source: str) -> Path:
    """A model's upstream file or folder on this machine, from a place the user names.

    Args:
        spec: Says which files of an archive are wanted.
        source: A local path or any fsspec address, of a file, a zip archive or a folder.

    Raises:
        ModelError: There is nothing, or it is torn.
        StorageError: The address cannot be read.
    """
    storage = Storage(absolute_address(source))
    if storage.is_local:
        place = Path(storage.path())
        if not place.exists():
            raise ModelError(f"Model {spec.name!r}: there is nothing at {source}.")
        return _unzipped(spec, place) if place.suffix in ZIPPED else place
    folder = downloads_folder() / fingerprint([source, spec.name])
    folder.mkdir(parents=True, exist_ok=True)
    if storage.is_file():
        file = folder / urlsplit(source).path.rsplit("/", 1)[-1]
        download(storage, "", file)
        return _unzipped(spec, file) if file.suffix in ZIPPED else file
    names = storage.list_files()
    if not names:
        raise ModelError(f"Model {spec.name!r}: there is nothing at {without_secrets(source)}.")
    for name in names:
        download(storage, name, folder / name)
    return folder


def download(storage: Storage, relative: str, target: Path) -> None:
    """Copy a remote file to this machine in pieces, going on where an earlier attempt stopped.

    Raises:
        ModelError: Fewer bytes arrive than the source announces.
        StorageError: The source cannot be read.
    """
    path = storage.path(relative)
    size = storage.size(relative)
    # The mark keeps pieces of a file that has changed at its source apart from those of the new one.
    version = fingerprint([storage.version(relative), size])
    partial, done = target.with_name(f"{target.name}.{version}.part"), target.with_name(f"{target.name}.version")
    if target.is_file() and done.is_file() and done.read_text(encoding="utf-8") == version:
        return
    for stale in target.parent.glob(f"{target.name}.*.part"):
        if stale != partial:
            stale.unlink()
    progress = Progress(f"download {target.name}", (size or 0) >> 20, "MB")
    start = partial.stat().st_size if partial.is_file() and size is not None else 0
    if start:
        logger.info("download %s: going on after %d MB", target.name, start >> 20)
    progress.advance(start >> 20)
    with open(partial, "ab" if start else "wb") as out:
        for piece in storage.pieces(relative, start, size, CHUNK_BYTES):
            out.write(piece)
            progress.advance(len(piece) >> 20)
    found = partial.stat().st_size
    if size is not None and found != size:
        raise ModelError(f"{without_secrets(path)} ended after {found} of {size} bytes; run the same command again.")
    partial.replace(target)
    done.write_text(version, encoding="utf-8")


def _unzipped(spec: ModelSpec, archive: Path) -> Path:
    """The wanted files of a zip archive; only plain names are written, whatever paths the archive holds."""
    folder = downloads_folder() / fingerprint(
        [str(archive.absolute()), archive.stat().st_size, archive.stat().st_mtime_ns]
    )
    wanted = set(spec.source.files)
    try:
        with zipfile.ZipFile(archive) as opened:
            members = [m for m in opened.infolist() if not m.is_dir() and Path(m.filename).name in wanted]
            if {Path(member.filename).name for member in members} != wanted:
                listing = ", ".join(opened.namelist()[:8])
                raise ModelError(
                    f"Model {spec.name!r}: {archive} lacks {', '.join(sorted(wanted))}; it holds {listing}."
                )
            folder.mkdir(parents=True, exist_ok=True)
            for member in members:
                with opened.open(member) as stream, open(folder / Path(member.filename).name, "wb") as out:
                    shutil.copyfileobj(stream, out, CHUNK_BYTES)
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise ModelError(f"Model {spec.name!r}: {archive} is not a whole zip archive ({error}).") from error
    return folder
