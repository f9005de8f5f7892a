"""mmkd evaluate against clip-benchmark 1.6.2: the same scores, and the clock of whole commands for one and four models.

python tests/benchmarks/bench_clip_benchmark.py [--runs N] [--peer DIR] [--store] [--record]

Both classify breast ultrasounds and retrieve figures of textbooks with models whose weights numpy draws. What
clip-benchmark answers for the first model can be stored (``--store``); a unit test holds mmkd to it.
"""

import argparse
import io
import json
import shutil
import sys
import tarfile
from pathlib import Path

from material import ROOT
from paired import Comparison, conclude, in_turn, parser, workplace
from whole import insist, make_peer, run_whole

sys.path.insert(0, str(ROOT / "tests" / "support"))
from peer_evaluation import (
    ANSWER,
    ANSWER_ROWS,
    CAPTIONED,
    CUTOFFS,
    LABELLED,
    MODEL,
    MODELS,
    TEMPLATES,
    Row,
    read_rows,
    scores_of,
    write_lake,
    write_model,
    write_templates,
)

PEER = "clip-benchmark==1.6.2"
BESIDE = ("requests", "numpy<2.4")
"""It imports the one without asking for it; newer ones of the other refuse its arithmetic."""
TARS = 4
"""At least as many as its workers."""
BATCH = 64


class Bench:
    """Both programs, the models and what they are asked.

    Args:
        folder: For everything.
        peer: clip-benchmark's environment.
        rows: What is scored.
    """

    def __init__(self, folder: Path, peer: Path, rows: list[Row]) -> None:
        self.folder, self.peer = folder, peer
        self.models = [write_model(folder / f"model{seed}", seed) for seed in range(MODELS)]
        self.templates = write_templates(folder / "templates.yaml")
        self.lake = write_lake(folder / "lake", rows)
        for modality in (LABELLED, CAPTIONED):
            write_set(folder / "sets" / modality, [row for row in rows if row.modality == modality])

    def run_peer(self, models: int) -> float:
        """Seconds of clip-benchmark with so many models, one command for each kind of task."""
        shutil.rmtree(self.folder / "answers", ignore_errors=True)
        (self.folder / "answers").mkdir()
        weights = [str(folder / "open_clip_model.safetensors") for folder in self.models[:models]]
        seconds = 0.0
        for modality, task in ((LABELLED, "classification"), (CAPTIONED, "retrieval")):
            command = [str(self.peer / "bin" / "clip_benchmark"), "eval", "--no_amp", "--task", f"zeroshot_{task}"]
            command += ["--model", MODEL, "--pretrained", *weights, "--dataset", f"wds/{modality}"]
            command += ["--dataset_root", f"{self.folder}/sets/{modality}", "--batch_size", str(BATCH)]
            command += ["--num_workers", "2", "--recall_k", *map(str, CUTOFFS)]
            command += ["--output", f"{self.folder}/answers/{{dataset}}{{pretrained_full_path}}.json"]
            seconds += insist(run_whole(command, {"HF_HUB_OFFLINE": "1"})).seconds
        return seconds

    def peer_scores(self, model: int) -> dict[str, float]:
        """What it said of one model."""
        found: dict[str, float] = {}
        for file in (self.folder / "answers").glob(f"*model{model}*.json"):
            found |= json.loads(file.read_text())["metrics"]
        return {name: value for name, value in found.items() if name == "acc1" or "recall@" in name}

    def run_mmkd(self, models: int) -> float:
        """Seconds of ``mmkd evaluate`` with so many."""
        shutil.rmtree(Path(self.lake) / "scores", ignore_errors=True)
        names = ",".join(f"model{seed}={folder}" for seed, folder in enumerate(self.models[:models]))
        command = [sys.executable, "-m", "cluster.cli", "evaluate", self.lake, "--models", names]
        command += ["--templates", str(self.templates), "--set", f"batch_size={BATCH}"]
        return insist(run_whole(command, {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)})).seconds

    def mmkd_scores(self, model: int) -> dict[str, float]:
        """Likewise."""
        import pyarrow.parquet as pq

        (file,) = (Path(self.lake) / "scores").glob("*.parquet")
        return scores_of([row for row in pq.read_table(file).to_pylist() if row["model"] == f"model{model}"])


def write_set(folder: Path, rows: list[Row]) -> None:
    """Tars as clip-benchmark reads them, with class names and templates, or as a set for retrieval."""
    (folder / "test").mkdir(parents=True)
    labels = sorted({row.label for row in rows if row.label is not None})
    (folder / "test" / "nshards.txt").write_text(str(TARS))
    if labels:
        (folder / "classnames.txt").write_text("\n".join(labels))
        templates = "\n".join(text.format("{c}") for text in TEMPLATES)
        (folder / "zeroshot_classification_templates.txt").write_text(templates)
    else:
        (folder / "dataset_type.txt").write_text("retrieval")
    for number in range(TARS):
        with tarfile.open(folder / "test" / f"{number}.tar", "w") as tar:
            for place, row in enumerate(rows[number::TARS]):
                answer = ("cls", str(labels.index(row.label))) if row.label is not None else ("txt", row.caption)
                for suffix, data in (("jpg", row.image), (answer[0], answer[1].encode())):
                    member = tarfile.TarInfo(f"{place:05d}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))


def compare_scores(bench: Bench, models: int) -> None:
    """Say for each model how far the two are apart."""
    for model in range(models):
        theirs, ours = bench.peer_scores(model), bench.mmkd_scores(model)
        apart = {name: abs(value - ours[name]) for name, value in theirs.items()}
        print(f"model {model}: {len(apart)} scores differ by {max(apart.values()):.1e} at most; {theirs}")


def measure(bench: Bench, options: argparse.Namespace) -> list[Comparison]:
    """Whole commands, in turn."""
    made = []
    for models in (1, MODELS):
        taken = Comparison(f"evaluate against clip-benchmark 1.6.2, {models} models, whole commands", "s")
        ways = {
            "clip-benchmark": lambda models=models, taken=taken: taken.add("clip-benchmark", bench.run_peer(models)),
            "mmkd": lambda models=models, taken=taken: taken.add("mmkd", bench.run_mmkd(models)),
        }
        in_turn(options.runs, ways)
        compare_scores(bench, models)
        made.append(taken)
    return made


if __name__ == "__main__":
    arguments = parser(__doc__ or "", runs=3, rows=300)
    arguments.add_argument("--peer", type=Path, help="clip-benchmark's environment (default: in the user's cache)")
    arguments.add_argument("--store", action="store_true", help=f"only write its answer to {ANSWER.relative_to(ROOT)}")
    chosen = arguments.parse_args()
    with workplace(chosen) as place:
        environment = make_peer("clip-benchmark", [PEER, *BESIDE], chosen.peer)
        made = Bench(place, environment, read_rows(chosen.data, ANSWER_ROWS if chosen.store else chosen.rows))
        if chosen.store:
            made.run_peer(1)
            ANSWER.write_text(json.dumps({"by": PEER, "scores": made.peer_scores(0)}, indent=2, sort_keys=True) + "\n")
        else:
            conclude(measure(made, chosen), chosen, f"{MODEL}, {chosen.rows} rows of each kind, {BATCH} a pass")
