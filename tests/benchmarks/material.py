"""What the benchmarks work on: lakes of real JPEGs of about 50 kB, and teachers of any size with random weights."""

import hashlib
import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

LEAST_BYTES, MOST_BYTES = 40_000, 120_000
"""Of the JPEGs that are used: 114 files of the shared data, 49 kB on average, most of 448 pixels a side."""

TINY_TEXT = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
TINY_VISION = {"image_size": 224, "layers": 1, "width": 32, "patch_size": 56, "head_width": 16}
B32_TEXT = {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12}
B32_VISION = {"image_size": 224, "layers": 12, "width": 768, "patch_size": 32}
S32_VISION = {"image_size": 224, "layers": 12, "width": 384, "patch_size": 32}
S32_TEXT = {"context_length": 77, "vocab_size": 49408, "width": 256, "heads": 4, "layers": 10}
SHORTEST = {"interpolation": "bicubic", "resize_mode": "shortest"}
LONGEST = {"interpolation": "bicubic", "resize_mode": "longest"}
BILINEAR = {"interpolation": "bilinear", "resize_mode": "shortest"}
NINE_PREPROCESSINGS = (SHORTEST, LONGEST, BILINEAR, BILINEAR, *[SHORTEST] * 5)
"""Three distinct geometries, shared by six, two and one teacher, as among the paper's nine."""


def default_data() -> Path:
    """Folder of real pictures, where the tests look for it too."""
    return Path(os.environ.get("MMKD_SHARED_DATA", ROOT.parent / "shared" / "data"))


def read_jpegs(data: Path, side: int | None = None) -> list[bytes]:
    """Real JPEG files of about 50 kB, in a fixed order.

    Args:
        data: Folder that is searched.
        side: None: the files as they are. Else each is enlarged to this many pixels along its long side and encoded
            anew at quality 85.

    Raises:
        SystemExit: There are none.
    """
    files = [file for pattern in ("*.jpg", "*.jpeg") for file in data.rglob(pattern) if "nasty" not in file.parts]
    found = [file for file in sorted(files) if LEAST_BYTES <= file.stat().st_size <= MOST_BYTES]
    if not found:
        raise SystemExit(
            f"{data} holds no JPEG of {LEAST_BYTES // 1000} to {MOST_BYTES // 1000} kB. Give a folder of real pictures "
            "with --data, or name it in MMKD_SHARED_DATA."
        )
    encoded = [file.read_bytes() for file in found]
    return encoded if side is None else [_enlarged(data, side) for data in encoded]


def _enlarged(encoded: bytes, side: int) -> bytes:
    from PIL import Image

    image = Image.open(io.BytesIO(encoded)).convert("RGB")
    scale = side / max(image.size)
    buffer = io.BytesIO()
    size = (round(image.width * scale), round(image.height * scale))
    image.resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def write_lake(folder: Path, jpegs: list[bytes], rows: int, shard_rows: int) -> str:
    """A lake of so many rows, written without ingest: the pictures come round again, every caption is another.

    Returns:
        Its address.
    """
    import pyarrow as pa

    from common.lake import create_lake, shard_name
    from common.schemas import PAIRS

    lake = create_lake(str(folder), shard_rows)
    for start in range(0, rows, shard_rows):
        made = [sample_row(row, jpegs[row % len(jpegs)]) for row in range(start, min(start + shard_rows, rows))]
        table = pa.Table.from_pylist(made, schema=PAIRS)
        lake.storage.write_table(f"pairs/{shard_name(start // shard_rows)}", table)
    return str(folder)


def write_tars(folder: Path, jpegs: list[bytes], rows: int, tar_rows: int) -> Path:
    """The same rows as WebDataset tars ``00000.tar`` and so on."""
    folder.mkdir()
    for start in range(0, rows, tar_rows):
        with tarfile.open(folder / f"{start // tar_rows:05d}.tar", "w") as tar:
            for row in range(start, min(start + tar_rows, rows)):
                pair = sample_row(row, jpegs[row % len(jpegs)])
                for suffix, data in (("jpg", pair["image"]), ("txt", pair["captions"][0].encode())):
                    member = tarfile.TarInfo(f"{row:08d}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return folder


def sample_row(row: int, jpeg: bytes) -> dict[str, Any]:
    """A row of pairs, as ingest would make it."""
    return {
        "sample_id": hashlib.sha256(str(row).encode()).hexdigest()[:32],
        "image": jpeg,
        "captions": [f"Finding {row % 97} in picture {row}: no sign of acute disease, the heart is of normal size."],
        "modality": "radiograph",
        "labels": [],
        "source": "benchmark",
        "source_key": str(row),
        "license": "see the shared data",
        "width": 448,
        "height": 448,
        "sha256": hashlib.sha256(jpeg).hexdigest(),
        "split": "train",
    }


def first_shards(lake: str, folder: Path, shards: int) -> str:
    """A lake that holds the first shards of another one, without copying their bytes.

    Returns:
        Its address.
    """
    from common.lake import shard_name

    (folder / "pairs").mkdir(parents=True)
    os.link(Path(lake) / "lake.json", folder / "lake.json")
    for index in range(shards):
        os.link(Path(lake) / "pairs" / shard_name(index), folder / "pairs" / shard_name(index))
    return str(folder)


def write_teacher(
    folder: Path,
    vision: dict[str, object],
    text: dict[str, object],
    dim: int = 64,
    seed: int = 0,
    preprocessing: dict[str, object] | None = None,
) -> str:
    """A real open_clip model with random weights, in the folder layout open_clip publishes.

    Returns:
        ``NAME=FOLDER``, as extract takes it; the name is the folder's.
    """
    import open_clip
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    config = {"embed_dim": dim, "vision_cfg": vision, "text_cfg": text}
    torch.manual_seed(seed)
    state = {key: value.contiguous() for key, value in open_clip.CLIP(**config).state_dict().items()}
    for key in state:
        if key.endswith("bn3.weight"):  # zero at first, which makes a ResNet give every picture the same vector
            state[key].fill_(1.0)
    save_file(state, str(folder / "open_clip_model.safetensors"))
    constants = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25], **(preprocessing or SHORTEST)}
    document = {"model_cfg": config, "preprocess_cfg": constants}
    (folder / "open_clip_config.json").write_text(json.dumps(document))
    return f"{folder.name}={folder}"


def write_base_teacher(folder: Path) -> list[str]:
    """One teacher of the size of ViT-B/32: on a CPU, it bounds the run."""
    return [write_teacher(folder / "base", B32_VISION, B32_TEXT, 512)]


def write_small_teacher(folder: Path) -> list[str]:
    """One teacher of the size of open_clip's ViT-S-32-alt: it bounds the run, and the run ends in minutes."""
    return [write_teacher(folder / "small", S32_VISION, S32_TEXT, 256)]


def write_tiny_teachers(folder: Path, count: int = 9) -> list[str]:
    """Teachers so small that decoding bounds the run, with up to three distinct geometries among them."""
    return [
        write_teacher(folder / f"tiny{place}", TINY_VISION, TINY_TEXT, 16, place, preprocessing)
        for place, preprocessing in enumerate(NINE_PREPROCESSINGS[:count])
    ]
