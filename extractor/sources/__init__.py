"""Where pairs come from. A kind of source is a module with two functions, and a line in the table below.

``parts(file, config) -> list[Part]`` plans the reading of one file, cheaply, in the driver.
``read(part, config) -> Iterator[Row]`` reads one part, in a worker, in bounded memory; whatever is wrong
with one row becomes that row's reason. Rows with pictures far away come as calls that fetch them.
"""

from __future__ import annotations

import importlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from common.errors import SourceError
from common.storage_errors import without_secrets
from extractor.config import IngestConfig
from extractor.sources.addresses import EXTENSIONS, find_files, kind_of
from extractor.sources.columns import say_columns
from extractor.sources.delimited import say_dialects
from extractor.sources.record import Part, Record, Row

SOURCES = {  # kind -> module with parts() and read()
    "webdataset": "extractor.sources.webdataset",
    "jsonl": "extractor.sources.jsonl",
    "csv": "extractor.sources.delimited",
    "parquet": "extractor.sources.parquet",
    "mmkd-features": "extractor.sources.mmkd_features",
}


def plan_sources(sources: list[str], config: IngestConfig) -> list[Part]:
    """Parts of all sources in the given order; within a folder or pattern, in the order of names.

    Raises:
        SourceError: A source is absent, of no known kind, empty, or lacks a column.
        StorageError: A source's storage cannot be reached.
    """
    files = [file for source in sources for file in find_files(source, config.format)]
    planned = [part for file in files for part in _module(_kind(file.uri, config)).parts(file, config)]
    say_columns(planned)
    say_dialects(planned)
    return planned


def read_part(part: Part, config: IngestConfig) -> Iterator[Record]:
    """The records of one part, in order."""
    return _in_order(_module(part.kind).read(part, config), config.fetch.at_once)


def _in_order(rows: Iterator[Row], at_once: int) -> Iterator[Record]:
    """Rows as records; as many fetches as ``at_once`` are under way, and no more than that are held."""
    waiting: deque[Record | Future[Record]] = deque()
    pool: ThreadPoolExecutor | None = None
    try:
        for row in rows:
            if callable(row):
                pool = pool or ThreadPoolExecutor(at_once, "mmkd-fetch")
                waiting.append(pool.submit(row))
            elif waiting:
                waiting.append(row)
            else:
                yield row
            if len(waiting) >= at_once:
                yield _taken(waiting)
        while waiting:
            yield _taken(waiting)
    finally:
        if pool is not None:
            pool.shutdown(cancel_futures=True)


def _taken(waiting: deque[Record | Future[Record]]) -> Record:
    first = waiting.popleft()
    return first.result() if isinstance(first, Future) else first


def _kind(uri: str, config: IngestConfig) -> str:
    kind = kind_of(uri) if config.format == "auto" else config.format
    if kind is None:
        endings = ", ".join(ending for endings in EXTENSIONS.values() for ending in endings)
        raise SourceError(
            f"The extension of {without_secrets(uri)} does not tell what it is (known: {endings}). "
            f"Name its kind with --format: {', '.join(SOURCES)}."
        )
    return kind


def _module(kind: str) -> Any:
    return importlib.import_module(SOURCES[kind])
