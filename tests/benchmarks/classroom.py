"""Specialists, pairs and lakes for ``bench_students.py``: the paper's situation, small, on real pictures.

Four sets of the shared data, one for each modality. Of a set's train split the specialist sees its own part and the
student's, all with captions that name the label; the student's pairs are fewer and most of their captions are generic,
as captions from papers are. A part is kept for choosing settings; the test split is touched by the last scoring only.
"""

import io
import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch
from safetensors.torch import load_file

from cluster.config import DemoConfig
from cluster.demo.captions import GENERIC as DEMO_GENERIC
from cluster.demo.specialists import Specialist, make_corpus, train_specialist
from common.config import fingerprint
from common.images import decode_rgb, fit
from common.lake import Lake, create_lake, shard_name
from common.models.spec import Geometry
from common.schemas import PAIRS, features_schema
from common.seeding import rng
from common.storage import Storage
from trainer.architecture import load_tokenizer, read_architecture
from trainer.evaluation.metrics import Score, classification_scores
from trainer.student import Student

SIZE = 32
SHARD_ROWS = 512
GENERIC_SHARE = 0.7
VAL_SHARE, STUDENT_SHARE = 0.15, 0.45
"""Of a set's train split; the rest only its specialist sees."""
STAGE1_SHARE = 0.25
"""Of the student's pairs, for stage 1."""

SPECIFIC = ("{view} showing {label}", "{label} on {view}", "{view} with {label}", "{view} , {label}")
PROMPTS = SPECIFIC[:2]
GENERIC = tuple(text for text in DEMO_GENERIC if not text.startswith("axial"))
"""The demo's, but for the one that speaks of slices: there are none here."""


class Field(NamedTuple):
    """A modality: its set, its specialist, and the words for it."""

    folder: str
    specialist: Specialist
    views: tuple[str, ...]
    labels: dict[str, str]
    """What the set calls a class -> the words in captions; other rows are left out."""


FIELDS = {
    "X-ray": Field(
        "cls-cxr-kermany",
        Specialist("chest", ("X-ray",), 96),
        ("chest x ray", "chest radiograph"),
        {"normal": "clear lungs", "pneumonia": "pneumonia"},
    ),
    "ultrasound": Field(
        "cls-busi-us",
        Specialist("sono", ("ultrasound",), 64),
        ("breast ultrasound", "sonogram of the breast"),
        {"normal": "no lesion", "benign": "a benign lesion", "malignant": "a malignant lesion"},
    ),
    "pathology": Field(
        "cls-path-lc25000",
        Specialist("patho", ("pathology",), 128),
        ("lung histology", "micrograph of lung tissue"),
        {
            "benign lung tissue": "benign tissue",
            "lung adenocarcinoma": "adenocarcinoma",
            "lung squamous cell carcinoma": "squamous cell carcinoma",
        },
    ),
    "fundus": Field(
        "cls-fundus-dr",
        Specialist("retina", ("fundus",), 64),
        ("fundus photograph", "retinal image"),
        {
            "No DR": "no retinopathy",
            **{f"{grade} DR without maculopathy": "retinopathy" for grade in ("Mild", "Moderate", "Severe")},
            **{f"{grade} DR with maculopathy": "maculopathy" for grade in ("Mild", "Moderate", "Severe")},
            "PDR without maculopathy": "retinopathy",
            "PDR with maculopathy": "maculopathy",
        },
    ),
}


@dataclass(frozen=True)
class Picture:
    """A real picture, shrunk, with its class in words."""

    key: str
    modality: str
    label: str
    image: bytes
    """A PNG of SIZE pixels along the short side."""


@dataclass(frozen=True)
class Room:
    """What one seed works with."""

    seed: int
    folder: Path
    parts: dict[str, list[Picture]]
    """val, student, teachers and test."""
    lake: str
    stage1_lake: str
    architecture: Path


def read_pictures(data: Path) -> dict[str, list[tuple[str, Picture]]]:
    """train and test -> group of near-duplicates and picture, of all sets."""
    from PIL import Image

    found: dict[str, list[tuple[str, Picture]]] = {"train": [], "test": []}
    for modality, field in FIELDS.items():
        folder = data / field.folder
        if not folder.is_dir():
            sys.exit(f"{folder} is missing. Name the folder of the shared data with --data or MMKD_SHARED_DATA.")
        for line in (folder / "pairs.jsonl").read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            if row["label"] not in field.labels:
                continue
            picture = decode_rgb((folder / row["image"]).read_bytes())
            scale = SIZE / min(picture.size)
            small = picture.resize(tuple(round(side * scale) for side in picture.size), Image.Resampling.BICUBIC)
            buffer = io.BytesIO()
            small.save(buffer, "PNG")
            group = row.get("dup_group") or row.get("patient") or row["id"]
            found[row["split"]].append(
                (group, Picture(row["id"], modality, field.labels[row["label"]], buffer.getvalue()))
            )
    return found


def share_out(
    pictures: dict[str, list[tuple[str, Picture]]], seed: int, student_share: float = STUDENT_SHARE
) -> dict[str, list[Picture]]:
    """Deal the train pictures to val, the student and the specialists, groups together."""
    parts: dict[str, list[Picture]] = {"val": [], "student": [], "teachers": [], "test": []}
    parts["test"] = [picture for _, picture in pictures["test"]]
    for group, picture in pictures["train"]:
        draw = rng(seed, "part", picture.modality, group).random()
        bounds = np.cumsum([VAL_SHARE, student_share])
        parts[("val", "student", "teachers")[int(np.searchsorted(bounds, draw, side="right"))]].append(picture)
    return parts


def specific(picture: Picture, which: int) -> str:
    """A caption that names the label."""
    views = FIELDS[picture.modality].views
    return SPECIFIC[which % len(SPECIFIC)].format(view=views[which // len(SPECIFIC) % len(views)], label=picture.label)


def caption(picture: Picture, seed: int) -> str:
    """What the student's pair says of a picture."""
    draw = rng(seed, "caption of", picture.key)
    if draw.random() >= GENERIC_SHARE:
        return specific(picture, int(draw.integers(64)))
    return str(draw.choice(GENERIC)).format(view=draw.choice(FIELDS[picture.modality].views))


def every_caption() -> list[str]:
    """All sentences there can be, for the tokenizers."""
    return [
        text.format(view=view, label=label)
        for field in FIELDS.values()
        for view in field.views
        for label in field.labels.values()
        for text in (*SPECIFIC, *GENERIC)
    ]


def prepare_room(folder: Path, data: Path, seed: int, student_share: float = STUDENT_SHARE) -> Room:
    """Train the specialists, let them embed the student's pairs, and write the lakes, without selection."""
    from cluster.demo.specialists import write_model_folder

    parts = share_out(read_pictures(data), seed, student_share)
    settings = DemoConfig(seed=seed, image_size=SIZE, teacher_steps=300, teacher_batch=64)
    for modality, field in FIELDS.items():
        mine = [p for part in ("student", "teachers") for p in parts[part] if p.modality == modality]
        captions = [[specific(p, which) for which in range(8)] for p in mine]
        corpus = make_corpus([p.image for p in mine], captions, SIZE)
        train_specialist(field.specialist, corpus, folder / "teachers" / field.specialist.name, settings)
    architecture = folder / "student"
    write_model_folder(architecture, 96, SIZE, every_caption())
    student = sorted(parts["student"], key=lambda p: rng(seed, "order", p.key).random())
    few = student[: round(STAGE1_SHARE * len(student))]
    uri, stage1_uri = str(folder / "lake"), str(folder / "stage1-lake")
    write_lake(uri, [*student, *parts["val"]], seed, {p.key for p in parts["val"]})
    write_lake(stage1_uri, few, seed, set())
    for field in FIELDS.values():
        write_features(uri, field.specialist.name, folder / "teachers" / field.specialist.name)
    return Room(seed, folder, parts, uri, stage1_uri, architecture)


def write_lake(uri: str, pictures: list[Picture], seed: int, val: set[str]) -> None:
    """The pairs, in shards."""
    lake = create_lake(uri, SHARD_ROWS)
    for first in range(0, len(pictures), SHARD_ROWS):
        rows = [
            {
                "sample_id": fingerprint([p.key]).ljust(32, "0"),
                "image": p.image,
                "captions": [caption(p, seed)],
                "modality": p.modality,
                "labels": [p.label],
                "source": FIELDS[p.modality].folder,
                "source_key": p.key,
                "license": None,
                "width": SIZE,
                "height": SIZE,
                "sha256": "0" * 64,
                "split": "val" if p.key in val else "train",
            }
            for p in pictures[first : first + SHARD_ROWS]
        ]
        table = pa.Table.from_pylist(rows, schema=PAIRS)
        lake.storage.write_table(f"pairs/{shard_name(first // SHARD_ROWS)}", table)


def write_features(uri: str, name: str, folder: Path) -> None:
    """What a specialist makes of every pair of a lake, as extract stores it."""
    model, scale = load_model(folder)
    lake = Lake(uri)
    for shard in lake.shards():
        pairs = lake.read_pairs(shard)
        image, text = embed(model, pairs["image"].to_pylist(), [texts[0] for texts in pairs["captions"].to_pylist()])
        rows = [
            {
                "sample_id": sample,
                "image_embedding": one.tolist(),
                "image_norm": 1.0,
                "text_embedding": other.tolist(),
                "text_norm": 1.0,
                "extra_text_embeddings": [],
            }
            for sample, one, other in zip(pairs["sample_id"].to_pylist(), image, text, strict=True)
        ]
        table = pa.Table.from_pylist(rows, schema=features_schema(image.shape[1], text.shape[1]))
        lake.storage.write_table(f"{lake.features_folder(name)}/{shard_name(shard)}", table)
    made = {"name": name, "image_dim": image.shape[1], "text_dim": text.shape[1]}
    manifest = {"fingerprint": made, "logit_scale": scale}
    lake.storage.write_json(f"manifests/teachers/{name}.json", manifest)


def load_model(folder: Path) -> tuple[Student, float]:
    """A trained model from its folder, and its logit scale."""
    model = Student(read_architecture(Storage(str(folder))))
    tensors = load_file(str(folder / "open_clip_model.safetensors"))
    model.load_tensors(tensors, str(folder))
    return model.eval(), float(tensors["logit_scale"].exp())


@torch.no_grad()
def embed(model: Student, images: Iterable[bytes], texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors of pictures and of as many sentences."""
    pixels = np.stack([fit(decode_rgb(image), Geometry(size=SIZE)) for image in images])
    tokens = load_tokenizer(model.architecture)(texts)
    found = [
        model(torch.from_numpy(pixels[first : first + 256]), torch.from_numpy(tokens[first : first + 256]))
        for first in range(0, len(pixels), 256)
    ]
    image, text = (torch.cat(side).numpy() for side in zip(*found, strict=True))
    return image, text


@torch.no_grad()
def zero_shot_auc(model: Student, pictures: list[Picture], resamples: int = 1000) -> dict[str, Score]:
    """Modality -> macro one-against-rest AUC of zero-shot classification; all models get the same resamples."""
    was_training = model.training
    model.eval()
    scores = {}
    for modality, field in FIELDS.items():
        rows = [p for p in pictures if p.modality == modality]
        labels = list(dict.fromkeys(field.labels.values()))
        prompts = [[text.format(view=view, label=one) for text in PROMPTS for view in field.views] for one in labels]
        flat = [text for texts in prompts for text in texts]
        blank = [rows[0].image] * len(flat)
        image, _ = embed(model, [p.image for p in rows], [flat[0]] * len(rows))
        _, text = embed(model, blank, flat)
        classes = text.reshape(len(labels), -1, text.shape[1]).mean(axis=1)
        classes /= np.linalg.norm(classes, axis=1, keepdims=True)
        logits = 10 * image.astype(np.float64) @ classes.T
        shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        truth = np.array([labels.index(p.label) for p in rows])
        scores[modality] = classification_scores(shares, truth, resamples, rng(0, "zero-shot", modality))["auc"]
    model.train(was_training)
    return scores
