"""What stage 2 costs over stage 1, how long it waits for data, and whether its memory grows with the lake.

    python tests/benchmarks/bench_training.py [--only step wait memory] [--runs N] [--rows N] [--record]

**step**: the same student, one optimiser step of each stage in turn on the same batch, which lies in memory; stage 2
with the default terms and nine teachers of the paper's widths. **wait**: `train stage2` through Ray on real JPEGs with
two decode tasks, the share of its time without a batch. **memory**: greatest memory of all its processes on the rows
and on a tenth of them, with a student so small that reading and decoding set the pace.
"""

import argparse
import itertools
import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from bench_reader import SPOKEN, WIDTHS, write_shard
from material import first_shards, read_jpegs, write_lake
from paired import Comparison, conclude, in_turn, parser, run_way, workplace

PARTS = ("step", "wait", "memory")
MOST_COST, MOST_WAIT, MOST_GROWTH = 1.05, 0.03, 1.15
SHARD_ROWS, GIB = 256, 1 << 30
WINDOW_SHARD_ROWS = 64
"""For memory: four lanes of two shards are read together, so 2,048 rows are four windows."""
BATCH = 64
STEPS_A_RUN = 3
SMALL = {"image_size": 224, "layers": 6, "width": 256, "patch_size": 32, "head_width": 64}
TINY = {"image_size": 64, "layers": 1, "width": 64, "patch_size": 32, "head_width": 32}
TEXT = {"context_length": 32, "vocab_size": 49408, "width": 256, "heads": 4, "layers": 4}
TINY_TEXT = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}


def write_student(folder: Path, vision: dict[str, Any], text: dict[str, Any]) -> Path:
    """An open_clip configuration; the tokenizer is CLIP's own."""
    folder.mkdir(parents=True)
    config = {"embed_dim": 512, "vision_cfg": vision, "text_cfg": text}
    constants = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25], "interpolation": "bicubic"}
    document = {"model_cfg": config, "preprocess_cfg": {**constants, "resize_mode": "shortest"}}
    (folder / "open_clip_config.json").write_text(json.dumps(document))
    return folder


def teach(uri: str) -> None:
    """Give a lake nine teachers with random unit vectors, and a selection."""
    from common.config import fingerprint
    from common.lake import open_lake

    lake, draw = open_lake(uri), np.random.default_rng(0)
    for shard in lake.shards():
        ids = lake.read_pairs(shard, ["sample_id"])["sample_id"].to_pylist()
        found = {name: (unit(draw, len(ids), width), unit(draw, len(ids), width)) for name, width in WIDTHS.items()}
        write_shard(lake, shard, ids, found, {name: draw.random(len(ids)) < SPOKEN for name in WIDTHS})
    made = {name: {"name": name, "image_dim": width, "text_dim": width} for name, width in WIDTHS.items()}
    for name, identity in made.items():
        manifest = {"fingerprint": identity, "logit_scale": 50.0}
        lake.storage.write_json(f"manifests/teachers/{name}.json", manifest)
    teachers = {name: fingerprint(identity) for name, identity in made.items()}
    document = {"fingerprint": {"config": {}, "teachers": teachers}, "created_at": "2026-01-01T00:00:00+00:00"}
    lake.storage.write_json("manifests/selection/sel.json", {**document, "teachers": list(made)})


def unit(draw: np.random.Generator, rows: int, width: int) -> np.ndarray:
    """Random unit vectors, rounded as embeddings are stored."""
    x = draw.normal(size=(rows, width)).astype(np.float32)
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float16).astype(np.float32)


def noise_batch(rows: int, context_length: int) -> Any:
    """A batch of noise with what nine teachers of the paper's widths say of it."""
    from trainer.data import Batch, TeacherRows

    draw = np.random.default_rng(0)
    teachers = {
        name: TeacherRows(
            unit(draw, rows, width), unit(draw, rows, width), *(draw.random(rows) < SPOKEN for _ in range(2))
        )
        for name, width in WIDTHS.items()
    }
    pixels = draw.integers(0, 256, (rows, 224, 224, 3), np.uint8)
    tokens = draw.integers(1, 49408, (rows, context_length))
    draws = draw.random((rows, 1 + len(teachers)), np.float32)
    return Batch(np.arange(rows), [str(row) for row in range(rows)], pixels, tokens, teachers, draws)


def measure_step(options: argparse.Namespace, folder: Path) -> list[Comparison]:
    """Seconds of an optimiser step of either stage."""
    import torch

    from common.storage import Storage
    from trainer.architecture import read_architecture
    from trainer.config import DistillConfig, OptimConfig
    from trainer.loop import LoopPlan, train
    from trainer.objectives import ContrastiveObjective, DistillObjective
    from trainer.optim import build_optimizer
    from trainer.student import Student

    student = Student(read_architecture(Storage(str(write_student(folder / "step", SMALL, TEXT))))).train()
    batch = noise_batch(BATCH, TEXT["context_length"])
    plan = LoopPlan(10**6, 10**6, OptimConfig(lr=1e-5), 1, 0)
    dims = {name: (width, width) for name, width in WIDTHS.items()}
    stages = {
        "stage 1": (ContrastiveObjective(0.07), replace(batch, teachers={})),
        "stage 2": (DistillObjective(DistillConfig(), dict.fromkeys(WIDTHS, 50.0), 14.0, 512, dims), batch),
    }
    comparison = Comparison("an optimiser step of stage 2 over one of stage 1", "s", MOST_COST, at_most=True)

    def steps(name: str, count: int) -> list[float]:
        objective, one = stages[name]
        optimizer = build_optimizer({"student": student, "objective": objective}, plan.optim)
        return [report.seconds for report in train([one] * count, student, objective, optimizer, plan, 0)]

    for name in stages:
        steps(name, 1)  # once untimed
    in_turn(
        options.runs, {name: lambda name=name: comparison.add(name, min(steps(name, STEPS_A_RUN))) for name in stages}
    )
    print(f"torch threads: {torch.get_num_threads()}")
    return [comparison]


def start_from(uri: str, student: Path, lake_folder: Path) -> str:
    """A stage-1 run of one step, from which stage 2 starts; returns its address."""
    from cluster.session import ray_session
    from trainer.config import DataConfig, ModelConfig, ScaleConfig, Stage1Config
    from trainer.stage1 import train_stage1

    few = first_shards(uri, lake_folder, 1)
    config = Stage1Config(
        model=ModelConfig(architecture=str(student)),
        data=DataConfig(batch_size=WINDOW_SHARD_ROWS, lanes=4, tasks=2),
        scale=ScaleConfig(track=()),
        epochs=1,
    )
    with ray_session():
        return train_stage1(few, "start", config).last


def stage2_settings(batch: int, log_every: int) -> dict[str, Any]:
    """One pass with two decode tasks."""
    return {
        "epochs": 1,
        "optim": {"lr": 1e-5},
        "data": {"batch_size": batch, "lanes": 4, "tasks": 2},
        "scale": {"log_every": log_every, "checkpoint_every": 10**6, "track": ()},
    }


def measure_wait(options: argparse.Namespace, folder: Path) -> list[Comparison]:
    """Share of stage 2's time that it waits for data."""
    uri = write_lake(folder / "wait", read_jpegs(options.data), 8 * SHARD_ROWS, SHARD_ROWS)
    teach(uri)
    init = start_from(uri, write_student(folder / "student", SMALL, TEXT), folder / "wait-start")
    comparison = Comparison("time without a batch in all time of stage 2", "share", MOST_WAIT, at_most=True)
    settings = {"init": init, "stage2": stage2_settings(BATCH, 4)}

    def run() -> None:
        found = run_way("trained", {"lake": uri, "teachers": [], "settings": settings})
        comparison.add("all", 1.0)
        comparison.add("waiting", found["data_wait"])

    in_turn(options.runs, {"stage 2": run})
    return [comparison]


def measure_memory(options: argparse.Namespace, folder: Path) -> list[Comparison]:
    """Greatest memory on all rows against a tenth of them, which are several windows of rows shuffled together."""
    long = write_lake(folder / "long", read_jpegs(options.data), options.rows, WINDOW_SHARD_ROWS)
    short = write_lake(folder / "short", read_jpegs(options.data), options.rows // 10, WINDOW_SHARD_ROWS)
    for uri in (short, long):
        teach(uri)
    init = start_from(short, write_student(folder / "tiny", TINY, TINY_TEXT), folder / "memory-start")
    names = {short: f"{options.rows // 10} rows", long: f"{options.rows} rows"}
    comparisons = {
        "rss": Comparison("peak memory of stage 2, RSS of all processes", "GiB", MOST_GROWTH, at_most=True),
        "pss": Comparison("peak memory of stage 2, shared pages counted once", "GiB", MOST_GROWTH, at_most=True),
        "object_store": Comparison("peak of the object store in stage 2", "GiB"),
    }
    settings = {"init": init, "stage2": stage2_settings(BATCH, 8)}

    def run(uri: str) -> None:
        found = run_way("trained", {"lake": uri, "teachers": [], "settings": settings})
        for name, comparison in comparisons.items():
            comparison.add(names[uri], found[name] / GIB)

    in_turn(options.runs, {names[uri]: partial(run, uri) for uri in (short, long)})
    return list(comparisons.values())


if __name__ == "__main__":
    arguments = parser(__doc__ or "", runs=5, rows=20480)
    arguments.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="which (default: all)")
    chosen = arguments.parse_args()
    measures = {"step": measure_step, "wait": measure_wait, "memory": measure_memory}
    with workplace(chosen) as place:
        results = list(itertools.chain.from_iterable(measures[part](chosen, place) for part in chosen.only))
    conclude(results, chosen, f"{len(WIDTHS)} teachers, default terms, student {SMALL['layers']} x {SMALL['width']}")
