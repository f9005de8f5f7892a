"""What clip-benchmark and mmkd are both asked: the same pictures, prompts, captions and weights.

``tests/benchmarks/bench_clip_benchmark.py`` asks both and keeps the peer's answer in ``ANSWER``; a unit test asks mmkd
again.
"""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
ANSWER = ROOT / "tests" / "trainer" / "evaluation" / "clip_benchmark.json"
ANSWER_ROWS = 120
"""Of each kind, behind that answer."""
MODEL = "ViT-S-32-alt"
"""Of open_clip's own list, since clip-benchmark takes no other."""
MODELS = 4
PREPROCESSING = {
    "mean": [0.48145466, 0.4578275, 0.40821073],
    "std": [0.26862954, 0.26130258, 0.27577711],
    "interpolation": "bicubic",
    "resize_mode": "shortest",
}
"""OpenAI's, which clip-benchmark takes for a file of weights."""
TEMPLATES = ("a photo of {}.", "ultrasound of the breast, {}", "{} breast tissue")
LABELLED, CAPTIONED = "ultrasound", "figure"
"""The two sets, by the modality that each has in mmkd's lake."""
CUTOFFS = (1, 5, 10)


@dataclass(frozen=True)
class Row:
    """A picture with its label (breast ultrasounds) or with a caption that no other has (figures of textbooks)."""

    modality: str
    image: bytes
    caption: str
    label: str | None


def read_rows(data: Path, most: int) -> list[Row]:
    """At most so many labelled pictures, then at most so many captioned ones.

    clip-benchmark knows one right picture for a caption, so captions that come twice are left out.
    """
    labelled = _table(data / "cls-busi-us", LABELLED)
    labelled = [row for number, row in enumerate(labelled) if number % -(-len(labelled) // most) == 0]
    captioned = _table(data / "cap-openstax", CAPTIONED)
    times = Counter(row.caption for row in captioned)
    return labelled + [row for row in captioned if times[row.caption] == 1][:most]


def _table(folder: Path, modality: str) -> list[Row]:
    (table,) = folder.glob("*.jsonl")
    rows = map(json.loads, table.read_text("utf-8").splitlines())
    return [
        Row(modality, (folder / row["image"]).read_bytes(), " ".join(row["caption"].split()), row.get("label"))
        for row in rows
    ]


def write_model(folder: Path, seed: int) -> Path:
    """A model folder with weights drawn by numpy, whose numbers stay the same from version to version."""
    import open_clip
    import torch
    from safetensors.torch import save_file

    config = open_clip.get_model_config(MODEL)
    draw = np.random.RandomState(seed)
    state = {}
    for name, tensor in sorted(open_clip.CLIP(**config).state_dict().items()):
        if not tensor.dtype.is_floating_point or tensor.ndim == 0 or name.endswith("attn_mask"):
            state[name] = tensor.contiguous()
        elif tensor.ndim == 1 and name.endswith("weight"):  # of a layer norm
            state[name] = torch.ones_like(tensor)
        else:
            spread = tensor.shape[-1] ** -0.5 if tensor.ndim > 1 else 0.02
            state[name] = torch.from_numpy(draw.standard_normal(tuple(tensor.shape)).astype(np.float32) * spread)
    folder.mkdir(parents=True)
    save_file(state, str(folder / "open_clip_model.safetensors"))
    document = {"model_cfg": config, "preprocess_cfg": PREPROCESSING}
    (folder / "open_clip_config.json").write_text(json.dumps(document))
    return folder


def write_templates(file: Path) -> Path:
    """The prompts as ``mmkd evaluate`` reads them."""
    import yaml

    file.write_text(yaml.safe_dump({"general": [text.format("{label}") for text in TEMPLATES]}))
    return file


def write_lake(folder: Path, rows: list[Row]) -> str:
    """The rows as the test split of a lake, without ingest, which would leave out the duplicate among them."""
    import pyarrow as pa

    from common.lake import create_lake, shard_name
    from common.schemas import PAIRS

    lake = create_lake(str(folder), len(rows))
    made = [
        {
            "sample_id": f"{number:032x}",
            "image": row.image,
            "captions": [row.caption],
            "modality": row.modality,
            "labels": [] if row.label is None else [row.label],
            "source": "peer",
            "source_key": str(number),
            "width": 1,
            "height": 1,
            "sha256": f"{number:064x}",
            "split": "test",
        }
        for number, row in enumerate(rows)
    ]
    lake.storage.write_table(f"pairs/{shard_name(0)}", pa.Table.from_pylist(made, schema=PAIRS))
    return str(folder)


def scores_of(measured: list[dict[str, Any]]) -> dict[str, float]:
    """Rows of one model's score table, by the names that clip-benchmark has for the numbers."""
    rows = {(row["task"], row["modality"], row["metric"]): row["value"] for row in measured}
    found = {"acc1": rows["zero_shot", LABELLED, "accuracy"]}
    for k in CUTOFFS:
        found[f"image_retrieval_recall@{k}"] = rows["retrieval", CAPTIONED, f"text_to_image_recall@{k}"]
        found[f"text_retrieval_recall@{k}"] = rows["retrieval", CAPTIONED, f"image_to_text_recall@{k}"]
    return found
