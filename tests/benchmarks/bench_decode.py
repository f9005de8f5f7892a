"""Pictures a second on one core through prepare, against Pillow with torchvision's transforms on the same files.

    python tests/benchmarks/bench_decode.py [--side PIXELS] [--runs N] [--rows N] [--record]

``--side 1792`` enlarges the pictures first, to the size of a publisher's figures, where scaled decoding pays.
"""

import argparse
import io
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from material import read_jpegs, write_lake, write_tiny_teachers
from paired import Comparison, conclude, in_turn, parser, workplace
from watch import CpuMeter

SIZE = 224


def pillow_and_torchvision(jpegs: list[bytes]) -> np.ndarray:
    """Uint8 [N, 224, 224, 3], as CLIP's own code does it: decode, resize, cut the middle out."""
    from PIL import Image
    from torchvision.transforms import CenterCrop, Compose, InterpolationMode, PILToTensor, Resize

    transform = Compose([Resize(SIZE, InterpolationMode.BICUBIC), CenterCrop(SIZE), PILToTensor()])
    pixels = [transform(Image.open(io.BytesIO(data)).convert("RGB")) for data in jpegs]
    return np.stack([pixels_CHW.permute(1, 2, 0).numpy() for pixels_CHW in pixels])


def torchvision_tensors(jpegs: list[bytes]) -> np.ndarray:
    """Uint8 [N, 224, 224, 3], decoded and resized by torchvision without Pillow: another decoder in the same dress."""
    import torch
    from torchvision.io import ImageReadMode, decode_jpeg
    from torchvision.transforms.v2.functional import InterpolationMode, center_crop, resize

    found = []
    for data in jpegs:
        pixels_CHW = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)
        pixels_CHW = resize(pixels_CHW, [SIZE], InterpolationMode.BICUBIC, antialias=True)
        found.append(center_crop(pixels_CHW, [SIZE, SIZE]).permute(1, 2, 0).numpy())
    return np.stack(found)


def prepared(lake: str, teacher: str, decode: str) -> Callable[[], np.ndarray]:
    """One shard through prepare, safe decoding in a child process and Arrow table included."""
    from extractor.config import ExtractConfig
    from extractor.partitions import describe_inputs, find_teachers
    from extractor.prepare import Prepare, rows_of

    config = ExtractConfig(teachers=(teacher,), towers="image", decode=decode)
    (item,) = describe_inputs(find_teachers(config), config).values()
    step = Prepare(lake, {item.name: item}, {0: (item.name,)}, decode=config.decode)
    return lambda: rows_of(step.prepare(0)[item.pixels]).reshape(-1, SIZE, SIZE, 3)


def measure(options: argparse.Namespace, folder: Path) -> tuple[list[Comparison], str]:
    """Compare, and tell how far the pixels are from those of the exact way."""
    import torch

    torch.set_num_threads(1)
    found = read_jpegs(options.data, options.side)
    jpegs = [found[row % len(found)] for row in range(options.rows)]
    lake = write_lake(folder / "lake", found, options.rows, options.rows)
    (teacher,) = write_tiny_teachers(folder, 1)  # bicubic, as nearly all CLIP models
    ways: dict[str, Callable[[], Any]] = {
        "Pillow and torchvision": lambda: pillow_and_torchvision(jpegs),
        "torchvision without Pillow": lambda: torchvision_tensors(jpegs),
        "prepare, scaled": prepared(lake, teacher, "scaled"),
        "prepare, fast": prepared(lake, teacher, "fast"),
        "prepare": prepared(lake, teacher, "exact"),
    }
    exact = ways["Pillow and torchvision"]().astype(int)
    for way, run in ways.items():  # also starts the decoding processes
        difference = np.abs(run().astype(int) - exact)
        print(f"{way}: pixels differ by {difference.mean():.3f} on average, at most {difference.max()} of 255")
    title = f"decoding, {np.mean([len(data) for data in found]) / 1e3:.0f} kB a file"
    by_clock, by_work = Comparison(title, "pictures/s, one process at work"), Comparison(title, "pictures/CPU s", 0.9)

    def timed(way: str) -> None:
        started = time.perf_counter()
        with CpuMeter() as meter:
            ways[way]()
            by_clock.add(way, options.rows / (time.perf_counter() - started))
        by_work.add(way, options.rows / meter.seconds)

    in_turn(options.runs, {way: (lambda way=way: timed(way)) for way in ways})
    return [by_clock, by_work], f"{options.rows} pictures, {options.side or 'as they are'}, one geometry of {SIZE}"


if __name__ == "__main__":
    arguments = parser(__doc__ or "", rows=456)
    arguments.add_argument("--side", type=int, help="long side that pictures are enlarged to (default: as they are)")
    chosen = arguments.parse_args()
    with workplace(chosen) as place:
        results, described = measure(chosen, place)
    conclude(results, chosen, described)
