"""On a GPU at bf16: each teacher against the bare model, all nine on one card, and a training step of either stage.

    python tests/benchmarks/bench_gpu.py [--runs N] [--rows N] [--teachers a,b] [--only teachers training] [--record]

Models of the sizes of the paper's nine with random weights, so that nothing is downloaded; pixels and tokens are noise,
which costs a model the same. No Ray: this is :class:`extractor.teachers.Teacher`, fed prepared tables from memory. The
bare model gets the same micro-batch again and again, already on the GPU. A training step is one of the loop that Ray
Train's workers run, with batches from memory, against the same step on a batch that lies on the GPU, and, with
``scale.compile``, as torch compiles the student.
"""

import argparse
import contextlib
import itertools
import json
import multiprocessing
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from material import TINY_TEXT, TINY_VISION, write_teacher
from paired import Comparison, conclude, in_turn, parser, workplace

TARGET = 0.95
CLIP_TEXT = {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12}
LARGE_TEXT = {**CLIP_TEXT, "width": 768, "heads": 12}
BERT_SIZED = {"context_length": 256, "vocab_size": 49408, "width": 768, "heads": 12, "layers": 12}
L14 = {"image_size": 224, "layers": 24, "width": 1024, "patch_size": 14}
B16 = {"image_size": 224, "layers": 12, "width": 768, "patch_size": 16}
B32 = {**B16, "patch_size": 32}
RN50 = {"image_size": 224, "layers": [3, 4, 6, 3], "width": 64, "patch_size": None}
SWIN = {
    "image_size": 224,
    "timm_model_name": "swin_tiny_patch4_window7_224",
    "timm_model_pretrained": False,
    "timm_pool": "",
    "timm_proj": "linear",
}
NINE = {  # name -> image tower, text tower, width; text towers of BERT's size stand for BERTs
    "bmca-clip": (L14, LARGE_TEXT, 768),
    "biomedclip": (B16, BERT_SIZED, 512),
    "unimed-clip": (B16, BERT_SIZED, 512),
    "quiltnet-b-32": (B32, CLIP_TEXT, 512),
    "genmedclip": (B16, CLIP_TEXT, 512),
    "plip": (B32, CLIP_TEXT, 512),
    "pmc-clip": (RN50, {**BERT_SIZED, "context_length": 77}, 768),
    "pubmedclip": (B32, CLIP_TEXT, 512),
    "medclip": (SWIN, {**BERT_SIZED, "context_length": 77}, 512),
}
WARM_UP_PASSES = 3


def write_models(names: list[str], folder: Path) -> dict[str, Any]:
    """Name -> TeacherInput of a model of that size, run at bf16."""
    from extractor.config import ExtractConfig
    from extractor.partitions import describe_inputs, find_teachers

    entries = {}
    for seed, name in enumerate(names):
        vision, text, dim = NINE[name]
        write_teacher(folder / name, vision, text, dim, seed)
        entries[name] = {"family": "open_clip", "path": str(folder / name), "recipe": {"dtype": "bfloat16"}}
        for fact in ("expect", "recipes"):  # the packaged entries' are those of the real weights
            entries[name][fact] = {}
    (folder / "catalog.yaml").write_text(json.dumps(entries))
    config = ExtractConfig(teachers=tuple(names), catalog=str(folder / "catalog.yaml"))
    return describe_inputs(find_teachers(config), config)


def noise_table(inputs: list[Any], rows: int) -> pa.Table:
    """A prepared table of noise for some teachers, as ``prepare`` lays it out."""
    from extractor.prepare import fixed_rows

    draw = np.random.default_rng(0)
    columns: dict[str, pa.Array] = {
        "shard": pa.array(np.zeros(rows, np.int32)),
        "sample_id": pa.array([f"{row:032x}" for row in range(rows)]),
        "image_error": pa.nulls(rows, pa.string()),
    }
    for item in inputs:
        if item.pixels not in columns:
            # Coarse squares: of fine noise, a convolutional tower sees nothing but its mean.
            coarse, repeats = draw.integers(0, 256, (rows, 7, 7, 3), np.uint8), item.description.geometry.size // 7
            columns[item.pixels] = fixed_rows(coarse.repeat(repeats, 1).repeat(repeats, 2).reshape(rows, -1))
        if item.tokens not in columns:
            tokens = draw.integers(1, 1000, (rows, item.description.context_length), np.int32)
            none = pa.array(np.zeros(rows + 1, np.int32))
            columns[item.tokens] = fixed_rows(tokens)
            columns[item.extra_tokens] = pa.ListArray.from_arrays(none, fixed_rows(tokens[:0]))
    return pa.table(columns)


def teacher_rate(teacher: Any, table: pa.Table) -> float:
    """Rows a second of the real thing: tables in, tables out."""
    started = time.perf_counter()
    teacher.embed(table)
    return table.num_rows / (time.perf_counter() - started)


def bare_rate(teacher: Any, table: pa.Table, micro_batch: int) -> float:
    """Rows a second of the model alone on a batch that lies on the device, with autocast's copies of weights kept."""
    import torch

    from extractor.prepare import rows_of

    item = teacher.teacher
    size = item.description.geometry.size
    part = table.slice(0, micro_batch)
    pixels = torch.from_numpy(rows_of(part[item.pixels]).reshape(-1, size, size, 3).copy()).to(teacher.device)
    tokens = torch.from_numpy(rows_of(part[item.tokens]).copy()).to(teacher.device)
    passes = max(1, table.num_rows // micro_batch)
    on_gpu = teacher.device.startswith("cuda")
    with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16, enabled=on_gpu):
        for _ in range(WARM_UP_PASSES):
            teacher.model.encode_image(pixels), teacher.model.encode_text(tokens)
        _wait(teacher.device)
        started = time.perf_counter()
        for _ in range(passes):
            teacher.model.encode_image(pixels)
        for _ in range(passes):
            teacher.model.encode_text(tokens)
        _wait(teacher.device)
    return passes * len(pixels) / (time.perf_counter() - started)


def _wait(device: str) -> None:
    import torch

    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def at_once(inputs: dict[str, Any], rows: int, micro_batch: int, device: str) -> float:
    """Rows a second through all teachers, each in a process of its own on the same card."""
    context = multiprocessing.get_context("spawn")
    together, spans = context.Barrier(len(inputs)), context.Queue()
    others = [
        context.Process(target=_embed_beside, args=(item, rows, micro_batch, device, together, spans))
        for item in inputs.values()
    ]
    for process in others:
        process.start()
    for process in others:
        process.join()
    failed = [name for name, process in zip(inputs, others, strict=True) if process.exitcode]
    if failed:
        raise SystemExit(f"The processes of {', '.join(failed)} failed; what they said stands above.")
    found = [spans.get() for _ in others]
    return rows / (max(end for _, end in found) - min(begin for begin, _ in found))


def _embed_beside(item: Any, rows: int, micro_batch: int, device: str, together: Any, spans: Any) -> None:
    from extractor.teachers import Teacher

    teacher, table = Teacher(item, device, micro_batch), noise_table([item], rows)
    teacher.embed(table.slice(0, micro_batch))
    together.wait()
    started = time.time()
    teacher.embed(table)
    spans.put((started, time.time()))


def measure(options: argparse.Namespace, folder: Path) -> tuple[list[Comparison], str]:
    """Each teacher alone, then all of them beside each other."""
    from extractor.teachers import Teacher

    names = options.teachers.split(",") if options.teachers else list(NINE)
    inputs = write_models(names, folder)
    comparisons, bare = [], {}
    for name, item in inputs.items():
        teacher, table = Teacher(item, options.device, options.micro_batch), noise_table([item], options.rows)
        teacher.embed(table.slice(0, options.micro_batch))
        comparison = Comparison(f"{name} at bf16", "rows/s", TARGET)
        ways = {"bare model": partial(bare_rate, teacher, table, options.micro_batch)}
        ways["teacher"] = partial(teacher_rate, teacher, table)
        in_turn(options.runs, {way: partial(_add, comparison, way, rate) for way, rate in ways.items()})
        bare[name] = comparison.numbers["bare model"]
        comparisons.append(comparison)
        del teacher
        _give_back(options.device)
    together = Comparison(f"all {len(names)} on one card at bf16", "rows/s through all of them")
    for run in range(options.runs):
        # One after the other, each at its bare rate: what the card could do if nothing were lost.
        together.add("bare models in turn", 1 / sum(1 / rates[run] for rates in bare.values()))
        together.add("teachers at once", at_once(inputs, options.rows, options.micro_batch, options.device))
    return [*comparisons, together], f"micro-batch {options.micro_batch}, {options.rows} rows of noise"


def measure_training(options: argparse.Namespace, folder: Path) -> tuple[list[Comparison], str]:
    """Steps of a ViT-B/16 student: what sending batches and keeping the account costs, and what compiling gains."""
    from bench_training import WIDTHS, noise_batch, write_student

    vision, text = (B16, CLIP_TEXT) if not options.small else (TINY_VISION, TINY_TEXT)
    architecture = write_student(folder / "student", vision, text)
    batch = noise_batch(options.batch, text["context_length"])
    comparisons = []
    for stage in ("stage 1", "stage 2"):
        given = batch if stage == "stage 2" else replace(batch, teachers={})
        said = f"{stage}, {len(WIDTHS)} teachers" if given.teachers else stage
        size = "a tiny student" if options.small else "ViT-B/16"
        comparison = Comparison(f"a step of {said}, {size}", "samples/s", TARGET)
        ways = {"on the device already": "bare", "compiled": "compiled", "the loop": "loop"}
        rates = {name: partial(step_rate, architecture, given, way, options) for name, way in ways.items()}
        in_turn(options.runs, {name: partial(_add, comparison, name, rate) for name, rate in rates.items()})
        comparisons.append(comparison)
    return comparisons, f"batch {options.batch}, {options.steps} steps of noise"


def step_rate(architecture: Path, batch: Any, way: str, options: argparse.Namespace) -> float:
    """Samples a second of one way of taking steps; the first few are left out."""
    import torch
    from bench_training import WIDTHS

    from common.storage import Storage
    from trainer.architecture import read_architecture
    from trainer.config import DistillConfig, OptimConfig
    from trainer.loop import LoopPlan, clip_gradients, forward_backward, train
    from trainer.objectives import ContrastiveObjective, DistillObjective
    from trainer.optim import build_optimizer
    from trainer.student import Student
    from trainer.transfer import Sender

    device = torch.device(options.device)
    student = Student(read_architecture(Storage(str(architecture)))).train().to(device)
    if way == "compiled":
        student.compile()
    dims = {name: (width, width) for name, width in WIDTHS.items()}
    objective: Any = ContrastiveObjective(0.07)
    if batch.teachers:
        objective = DistillObjective(DistillConfig(), dict.fromkeys(WIDTHS, 50.0), 14.0, 512, dims)
    objective = objective.to(device)
    plan = LoopPlan(10**6, 10**6, OptimConfig(lr=1e-5), 1, 0, bfloat16=device.type == "cuda")
    optimizer = build_optimizer({"student": student, "objective": objective}, plan.optim)

    def loop(count: int) -> None:
        for _ in train(itertools.repeat(batch, count), student, objective, optimizer, plan, 0):
            pass

    def bare(count: int) -> None:
        here = Sender(device).send(batch)
        for step in range(count):
            optimizer.zero_grad(set_to_none=True)
            forward_backward(here, student, objective, plan, step, contextlib.nullcontext)
            clip_gradients(optimizer, plan.optim.clip_norm)
            optimizer.step()

    steps = bare if way == "bare" else loop
    steps(WARM_UP_PASSES)
    _wait(options.device)
    started = time.perf_counter()
    steps(options.steps)
    _wait(options.device)
    return options.steps * len(batch.place_B) / (time.perf_counter() - started)


def _add(comparison: Comparison, way: str, rate: Any) -> None:
    comparison.add(way, rate())


def _give_back(device: str) -> None:
    import torch

    if device.startswith("cuda"):
        torch.cuda.empty_cache()


def insist_on(device: str) -> None:
    """Refuse to measure a GPU that is not there."""
    import torch

    if device.startswith("cuda") and not torch.cuda.is_available():
        raise SystemExit(
            "bench_gpu measures a CUDA GPU, and torch sees none here. Run it on a machine that has one; "
            "--device cpu only shows that the script runs (its numbers say nothing)."
        )


if __name__ == "__main__":
    arguments = parser(__doc__ or "", rows=4096)
    arguments.add_argument("--micro-batch", type=int, default=64, help="rows per forward pass")
    arguments.add_argument("--teachers", help="some of the nine, by name (default: all)")
    arguments.add_argument("--device", default="cuda", help="cpu only shows that the script runs")
    arguments.add_argument("--only", nargs="+", choices=["teachers", "training"], default=["teachers", "training"])
    arguments.add_argument("--batch", type=int, default=256, help="rows of a training step")
    arguments.add_argument("--steps", type=int, default=30, help="training steps of a run")
    arguments.add_argument("--small", action="store_true", help="a tiny student, to show that the script runs")
    chosen = arguments.parse_args()
    insist_on(chosen.device)
    parts = {"teachers": measure, "training": measure_training}
    for part in chosen.only:
        with workplace(chosen) as place:
            results, described = parts[part](chosen, place)
        conclude(results, chosen, described)
