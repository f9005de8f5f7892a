"""Does the student beat its teachers? Zero-shot AUC of specialists and of students by every recipe, on real pictures.

    python tests/benchmarks/bench_students.py [--seeds 0 1 2] [--jobs N] [--steps N] [--record]
    python tests/benchmarks/bench_students.py --choose [--seeds 10 11] [--recipes NAME ...]

A seed deals the pictures anew, trains four specialists and stage 1, and from there every recipe for the same number of
steps at the same learning rate. Scores are on the test split; ``--choose`` scores the validation part instead, and is
how the default recipe was chosen. Everything that trains is the project's own: selection, alignment, reader,
objectives, loop; only Ray is left out. See ``classroom.py`` for what is learned.
"""

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from material import default_data
from paired import RECORD, provenance

LR, BATCH, STAGE1_STEPS, STEPS = 1e-3, 64, 100, 300
MEAN = "mean"

OFF = {"image_text": 0.0, "image_image": 0.0, "text_text": 0.0, "heads": 0.0, "teacher_scale": "own"}
PAPER = {**OFF, "feature": 50.0, "cross": 1.0, "cross_scale": "constant", "target_length": "stored"}
PAPER_FIXED = {**PAPER, "cross_scale": "learned", "target_length": "unit"}
DEFAULT: dict[str, object] = {}
"""What ``DistillConfig`` says."""

AFFINITY = {**OFF, "image_text": 1.0, "image_image": 1.0, "text_text": 1.0}
STRONG = {**OFF, "image_text": 3.0, "image_image": 3.0, "text_text": 3.0, "heads": 3.0}
CANDIDATES: dict[str, dict[str, object]] = {
    "heads": {**OFF, "heads": 1.0},
    "affinity": {**OFF, "image_text": 1.0},
    "affinity, images": {**OFF, "image_text": 1.0, "image_image": 1.0},
    "affinity, all": AFFINITY,
    "affinity, all, heads": {**AFFINITY, "heads": 1.0},
    "3 x affinity, all": {**STRONG, "heads": 0.0},
    "3 x affinity, all, heads": STRONG,
    "... fitted": {**STRONG, "teacher_scale": "fitted"},
    "... scale 10": {**STRONG, "teacher_scale": 10.0},
    "... queue": {**STRONG, "queue": 256},
    "... graph": {**STRONG, "graph": 1.0},
    "... drop": {**STRONG, "drop_teachers": 0.5},
    "... no contrastive": {**STRONG, "contrastive": 0.0},
}
ALIGNED = ("paper", "paper-fixed")


def recipes() -> dict[str, dict[str, object]]:
    """Name -> settings of DistillConfig: what is compared on the test split."""
    from trainer.config import DistillConfig

    default = DistillConfig(**DEFAULT)
    terms = ("contrastive", "image_text", "image_image", "text_text", "graph", "heads")
    without = {f"default, no {term}": {**DEFAULT, term: 0.0} for term in terms if getattr(default, term)}
    options = {"queue": 0, "drop_teachers": 0.0, "teacher_scale": "own"}
    without |= {
        f"default, no {name}": {**DEFAULT, name: off} for name, off in options.items() if getattr(default, name) != off
    }
    return {"continued": OFF, "paper": PAPER, "paper-fixed": PAPER_FIXED, "default": DEFAULT, **without}


def run_seed(seed: int, options: argparse.Namespace) -> dict[str, dict[str, tuple[float, list[float]]]]:
    """Model -> modality -> AUC and its resamples."""
    import torch
    from classroom import load_model, prepare_room, zero_shot_auc

    torch.set_num_threads(max(1, (os.cpu_count() or 1) // options.jobs))
    found = {}
    with tempfile.TemporaryDirectory(prefix=f"mmkd-students-{seed}-", dir=options.work) as folder:
        os.environ["MMKD_CACHE"] = f"{folder}/cache"
        room = prepare_room(Path(folder), options.data, seed, options.student_share)
        pictures = room.parts["val" if options.choose else "test"]

        def note(name: str, model: object) -> None:
            scores = zero_shot_auc(model, pictures)  # type: ignore[arg-type]
            found[name] = {modality: (s.value, s.resampled_B.tolist()) for modality, s in scores.items()}
            mean = np.mean([s.value for s in scores.values()])
            print(f"seed {seed}: {name}: {100 * mean:.1f}", file=sys.stderr, flush=True)

        for teacher in sorted((room.folder / "teachers").iterdir()):
            note(f"teacher {teacher.name}", load_model(teacher)[0])
        for name, model in students(room, options):
            note(name, model)
    return found


def students(room: "object", options: argparse.Namespace) -> Iterator[tuple[str, object]]:
    """Stage 1 and then a student by each recipe."""
    from classroom import Room

    from trainer.config import AlignConfig, AutoencoderConfig, DistillConfig, SelectConfig
    from trainer.objectives import ContrastiveObjective, DistillObjective

    assert isinstance(room, Room)
    data, architecture = Teaching(room.stage1_lake, room, ()), room.architecture
    objective = ContrastiveObjective(0.07)
    student = data.train(new_student(architecture, room.seed), objective, STAGE1_STEPS)
    yield "stage 1", student
    start, scale = {k: v.clone() for k, v in student.state_dict().items()}, float(objective.scale().detach())

    from trainer.selection.select import select

    teachers = tuple(sorted(path.name for path in (room.folder / "teachers").iterdir()))
    select(room.lake, SelectConfig(teachers=teachers, min_skill=0.55, keep_fraction=0.9))
    from trainer.alignment.align import align

    aligned = AlignConfig(recipe="paper", autoencoder=AutoencoderConfig(latent_dim=96, epochs=60))
    align(room.lake, aligned)
    data = Teaching(room.lake, room, teachers)
    chosen = CANDIDATES if options.choose else recipes()
    for name in options.recipes or chosen:
        config = DistillConfig(**{**recipes(), **CANDIDATES}[name])
        maps = data.maps() if name in ALIGNED else None
        objective = DistillObjective(config, data.scales(config), scale, 96, data.dims(maps), maps)
        student = new_student(architecture, room.seed)
        student.load_state_dict(start)
        yield name, data.train(student, objective, options.steps)


def new_student(architecture: Path, seed: int) -> "object":
    """A student with first weights by the seed."""
    import torch

    from common.seeding import seed_of
    from common.storage import Storage
    from trainer.architecture import read_architecture
    from trainer.student import Student

    torch.manual_seed(seed_of(seed, "student") % 2**63)
    return Student(read_architecture(Storage(str(architecture))))


class Teaching:
    """A lake's batches, and the loop over them."""

    def __init__(self, lake_uri: str, room: "object", teachers: tuple[str, ...]) -> None:
        from common.lake import open_lake
        from common.storage import Storage
        from trainer.architecture import read_architecture
        from trainer.config import DataConfig
        from trainer.data import Batch, TrainData
        from trainer.launch import build_order, find_rows
        from trainer.selection.stored import choose_selection

        self.lake, self.teachers, self.seed = open_lake(lake_uri), teachers, room.seed
        self.selection = choose_selection(self.lake, None, teachers)[0] if teachers else None
        # Continued stage 1 gets the same rows as the others: those for which a teacher may speak.
        rows = find_rows(self.lake, teachers, self.selection, self.seed)
        config = DataConfig(batch_size=BATCH, lanes=4, crop_scale=0.7, seed=self.seed)
        order = build_order(rows, config, self.lake)
        architecture = read_architecture(Storage(str(room.architecture)))
        self.data = TrainData(lake_uri, order, architecture, config.crop_scale, teachers, self.selection)
        self.batches: list[Batch] = []

    def train(self, student: object, objective: object, steps: int) -> object:
        """Train for some steps."""
        from trainer.config import OptimConfig
        from trainer.feed import local_batches
        from trainer.loop import LoopPlan, train
        from trainer.optim import build_optimizer

        student.train()
        optim = OptimConfig(lr=LR, warmup_steps=steps // 10, weight_decay=0.1)
        optimizer = build_optimizer({"student": student, "objective": objective}, optim)
        plan = LoopPlan(steps, self.data.order.steps_per_epoch, optim, 1, self.seed)
        if len(self.batches) < steps:  # the same for every recipe, so they are read once
            self.batches = list(local_batches(self.data, 0, steps))
        for _ in train(self.batches[:steps], student, objective, optimizer, plan, 0):
            pass
        return student

    def maps(self) -> object:
        """The paper's maps into the student's space."""
        from trainer.alignment.maps import NEWEST, load_alignment

        return load_alignment(self.lake, NEWEST, self.teachers).maps

    def dims(self, maps: object) -> dict[str, tuple[int, int]]:
        """Widths of the teachers' vectors, after their maps."""
        made = {name: self.lake.read_teacher(name)["fingerprint"] for name in self.teachers}
        return {name: (96, 96) if maps else (it["image_dim"], it["text_dim"]) for name, it in made.items()}

    def scales(self, config: object) -> dict[str, float]:
        """As stage 2 chooses them."""
        from trainer.config import DataConfig, Stage2Config
        from trainer.stage2 import teacher_scales

        stage2 = Stage2Config(distill=config, data=DataConfig(batch_size=BATCH, lanes=4, seed=self.seed))
        return teacher_scales(self.lake, self.teachers, str(self.selection), stage2)


def summarise(found: list[dict], options: argparse.Namespace) -> str:
    """A Markdown table: mean over the seeds, with 95 % intervals of a bootstrap over seeds and test pictures."""
    from classroom import FIELDS

    columns = [*FIELDS, MEAN]
    lines = ["| model | " + " | ".join(columns) + " |", "| --- " * (len(columns) + 1) + "|"]
    for name in found[0]:
        cells = []
        for column in columns:
            value, resampled = pooled([of_column(one[name], column) for one in found])
            low, high = np.percentile(resampled, [2.5, 97.5])
            cells.append(f"{100 * value:.1f} [{100 * low:.1f}, {100 * high:.1f}]")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += ["", "| difference of the means | points | by seed |", "| --- | --- | --- |"]
    names = [name for name in found[0] if not name.startswith("teacher")]
    rivals = [(name, names[-1] if "default" not in names else "default") for name in names]
    for rival, mine in rivals:
        if rival == mine:
            continue
        by_seed = [(of_column(one[mine], MEAN)[0] - of_column(one[rival], MEAN)[0]) * 100 for one in found]
        differences = [
            (of_column(one[mine], MEAN)[0], of_column(one[mine], MEAN)[1] - of_column(one[rival], MEAN)[1])
            for one in found
        ]
        low, high = np.percentile(pooled(differences)[1] * 100, [2.5, 97.5])
        listing = ", ".join(f"{points:+.1f}" for points in by_seed)
        lines.append(f"| {mine} less {rival} | {np.mean(by_seed):+.1f} [{low:+.1f}, {high:+.1f}] | {listing} |")
    return "\n".join([*lines, *against_specialists(found)])


def against_specialists(found: list[dict]) -> list[str]:
    """In each modality, the default less the teacher that is best there."""
    from classroom import FIELDS

    if "default" not in found[0]:
        return []
    lines = ["", "| default less the best teacher, in | points | by seed |", "| --- | --- | --- |"]
    for modality in FIELDS:
        teachers = [name for name in found[0] if name.startswith("teacher")]
        best = max(teachers, key=lambda name: np.mean([one[name][modality][0] for one in found]))
        pairs = [(of_column(one["default"], modality), of_column(one[best], modality)) for one in found]
        value, resampled = pooled([(mine[0] - its[0], mine[1] - its[1]) for mine, its in pairs])
        low, high = np.percentile(100 * resampled, [2.5, 97.5])
        listing = ", ".join(f"{100 * (mine[0] - its[0]):+.1f}" for mine, its in pairs)
        lines.append(f"| {modality} ({best}) | {100 * value:+.1f} [{low:+.1f}, {high:+.1f}] | {listing} |")
    return lines


def of_column(scores: dict, column: str) -> tuple[float, np.ndarray]:
    """AUC and resamples of a modality, or of the mean over all."""
    if column != MEAN:
        return scores[column][0], np.array(scores[column][1])
    return float(np.mean([s[0] for s in scores.values()])), np.mean([s[1] for s in scores.values()], axis=0)


def pooled(by_seed: list[tuple[float, np.ndarray]]) -> tuple[float, np.ndarray]:
    """Mean over seeds, and resamples of it: seeds drawn with replacement, each with its own resamples of pictures.

    All seeds share the test pictures, so resample b of each is of the same ones.
    """
    resampled = np.stack([resamples for _, resamples in by_seed])
    draw = np.random.default_rng(0).integers(len(by_seed), size=(len(by_seed), resampled.shape[1]))
    return float(np.mean([value for value, _ in by_seed])), np.take_along_axis(resampled, draw, axis=0).mean(axis=0)


def main() -> None:
    """Run the seeds, print the table, and record it if asked."""
    from classroom import STUDENT_SHARE

    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="one table over all of them")
    made.add_argument("--runs", type=int, help="so many seeds from 0 on, as other benchmarks' option is called")
    made.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="seeds at once (default: cores)")
    made.add_argument("--steps", type=int, default=STEPS, help=f"of stage 2 (default {STEPS})")
    made.add_argument("--recipes", nargs="+", help="only these")
    made.add_argument(
        "--student-share", type=float, default=STUDENT_SHARE, help="of the train pictures (0.85: all that teachers see)"
    )
    made.add_argument("--choose", action="store_true", help="score candidates on the validation part")
    made.add_argument("--data", type=Path, default=default_data(), help="the shared data")
    made.add_argument("--work", type=Path, help="folder for lakes and models (default: the temporary one)")
    made.add_argument("--keep", type=Path, help="write all scores to this JSON file")
    made.add_argument("--record", action="store_true", help="write the table to docs/benchmarks.md")
    options = made.parse_args()
    if options.runs:
        options.seeds = list(range(options.runs))
    options.jobs = min(options.jobs, len(options.seeds))
    # Threads that spin while they wait would take the cores from the other seed.
    os.environ.update({"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0", "OPENBLAS_NUM_THREADS": "1"})
    with ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn")) as pool:
        found = list(pool.map(run_seed, options.seeds, [options] * len(options.seeds)))
    if options.keep:
        options.keep.write_text(json.dumps(found))
    table = summarise(found, options)
    print(table)
    if options.record:
        write_record(table, f"Seeds {', '.join(map(str, options.seeds))}; {options.steps} steps. {provenance()}")


def write_record(table: str, settings: str) -> None:
    """Put the table where docs/benchmarks.md keeps it, in place of the one before."""
    begin, end = "<!-- students: begin -->\n", "<!-- students: end -->\n"
    text = RECORD.read_text(encoding="utf-8")
    before, _, rest = text.partition(begin)
    after = rest.partition(end)[2]
    RECORD.write_text(f"{before}{begin}{table}\n\n{settings}\n{end}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
