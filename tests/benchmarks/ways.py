"""The ways of embedding a lake that are compared, each in a process of its own: ``python ways.py WAY ORDER ANSWER``.

Every way answers with rows per second and per CPU second of all its processes, without its start-up.
"""

import itertools
import json
import os
import shutil
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from watch import CpuMeter, MemoryWatch, store_statistics

CORES = os.cpu_count() or 1
CHUNKS_AHEAD = 3
STEADY = 0.9
"""The last commits must come at this share of the rate that counts, or much of it was prepared before."""


Answer = dict[str, float]


@dataclass(frozen=True)
class Order:
    """What to embed and with what.

    Attributes:
        lake: Its address.
        teachers: ``NAME=FOLDER`` of open_clip models.
        micro_batch: Rows per forward pass.
        settings: Further settings of extract, by their names in ExtractConfig.
        pass_rows: Of the lake's rows, so many are enough to tell the rate of the passes; 0 takes all.
    """

    lake: str
    teachers: list[str]
    micro_batch: int = 64
    settings: dict[str, Any] = field(default_factory=dict)
    pass_rows: int = 0


def extract_way(order: Order) -> Answer:
    """mmkd extract, with a local Ray as its command starts it.

    The rate is that of the second half of the commits (a line through them, since they come in bunches). While the
    models load, shards are prepared ahead; the first commits after that come too fast to count.
    """
    from cluster.session import ray_session

    with CpuMeter() as meter, ray_session():
        started = time.time()
        _extract_anew(order)
        commits = _commits(order)
    times, rows = (np.array(column[len(column) // 2 :]) for column in zip(*commits, strict=True))
    start, last = commits[0][0] - started, max(0, min(len(times) // 2, len(times) - 2))
    whole, late = np.polyfit(times, rows, 1)[0], np.polyfit(times[last:], rows[last:], 1)[0]
    if late < STEADY * whole:
        print(
            f"WARNING: extract stored {whole:.1f} rows/s in the second half of its commits, but {late:.1f} in the "
            "last quarter: what was prepared during the start flatters it, or the machine is not idle. Raise --rows."
        )
    cpu = np.array([meter.seconds_at(moment) for moment in times])
    return {
        "per_second": float(np.polyfit(times, rows, 1)[0]),
        "per_cpu_second": float(np.polyfit(cpu, rows, 1)[0]),
        "start_seconds": start,
        "driver_share": meter.own_share(times[0], times[-1]),
    }


def _commits(order: Order) -> list[tuple[float, int]]:
    """When each further shard was stored for every teacher, and how many rows were there by then."""
    import pyarrow.parquet as pq

    folders = [Path(order.lake) / "features" / f"teacher={one.partition('=')[0]}" for one in order.teachers]
    names = sorted(file.name for file in folders[0].glob("shard-*.parquet"))
    stored = sorted((max((folder / name).stat().st_mtime for folder in folders), name) for name in names)
    total, commits = 0, []
    for moment, name in stored:
        total += pq.read_metadata(folders[0] / name).num_rows
        commits.append((moment, total))
    return commits


def watched_way(order: Order) -> Answer:
    """mmkd extract; answers with its greatest memory and what Ray spilled, in bytes, instead of rates."""
    from cluster.session import ray_session

    with ray_session():
        with MemoryWatch() as watch:
            _extract_anew(order)
        return {**watch.peaks, "spilled": float(store_statistics().spilled_bytes_total)}


def _extract_anew(order: Order) -> None:
    from extractor.config import ExtractConfig
    from extractor.pipeline import extract

    for left in ("features", "manifests", "runs", "rejects"):
        shutil.rmtree(Path(order.lake) / left, ignore_errors=True)
    extract(order.lake, ExtractConfig(teachers=tuple(order.teachers), micro_batch=order.micro_batch, **order.settings))


def trained_way(order: Order) -> Answer:
    """Stage 2 from a stage-1 run; answers with its greatest memory, in bytes, and the share of time it waited."""
    from cluster.session import ray_session
    from trainer.config import Stage2Config
    from trainer.stage2 import train_stage2

    lake = Path(order.lake)
    shutil.rmtree(lake / "runs" / "measured", ignore_errors=True)
    with ray_session(), MemoryWatch() as watch:
        train_stage2(order.lake, "measured", str(order.settings["init"]), Stage2Config(**order.settings["stage2"]))
    rows = [json.loads(line) for line in (lake / "runs/measured/metrics.jsonl").read_text().splitlines()]
    # The first row has the wait for the first batch, which is start-up.
    waits = [row["data_wait"] for row in rows[1:]] or [rows[0]["data_wait"]]
    rates = [row["samples_per_s"] for row in rows[1:]] or [rows[0]["samples_per_s"]]
    return {**watch.peaks, "data_wait": sum(waits) / len(waits), "samples_per_s": sum(rates) / len(rates)}


def loop_way(order: Order) -> Answer:
    """What one would write by hand for one machine: one process, one decode for all teachers, nothing stored.

    Pillow gives the interpreter free while it decodes, so threads decode the next chunks on all cores while the models
    run on the present one.
    """
    import torch

    from common.models.load import find_spec, load_model

    torch.set_num_threads(CORES)
    models = [load_model(find_spec(reference, {})) for reference in order.teachers]
    images, captions = next(_chunks(order.lake, order.micro_batch))
    geometries = {model.description.geometry.key: model.description.geometry for model in models}
    with ThreadPoolExecutor(CORES) as pool:  # once untimed: tokenizers are loaded, kernels are chosen
        _embed_chunk(models, [pool.submit(_squares, image, geometries) for image in images], captions)
    started = time.perf_counter()
    with CpuMeter() as meter:
        vectors = _embed_all(models, order.micro_batch, order.lake)
        seconds = time.perf_counter() - started
    rows = sum(len(found[0]) for found in vectors)
    return {"per_second": rows / seconds, "per_cpu_second": rows / meter.seconds}


def _embed_all(models: list[Any], micro_batch: int, lake: str) -> list[list[Any]]:
    vectors: list[list[Any]] = []
    waiting: deque[tuple[list[Future[dict[str, Any]]], list[str]]] = deque()
    geometries = {model.description.geometry.key: model.description.geometry for model in models}
    with ThreadPoolExecutor(CORES) as pool:
        for images, captions in _chunks(lake, micro_batch):
            waiting.append(([pool.submit(_squares, image, geometries) for image in images], captions))
            if len(waiting) > CHUNKS_AHEAD:
                vectors.append(_embed_chunk(models, *waiting.popleft()))
        while waiting:
            vectors.append(_embed_chunk(models, *waiting.popleft()))
    return vectors


def _squares(image: bytes, geometries: dict[str, Any]) -> dict[str, Any]:
    import io

    from PIL import Image

    from common.images import fit

    picture = Image.open(io.BytesIO(image)).convert("RGB")
    return {key: fit(picture, geometry) for key, geometry in geometries.items()}


def _embed_chunk(models: list[Any], decoding: list[Future[dict[str, Any]]], captions: list[str]) -> list[Any]:
    import torch

    decoded = [future.result() for future in decoding]
    pixels = {key: torch.from_numpy(np.stack([squares[key] for squares in decoded])) for key in decoded[0]}
    tokens: dict[str, torch.Tensor] = {}
    found = []
    with torch.inference_mode():
        for model in models:
            key = model.description.tokenizer_key
            if key not in tokens:
                tokens[key] = torch.from_numpy(model.tokenize(captions))
            towers = (model.encode_image(pixels[model.description.geometry.key]), model.encode_text(tokens[key]))
            found += [torch.nn.functional.normalize(vectors_BD).half().numpy() for vectors_BD in towers]
    return found


def passes_way(order: Order) -> Answer:
    """One pass for each teacher through a plain DataLoader, as clip-retrieval and TRIDENT work; nothing stored.

    Stock open_clip and torchvision; as many worker processes as there are cores; the encoded pictures lie in memory. A
    pass counts from its first batch on, so that loading the model and starting the workers is left out.
    """
    every = (pair for images, captions in _chunks(order.lake, 256) for pair in zip(images, captions, strict=True))
    pairs = list(itertools.islice(every, order.pass_rows or None))
    seconds, cpu_seconds = 0.0, 0.0
    for reference in order.teachers:
        moments: list[float] = []
        with CpuMeter() as meter:
            _one_pass(reference.partition("=")[2], pairs, order.micro_batch, moments)
        seconds += moments[-1] - moments[0]
        cpu_seconds += meter.seconds_at(moments[-1]) - meter.seconds_at(moments[0])
    rows = len(pairs) - min(order.micro_batch, len(pairs))
    return {"per_second": rows / seconds, "per_cpu_second": rows / cpu_seconds}


def _one_pass(folder: str, pairs: list[tuple[bytes, str]], batch_size: int, moments: list[float]) -> list[Any]:
    """Vectors of one teacher; the time at which each batch was done goes into ``moments``."""
    import open_clip
    import torch

    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    dataset = LoadedPairs(pairs, preprocess, open_clip.get_tokenizer(f"local-dir:{folder}"))
    loader = torch.utils.data.DataLoader(dataset, batch_size=batch_size, num_workers=CORES)
    model.eval()
    found = []
    with torch.inference_mode():
        for pixels_BCHW, tokens_BL in loader:
            towers = (model.encode_image(pixels_BCHW), model.encode_text(tokens_BL))
            found += [torch.nn.functional.normalize(vectors_BD).half().numpy() for vectors_BD in towers]
            moments.append(time.time())
    return found


class LoadedPairs:
    """Encoded pictures and captions in memory; decoded, transformed and tokenised one by one in the workers."""

    def __init__(self, pairs: list[tuple[bytes, str]], preprocess: Callable[..., Any], tokenize: Callable[..., Any]):
        self.pairs, self.preprocess, self.tokenize = pairs, preprocess, tokenize

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        import io

        from PIL import Image

        image, caption = self.pairs[index]
        return self.preprocess(Image.open(io.BytesIO(image))), self.tokenize([caption])[0]


def _chunks(lake: str, size: int) -> Iterator[tuple[list[bytes], list[str]]]:
    """Encoded pictures and main captions of a lake, so many rows at a time."""
    import pyarrow.parquet as pq

    for file in sorted((Path(lake) / "pairs").iterdir()):
        table = pq.read_table(file, columns=["image", "captions"])
        for start in range(0, table.num_rows, size):
            part = table.slice(start, size)
            yield part["image"].to_pylist(), [captions[0] for captions in part["captions"].to_pylist()]


WAYS = {"extract": extract_way, "watched": watched_way, "loop": loop_way, "passes": passes_way, "trained": trained_way}


if __name__ == "__main__":
    from common.logs import configure_logs

    configure_logs()
    way, asked, answered = sys.argv[1:]
    answer = WAYS[way](Order(**json.loads(Path(asked).read_text())))
    Path(answered).write_text(json.dumps(answer))
