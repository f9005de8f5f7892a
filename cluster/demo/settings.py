"""Who teaches whom in the demo: the specialists, the student, and the settings of its two stages."""

from __future__ import annotations

import re
from pathlib import Path

import pyarrow.compute as pc
import yaml

from cluster.config import DemoConfig
from cluster.demo.captions import zero_shot_prompts
from cluster.demo.modalities import MODALITIES
from cluster.demo.specialists import Specialist, write_model_folder
from common.captions import captioned
from common.lake import Lake
from trainer.config import DataConfig, DistillConfig, ModelConfig, OptimConfig, ScaleConfig, Stage1Config, Stage2Config

SPECIALISTS = (
    Specialist("chest", ("radiograph",), 96),
    Specialist("sono", ("ultrasound",), 64),
    Specialist("patho", ("histology",), 128),
    Specialist("retina", ("fundus",), 64),
)
STUDENT_DIM = 96


def specialist_for(modality: str, position: int) -> Specialist:
    """A specialist for a modality of the user's own pairs."""
    name = re.sub(r"[^a-z0-9]+", "-", modality.lower()).strip("-") or "unknown"
    # Numbered, since "CT scan" and "CT-scan" would otherwise share a folder.
    return Specialist(f"expert-{position + 1}-{name}", (modality,), (64, 96, 128)[position % 3])


def student_config(lake: Lake, home: Path, config: DemoConfig) -> tuple[Stage1Config, Stage2Config]:
    """Write the student's empty model folder and give the settings of both stages."""
    folder = home / "student-architecture"
    captions: set[str] = set()
    rows = 0
    for index in lake.shards():
        table = lake.read_pairs(index, ["captions", "split"])
        train = table.filter(pc.equal(table["split"], "train"))
        train = train.filter(captioned(train["captions"]))
        rows += train.num_rows
        captions.update(pc.list_flatten(train["captions"]).to_pylist())
    if not (folder / "open_clip_config.json").exists():
        words = sorted(captions)
        write_model_folder(folder, STUDENT_DIM, config.image_size, words)
    batch = min(config.student_batch, max(4, rows // 8 * 4))
    optim1, optim2 = (
        OptimConfig(lr=lr, warmup_steps=max(1, epochs * (rows // batch) // 10), weight_decay=0.1)
        for lr, epochs in ((config.stage1_lr, config.stage1_epochs), (config.stage2_lr, config.stage2_epochs))
    )
    # One decode task keeps up with so small a student, and a second would cost seconds of imports.
    data = DataConfig(batch_size=batch, lanes=4, crop_scale=0.8, tasks=1, seed=config.seed)
    scale = ScaleConfig(checkpoint_every=100, log_every=5)
    stage1 = Stage1Config(
        model=ModelConfig(architecture=str(folder)), optim=optim1, data=data, scale=scale, epochs=config.stage1_epochs
    )
    # Terms that the README's figures were made with; the default recipe came later and does not differ much here.
    distill = DistillConfig(image_text=3, image_image=3, text_text=3, heads=0, teacher_scale="own")
    stage2 = Stage2Config(distill=distill, optim=optim2, data=data, scale=scale, epochs=config.stage2_epochs)
    return stage1, stage2


def write_templates(home: Path) -> str:
    """The drawn corpus's own zero-shot prompts as a file that ``mmkd evaluate --templates`` reads."""
    entries = [
        {"names": [modality], "templates": ["{label}"], "labels": zero_shot_prompts(modality)}
        for modality in MODALITIES
    ]
    file = home / "prompts.yaml"
    file.write_text(yaml.safe_dump({"general": ["{label}"], "modalities": entries}, sort_keys=False))
    return str(file)
