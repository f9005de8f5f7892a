"""Ingest by hand, the baseline of bench_ingest.py: ``python ingest_loop.py FOLDER_OF_TARS OUT``.

One process reads each tar, decodes every picture, drops exact duplicates and writes Parquet shards. It rejects nothing,
keeps no account, and one damaged picture ends it.
"""

import hashlib
import io
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

SHARD_ROWS = 1024


def rows_of(folder: Path) -> Iterator[dict[str, object]]:
    """Each pair of the tars, checked and without exact duplicates."""
    seen = set()
    for file in sorted(folder.glob("*.tar")):
        with tarfile.open(file) as tar:
            members = iter(tar)
            for picture, text in zip(members, members, strict=True):
                image, caption = (tar.extractfile(one).read() for one in (picture, text))  # type: ignore[union-attr]
                rgb = Image.open(io.BytesIO(image)).convert("RGB")
                sha256 = hashlib.sha256(image).hexdigest()
                if (sha256, caption) in seen:
                    continue
                seen.add((sha256, caption))
                yield {
                    "image": image,
                    "captions": [caption.decode()],
                    "source_key": f"{file.name}/{picture.name}",
                    "width": rgb.width,
                    "height": rgb.height,
                    "sha256": sha256,
                }


def main(folder: Path, out: Path) -> None:
    """Write the shards."""
    out.mkdir(parents=True)
    waiting: list[dict[str, object]] = []

    def flush() -> None:
        file = out / f"shard-{len(list(out.iterdir())):06d}.parquet"
        pq.write_table(pa.Table.from_pylist(waiting), file, compression="zstd")
        waiting.clear()

    for row in rows_of(folder):
        waiting.append(row)
        if len(waiting) == SHARD_ROWS:
            flush()
    if waiting:
        flush()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
