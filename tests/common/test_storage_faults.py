"""Storage against a server that errs, throttles, stalls, tears, damages, resets and loses answers."""

import logging
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import fsspec
import pyarrow as pa
import pytest
from fault_proxy import FaultProxy

from common.errors import LeaseError, StorageError
from common.lease import hold
from common.logs import logger
from common.s3 import RetryingS3
from common.storage import Storage

ROUGH = {"error": 0.05, "throttle": 0.05, "reset": 0.05, "slow": 0.05, "truncate": 0.1, "damage": 0.05, "lost_ack": 0.1}


@pytest.fixture
def proxy(s3, s3_server, monkeypatch):
    """A proxy that injects nothing yet, as the S3 server of this process."""
    with FaultProxy(s3_server, seed=1) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        yield proxy


@pytest.fixture
def storage(s3, proxy):
    return Storage(f"{s3}/lake")


@pytest.fixture
def log(monkeypatch):
    """What the project logs, whatever else listens."""
    records = []

    class Collect(logging.Handler):
        def emit(self, record):
            records.append(record)

    handler = Collect()
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    yield records
    logger.removeHandler(handler)
    logger.setLevel(before)


@pytest.fixture
def impatient(monkeypatch):
    """Try again at once, and give up soon."""
    monkeypatch.setattr("common.retries.PATIENCE_SECONDS", 3.0)
    monkeypatch.setattr("common.retries.UNREACHABLE_SECONDS", 0.5)
    monkeypatch.setattr("common.retries.BACKOFF_SECONDS", 0.01)
    monkeypatch.setattr("common.retries.LONGEST_BACKOFF_SECONDS", 0.05)


def table_of(number: int) -> pa.Table:
    return pa.table({"id": [f"{number}-{row}" for row in range(50)], "v": [float(number)] * 50})


def test_hundreds_of_operations_lose_and_double_nothing(s3, s3_server, storage, proxy, log, monkeypatch):
    monkeypatch.setattr("common.retries.BACKOFF_SECONDS", 0.02)
    proxy.rates = ROUGH
    created, lock = [], threading.Lock()

    def work(number: int) -> None:
        storage.write_bytes(f"bytes/{number}", b"%d " % number * 100)
        assert storage.read_bytes(f"bytes/{number}") == b"%d " % number * 100
        storage.write_table(f"tables/{number}.parquet", table_of(number))
        assert storage.read_table(f"tables/{number}.parquet").equals(table_of(number))
        assert f"{number}.parquet" in storage.list_files("tables", ".parquet")
        mine = storage.create(f"created/{number // 4}", b"%d" % number)
        with lock:
            created.extend([number] if mine else [])
        storage.write_bytes(f"gone/{number}", b"1")
        storage.remove(f"gone/{number}")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(32)))

    for number in range(4):
        with hold(storage, f"{number}", "first", seconds=6) as lease:
            assert lease.is_held()
            with pytest.raises(LeaseError):
                hold(storage, f"{number}", "second", seconds=6)
    assert {kind for kind, count in proxy.counts.items() if count} == {*ROUGH, "requests"}

    # What is there is asked of the server itself.
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    direct = Storage(f"{s3}/lake")
    assert direct.list_folders() == ["bytes", "created", "leases", "tables"]
    assert sorted(direct.list_files("bytes"), key=int) == [str(number) for number in range(32)]
    assert all(direct.read_bytes(f"bytes/{number}") == b"%d " % number * 100 for number in range(32))
    assert len(direct.list_files("tables")) == 32
    assert all(direct.read_table(f"tables/{number}.parquet").equals(table_of(number)) for number in range(32))
    # Exactly one creator of each name was told that it is the one, and it was told the truth.
    assert sorted(number // 4 for number in created) == list(range(8))
    assert all(direct.read_bytes(f"created/{number // 4}") == b"%d" % number for number in created)
    assert any("retry" in record.getMessage() for record in log)


def test_large_objects_come_through_whole(storage, proxy, tmp_path, monkeypatch):
    monkeypatch.setattr("common.s3.PART_BYTES", 5 << 20)  # the least that S3 takes as a part
    proxy.rates = {**ROUGH, "lost_ack": 0.3}
    data = os.urandom((22 << 20) + 1)
    source = tmp_path / "source"
    source.write_bytes(data)
    for number in range(2):
        storage.write_bytes(f"bytes {number}", data)
        assert storage.read_bytes(f"bytes {number}") == data
        storage.upload(source, f"file {number}")
        storage.download(f"file {number}", tmp_path / "target")
        assert (tmp_path / "target").read_bytes() == data
    assert proxy.counts["lost_ack"] > 0
    assert proxy.counts["damage"] + proxy.counts["truncate"] > 0


def test_an_upload_whose_last_answer_is_lost_is_there_all_the_same(storage, proxy, monkeypatch):
    monkeypatch.setattr("common.s3.PART_BYTES", 5 << 20)
    data = bytes(11 << 20)
    losing = iter([False] * 4 + [True])  # start, three parts, end

    def draw(method):
        proxy.counts["requests"] += 1
        return ("lost_ack" if next(losing, False) else "", 0.0)

    monkeypatch.setattr(proxy, "draw", draw)
    storage.write_bytes("x", data)
    assert next(losing, None) is None
    assert storage.read_bytes("x") == data


@pytest.mark.parametrize("kind", ["truncate", "damage"])
def test_a_spoilt_transfer_is_never_taken_for_a_good_one(storage, proxy, impatient, kind):
    storage.write_bytes("good", b"content" * 100)
    proxy.rates = {kind: 1.0}
    with pytest.raises(StorageError):
        storage.read_bytes("good") if kind == "truncate" else storage.write_bytes("bad", b"content" * 100)
    assert proxy.counts[kind] > 1


def test_a_server_that_never_answers_is_noticed(storage, proxy, log, monkeypatch):
    monkeypatch.setattr(RetryingS3, "read_timeout", 0.3)
    storage.write_bytes("x", b"1")
    proxy.rates = {"hang": 0.5}
    assert [storage.read_bytes("x") for _ in range(6)] == [b"1"] * 6
    assert proxy.counts["hang"] > 0
    assert any("ReadTimeoutError" in record.getMessage() for record in log)


def test_patience_ends_and_every_retry_was_told(storage, proxy, impatient, log):
    storage.write_bytes("warm", b"1")  # the first request of a process makes a client, which takes its time
    proxy.counts.clear()
    proxy.rates = {"error": 1.0}
    with pytest.raises(StorageError, match=r"Could not read .*lake/x: .*internal error|Reduce your request rate"):
        storage.read_bytes("x")
    told = [record.levelno for record in log if "retry" in record.getMessage()]
    # One place retries: as many requests reached the server as were told, and the first.
    assert proxy.counts["requests"] == len(told) + 1
    assert told[:3] == [logging.DEBUG, logging.DEBUG, logging.WARNING]
    assert set(told[2:]) == {logging.WARNING}
    assert "storage: get_object of" in log[0].getMessage()
    assert "500 InternalError" in log[0].getMessage() or "503 ServiceUnavailable" in log[0].getMessage()


def test_what_cannot_pass_by_itself_is_tried_once(storage, proxy, log):
    with pytest.raises(FileNotFoundError):
        storage.read_bytes("missing")
    assert proxy.counts["requests"] == 1
    proxy.rates = {"deny": 1.0}
    with pytest.raises(StorageError, match="permission denied"):
        storage.read_bytes("x")
    assert proxy.counts["requests"] == 2
    with pytest.raises(StorageError, match="permission denied"):
        storage.write_bytes("x", b"1")
    assert proxy.counts["requests"] == 3
    assert log == []


def test_nothing_listens(s3, monkeypatch, impatient):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    with pytest.raises(StorageError, match="AWS_ENDPOINT_URL"):
        Storage(f"{s3}/lake").read_bytes("x")


def test_objects_that_a_store_refuses_to_delete_are_not_passed_over(storage, proxy):
    storage.write_bytes("d/x", b"1")
    proxy.rates = {"deny": 1.0}
    with pytest.raises(StorageError, match="permission denied"):
        storage.remove("d")
