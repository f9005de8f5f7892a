"""The ways of embedding a lake that are compared, each in a process of its own: ``python ways.py WAY ORDER ANSWER``.

The order names a warm-up lake and lakes to time. Every way answers with the seconds and the CPU seconds that each timed
lake took; from two lakes of unlike length follows a rate without start-up (:func:`marginal_rate`).
"""

import json
import os
import shutil
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from watch import CpuMeter, MemoryWatch, store_statistics

CORES = os.cpu_count() or 1
CHUNKS_AHEAD = 3
ENOUGH = 2.0
"""So many times as long as until its first file should the shorter run of extract take."""


@dataclass(frozen=True)
class Order:
    """What to embed and with what.

    Attributes:
        warm_up: A small lake that is embedded first and not timed.
        lakes: Those that are timed, in this order.
        teachers: ``NAME=FOLDER`` of open_clip models.
        micro_batch: Rows per forward pass.
        settings: Further settings of extract, by their names in ExtractConfig.
    """

    warm_up: str
    lakes: list[str]
    teachers: list[str]
    micro_batch: int = 64
    settings: dict[str, Any] = field(default_factory=dict)


def marginal_rate(rows: list[int], seconds: list[float]) -> float:
    """Rows per second (or per CPU second) by which the longer of two runs exceeds the shorter.

    Whatever happens once (starting Ray, loading models, preparing ahead while they load, writing the report) is in both
    and falls out. The rate between the first and the last commit would flatter a pipeline that prepares ahead; so does
    this one, where the shorter run ends soon after its first commit (:func:`warn_of_short`).
    """
    return (rows[1] - rows[0]) / (seconds[1] - seconds[0])


def warn_of_short(answer: dict[str, list[float]]) -> None:
    """Say so if the shorter run of extract was mostly start-up."""
    whole, first = answer["seconds"][0], answer["first_file_seconds"][0]
    if whole < ENOUGH * first:
        print(
            f"The shorter run took {whole:.0f} s, and {first:.0f} s until its first file: too much was prepared during "
            "the start for its rate to mean much. Raise --rows, or wait until the machine is idle.",
            file=sys.stderr,
        )


def extract_way(order: Order) -> dict[str, list[float]]:
    """mmkd extract, with a local Ray as its command starts it."""
    from cluster.session import ray_session

    with ray_session():
        answer = _timed(order, partial(_extract_anew, order))
    reports = [json.loads(next(Path(lake).glob("runs/*/report.json")).read_text()) for lake in order.lakes]
    return {**answer, "first_file_seconds": [report["first_file_seconds"] for report in reports]}


def watched_way(order: Order) -> dict[str, list[float]]:
    """mmkd extract on the warm-up lake alone; answers with its greatest memory and what Ray spilled, in bytes."""
    from cluster.session import ray_session

    with ray_session():
        with MemoryWatch() as watch:
            _extract_anew(order, order.warm_up)
        found = {**watch.peaks, "spilled": float(store_statistics().spilled_bytes_total)}
    return {name: [value] for name, value in found.items()}


def _extract_anew(order: Order, lake: str) -> None:
    from extractor.config import ExtractConfig
    from extractor.pipeline import extract

    for left in ("features", "runs", "rejects"):
        shutil.rmtree(Path(lake) / left, ignore_errors=True)
    extract(lake, ExtractConfig(teachers=tuple(order.teachers), micro_batch=order.micro_batch, **order.settings))


def loop_way(order: Order) -> dict[str, list[float]]:
    """What one would write by hand for one machine: one process, one decode for all teachers, nothing stored.

    Pillow gives the interpreter free while it decodes, so threads decode the next chunks on all cores while the models
    run on the present one.
    """
    import torch

    from common.models.load import find_spec, load_model

    torch.set_num_threads(CORES)
    models = [load_model(find_spec(reference, {})) for reference in order.teachers]
    return _timed(order, partial(_embed_all, models, order.micro_batch))


def _embed_all(models: list[Any], micro_batch: int, lake: str) -> None:
    vectors: list[Any] = []
    waiting: deque[tuple[list[Future[dict[str, Any]]], list[str]]] = deque()
    geometries = {model.description.geometry.key: model.description.geometry for model in models}
    with ThreadPoolExecutor(CORES) as pool:
        for images, captions in _chunks(lake, micro_batch):
            waiting.append(([pool.submit(_squares, image, geometries) for image in images], captions))
            if len(waiting) > CHUNKS_AHEAD:
                vectors.append(_embed_chunk(models, *waiting.popleft()))
        while waiting:
            vectors.append(_embed_chunk(models, *waiting.popleft()))


def _squares(image: bytes, geometries: dict[str, Any]) -> dict[str, Any]:
    import io

    from PIL import Image

    from common.images import fit

    picture = Image.open(io.BytesIO(image)).convert("RGB")
    return {key: fit(picture, geometry) for key, geometry in geometries.items()}


def _embed_chunk(models: list[Any], decoding: list[Future[dict[str, Any]]], captions: list[str]) -> list[Any]:
    import numpy as np
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


def passes_way(order: Order) -> dict[str, list[float]]:
    """One pass for each teacher through a plain DataLoader, as clip-retrieval and TRIDENT work; nothing stored.

    Stock open_clip and torchvision; as many worker processes as there are cores; the encoded pictures lie in memory.
    """

    def embed(lake: str) -> None:
        rows = [pair for images, captions in _chunks(lake, 1024) for pair in zip(images, captions, strict=True)]
        for reference in order.teachers:
            _one_pass(reference.partition("=")[2], rows, order.micro_batch)

    return _timed(order, embed)


def _one_pass(folder: str, rows: list[tuple[bytes, str]], batch_size: int) -> list[Any]:
    import open_clip
    import torch

    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    dataset = LoadedPairs(rows, preprocess, open_clip.get_tokenizer(f"local-dir:{folder}"))
    loader = torch.utils.data.DataLoader(dataset, batch_size=batch_size, num_workers=CORES)
    model.eval()
    found = []
    with torch.inference_mode():
        for pixels_BCHW, tokens_BL in loader:
            towers = (model.encode_image(pixels_BCHW), model.encode_text(tokens_BL))
            found += [torch.nn.functional.normalize(vectors_BD).half().numpy() for vectors_BD in towers]
    return found


class LoadedPairs:
    """Encoded pictures and captions in memory, decoded, transformed and tokenised one by one in the workers."""

    def __init__(self, rows: list[tuple[bytes, str]], preprocess: Callable[..., Any], tokenize: Callable[..., Any]):
        self.rows, self.preprocess, self.tokenize = rows, preprocess, tokenize

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        import io

        from PIL import Image

        image, caption = self.rows[index]
        return self.preprocess(Image.open(io.BytesIO(image))), self.tokenize([caption])[0]


def _chunks(lake: str, size: int) -> Iterator[tuple[list[bytes], list[str]]]:
    """Encoded pictures and main captions of a lake, so many rows at a time."""
    import pyarrow.parquet as pq

    for file in sorted((Path(lake) / "pairs").iterdir()):
        table = pq.read_table(file, columns=["image", "captions"])
        for start in range(0, table.num_rows, size):
            part = table.slice(start, size)
            yield part["image"].to_pylist(), [captions[0] for captions in part["captions"].to_pylist()]


def _timed(order: Order, embed: Callable[[str], None]) -> dict[str, list[float]]:
    embed(order.warm_up)
    answer: dict[str, list[float]] = {"seconds": [], "cpu_seconds": []}
    for lake in order.lakes:
        started = time.perf_counter()
        with CpuMeter() as meter:
            embed(lake)
            answer["seconds"].append(time.perf_counter() - started)
        answer["cpu_seconds"].append(meter.seconds)
    return answer


WAYS = {"extract": extract_way, "watched": watched_way, "loop": loop_way, "passes": passes_way}


if __name__ == "__main__":
    from common.logs import configure_logs

    configure_logs()
    way, asked, answered = sys.argv[1:]
    answer = WAYS[way](Order(**json.loads(Path(asked).read_text())))
    Path(answered).write_text(json.dumps(answer))
