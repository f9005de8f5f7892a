import threading
import uuid

import fsspec
import pytest
from fault_proxy import FaultProxy

from common.storage import Storage


@pytest.fixture(params=["local", "s3", "memory"])
def storage(request, tmp_path, monkeypatch):
    """A place of each kind; through the proxy, writes are decided one at a time, as S3 does and moto does not."""
    if request.param == "local":
        yield Storage(str(tmp_path / "lake"))
    elif request.param == "memory":
        yield Storage(f"memory://{uuid.uuid4().hex}")
    else:
        bucket = request.getfixturevalue("s3")
        with FaultProxy(request.getfixturevalue("s3_server")) as proxy:
            monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
            fsspec.get_filesystem_class("s3").clear_instance_cache()
            yield Storage(f"{bucket}/lake")


def test_create_never_replaces(storage):
    assert storage.create("a/b", b"first")
    assert not storage.create("a/b", b"second")
    assert storage.read_bytes("a/b") == b"first"
    assert storage.list_files("a") == ["b"]


def test_replace_wants_the_version_that_is_there(storage):
    storage.write_bytes("a", b"first")
    data, version = storage.read_versioned("a")
    assert data == b"first"
    assert storage.replace("a", b"second", version)
    assert not storage.replace("a", b"third", version)
    data, version = storage.read_versioned("a")
    assert data == b"second"
    storage.write_bytes("a", b"somebody else's")
    assert not storage.replace("a", b"fourth", version)
    assert storage.read_bytes("a") == b"somebody else's"


def test_nothing_there_is_no_version(storage):
    storage.write_bytes("a", b"first")
    version = storage.read_versioned("a")[1]
    storage.remove("a")
    assert not storage.replace("a", b"second", version)
    assert not storage.exists("a")
    with pytest.raises(FileNotFoundError):
        storage.read_versioned("a")


def in_threads(count, work):
    answers = [None] * count
    barrier = threading.Barrier(count)

    def one(index):
        barrier.wait()
        answers[index] = work(index)

    threads = [threading.Thread(target=one, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers


@pytest.mark.parametrize("storage", ["local", "s3"], indirect=True)
def test_of_many_creators_one_succeeds(storage):
    for number in range(10):
        answers = in_threads(6, lambda index, name=f"n{number}": storage.create(name, b"%d" % index))
        assert answers.count(True) == 1
        assert storage.read_bytes(f"n{number}") == b"%d" % answers.index(True)
    assert len(storage.list_files()) == 10


@pytest.mark.parametrize("storage", ["local", "s3"], indirect=True)
def test_a_counter_counts_every_increment(storage):
    storage.write_bytes("counter", b"0")

    def increment(index):
        for _ in range(5):
            while True:
                data, version = storage.read_versioned("counter")
                count, _, _ = data.partition(b" ")
                if storage.replace("counter", b"%d %s" % (int(count) + 1, uuid.uuid4().hex.encode()), version):
                    break

    in_threads(4, increment)
    assert storage.read_bytes("counter").split()[0] == b"20"


def test_a_file_system_without_links_creates_under_the_lock(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("os.link", refuse)
    storage = Storage(str(tmp_path))
    answers = in_threads(6, lambda index: storage.create("a", b"%d" % index))
    assert answers.count(True) == 1
    assert storage.read_bytes("a") == b"%d" % answers.index(True)
    assert storage.list_files() == ["a"]
