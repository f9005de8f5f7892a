import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import fsspec
import pytest
from fault_proxy import FaultProxy

from common.errors import LeaseError
from common.lease import hold, hold_all
from common.logs import logger
from common.storage import Storage

ROOT = Path(__file__).resolve().parents[2]
# A run of its own: acquires, asks and releases as it is told, one answer a line.
HOLDER = """
import sys
from common.errors import LeaseError
from common.lease import hold
from common.storage import Storage

storage, lease = Storage(sys.argv[1]), None
storage.exists("warm the connection")
print("ready", flush=True)
for line in sys.stdin:
    command, _, name = line.rstrip("\\n").partition(" ")
    if command == "hold":
        try:
            lease = hold(storage, name, f"run {sys.argv[2]}", float(sys.argv[3]))
            print("held", flush=True)
        except LeaseError as error:
            print("refused", error, flush=True)
    elif command == "ask":
        print("lost" if lease.lost else "held", "mine" if lease.is_held() else "another's", flush=True)
    elif command == "release":
        lease.release()
        print("released", flush=True)
"""


class Run:
    """A process that holds leases."""

    def __init__(self, uri: str, name: str, seconds: float):
        command = [sys.executable, "-c", HOLDER, uri, name, str(seconds)]
        self.process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.answer() == "ready"

    def tell(self, line: str) -> None:
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def answer(self) -> str:
        return self.process.stdout.readline().rstrip("\n")

    def ask(self, line: str) -> str:
        self.tell(line)
        return self.answer()


@pytest.fixture
def start_run():
    """Factory of runs in processes of their own, which end with the test."""
    runs = []

    def start(uri: str, name: str, seconds: float) -> Run:
        runs.append(Run(uri, name, seconds))
        return runs[-1]

    yield start
    for run in runs:
        run.process.send_signal(signal.SIGCONT)
        run.process.kill()
        run.process.communicate()


@pytest.fixture(params=["local", "s3"])
def uri(request, tmp_path, monkeypatch):
    """A lake's address; the S3 server decides about conditional writes one at a time, as S3 does and moto does not."""
    if request.param == "local":
        yield str(tmp_path / "lake")
        return
    bucket = request.getfixturevalue("s3")
    with FaultProxy(request.getfixturevalue("s3_server")) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        yield f"{bucket}/lake"


@pytest.fixture
def storage(uri):
    return Storage(uri)


def test_one_run_at_a_time(storage):
    with hold(storage, "a", "first", seconds=3) as lease:
        assert lease.is_held()
        assert not lease.lost
        with pytest.raises(LeaseError, match=rf"run 'first' on .*process {os.getpid()}.*Wait for that run"):
            hold(storage, "a", "second", seconds=3)
        with hold(storage, "b", "second", seconds=3):
            pass
    assert not lease.is_held()
    with hold(storage, "a", "second", seconds=3) as successor:
        assert successor.is_held()


def test_two_processes_race_and_exactly_one_wins(uri, start_run):
    runs = [start_run(uri, name, 3) for name in ("left", "right")]
    wins = {"left": 0, "right": 0}
    for number in range(8):
        for run in runs:
            run.tell(f"hold round {number}")
        answers = [run.answer() for run in runs]
        assert sorted(answer.split()[0] for answer in answers) == ["held", "refused"]
        winner = answers.index("held")
        wins[["left", "right"][winner]] += 1
        assert f"by run 'run {['left', 'right'][winner]}'" in answers[1 - winner]
        assert runs[winner].ask("release") == "released"
    assert sum(wins.values()) == 8


def test_two_processes_race_for_what_a_dead_run_left(uri, start_run, storage):
    runs = [start_run(uri, name, 3) for name in ("left", "right")]
    for number in range(2):
        dead = start_run(uri, "dead", 600)
        assert dead.ask(f"hold {number}") == "held"
        dead.process.kill()
        dead.process.wait()
        for run in runs:
            run.tell(f"hold {number}")
        answers = [run.answer() for run in runs]
        assert sorted(answer.split()[0] for answer in answers) == ["held", "refused"]


def test_a_killed_run_is_succeeded_at_once_on_its_own_machine(uri, storage, start_run):
    run = start_run(uri, "killed", 600)
    assert run.ask("hold a") == "held"
    run.process.kill()
    # Nobody has waited for it yet: to the system it is a zombie, and it counts as dead all the same.
    with hold(storage, "a", "next", seconds=600) as lease:
        assert lease.is_held()


def test_a_stalled_run_is_taken_over_and_knows_it(uri, storage, start_run):
    run = start_run(uri, "stalled", 1.5)
    assert run.ask("hold a") == "held"
    assert run.ask("ask") == "held mine"
    run.process.send_signal(signal.SIGSTOP)
    with hold(storage, "a", "next", seconds=5) as lease:
        run.process.send_signal(signal.SIGCONT)
        assert run.ask("ask") == "lost another's"
        time.sleep(0.5)
        assert lease.is_held()
        assert not lease.lost
        # A late release must not hit the successor.
        assert run.ask("release") == "released"
        assert Lookup(storage, "a").run == "next"
    assert Lookup(storage, "a").released


class Lookup:
    """What a lease's file says."""

    def __init__(self, storage: Storage, name: str):
        self.__dict__.update(storage.read_json(f"leases/{name}.json"))


def test_a_run_from_another_machine_is_watched_for_its_own_length(storage, caplog):
    with hold(storage, "a", "far away", seconds=2):
        content = Lookup(storage, "a").__dict__
    # What a run on another machine leaves when its power fails: nothing here can tell whether it lives.
    content.update(released=False, beat=7, token="other", process={**content["process"], "machine": "elsewhere"})
    storage.write_json("leases/a.json", content)
    logger.addHandler(caplog.handler)
    caplog.set_level("INFO", logger="mmkd")
    try:
        with hold(storage, "a", "next", seconds=5) as lease:
            assert lease.is_held()
    finally:
        logger.removeHandler(caplog.handler)
    # The handler hears them twice where the logger passes on what it is told.
    watching, taken = dict.fromkeys(record.message for record in caplog.records if record.name == "mmkd")
    assert "run 'far away'" in watching
    assert "watching for 2 s" in watching
    assert "taken over" in taken


def test_a_file_that_is_no_lease_is_watched_and_replaced(storage):
    storage.write_bytes("leases/a.json", b"{}")
    with hold(storage, "a", "next", seconds=1) as lease:
        assert lease.is_held()


def test_workers_ask_with_a_pickled_token(storage, monkeypatch):
    monkeypatch.setattr("common.lease.TRUSTED_SECONDS", 0)
    lease = hold(storage, "a", "driver", seconds=5)
    worker = pickle.loads(pickle.dumps(lease))
    assert worker.is_held()
    worker.release()  # nothing of its own to let go of
    assert worker.is_held()
    assert lease.is_held()
    lease.release()
    assert not worker.is_held()
    with hold(storage, "a", "next", seconds=5):
        assert not worker.is_held()


def test_a_holder_without_storage_is_lost_when_its_time_is_up(tmp_path):
    lake = tmp_path / "lake"
    lease = hold(Storage(str(lake)), "a", "first", seconds=0.5)
    (lake / "leases").rename(tmp_path / "away")
    (lake / "leases").write_text("no folder")  # reads and writes fail from now on
    deadline = time.monotonic() + 20
    while not lease.lost and time.monotonic() < deadline:
        time.sleep(0.05)
    assert lease.lost
    assert not lease.is_held()
    lease.release()


def test_several_leases_are_all_or_none(storage):
    with hold_all(storage, ["b", "a", "b"], "both", seconds=3) as leases:
        assert [lease.name for lease in leases.leases] == ["a", "b"]
        assert leases.is_held()
        with pytest.raises(LeaseError, match="b is being written"):
            hold_all(storage, ["0", "b", "c"], "other", seconds=3)
        assert Lookup(storage, "0").released
        assert storage.list_files("leases") == ["0.json", "a.json", "b.json"]
    assert Lookup(storage, "a").released
    assert Lookup(storage, "b").released


def test_all_leases_of_a_run_that_died_elsewhere_are_watched_at_the_same_time(storage, caplog):
    logger.addHandler(caplog.handler)
    caplog.set_level("INFO", logger="mmkd")
    try:
        with hold_all(storage, ["a", "b", "c"], "dead", seconds=2):
            pass
        for name in "abc":  # as a machine leaves them that lost its power
            record = storage.read_json(f"leases/{name}.json")
            record["process"]["machine"] = "another"
            storage.write_json(f"leases/{name}.json", {**record, "released": False})
        with hold_all(storage, ["a", "b", "c"], "next", seconds=2) as leases:
            assert leases.is_held()
    finally:
        logger.removeHandler(caplog.handler)
    said = set(caplog.messages)
    (watched,) = [message for message in said if "watching" in message]
    assert watched.startswith("lease a is held by run 'dead'")
    assert len([message for message in said if "taken over" in message]) == 3


def test_among_several_a_lease_that_shows_life_turns_the_run_away(storage):
    with hold(storage, "b", "alive", seconds=1.5):
        record = storage.read_json("leases/b.json")
        storage.write_json("leases/a.json", {**record, "process": {**record["process"], "machine": "another"}})
        with pytest.raises(LeaseError, match="b is being written by run 'alive'"):
            hold_all(storage, ["a", "b"], "next", seconds=1.5)


@pytest.mark.parametrize("name", ["features/teacher=pmc-clip@notebook", "ü 試験", "50% + #1?", "..", "a\\b:c*[d]", "~"])
def test_odd_names(storage, name):
    with hold(storage, name, "first", seconds=3) as lease:
        assert lease.is_held()
        assert len(storage.list_files("leases")) == 1
        with pytest.raises(LeaseError):
            hold(storage, name, "second", seconds=3)
    assert storage.list_folders("leases") == []


def test_lost_answers_neither_lose_nor_double_a_lease(s3, s3_server, monkeypatch):
    with FaultProxy(s3_server, seed=3, rates={"lost_ack": 0.7}) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        storage = Storage(f"{s3}/lake")
        for number in range(4):
            lease = hold(storage, f"name {number}", "first", seconds=3)
            assert lease.is_held()
            with pytest.raises(LeaseError, match="run 'first'"):
                hold(storage, f"name {number}", "second", seconds=3)
            lease.release()
            assert Lookup(storage, f"name {number}").released
        assert proxy.counts["lost_ack"] >= 4


@pytest.mark.parametrize("ignoring", [True, False])
def test_a_store_that_ignores_conditions_is_named(s3, s3_server, monkeypatch, caplog, ignoring):
    with FaultProxy(s3_server) as proxy:
        proxy.ignores_conditions = ignoring
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        monkeypatch.setattr("common.lease._DOUBTED", set())
        monkeypatch.setattr(logger, "propagate", True)
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        storage = Storage(f"{s3}/lake")
        with hold(storage, "a", "first", seconds=3) as lease:
            assert lease.is_held()
        assert Lookup(storage, "a").released
    assert ("does not keep to the conditions" in caplog.text) == ignoring


def test_the_file_says_who_holds_it(storage):
    with hold(storage, "a", "nightly", seconds=3):
        content = json.loads(storage.read_bytes("leases/a.json"))
    assert content["run"] == "nightly"
    assert content["process"]["pid"] == os.getpid()
    assert content["seconds"] == 3
    assert {"token", "host", "beat", "since", "written_at", "released"} <= set(content)
