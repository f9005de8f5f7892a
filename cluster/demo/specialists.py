"""Small specialist teachers, trained on the spot: each knows some modalities only, from captions the student lacks.

They are honest models: trained with the project's own loop and objective on a corpus of their own, and saved as
folders that stock open_clip loads.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from cluster.config import DemoConfig
from cluster.demo.architectures import model_folder_config, small_clip
from cluster.demo.tokenizer import build_tokenizer
from common.images import decode_rgb, fit
from common.logs import Progress
from common.models.convert import save_tensors
from common.models.spec import Geometry
from common.seeding import rng, seed_of
from common.storage import Storage
from trainer.architecture import load_tokenizer, read_architecture
from trainer.config import OptimConfig
from trainer.data import Batch
from trainer.loop import LoopPlan, train
from trainer.objectives import ContrastiveObjective
from trainer.optim import build_optimizer
from trainer.student import Student

SHIFT = 4  # pixels a training picture may move in each direction


@dataclass(frozen=True)
class Specialist:
    """What a teacher is and what it has seen."""

    name: str
    modalities: tuple[str, ...]
    embed_dim: int


@dataclass(frozen=True)
class Corpus:
    """A specialist's pictures in memory, with one or more captions each."""

    pixels_NHWC: np.ndarray
    captions: list[list[str]]

    @property
    def all_captions(self) -> list[str]:
        """Every caption, for building the vocabulary."""
        return [caption for row in self.captions for caption in row]


def make_corpus(images: Sequence[bytes], captions: Sequence[Sequence[str]], size: int) -> Corpus:
    """Decode encoded images to squares of ``size`` pixels."""
    pixels = np.stack([fit(_decoded(image), Geometry(size=size)) for image in images])
    return Corpus(pixels, [list(row) for row in captions])


def _decoded(image: bytes) -> Image.Image:
    return decode_rgb(image)


def write_model_folder(folder: Path, embed_dim: int, size: int, captions: list[str]) -> None:
    """An open_clip folder without weights: configuration and a tokenizer built from the captions."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer(captions)
    tokenizer.save_pretrained(folder)
    model = small_clip(len(tokenizer), embed_dim, image_size=size)
    (folder / "open_clip_config.json").write_text(json.dumps(model_folder_config(model), indent=2) + "\n")


def train_specialist(specialist: Specialist, corpus: Corpus, folder: Path, config: DemoConfig) -> None:
    """Train one teacher and leave it in ``folder``; a folder that already has weights is kept as it is."""
    if (folder / "open_clip_model.safetensors").exists():
        return
    write_model_folder(folder, specialist.embed_dim, config.image_size, corpus.all_captions)
    torch.manual_seed(seed_of(config.seed, specialist.name) % 2**63)
    architecture = read_architecture(Storage(str(folder)))
    student, objective = Student(architecture), ContrastiveObjective(init_temperature=0.07)
    student.train()
    steps = config.teacher_steps
    optim = OptimConfig(lr=config.teacher_lr, warmup_steps=steps // 10, weight_decay=0.1)
    optimizer = build_optimizer({"student": student, "objective": objective}, optim)
    plan = LoopPlan(steps, max(1, len(corpus.captions) // config.teacher_batch), optim, 1, config.seed)
    tokens = [load_tokenizer(architecture)(row) for row in corpus.captions]
    progress = Progress(f"teacher {specialist.name}", steps, "steps")
    for report in train(_batches(corpus, tokens, specialist.name, config), student, objective, optimizer, plan, 0):
        progress.advance(1, f"loss {report.terms['total']:.2f}")
    log_scale = float(objective.scale.log.detach())
    save_tensors(student.tensors(log_scale), folder / "open_clip_model.safetensors")


def _batches(corpus: Corpus, tokens: list[np.ndarray], name: str, config: DemoConfig) -> Iterator[Batch]:
    """Endless epochs cut to the configured number of steps; pictures moved a little, one caption drawn for each."""
    generator = rng(config.seed, "specialist", name)
    total, size = len(corpus.captions), min(config.teacher_batch, len(corpus.captions))
    order: np.ndarray[Any, Any] = np.empty(0, np.int64)
    for _ in range(config.teacher_steps):
        if len(order) < size:
            order = np.concatenate([order, generator.permutation(total)])
        rows, order = order[:size], order[size:]
        drawn = np.stack([tokens[row][generator.integers(len(tokens[row]))] for row in rows])
        ids = [str(row) for row in rows]
        yield Batch(rows, ids, _moved(corpus.pixels_NHWC[rows], generator), drawn, {}, np.empty((len(rows), 0)))


def _moved(pixels_BHWC: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Each picture shifted by up to SHIFT pixels; the border repeats."""
    side = pixels_BHWC.shape[1]
    padded = np.pad(pixels_BHWC, ((0, 0), (SHIFT, SHIFT), (SHIFT, SHIFT), (0, 0)), mode="edge")
    starts = generator.integers(0, 2 * SHIFT + 1, (len(pixels_BHWC), 2))
    return np.stack([picture[y : y + side, x : x + side] for picture, (y, x) in zip(padded, starts, strict=True)])
