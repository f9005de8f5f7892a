"""Small real things: model folders with random weights, a checkpoint of one, and a lake of coloured pictures."""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image, ImageDraw

from common.lake import Lake, create_lake, shard_name
from common.schemas import PAIRS

MODEL_CFG = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}
PREPROCESS_CFG = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.25, 0.3], "interpolation": "bicubic", "resize_mode": "shortest"}
COLOURS = {"normal": (40, 160, 60), "lesion": (200, 50, 40), "cyst": (40, 60, 200)}


@pytest.fixture(autouse=True, scope="session")
def _one_torch_thread():
    """Tiny models are slower on several threads, the more so when the machine is shared."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def new_model(seed: int):
    """A tiny open_clip CLIP with random weights."""
    import open_clip
    import torch

    torch.manual_seed(seed)
    return open_clip.model.CLIP(**{**MODEL_CFG, "embed_dim": 24})


@pytest.fixture
def model_folder(tmp_path):
    """Write an open_clip model folder: ``model_folder("name", seed=0) -> Path``."""
    from safetensors.torch import save_file

    def make(name: str, seed: int = 0) -> Path:
        folder = tmp_path / "models" / name
        folder.mkdir(parents=True)
        save_file(new_model(seed).state_dict(), folder / "open_clip_model.safetensors")
        config = {"model_cfg": MODEL_CFG, "preprocess_cfg": PREPROCESS_CFG}
        (folder / "open_clip_config.json").write_text(json.dumps(config))
        return folder

    return make


@pytest.fixture
def checkpoint(tmp_path):
    """Write a training checkpoint below a folder: ``checkpoint(run, step=10, seed=0, scale=3.2) -> Path``."""
    import torch
    from safetensors.torch import save_file

    def make(run: Path, step: int = 10, seed: int = 0, scale: float = 3.2, teachers: tuple[str, ...] = ()) -> Path:
        folder = run / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        save_file(new_model(seed).state_dict(), folder / "model.safetensors")
        save_file({"logit_scale": torch.tensor(scale)}, folder / "objective.safetensors")
        config = {"model_cfg": MODEL_CFG, "preprocess_cfg": PREPROCESS_CFG}
        (folder / "open_clip_config.json").write_text(json.dumps(config))
        manifest = {"stage": "stage2", "step": step, "teachers": list(teachers), "config": {"epochs": 3}}
        (folder / "checkpoint.json").write_text(json.dumps(manifest))
        return folder

    return make


def picture(label: str, rng: np.random.Generator, width: int = 48, height: int = 40) -> bytes:
    """A PNG of the label's colour with a disc and noise."""
    noise = rng.integers(0, 60, (height, width, 3))
    image = Image.fromarray(np.clip(np.array(COLOURS[label]) + noise, 0, 255).astype(np.uint8))
    x, y = rng.integers(5, 30, 2)
    ImageDraw.Draw(image).ellipse([x, y, x + 9, y + 9], fill=(250, 250, 250))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def pair(number: int, modality: str | None, label: str | None, split: str, rng: np.random.Generator) -> dict:
    """One row of PAIRS; every second sample has a further caption of its own."""
    captions = [f"{modality} showing {label}"] + ([f"case {number} of the series"] if number % 2 else [])
    return {
        "sample_id": f"{number:032x}",
        "image": picture(label or "normal", rng),
        "captions": captions,
        "modality": modality,
        "label": label,
        "source": "test",
        "source_key": str(number),
        "license": "CC-BY" if number % 3 else None,
        "width": 48,
        "height": 40,
        "sha256": f"{number:064x}",
        "split": split,
    }


@pytest.fixture
def small_lake(tmp_path) -> Lake:
    """Two shards: two modalities with labels, one with a single label; two thirds of the rows are of the test split."""
    rng = np.random.default_rng(7)
    kinds = [("x-ray", "normal"), ("x-ray", "lesion"), ("fundus", "cyst"), ("fundus", "normal"), ("fundus", "lesion")]
    kinds += [("specimen", "cyst")]
    rows = [pair(i, *kinds[i % 6], "test" if i % 9 < 6 else "train", rng) for i in range(72)]
    lake = create_lake(str(tmp_path / "lake"), shard_rows=40)
    for index, start in enumerate((0, 40)):
        table = pa.Table.from_pylist(rows[start : start + 40], schema=PAIRS)
        lake.storage.write_table(f"pairs/{shard_name(index)}", table)
    return lake
