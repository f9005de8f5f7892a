"""Samples a second of the reader of aligned shards against one file a sample, and against a tar read as a stream.

    python tests/benchmarks/bench_reader.py [--runs N] [--rows N] [--record]

All hold the same vectors of nine teachers, of the widths of the paper's. The first baseline is the layout in which
MMKD-CLIP's features are distributed, as its data set class reads them: a ``.pt`` file for each sample, ``torch.load``.
The second is a WebDataset: the same tensors in tars. Every way ends with the same: for each teacher float32 [B, D] for
pictures and for captions, and a mask. Pictures are left out, since all have the same. Shards are read in their order,
as the others are, and once more by the very function of stage 2's reading tasks, which shuffles them and also joins
captions and numbers to draw by: the target is that one's.

Rates are taken twice: per CPU second with every file in memory, and by the clock with none there, as when millions of
samples come round once an epoch. Sizes are compared twice: with that one file, and with the two that the authors
distribute for a sample, of which the second holds the same vectors in their common space. From a lake those come by the
maps that ``mmkd align`` keeps. One more size is of a lake extracted with ``stored_precision=bfloat16``.
"""

import argparse
import io
import os
import tarfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from paired import Comparison, conclude, in_turn, parser, workplace
from watch import CpuMeter

if TYPE_CHECKING:
    from common.lake import Lake
    from trainer.data import TrainData

WIDTHS = {f"t{place}": width for place, width in enumerate((768, 512, 512, 512, 512, 512, 768, 512, 512))}
SPOKEN = 0.74
"""Share of samples for which a teacher speaks, as in the paper."""
BATCH = 256
SHARD_ROWS = 1024
COMMON_WIDTH = 512
"""Of the space of MMKD-CLIP's projected features."""
LEAST_RATIO, MOST_BYTES = 20.0, 1 / 3


def rounded(sides: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Vectors in bfloat16, as float32."""
    import torch

    image, text = (torch.from_numpy(side).bfloat16().float().numpy() for side in sides)
    return image, text


def vectors(rows: int) -> tuple[dict[str, tuple[np.ndarray, np.ndarray]], dict[str, np.ndarray]]:
    """Unit vectors of pictures and captions, rounded as they are stored, and where each teacher speaks."""
    draw = np.random.default_rng(0)

    def unit(width: int) -> np.ndarray:
        x = draw.normal(size=(rows, width)).astype(np.float32)
        return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float16).astype(np.float32)

    masks = {name: draw.random(rows) < SPOKEN for name in WIDTHS}
    return {name: (unit(width), unit(width)) for name, width in WIDTHS.items()}, masks


def write_files(folder: Path, found: dict[str, tuple[np.ndarray, np.ndarray]], masks: dict[str, np.ndarray]) -> None:
    """One ``.pt`` a sample, and the same bytes in tars of a shard's rows."""
    import torch

    rows = len(next(iter(masks.values())))
    for start in range(0, rows, SHARD_ROWS):
        with tarfile.open(folder / f"{start // SHARD_ROWS:06d}.tar", "w") as tar:
            for row in range(start, min(start + SHARD_ROWS, rows)):
                entries = {
                    f"{name}_{end}": torch.from_numpy(side[row].copy())
                    for name, sides in found.items()
                    if masks[name][row]
                    for end, side in zip(("img", "txt"), sides, strict=True)
                }
                place = folder / "files" / f"{row:08d}"
                place.mkdir(parents=True)
                torch.save(entries, place / "clips_output.pt")
                torch.save({name: torch.zeros(COMMON_WIDTH) for name in entries}, place / "clips_project_output.pt")
                tar.add(place / "clips_output.pt", f"{row:08d}.pt")


def write_shard(
    lake: "Lake",
    shard: int,
    ids: list[str],
    found: dict[str, tuple[np.ndarray, ...]],
    masks: dict[str, np.ndarray],
) -> None:
    """A shard of every teacher's embeddings, and of a selection that admits each where it speaks."""
    import pyarrow as pa

    from common.lake import shard_name
    from common.schemas import SELECTION, features_schema
    from extractor.prepare import fixed_rows
    from extractor.sink import write_single

    for name, sides in found.items():
        dim, absent = WIDTHS[name], pa.array(~masks[name])
        columns = {"sample_id": pa.array(ids)}
        for side, values in zip(("image", "text"), sides, strict=True):
            flat = fixed_rows(values).flatten()
            columns[f"{side}_embedding"] = pa.FixedSizeListArray.from_arrays(flat, dim, mask=absent)
            columns[f"{side}_norm"] = pa.array(np.ones(len(ids), np.float32), mask=~masks[name])
        schema = features_schema(dim, dim)
        columns["extra_text_embeddings"] = pa.array([[]] * len(ids), schema.field("extra_text_embeddings").type)
        features = pa.table({field: columns[field] for field in schema.names}, schema=schema)
        write_single(lake, name, shard, features, {"fingerprint": {"image_dim": dim, "text_dim": dim}})
        chosen = [{"sample_id": one, "admitted": bool(said)} for one, said in zip(ids, masks[name], strict=True)]
        selected = pa.Table.from_pylist(chosen, schema=SELECTION)
        lake.storage.write_table(f"selection/sel/teacher={name}/{shard_name(shard)}", selected)


def write_lake(
    folder: Path,
    found: dict[str, tuple[np.ndarray, np.ndarray]],
    masks: dict[str, np.ndarray],
    name: str = "lake",
) -> str:
    """The same as a lake, by the functions that extract and select write with."""
    import pyarrow as pa

    from common.lake import create_lake, shard_name
    from common.schemas import PAIRS

    lake = create_lake(str(folder / name), SHARD_ROWS)
    rows = len(next(iter(masks.values())))
    fixed = {
        "image": b"",
        "captions": ["a"],
        "labels": [],
        "source": "s",
        "source_key": "k",
        "width": 1,
        "height": 1,
        "split": "train",
    }
    for start in range(0, rows, SHARD_ROWS):
        ids = [f"{row:032x}" for row in range(start, min(start + SHARD_ROWS, rows))]
        table = pa.Table.from_pylist([{"sample_id": one, "sha256": one, **fixed} for one in ids], schema=PAIRS)
        lake.storage.write_table(f"pairs/{shard_name(start // SHARD_ROWS)}", table)
        here = slice(start, start + len(ids))
        sides = {name: tuple(values[here] for values in both) for name, both in found.items()}
        write_shard(lake, start // SHARD_ROWS, ids, sides, {name: mask[here] for name, mask in masks.items()})
    return lake.uri


Sides = dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]
"""Teacher -> float32 [B, D] of pictures, of captions, and bool [B]."""


def collate(loaded: list[dict]) -> Sides:
    """Samples' tensors as dense batches."""
    batch: Sides = {}
    for name, width in WIDTHS.items():
        image, text = (np.zeros((len(loaded), width), np.float32) for _ in range(2))
        mask = np.array([f"{name}_img" in entries for entries in loaded])
        for row in np.flatnonzero(mask):
            image[row], text[row] = loaded[row][f"{name}_img"].numpy(), loaded[row][f"{name}_txt"].numpy()
        batch[name] = image, text, mask
    return batch


def read_files(folder: Path) -> Iterator[Sides]:
    """As the authors' data set class: one ``torch.load`` a sample."""
    import torch

    places = sorted((folder / "files").iterdir())
    for start in range(0, len(places), BATCH):
        yield collate([torch.load(place / "clips_output.pt") for place in places[start : start + BATCH]])


def read_tars(folder: Path) -> Iterator[Sides]:
    """As a WebDataset is read: tars as streams, each member decoded."""
    import torch

    loaded: list[dict] = []
    for file in sorted(folder.glob("*.tar")):
        with tarfile.open(file, "r|") as tar:
            for member in tar:
                content = tar.extractfile(member)
                assert content is not None
                loaded.append(torch.load(io.BytesIO(content.read())))
                if len(loaded) == BATCH:
                    yield collate(loaded)
                    loaded = []
    if loaded:
        yield collate(loaded)


def read_shards(lake_uri: str) -> Iterator[Sides]:
    """As stage 2 reads: aligned shards side by side, ids compared, dense batches with masks."""
    from common.lake import Lake
    from trainer.data import FEATURE_COLUMNS, read_selection, teacher_columns

    lake = Lake(lake_uri)
    for shard in lake.shards():
        pairs = lake.read_pairs(shard, ["sample_id"])
        sides = {}
        for name in WIDTHS:
            features = lake.read_features(name, shard, FEATURE_COLUMNS)
            assert features["sample_id"].equals(pairs["sample_id"])
            admitted = read_selection(lake, "sel", name, shard, pairs)["admitted"]
            named = [f"{name}/{column}" for column in features.column_names]
            table = features.rename_columns(named).append_column(f"{name}/admitted", admitted)
            dense = teacher_columns(table, name, np.zeros(len(table), np.int64))
            sides[name] = dense["image"], dense["text"], dense["image_mask"]
        for start in range(0, pairs.num_rows, BATCH):
            part = slice(start, start + BATCH)
            yield {name: (image[part], text[part], mask[part]) for name, (image, text, mask) in sides.items()}


def stage2_data(lake_uri: str) -> "TrainData":
    """What stage 2 gives to its reading tasks; made once in a run."""
    from common.lake import open_lake
    from trainer.architecture import resolve_architecture
    from trainer.config import DataConfig
    from trainer.data import TrainData
    from trainer.launch import build_order, find_rows

    lake, names = open_lake(lake_uri), tuple(WIDTHS)
    settings = DataConfig(batch_size=BATCH)
    order = build_order(find_rows(lake, names, "sel", settings.seed), settings, lake)
    return TrainData(lake_uri, order, resolve_architecture("ViT-B-32"), 1.0, names, "sel")


def read_shuffled(data: "TrainData") -> Iterator[tuple[np.ndarray, Sides]]:
    """As stage 2's reading tasks, one epoch: the rows of each block, and their batch."""
    from trainer.data import read_blocks

    for segment in data.order.segments(0, data.order.steps_per_epoch):
        for block in read_blocks(data, segment, range(data.order.lanes)):
            sides = {}
            for name, width in WIDTHS.items():
                image, text = (
                    block[f"{name}/{side}"].combine_chunks().flatten().to_numpy().reshape(-1, width)
                    for side in ("image", "text")
                )
                sides[name] = image, text, block[f"{name}/image_mask"].to_numpy()
            yield np.array([int(one, 16) for one in block["sample_id"].to_pylist()]), sides


def insist_on_same(ways: dict[str, Callable[[], Iterator[Sides]]], data: "TrainData") -> None:
    """Insist that all ways read the same, sample by sample."""
    whole: list[Sides] = []
    for batches in zip(*(run() for run in ways.values()), strict=True):
        whole.append(batches[0])
        for name in WIDTHS:
            for other in batches[1:]:
                for left, right in zip(batches[0][name], other[name], strict=True):
                    np.testing.assert_array_equal(left, right)
    in_order = {
        name: [np.concatenate(part) for part in zip(*(one[name] for one in whole), strict=True)] for name in WIDTHS
    }
    seen = 0
    for rows, sides in read_shuffled(data):
        seen += len(rows)
        for name in WIDTHS:
            for left, right in zip(in_order[name], sides[name], strict=True):
                np.testing.assert_array_equal(left[rows], right)
    assert seen >= len(in_order["t0"][2]) - 2 * BATCH, "most samples come by in an epoch"


def forget(folder: Path) -> None:
    """Have the kernel drop the files' content from memory; their names and places it may keep."""
    os.sync()  # what is not yet written cannot be dropped
    for file in folder.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def measure(options: argparse.Namespace, folder: Path) -> tuple[list[Comparison], str]:
    """Compare the rates and the sizes, after insisting that all read the same."""
    found, masks = vectors(options.rows)
    write_files(folder, found, masks)
    lake = write_lake(folder, found, masks)
    write_lake(folder, {name: rounded(sides) for name, sides in found.items()}, masks, "coarse")
    ways = {
        "one .pt a sample": lambda: read_files(folder),
        "tars of .pt": lambda: read_tars(folder),
        "aligned shards": lambda: read_shards(lake),
    }
    data = stage2_data(lake)
    insist_on_same(ways, data)
    ways["aligned shards, shuffled"] = lambda: (sides for _, sides in read_shuffled(data))
    rate = Comparison("teachers' vectors of a sample, samples", "samples per CPU second", LEAST_RATIO)
    from_disk = Comparison("teachers' vectors of a sample, files on disk only", "samples/s", LEAST_RATIO)
    size = Comparison("size of the vectors", "kB per sample", MOST_BYTES, at_most=True)
    distributed = Comparison("size of what is distributed for a sample", "kB per sample", MOST_BYTES, at_most=True)

    def time_way(way: str) -> None:
        with CpuMeter() as meter:
            rows = sum(len(batch["t0"][2]) for batch in ways[way]())
        rate.add(way, rows / meter.seconds)

    def time_from_disk(way: str) -> None:
        forget(folder)
        started = time.perf_counter()
        rows = sum(len(batch["t0"][2]) for batch in ways[way]())
        from_disk.add(way, rows / (time.perf_counter() - started))

    for measured in (time_way, time_from_disk):
        in_turn(options.runs, {way: partial(measured, way) for way in ways})
    shards, coarse = "lake/features/**/*.parquet", "coarse/features/**/*.parquet"
    for comparison, way, pattern in (
        (size, "one .pt a sample", "files/*/clips_output.pt"),
        (size, "tars of .pt", "*.tar"),
        (size, "aligned shards, bfloat16", coarse),
        (size, "aligned shards", shards),
        (distributed, "two .pt a sample", "files/*/*.pt"),
        (distributed, "aligned shards, bfloat16", coarse),
        (distributed, "aligned shards", shards),
    ):
        comparison.add(way, sum(file.stat().st_size for file in folder.glob(pattern)) / options.rows / 1e3)
    settings = f"{len(WIDTHS)} teachers, {options.rows} samples in shards of {SHARD_ROWS}"
    return [rate, from_disk, size, distributed], settings


if __name__ == "__main__":
    chosen = parser(__doc__ or "", rows=4096).parse_args()
    with workplace(chosen) as place:
        results, described = measure(chosen, place)
    conclude(results, chosen, described)
