"""Random faults over ingest, extract and train; after each, the lake's account must balance and its files be whole.

Every round brings in a new table or tar with bad rows of many kinds, embeds it, or trains, while something goes wrong:
the command is killed or stopped at a random moment, starts twice, finds a full disk, dead and silent links or damaged
bytes. Then the same command runs to its end, and all of it is checked: every row of every source is a pair, a reject, a
duplicate, merged or filtered; pictures, rows and vectors are what their hashes say; no sample is there twice; training
took each step once.

    python tests/benchmarks/soak.py --faults 200 --seed 1
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import importlib.util
import io
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

import pyarrow as pa  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402
from material import TINY_TEXT, write_teacher  # noqa: E402
from picture_server import PictureServer, png  # noqa: E402

from common.lake import INGEST_REJECTS, open_lake  # noqa: E402

VISION = {"image_size": 32, "layers": 1, "width": 32, "patch_size": 16, "head_width": 16}
SHARD_ROWS = 16
LONGEST_SECONDS = 300
STEPS = ("ingest", "ingest", "extract", "train")
FAULTS = {
    "ingest": ("kill", "kill", "stop", "twice", "full disk", "beside extract"),
    "extract": ("kill", "kill", "stop", "twice", "damaged bytes"),
    "train": ("kill", "stop", "twice"),
}
SETTINGS = {
    "optim": {"lr": 1e-3, "warmup_steps": 2},
    "data": {"batch_size": 8, "lanes": 2, "tasks": 1},
    "scale": {"log_every": 1, "checkpoint_every": 1000, "checkpoint_minutes": 0.02, "use_gpu": False},
    "epochs": 3,
}


class Soak:
    """One lake, and what happens to it."""

    def __init__(self, root: Path, seed: int, server: PictureServer) -> None:
        self.root, self.server = root, server
        self.draw = random.Random(seed)
        self.lake = str(root / "lake")
        self.teachers = [write_teacher(root / f"t{i}", VISION, TINY_TEXT, 16, seed=i) for i in range(2)]
        helpers = _load(ROOT / "tests" / "trainer" / "conftest.py")
        helpers.write_student(root / "student")
        (root / "train.yaml").write_text(json.dumps({**SETTINGS, "model": {"architecture": str(root / "student")}}))
        self.pictures = 0
        self.sources: list[Path] = []
        self.done: Counter[str] = Counter()
        self.hits = 0
        """Signals that met a command at work."""

    def round(self, number: int) -> str:
        """One fault, and what follows from it; returns what it was.

        Raises:
            AssertionError: Something does not balance, or a command did not come to its end.
        """
        step = "ingest" if number == 0 else self.draw.choice(STEPS)
        fault = self.draw.choice(FAULTS[step])
        getattr(self, f"_{step}")(number, fault)
        self._check()
        self.done[f"{step}: {fault}"] += 1
        return f"{step}: {fault}"

    # The three steps.

    def _ingest(self, number: int, fault: str) -> None:
        source = self._write_source(number)
        self.sources.append(source)
        command = self._ingest_command(source)
        if fault == "twice":
            self._both(command, self._ingest_command(self._another_source(number)))
        elif fault == "beside extract":
            self._both(command, self._extract_command() if number else command)
        elif fault == "full disk":
            said, status = self._run(command, most_bytes=self.draw.choice((2_000, 20_000, 60_000)))
            assert status in (0, 1), said
        else:
            self._disturb(command, fault, most_seconds=3.0)
        self._finish(command)
        if self.draw.random() < 0.3:  # links that were dead live again
            self.server.files.update({f"later-{source.stem}-{i}.png": self._png() for i in range(50)})
            self._finish([*command, "--retry-rejects"])

    def _extract(self, number: int, fault: str) -> None:
        self._finish(self._ingest_command(self._another_source(number)))  # so that there is something to embed
        if fault == "damaged bytes":
            self._finish(self._extract_command())
            files = sorted((self.root / "lake" / "features").rglob("*.parquet"))
            self._damage(self.draw.choice(files))
            said, status = self._run(["verify", self.lake])
            assert status == 1, f"verify did not see the damage\n{said}"
            self._run(["verify", self.lake, "--repair"])
        elif fault == "twice":
            self._both(self._extract_command(), self._extract_command())
        else:
            self._disturb(self._extract_command(), fault, most_seconds=25.0)
        self._finish(self._extract_command())

    def _train(self, number: int, fault: str) -> None:
        run = f"run-{number}"
        command = ["train", "stage1", self.lake, "--run", run, "--config", str(self.root / "train.yaml")]
        if fault == "twice":
            self._both(command, [*command[:4], f"{run}-too", *command[5:]])
        else:
            self._disturb(command, fault, most_seconds=40.0)
        self._finish(command)
        rows = (self.root / "lake" / "runs" / run / "metrics.jsonl").read_text().splitlines()
        steps = [json.loads(row)["step"] for row in rows]
        assert steps == list(range(1, len(steps) + 1)), f"{run} took the steps {steps}"

    # What goes wrong.

    def _disturb(self, command: list[str], fault: str, most_seconds: float) -> None:
        process = self._start(command)
        delay = self.draw.uniform(0.2, most_seconds)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(delay)
        number = {"kill": signal.SIGKILL, "stop": signal.SIGTERM}[fault]
        if process.poll() is None:
            process.send_signal(number)
            self.hits += 1
        said, status = self._end(process)
        expected = {0, 143} if fault == "stop" else {0, -signal.SIGKILL}
        # Python itself has no handler yet in its first moments.
        assert status in expected | ({-signal.SIGTERM} if delay < 2 else set()), f"{command}: {status}\n{said}"

    def _both(self, first: list[str], second: list[str]) -> None:
        processes = [self._start(first), self._start(second)]
        for process, command in zip(processes, (first, second), strict=True):
            said, status = self._end(process)
            assert status in (0, 1), f"{command}: {status}\n{said}"
            assert "Traceback" not in said, f"{command}\n{said}"
        for command in (first, second):
            self._finish(command)

    def _damage(self, path: Path) -> None:
        data = bytearray(path.read_bytes())
        for _ in range(3):
            data[self.draw.randrange(len(data))] ^= 1 + self.draw.randrange(255)
        path.write_bytes(data)

    # Sources with every kind of bad row.

    def _png(self) -> bytes:
        self.pictures += 1
        return png(self.pictures)

    def _another_source(self, number: int) -> Path:
        source = self._write_source(number + 1_000_000)
        self.sources.append(source)
        return source

    def _write_source(self, number: int) -> Path:
        folder = self.root / "sources" / f"s{number}"
        folder.mkdir(parents=True)
        kind = self.draw.choice(("jsonl", "csv", "parquet", "tar"))
        rows = [self._row(folder, place) for place in range(self.draw.randrange(30, 120))]
        path = folder / f"s{number}.{kind}"
        if kind == "jsonl":
            lines = [json.dumps(row) if self.draw.random() > 0.03 else "{broken" for row in rows]
            path.write_text("\n".join(lines) + "\n")
        elif kind == "csv":
            with path.open("w", newline="") as stream:
                writer = csv.DictWriter(stream, ["image", "caption", "label", "split", "patient"], restval="")
                writer.writeheader()
                writer.writerows(rows)
        elif kind == "parquet":
            pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=self.draw.randrange(8, 64))
        else:
            self._write_tar(path, folder, rows)
        return path

    def _row(self, folder: Path, place: int) -> dict[str, Any]:
        row = {"image": f"{place}.png", "caption": f"words {folder.name} {place}", "label": f"l{place % 4}"}
        row |= {"split": self.draw.choice(("train", "train", "", "test")), "patient": f"p{self.draw.randrange(40)}"}
        what = self.draw.random()
        if what < 0.05 and place:  # a repetition, whole or not
            row |= {"image": "0.png", "caption": f"words {folder.name} 0"}
        elif what < 0.10:
            (folder / row["image"]).write_bytes(self._png()[: self.draw.randrange(60)])
            return row
        elif what < 0.14:
            row["image"] = f"{self.server.url}/status/{self.draw.choice((404, 403, 500))}?row={place}"
            return row
        elif what < 0.18:
            row["image"] = f"{self.server.url}/later-{folder.name}-{place % 50}.png"
            return row
        elif what < 0.22:
            row["caption"] = ""
        (folder / row["image"]).write_bytes(self._png())
        return row

    def _write_tar(self, path: Path, folder: Path, rows: list[dict[str, Any]]) -> None:
        stream = io.BytesIO()
        with tarfile.open(fileobj=stream, mode="w") as tar:
            for place, row in enumerate(rows):
                file = folder / row["image"].rpartition("/")[2]
                picture = file.read_bytes() if file.exists() else b""
                for name, data in ((f"{place}.png", picture), (f"{place}.json", json.dumps(row).encode())):
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
        data = stream.getvalue()
        path.write_bytes(data[: self.draw.randrange(len(data) // 2, len(data))] if self.draw.random() < 0.3 else data)

    # Commands.

    def _ingest_command(self, source: Path) -> list[str]:
        settings = [f"shard_rows={SHARD_ROWS}", "fetch.seconds=5", "fetch.retries=0", "lease_seconds=4"]
        return ["ingest", str(source), self.lake, "--group-column", "patient", *_sets(settings)]

    def _extract_command(self) -> list[str]:
        return ["extract", self.lake, "--teachers", ",".join(self.teachers), *_sets(["lease_seconds=4"])]

    def _start(self, command: list[str], most_bytes: int | None = None) -> subprocess.Popen[str]:
        def limit() -> None:
            if most_bytes is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))

        log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - read and closed when the process has ended
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(
            [sys.executable, "-m", "cluster.cli", *command],
            cwd=self.root,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            preexec_fn=limit,
        )
        process.log = log  # type: ignore[attr-defined]
        return process

    def _end(self, process: subprocess.Popen[str]) -> tuple[str, int]:
        try:
            process.wait(LONGEST_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        log = process.log  # type: ignore[attr-defined]
        log.seek(0)
        said = log.read()
        log.close()
        return said, process.returncode

    def _run(self, command: list[str], most_bytes: int | None = None) -> tuple[str, int]:
        return self._end(self._start(command, most_bytes))

    def _finish(self, command: list[str]) -> None:
        """Run a command until it has nothing to complain of; what a killed one held runs out in between."""
        said, status = "", 1
        for _ in range(4):
            said, status = self._run(command)
            if status == 0:
                return
            time.sleep(5)
        raise AssertionError(f"{' '.join(command)} ended with {status}:\n{said}")

    # The account.

    def _check(self) -> None:
        lake = open_lake(self.lake)
        manifests = [lake.storage.read_json(f"ingests/{name}") for name in lake.storage.list_files("ingests", ".json")]
        total: Counter[str] = Counter()
        for manifest in manifests:
            counts = {
                name: manifest[name] for name in ("input", "pairs", "rejects", "duplicates", "merged", "filtered")
            }
            parts = sum(count for name, count in counts.items() if name != "input")
            assert counts["input"] == parts, f"the account of {manifest['ingest_id']} does not balance: {counts}"
            total.update({**counts, "retried": manifest["retried"]})
        pairs = sum(lake.read_pairs(shard, ["sample_id"]).num_rows for shard in lake.shards())
        names = lake.storage.list_files(INGEST_REJECTS)
        rejects = sum(lake.storage.read_metadata(f"{INGEST_REJECTS}/{name}")[0] for name in names)
        assert pairs == total["pairs"], f"{pairs} pairs are there, {total['pairs']} in the account"
        assert rejects == total["rejects"] - total["retried"], f"{rejects} rejects are there, the account says {total}"
        splits: dict[str, set[str]] = {}
        for shard in lake.shards():
            for row in lake.read_pairs(shard, ["group_id", "split"]).to_pylist():
                splits.setdefault(row["group_id"], set()).add(row["split"])
        said, status = self._run(["verify", self.lake, "--pairs"])
        whole = status == 0 or "lack" in said or "missing" in said  # teachers may be behind, nothing may be bad
        assert whole, said
        assert not list((self.root / "lake").glob("ingest/*")), "an ingest that has ended left staged files"


def _sets(settings: list[str]) -> list[str]:
    return [word for setting in settings for word in ("--set", setting)]


def _load(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location("small_lakes", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def main() -> None:
    """Let so many faults happen; ends with the first that a lake did not survive, and leaves that lake there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where to work; by default a temporary folder")
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="soak-"))
    folder.mkdir(parents=True, exist_ok=True)
    print(f"seed {options.seed}, in {folder}")
    with PictureServer() as server:
        soak = Soak(folder, options.seed, server)
        for number in range(options.faults):
            began = time.monotonic()
            what = soak.round(number)
            print(f"{number + 1:4d} {what:24s} {time.monotonic() - began:6.1f} s", flush=True)
    for what, count in sorted(soak.done.items()):
        print(f"{what:24s} {count:4d}")
    print(f"{soak.hits} signals met a command at work")


if __name__ == "__main__":
    main()
