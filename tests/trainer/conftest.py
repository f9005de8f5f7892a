"""Small real lakes and students: pictures whose colour says what their caption says, and teachers that know it."""

import io
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from common.config import fingerprint
from common.lake import create_lake, shard_name
from common.schemas import PAIRS, SELECTION, features_schema
from common.seeding import rng

WORDS = ["a", "picture", "of", "something", "red", "green", "blue", "bright", "dark", "small", "large", "left", "right"]
COLOURS = {"red": (220, 40, 40), "green": (40, 200, 60), "blue": (50, 60, 220)}
CONTEXT_LENGTH = 12


def write_student(folder: Path, size: int = 32, width: int = 32) -> Path:
    """A model folder: a two-layer vision transformer, a one-layer text tower, a word tokenizer."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing

    tokens = ["[PAD]", "[UNK]", *WORDS, "[EOS]"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="$A [EOS]", special_tokens=[("[EOS]", vocabulary["[EOS]"])])
    model_cfg = {
        "embed_dim": 16,
        "vision_cfg": {"layers": 2, "width": width, "head_width": 16, "patch_size": 8, "image_size": size},
        "text_cfg": {
            "context_length": CONTEXT_LENGTH,
            "vocab_size": len(tokens),
            "hf_tokenizer_name": "tokenizer-in-this-folder",
            "width": width,
            "heads": 2,
            "layers": 1,
        },
    }
    preprocess_cfg = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "eos_token": "[EOS]"}
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **names}), encoding="utf-8"
    )
    config = {"model_cfg": model_cfg, "preprocess_cfg": preprocess_cfg}
    (folder / "open_clip_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@dataclass(frozen=True)
class Sample:
    """One made-up pair."""

    sample_id: str
    colour: str
    image: bytes
    captions: list[str]
    split: str


def make_sample(index: int, val_share: float) -> Sample:
    draw = rng("lake", index)
    colour = list(COLOURS)[index % 3]
    brightness = 0.5 + 0.5 * draw.random()
    pixels = draw.normal(0, 20, (40, 48, 3)) + brightness * np.array(COLOURS[colour])
    buffer = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG")
    captions = [f"a {'bright' if brightness > 0.75 else 'dark'} {colour} picture", f"something {colour}"]
    split = "val" if draw.random() < val_share else "train"
    return Sample(f"{index:032x}", colour, buffer.getvalue(), captions[: 1 + index % 2], split)


def pairs_table(samples: list[Sample]) -> pa.Table:
    rows = [
        {
            "sample_id": s.sample_id,
            "image": s.image,
            "captions": s.captions,
            "modality": s.colour,
            "labels": [s.colour],
            "source": "made-up",
            "source_key": s.sample_id,
            "license": None,
            "width": 48,
            "height": 40,
            "sha256": s.sample_id,
            "split": s.split,
        }
        for s in samples
    ]
    return pa.Table.from_pylist(rows, schema=PAIRS)


def unit(vector: np.ndarray) -> list[float]:
    return [float(x) for x in vector / np.linalg.norm(vector)]


def features_table(samples: list[Sample], teacher: str, dim: int, speaks: Callable[[Sample], bool]) -> pa.Table:
    rows = []
    for s in samples:
        centre = rng(teacher, s.colour).normal(size=dim)
        noise = rng(teacher, s.sample_id)
        vectors = [unit(centre + 0.3 * noise.normal(size=dim)) for _ in range(2 + len(s.captions[1:]))]
        known, told = speaks(s), speaks(s) and bool(s.captions)
        rows.append(
            {
                "sample_id": s.sample_id,
                "image_embedding": vectors[0] if known else None,
                "image_norm": 1.0 if known else None,
                "text_embedding": vectors[1] if told else None,
                "text_norm": 1.0 if told else None,
                "extra_text_embeddings": vectors[2:] if known else None,
            }
        )
    return pa.Table.from_pylist(rows, schema=features_schema(dim, dim))


def selection_table(samples: list[Sample], admits: Callable[[Sample], bool]) -> pa.Table:
    rows = [{"sample_id": s.sample_id, "modality": s.colour, "admitted": admits(s)} for s in samples]
    return pa.Table.from_pylist(rows, schema=SELECTION)


def write_lake(
    uri: str,
    rows: int = 96,
    shard_rows: int = 24,
    val_share: float = 0.1,
    silent: Callable[[int], bool] = lambda index: False,
) -> str:
    """A lake with pairs, two teachers of different widths and a selection named ``sel``; ``silent`` rows no caption."""
    lake = create_lake(uri, shard_rows)
    samples = [make_sample(index, val_share) for index in range(rows)]
    samples = [replace(s, captions=[]) if silent(index) else s for index, s in enumerate(samples)]
    teachers = {"alpha": (8, lambda s: True), "beta": (12, lambda s: s.colour != "red")}
    for shard in range(-(-rows // shard_rows)):
        part = samples[shard * shard_rows : (shard + 1) * shard_rows]
        lake.storage.write_table(f"pairs/{shard_name(shard)}", pairs_table(part))
        for name, (dim, speaks) in teachers.items():
            features = features_table(part, name, dim, speaks)
            lake.storage.write_table(f"{lake.features_folder(name)}/{shard_name(shard)}", features)
            admits = lambda s, speaks=speaks: bool(s.captions) and speaks(s) and int(s.sample_id, 16) % 7 != 0  # noqa: E731
            chosen = selection_table(part, admits)
            lake.storage.write_table(f"selection/sel/teacher={name}/{shard_name(shard)}", chosen)
    made = {name: {"name": name, "image_dim": dim, "text_dim": dim} for name, (dim, _) in teachers.items()}
    for name in teachers:
        manifest = {"fingerprint": made[name], "logit_scale": 20.0}
        lake.storage.write_json(f"manifests/teachers/{name}.json", manifest)
    identity = {"config": {}, "teachers": {name: fingerprint(made[name]) for name in teachers}}
    selection = {"fingerprint": identity, "created_at": "2026-01-01T00:00:00+00:00", "teachers": list(teachers)}
    lake.storage.write_json("manifests/selection/sel.json", selection)
    return uri


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MMKD_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def student_folder(tmp_path) -> Path:
    return write_student(tmp_path / "student")


@pytest.fixture
def tiny_lake(tmp_path) -> str:
    return write_lake(str(tmp_path / "lake"))


@pytest.fixture
def silent_lake(tmp_path) -> str:
    """The small lake in which every fifth row, and all of the third shard, has no caption."""
    return write_lake(str(tmp_path / "lake"), silent=lambda index: index % 5 == 0 or 48 <= index < 72)


def write_image_encoder(uri: str, dim: int = 10, name: str = "pixels") -> str:
    """Add a teacher without a text tower to a lake of :func:`write_lake`; it has no vector for every eleventh row."""
    from common.lake import open_lake

    lake = open_lake(uri)
    for shard in lake.shards():
        rows = []
        for sample_id, modality in zip(
            *(lake.read_pairs(shard)[column].to_pylist() for column in ("sample_id", "modality")), strict=True
        ):
            vector = unit(rng(name, modality).normal(size=dim) + 0.3 * rng(name, sample_id).normal(size=dim))
            known = int(sample_id, 16) % 11 != 0
            rows.append(
                {
                    "sample_id": sample_id,
                    "image_embedding": vector if known else None,
                    "image_norm": 1.0 if known else None,
                    "text_embedding": None,
                    "text_norm": None,
                    "extra_text_embeddings": None,
                }
            )
        table = pa.Table.from_pylist(rows, schema=features_schema(dim, None))
        lake.storage.write_table(f"{lake.features_folder(name)}/{shard_name(shard)}", table)
    manifest = {"fingerprint": {"name": name, "image_dim": dim, "text_dim": None}, "logit_scale": None}
    lake.storage.write_json(f"manifests/teachers/{name}.json", manifest)
    return name


@pytest.fixture
def lake_with_image_encoder(tiny_lake) -> str:
    """The small lake with a third teacher, ``pixels``, that has no text tower."""
    write_image_encoder(tiny_lake)
    return tiny_lake


@pytest.fixture
def lake_without_red_captions(tmp_path) -> str:
    """The small lake with ``pixels`` too, in which no picture of the modality ``red`` has a caption."""
    uri = write_lake(str(tmp_path / "lake"), silent=lambda index: index % 3 == 0)
    write_image_encoder(uri)
    return uri


@pytest.fixture
def lake_without_captions(tmp_path) -> str:
    """The small lake in which no picture has a caption."""
    return write_lake(str(tmp_path / "lake"), silent=lambda index: True)
