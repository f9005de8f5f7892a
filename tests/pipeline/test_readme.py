"""Every command of the README, in order, on a demo made small enough for a test."""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

pytestmark = pytest.mark.ray

ROOT = Path(__file__).resolve().parent.parent.parent
BLOCKS = re.findall(
    r"<!-- test: (\w+)[^\n]* -->\n```(bash|python)\n(.*?)```",
    (ROOT / "README.md").read_text(encoding="utf-8"),
    re.DOTALL,
)
SMALL_DEMO = {
    "train_pictures": 96,
    "val_pictures": 10,
    "test_pictures": 16,
    "teacher_pictures": 128,
    "teacher_steps": 100,
    "teacher_batch": 16,
    "student_batch": 32,
    "stage1_epochs": 1,
    "stage2_epochs": 1,
}


assert len(BLOCKS) >= 14, "the pattern lost blocks of the README"


def blocks_of(kind: str) -> list[str]:
    return [text for mark, _, text in BLOCKS if mark == kind]


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    bin_folder = str(Path(sys.executable).parent)
    return {**os.environ, "PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def home(tmp_path_factory, environment) -> Path:
    """A working directory as a reader has it after `make demo`, only smaller."""
    folder = tmp_path_factory.mktemp("reader")
    settings = [part for key, value in SMALL_DEMO.items() for part in ("--set", f"{key}={value}")]
    run(["mmkd", "demo", "--lake", "demo-lake", *settings], folder, environment)
    return folder


def run(command: list[str] | str, folder: Path, environment: dict[str, str]) -> str:
    shell = ["bash", "-euo", "pipefail", "-c", command] if isinstance(command, str) else command
    done = subprocess.run(shell, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return done.stdout + done.stderr


def test_the_demo_leaves_what_the_readme_says(home):
    for name in (
        "report.html",
        "student/open_clip_model.safetensors",
        "student/README.md",
        "lake.json",
        "prompts.yaml",
    ):
        assert (home / "demo-lake" / name).is_file(), name
    page = (home / "demo-lake" / "report.html").read_text()
    assert "<svg" in page
    assert 'src="http' not in page


def test_the_demo_again_does_nothing_twice(home, environment):
    settings = [part for key, value in SMALL_DEMO.items() for part in ("--set", f"{key}={value}")]
    said = run(["mmkd", "demo", "--lake", "demo-lake", *settings], home, environment)
    assert "nothing to do" in said


def test_a_copied_demo_does_nothing_twice_either(home, environment):
    """Under another name, and with the files' times those of the copying, as after ``cp -r``."""
    lake, copy = home / "demo-lake", home / "renamed" / "copy"
    shutil.copytree(lake, copy, copy_function=shutil.copy)
    settings = [part for key, value in SMALL_DEMO.items() for part in ("--set", f"{key}={value}")]
    said = run(["mmkd", "demo", "--lake", "renamed/copy", *settings], home, environment)
    assert re.search(r"ingest: nothing to do", said)
    assert re.search(r"stage 1: run stage1 is finished; nothing to do", said)
    assert re.search(r"stage 2: run stage2 is finished; nothing to do", said)
    for kind in ("pairs", "features", "selection", "runs"):
        # What was computed is there once, and nothing more was.
        made = [
            path.relative_to(lake) for path in lake.glob(f"{kind}/**/*") if path.suffix in (".parquet", ".safetensors")
        ]
        assert made == [path for path in made if (copy / path).is_file()]
        assert len(made) == sum(path.suffix in (".parquet", ".safetensors") for path in copy.glob(f"{kind}/**/*"))
    # But for the accounts of extractions, which say what happened where.
    for path in set(copy.glob("**/*.json")) - set(copy.glob("runs/*/report.json")):
        assert str(lake) not in path.read_text(), f"{path} names the lake's first place"


def test_local_commands_then_the_python_blocks(home, environment):
    for block in blocks_of("local"):
        run(block, home, environment)
    outside = {**environment, "PYTHONPATH": "", "PYTHONSAFEPATH": "1"}
    for block in blocks_of("python"):
        code = (
            "import sys\n"
            + block
            + "\nassert not {'ray', 'common', 'trainer', 'extractor', 'cluster'} & set(sys.modules)"
        )
        run([sys.executable, "-c", code], home, outside)


def test_the_papers_two_stages(home, environment):
    """Alignment runs; of the training, a student of full size, the settings are put together and shown."""
    (block,) = blocks_of("paper")
    (home / "recipes").symlink_to(ROOT / "recipes")
    align, *stages = block.strip().splitlines()
    # Teachers of so small a demo have hardly learned anything, and one that may speak nowhere is refused.
    run("mmkd select lake --set min_skill=0", home, environment)
    assert "finds the caption first" in run(f"{align} --set autoencoder.epochs=1", home, environment).lower()
    shown = [run(f"{stage} --print-config", home, environment) for stage in stages]
    assert all(rate in said for rate, said in zip(("lr: 5.0e-05", "lr: 1.0e-06"), shown, strict=False))
    assert "weight_decay: 0.2" in shown[0]
    assert "feature: 50" in shown[1]


def test_the_teachers_section(home, environment):
    (block,) = blocks_of("teachers")
    alone = "mmkd extract lake --teachers chest --catalog demo-lake/teachers.yaml"
    run(f"test -e lake || (mmkd ingest demo-lake/source/pairs.jsonl lake && {alone})", home, environment)
    said = run(block, home, environment)
    assert "All checks that could be made have passed" in said
    assert "nothing to do" in said  # the same weights from the store: the same embeddings
    assert (home / "models" / "chest" / "teacher.json").is_file()


def test_the_published_student_names_the_nine_pictures(tmp_path, environment, shared_data):
    """On random weights in the published layout and at full size, so the answers mean nothing."""
    import torch
    from upstream import write_bert_vocabulary

    from common.models.architectures import read_architecture
    from common.models.open_clip import build

    torch.manual_seed(0)
    state = build(read_architecture("mmkd-b16", "student")["model_cfg"]).half().state_dict()
    fork = {
        name.replace("text.", "text_encoder.", 1) if name.startswith("text.") else name: value
        for name, value in state.items()
    }
    torch.save(
        {"epoch": 20, "state_dict": {f"module.{name}": value for name, value in fork.items()}},
        tmp_path / "MMKD_B16.pth",
    )
    del state, fork
    write_bert_vocabulary(tmp_path)
    (tmp_path / "imgs").symlink_to(shared_data / "mmkd-demo" / "imgs")
    (block,) = blocks_of("student")
    said = run([sys.executable, "-c", block], tmp_path, environment)
    assert {line.split()[0] for line in said.splitlines() if line} >= {"ct.jpg", "oct.jpg", "xray.png", "fundus.jpeg"}


def test_readers_stay_under_ten_lines():
    readers = [block for block in blocks_of("python") if "features/teacher=" in block]
    assert len(readers) == 4
    assert all(len(block.strip().splitlines()) < 10 for block in readers)
    assert not any("*" in block for block in readers), "folders open as they are"


def test_object_storage_commands(home, environment, s3_server):
    values = {
        "AWS_ENDPOINT_URL": s3_server,
        "AWS_ACCESS_KEY_ID": "reader-key",
        "AWS_SECRET_ACCESS_KEY": "reader-secret-canary",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    there = {**environment, **values}
    run([sys.executable, "-c", "import fsspec; fsspec.filesystem('s3').mkdir('bucket')"], home, there)
    said = "".join(run(block, home, there) for block in blocks_of("s3"))
    assert "canary" not in said
    list_all = "import fsspec; fs = fsspec.filesystem('s3'); print(*fs.find('bucket/lake'))"
    names = run([sys.executable, "-c", list_all], home, there)
    assert "bucket/lake/features/teacher=chest/shard-000000.parquet" in names
    read_all = "import fsspec; fs = fsspec.filesystem('s3'); print([b'canary' in fs.cat(f) for f in fs.find('bucket')])"
    assert "True" not in run([sys.executable, "-c", read_all], home, there)


@pytest.fixture(scope="module")
def ray_head(tmp_path_factory, environment):
    """A Ray head with its job server on this machine, stopped by process id."""
    ports = []
    for _ in range(3):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            ports.append(probe.getsockname()[1])
    dashboard, gcs, agent = ports
    temp = f"/tmp/ray-head-{os.getpid()}"  # short: Ray puts sockets below it
    command = ["ray", "start", "--head", "--block", "--num-cpus=4", "--temp-dir", temp]
    # The agent runs the jobs; its usual port belongs to the Ray that the other tests of this session share.
    command += [f"--dashboard-agent-listen-port={agent}"]
    command += [f"--port={gcs}", f"--dashboard-port={dashboard}", "--object-store-memory=500000000"]
    quiet = {**environment, "RAY_AUTH_MODE": "disabled"}
    process = subprocess.Popen(command, env=quiet, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{dashboard}"
    for _ in range(120):
        try:
            urllib.request.urlopen(f"{address}/api/version", timeout=2).read()
            break
        except OSError:
            time.sleep(0.5)
    there = {**quiet, "RAY_API_SERVER_ADDRESS": address}
    # The server answers before the agent that runs jobs is up; a reader would simply try again.
    for _ in range(30):
        probe = ["ray", "job", "submit", "--", "true"]
        if subprocess.run(probe, env=there, capture_output=True, check=False).returncode == 0:
            break
        time.sleep(1)
    yield there
    process.terminate()  # it takes half a minute to stop all it started; the next tests need not wait for it


def test_cluster_commands_run_to_the_end_and_show_logs(home, ray_head):
    command = "; ".join(line for block in blocks_of("cluster") for line in block.strip().splitlines())
    local = {key: value for key, value in ray_head.items() if key != "RAY_API_SERVER_ADDRESS"}
    run("test -e lake || mmkd ingest demo-lake/source/pairs.jsonl lake", home, local)
    run("rm -rf lake/features/teacher=chest", home, local)
    said = run(command, home, ray_head)
    assert said.count("SUCCEEDED") >= 1
    assert re.search(r"extract: \d+ files, \d+ rows", said)
    assert "nothing to do" in said  # the second job found the first one's files


def test_a_failing_job_shows_its_reason_and_exit_status(ray_head):
    done = subprocess.run(
        ["mmkd", "submit", "--", "extract", "/nowhere/lake", "--teachers", "plip"],
        cwd=ROOT,
        env=ray_head,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "There is no lake at /nowhere/lake" in done.stdout
