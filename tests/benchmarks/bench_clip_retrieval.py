"""mmkd extract against clip-retrieval on the same pictures and weights: whole commands, two sizes of one job each.

python tests/benchmarks/bench_clip_retrieval.py [--runs N] [--small N] [--large N] [--only rate faults] [--record]

clip-retrieval gets an environment of its own, made at the first run and kept (``--peer`` says where). The rate is that
of the rows by which two runs differ, so that starting, which both sizes do once, cancels. Nothing of mmkd is left out:
leases, the account and the check of every vector are in it.
"""

import argparse
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from material import ROOT, SHORTEST, read_jpegs, write_lake, write_tars, write_teacher
from paired import Comparison, conclude, in_turn, parser, workplace
from whole import GIB, WholeRun, insist, make_peer, run_whole

PEER = "clip-retrieval==2.45.0"
MODEL = "ViT-S-32-alt"
"""Of open_clip's own list, since clip-retrieval takes no other; small, so that decoding matters as beside a GPU."""
OPENAI = {"mean": [0.48145466, 0.4578275, 0.40821073], "std": [0.26862954, 0.26130258, 0.27577711], **SHORTEST}
SHARD_ROWS = 256
BATCH = 64
MODELS = 4
RATE_TARGET, FOUR_TARGET, MEMORY_TARGET = 1.0, 1.05, 1.3
CORRUPT = 5


@dataclass
class Job:
    """The same rows for both: a lake, and tars."""

    rows: int
    lake: Path
    tars: Path


class Bench:
    """Both programs, and what they work on.

    Args:
        folder: For lakes, tars and weights.
        peer: clip-retrieval's environment.
        workers: Its preprocessing workers.
    """

    def __init__(self, folder: Path, peer: Path, workers: int) -> None:
        self.folder, self.peer, self.workers = folder, peer, workers

    def write_models(self) -> None:
        """Four models of one shape with random weights."""
        import open_clip

        config = open_clip.get_model_config(MODEL)
        for seed in range(MODELS):
            towers = (config["vision_cfg"], config["text_cfg"], config["embed_dim"])
            write_teacher(self.folder / f"model{seed}", *towers, seed, OPENAI)

    def write_job(self, name: str, jpegs: list[bytes], rows: int, corrupt: int = 0) -> Job:
        """Rows as a lake and as tars; of some the picture is cut off in its middle."""
        job = Job(rows, self.folder / f"{name}-lake", self.folder / f"{name}-tars")
        spoiled = dict.fromkeys(range(3, rows, max(1, rows // max(corrupt, 1)))) if corrupt else {}
        made = [jpegs[row % len(jpegs)] for row in range(rows)]
        made = [data[: len(data) // 2] if row in spoiled else data for row, data in enumerate(made)]
        write_lake(job.lake, made, rows, SHARD_ROWS)
        write_tars(job.tars, made, rows, SHARD_ROWS)
        return job

    def run_peer(self, job: Job, model: int = 0, kill_when: Callable[[], bool] | None = None) -> WholeRun:
        """clip-retrieval, one model. With fewer tars in a partition than workers it hangs, hence one partition."""
        shutil.rmtree(self.folder / "peer-out", ignore_errors=True)
        last = job.rows // SHARD_ROWS - 1
        options = {
            "input_dataset": f"{job.tars}/{{00000..{last:05d}}}.tar",
            "input_format": "webdataset",
            "output_folder": str(self.folder / "peer-out"),
            "output_partition_count": "1",
            "clip_model": f"open_clip:{MODEL}/{self.folder}/model{model}/open_clip_model.safetensors",
            "batch_size": str(BATCH),
            "num_prepro_workers": str(self.workers),
        }
        command = [str(self.peer / "bin" / "clip-retrieval"), "inference"]
        for name, value in options.items():
            command += [f"--{name}", value]
        return run_whole(command, {"HF_HUB_OFFLINE": "1"}, kill_when)

    def run_mmkd(
        self, job: Job, models: int = 1, anew: bool = True, kill_when: Callable[[], bool] | None = None
    ) -> WholeRun:
        """``mmkd extract`` as a user would type it."""
        for left in ("features", "manifests", "runs", "rejects", "leases") if anew else ():
            shutil.rmtree(job.lake / left, ignore_errors=True)
        names = ",".join(f"model{seed}={self.folder}/model{seed}" for seed in range(models))
        command = [sys.executable, "-m", "cluster.cli", "extract", str(job.lake), "--teachers", names]
        command += ["--micro-batch", str(BATCH)]
        return run_whole(command, {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}, kill_when)

    def peer_vectors(self) -> dict[str, np.ndarray]:
        """Row -> unit vector of its picture, by clip-retrieval's last run."""
        import pyarrow.parquet as pq

        out = self.folder / "peer-out"
        names = pq.read_table(out / "metadata" / "metadata_0.parquet")["image_path"].to_pylist()
        vectors = np.load(out / "img_emb" / "img_emb_0.npy").astype(np.float32)
        return {str(int(name)): vector for name, vector in zip(names, vectors, strict=True)}

    def mmkd_vectors(self, job: Job) -> dict[str, np.ndarray]:
        """The same by mmkd's; rows without a vector are left out."""
        import pyarrow.parquet as pq

        found = {}
        for file in sorted((job.lake / "features" / "teacher=model0").glob("shard-*.parquet")):
            keys = pq.read_table(job.lake / "pairs" / file.name, columns=["source_key"])["source_key"].to_pylist()
            vectors = pq.read_table(file, columns=["image_embedding"])["image_embedding"].to_pylist()
            found |= {key: np.array(vector) for key, vector in zip(keys, vectors, strict=True) if vector is not None}
        return found


def measure_rates(bench: Bench, options: argparse.Namespace) -> tuple[list[Comparison], str]:
    """One model, and four off one decode, each by the difference of two sizes."""
    jpegs = read_jpegs(options.data)
    small, large = (bench.write_job(f"rows{rows}", jpegs, rows) for rows in (options.small, options.large))
    title = "embedding against clip-retrieval 2.45"
    one, four = (Comparison(f"{title}, {what}", "rows/s", target) for what, target in WANTED)
    work = Comparison(f"{title}, one model", "rows per CPU second of all processes")
    memory = Comparison(f"{title}, peak memory, shared pages counted once", "GiB", MEMORY_TARGET, at_most=True)
    driver: list[float] = []

    def add(name: str, command: partial, *places: tuple[Comparison, float]) -> None:
        less, more = insist(command(small)), insist(command(large))
        rows, seconds = large.rows - small.rows, more.seconds - less.seconds
        for comparison, factor in places:
            comparison.add(name, factor * rows / seconds)
        if name != "mmkd, four models":
            work.add(name, rows / (more.cpu_seconds - less.cpu_seconds))
        if name != "mmkd":
            memory.add(name, max(less.pss, more.pss) / GIB)
        else:
            driver.append((more.driver_cpu_seconds - less.driver_cpu_seconds) / (more.cpu_seconds - less.cpu_seconds))

    ways = {
        # The four have one shape: a run for each takes four times as long as a run for one.
        "clip-retrieval": partial(add, "clip-retrieval", partial(bench.run_peer), (one, 1), (four, 1 / MODELS)),
        "mmkd": partial(add, "mmkd", partial(bench.run_mmkd, models=1), (one, 1)),
        "mmkd, four models": partial(add, "mmkd, four models", partial(bench.run_mmkd, models=MODELS), (four, 1)),
    }
    in_turn(options.runs, ways)
    insist(bench.run_mmkd(small))
    insist(bench.run_peer(small))
    theirs, ours = bench.peer_vectors(), bench.mmkd_vectors(small)
    differences = [float(np.abs(ours[key] - theirs[key]).max()) for key in theirs]
    print(
        f"\n{len(ours)} vectors of mmkd, {len(theirs)} of clip-retrieval; they differ by {max(differences):.1e} at most"
    )
    share = f"mmkd's driver takes {100 * float(np.median(driver)):.1f} % of its CPU seconds"
    print(share)
    described = f"{MODEL}, {options.small} and {options.large} rows in shards and tars of {SHARD_ROWS}; {share}"
    return [one, four, work, memory], described


WANTED = (("one model", RATE_TARGET), ("four models off one decode against a run for each", FOUR_TARGET))


def show_faults(bench: Bench, options: argparse.Namespace) -> None:
    """What five cut-off pictures and a kill at half cost each of them."""
    jpegs = read_jpegs(options.data)
    spoiled = bench.write_job("spoiled", jpegs, options.small, CORRUPT)
    peer, ours = bench.run_peer(spoiled), bench.run_mmkd(spoiled)
    print(f"\n{CORRUPT} of {options.small} pictures are cut off:")
    print(f"  clip-retrieval: status {peer.status}, {len(bench.peer_vectors())} vectors, no list of what is missing")
    rejects = sum(len(table) for table in _rejects(spoiled))
    print(f"  mmkd: status {ours.status}, {len(bench.mmkd_vectors(spoiled))} vectors, {rejects} rows in rejects/")
    whole = bench.write_job("killed", jpegs, options.large)
    shards = options.large // SHARD_ROWS

    def half_is_stored() -> bool:
        return len(list((whole.lake / "features").glob("teacher=model0/shard-*.parquet"))) >= shards // 2

    bench.run_mmkd(whole, kill_when=half_is_stored)
    kept = len(bench.mmkd_vectors(whole))
    resumed = insist(bench.run_mmkd(whole, anew=False))
    print(f"killed at half of {options.large} rows:")
    print(f"  mmkd: {kept} rows were kept; the same command did the rest in {resumed.seconds:.0f} s")
    half = insist(bench.run_peer(whole)).seconds / 2
    begun = time.perf_counter()
    bench.run_peer(whole, kill_when=lambda: time.perf_counter() - begun > half)
    left = len(list((bench.folder / "peer-out").rglob("*.npy")))
    print(f"  clip-retrieval: {left} files of vectors were left after half of its time")


def _rejects(job: Job) -> list:
    import pyarrow.parquet as pq

    return [pq.read_table(file) for file in (job.lake / "rejects").rglob("*.parquet")]


if __name__ == "__main__":
    arguments = parser(__doc__ or "", runs=3)
    arguments.add_argument("--small", type=int, default=512, help="rows of the small job")
    arguments.add_argument("--large", type=int, default=3072, help="rows of the large job")
    arguments.add_argument("--workers", type=int, default=2, help="clip-retrieval's preprocessing workers")
    arguments.add_argument("--only", nargs="+", choices=["rate", "faults"], default=["rate", "faults"])
    arguments.add_argument("--peer", type=Path, help="its environment (default: in the user's cache)")
    chosen = arguments.parse_args()
    with workplace(chosen) as place:
        made = Bench(place, make_peer("clip-retrieval", [PEER], chosen.peer), chosen.workers)
        made.write_models()
        if "faults" in chosen.only:
            show_faults(made, chosen)
        if "rate" in chosen.only:
            found, settings = measure_rates(made, chosen)
            conclude(found, chosen, settings)
