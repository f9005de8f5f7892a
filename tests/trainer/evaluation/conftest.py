"""Small real things: model folders with random weights, a checkpoint of one, and a lake of coloured pictures."""

import copy
import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image, ImageDraw

from common.lake import Lake, create_lake, shard_name
from common.schemas import PAIRS
from common.storage import Storage
from trainer.architecture import Architecture
from trainer.checkpoint import MODEL, OBJECTIVE, OPTIMIZER, save_checkpoint

MODEL_CFG = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}
PREPROCESS_CFG = {
    "mean": [0.5, 0.4, 0.3],
    "std": [0.2, 0.25, 0.3],
    "interpolation": "bicubic",
    "resize_mode": "shortest",
}
COLOURS = {"normal": (40, 160, 60), "lesion": (200, 50, 40), "cyst": (40, 60, 200)}


@pytest.fixture(autouse=True, scope="session")
def _one_torch_thread():
    """Tiny models are slower on several threads, the more so when the machine is shared."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def model_cfg() -> dict:
    """The tiny models' open_clip configuration, to be changed freely."""
    return copy.deepcopy(MODEL_CFG)


def new_weights(seed: int) -> dict:
    """Weights of a tiny open_clip CLIP, random."""
    import open_clip
    import torch

    torch.manual_seed(seed)
    return open_clip.model.CLIP(**copy.deepcopy(MODEL_CFG)).state_dict()


@pytest.fixture
def model_folder(tmp_path):
    """Write an open_clip model folder: ``model_folder("name", seed=0) -> Path``."""
    from safetensors.torch import save_file

    def make(name: str, seed: int = 0) -> Path:
        folder = tmp_path / "models" / name
        folder.mkdir(parents=True)
        save_file(new_weights(seed), folder / "open_clip_model.safetensors")
        config = {"model_cfg": MODEL_CFG, "preprocess_cfg": PREPROCESS_CFG}
        (folder / "open_clip_config.json").write_text(json.dumps(config))
        return folder

    return make


@pytest.fixture
def checkpoint():
    """Write a training checkpoint below a run's folder: ``checkpoint(run, step=10, seed=0, scale=3.2) -> Path``."""
    import torch

    def make(run: Path, step=10, seed=0, scale=3.2, teachers=(), model_cfg=MODEL_CFG, tokenizer=None) -> Path:
        weights = {**new_weights(seed), "logit_scale": torch.tensor(scale)}
        scalars = {OBJECTIVE: {"scale.log": torch.tensor(scale)}, OPTIMIZER: {"step": torch.tensor(step)}}
        facts = {"teachers": {name: {"weights_sha256": "ab" * 32} for name in teachers}, "config": {"epochs": 3}}
        architecture = Architecture({"model_cfg": model_cfg, "preprocess_cfg": PREPROCESS_CFG}, tokenizer or {})
        state = {"stage": "stage2", "step": step, "identity": facts}
        saved = save_checkpoint(Storage(str(run)), step, {MODEL: weights, **scalars}, state, architecture)
        return Path(saved.uri)

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


def pair(number: int, modality: str, label: str, split: str, rng: np.random.Generator) -> dict:
    """One row of PAIRS; every second sample has a further caption of its own."""
    captions = [f"{modality} showing {label}"] + ([f"case {number} of the series"] if number % 2 else [])
    return {
        "sample_id": f"{number:032x}",
        "image": picture(label, rng),
        "captions": captions,
        "modality": modality,
        "labels": [label],
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
