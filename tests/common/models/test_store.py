"""The model store: what is fetched into it, from where, what is written down, and what is refused."""

import argparse
import base64
import hashlib
import http.server
import io
import logging
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from common.errors import MmkdError, ModelError, StorageError
from common.models.embed import embed_images, embed_texts
from common.models.load import describe_model, find_spec, load_model, read_catalog
from common.models.spec import ModelSpec, Source
from common.models.store import FetchPlan, fetch
from common.storage import Storage, without_secrets

CAPTIONS = ["a lung", "an opacity in the left lung"]
CONFIGURATION = "open_clip_config.json"
WEIGHTS = "open_clip_model.safetensors"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """A cache of this test alone."""
    monkeypatch.setenv("MMKD_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("MMKD_STORE", raising=False)
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def tiny(make_clip_folder) -> Path:
    """An open_clip folder; nothing may change it."""
    return make_clip_folder("tiny")


@pytest.fixture(scope="module")
def published(tiny) -> "Vectors":
    """What the model gives before it is fetched."""
    return vectors_of(find_spec(str(tiny), {}))


def draw_png(seed: int) -> bytes:
    buffer = io.BytesIO()
    coarse = np.random.default_rng(seed).integers(0, 255, (7, 5, 3), np.uint8)
    Image.fromarray(coarse).resize((50, 70)).save(buffer, "PNG")
    return buffer.getvalue()


PICTURES = [draw_png(0), draw_png(1)]


@pytest.fixture
def log():
    """All that this project logs."""
    lines: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    logger, handler = logging.getLogger("mmkd"), Keep()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    yield lines
    logger.removeHandler(handler)
    logger.setLevel(level)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def content(folder: Path) -> dict[str, bytes]:
    """Relative path -> bytes of all files below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def marks(folder: Path) -> dict[str, tuple[int, int]]:
    """Relative path -> inode and time of change: equal only if no file was written again."""
    stats = {str(path.relative_to(folder)): path.stat() for path in folder.rglob("*")}
    return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in stats.items()}


def manifest(folder: str) -> dict:
    return Storage(folder).read_json("teacher.json")


Vectors = tuple[np.ndarray, np.ndarray]


def vectors_of(spec: ModelSpec) -> Vectors:
    """Of two pictures and two captions, without the hub."""
    import huggingface_hub.constants

    assert huggingface_hub.constants.HF_HUB_OFFLINE
    model = load_model(spec)
    return embed_images(model, PICTURES), embed_texts(model, CAPTIONS)


def assert_vectors(spec: ModelSpec, expected: Vectors) -> None:
    for found, published in zip(vectors_of(spec), expected, strict=True):
        np.testing.assert_array_equal(found, published)


def assert_clean(folder: str) -> dict[str, bytes]:
    """Only safetensors, configuration and tokenizer, all as the manifest lists them; returns the files."""
    storage = Storage(folder)
    found = {name: storage.read_bytes(name) for name in storage.list_files() if name != "teacher.json"}
    assert not storage.list_folders()
    assert {Path(name).suffix for name in found} <= {".safetensors", ".json", ".txt", ".model"}
    listed = manifest(folder)["files"]
    assert {name: (facts["bytes"], facts["sha256"]) for name, facts in listed.items()} == {
        name: (len(data), sha256(data)) for name, data in found.items()
    }
    return found


def write_bare(folder: Path, model: Path, **more) -> str:
    """A checkpoint of a training program and a YAML that says what it is; returns the YAML."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {f"module.{name}": value for name, value in load_file(model / WEIGHTS).items()}
    torch.save({"epoch": 3, "state_dict": state, "optimizer": {"lr": 0.1}}, folder / "mine.pt")
    shutil.copy(model / CONFIGURATION, folder / "architecture.json")
    entry = {
        "title": "My model",
        "architecture": "./architecture.json",
        "path": "./mine.pt",
        "license": "CC0-1.0",
        "gated": False,
        "derivatives": "conditional",
        "derivative_terms": "ask me",
    }
    (folder / "mine.yaml").write_text(yaml.safe_dump({"mine": {**entry, **more}}))
    return str(folder / "mine.yaml")


# --- From folders and files, to a local store and to object storage.


def test_an_open_clip_folder_comes_into_a_local_store(tiny, tmp_path, published):
    folder = fetch(FetchPlan(find_spec(f"small={tiny}", {})), str(tmp_path / "store"))
    assert folder == str(tmp_path / "store" / "small")
    assert assert_clean(folder) == content(tiny)
    stored = find_spec("small", {}, str(tmp_path / "store"))
    assert stored.path == folder
    assert stored.family == "open_clip"
    assert_vectors(stored, published)


def test_an_open_clip_folder_comes_into_object_storage(tiny, s3, cache, published):
    folder = fetch(FetchPlan(find_spec(f"small={tiny}", {})), f"{s3}/models/")
    assert folder == f"{s3}/models/small"
    assert assert_clean(folder) == content(tiny)
    stored = find_spec("small", {}, f"{s3}/models")
    assert stored.path == folder
    assert_vectors(stored, published)
    copies = list((cache / "models").iterdir())
    assert len(copies) == 1
    before = marks(cache)
    assert_vectors(stored, published)
    assert marks(cache) == before
    # A torn object is found out when it is next copied.
    data = Storage(folder).read_bytes(WEIGHTS)
    Storage(folder).write_bytes(WEIGHTS, data[:-1])
    with pytest.raises(ModelError, match=r"is not the file that was fetched .* recorded with sha256"):
        load_model(stored)


def test_a_folder_on_object_storage_is_a_source(tiny, s3, tmp_path, published):
    remote = Storage(f"{s3}/theirs/tiny")
    for name, data in content(tiny).items():
        remote.write_bytes(name, data)
    spec = ModelSpec(name="small", path=str(tmp_path / "elsewhere"))
    folder = fetch(FetchPlan(spec, source=remote.uri), str(tmp_path / "store"))
    assert assert_clean(folder) == content(tiny)
    assert manifest(folder)["source"]["asked"] == remote.uri
    assert_vectors(find_spec("small", {}, str(tmp_path / "store")), published)


def test_a_transformers_folder_with_a_pickled_checkpoint(make_hf_clip_folder, tmp_path, s3):
    whole = make_hf_clip_folder("hf")
    pickled = tmp_path / "hf"
    shutil.copytree(whole, pickled)
    torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    expected = vectors_of(find_spec(str(whole), {}))
    for store in (str(tmp_path / "store"), f"{s3}/models"):
        folder = fetch(FetchPlan(find_spec(f"plip-like={pickled}", {})), store)
        found = assert_clean(folder)
        assert {"model.safetensors", "config.json", "preprocessor_config.json", "tokenizer.json"} <= set(found)
        data = (pickled / "pytorch_model.bin").read_bytes()
        made_from = manifest(folder)["files"]["model.safetensors"]["from"]
        assert made_from == {"name": "pytorch_model.bin", "sha256": sha256(data)}
        stored = find_spec("plip-like", {}, store)
        assert stored.family == "hf_clip"
        assert_vectors(stored, expected)


def test_a_bare_checkpoint_of_a_users_catalog(tiny, tmp_path, published, s3):
    catalog = read_catalog(write_bare(tmp_path / "lab", tiny))
    original = catalog["mine"]
    for store in (str(tmp_path / "store"), f"{s3}/models"):
        folder = fetch(FetchPlan(original), store)
        assert set(assert_clean(folder)) == {"architecture.json", "mine.safetensors"}
        # Found by name, with and without the catalog that the name came from.
        for known in (catalog, {}):
            stored = find_spec("mine", known, store)
            assert stored.path == folder
            assert stored.derivatives == "conditional"
        assert_vectors(stored, published)
    # The same weights are the same model, wherever they lie: their embeddings may be mixed.
    assert describe_model(stored).identity() == describe_model(original).identity()
    # A worker elsewhere has neither the checkpoint nor the architecture's file.
    shutil.rmtree(tmp_path / "lab")
    assert_vectors(find_spec("mine", {}, str(tmp_path / "store")), published)


def test_the_manifest_says_where_from_and_under_which_terms(tiny, tmp_path):
    catalog = read_catalog(write_bare(tmp_path / "lab", tiny))
    said = manifest(fetch(FetchPlan(catalog["mine"]), str(tmp_path / "store")))
    data = (tmp_path / "lab" / "mine.pt").read_bytes()
    stated = {key: said[key] for key in ("name", "title", "family", "license", "gated", "derivatives")}
    assert stated == {
        "name": "mine",
        "title": "My model",
        "family": "open_clip",
        "license": "CC0-1.0",
        "gated": False,
        "derivatives": "conditional",
    }
    assert said["derivative_terms"] == "ask me"
    assert said["source"]["asked"] == str(tmp_path / "lab" / "mine.pt")
    assert said["files"]["mine.safetensors"]["from"] == {"name": "mine.pt", "sha256": sha256(data)}
    assert re.fullmatch(r"mmkd \S+", said["created_by"])
    assert re.match(r"\d{4}-\d\d-\d\dT", said["created_at"])


# --- Fetching again.


def test_a_second_fetch_does_nothing_and_another_source_is_refused(tiny, make_clip_folder, tmp_path):
    store, spec = str(tmp_path / "store"), find_spec(f"small={tiny}", {})
    folder = fetch(FetchPlan(spec), store)
    before = marks(tmp_path / "store")
    assert fetch(FetchPlan(spec), store) == folder
    assert fetch(FetchPlan(spec, source=str(tiny)), store) == folder
    other = make_clip_folder("other", seed=5)
    with pytest.raises(ModelError, match=r"holds small from .*tiny, and .*other was asked for\. Delete that folder"):
        fetch(FetchPlan(spec, source=str(other)), store)
    assert marks(tmp_path / "store") == before


def test_the_manifest_is_written_last_and_a_folder_without_it_is_not_used(tiny, tmp_path):
    store, spec = tmp_path / "store", find_spec(f"small={tiny}", {})
    # The second file cannot be written: a folder is in its way.
    (store / "small" / WEIGHTS).mkdir(parents=True)
    (store / "small" / WEIGHTS / "x").touch()
    with pytest.raises(StorageError, match=WEIGHTS):
        fetch(FetchPlan(spec), str(store))
    assert (store / "small" / CONFIGURATION).is_file()
    assert not (store / "small" / "teacher.json").exists()
    with pytest.raises(ModelError, match="Unknown model 'small'"):
        find_spec("small", {}, str(store))
    assert find_spec("small", {"small": spec}, str(store)).path == str(tiny)
    # Mended, the same command goes through.
    shutil.rmtree(store / "small" / WEIGHTS)
    fetch(FetchPlan(spec), str(store))
    assert find_spec("small", {"small": spec}, str(store)).path == str(store / "small")


@pytest.mark.parametrize("name", [WEIGHTS, CONFIGURATION])
@pytest.mark.parametrize("damage", ["torn", "changed", "gone"])
def test_a_damaged_file_of_the_store_is_refused_on_load(tiny, tmp_path, name, damage):
    folder = Path(fetch(FetchPlan(find_spec(f"small={tiny}", {})), str(tmp_path / "store")))
    data = (folder / name).read_bytes()
    recorded = sha256(data)[:16]
    if damage == "gone":
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(data[:-7] if damage == "torn" else data[:-7] + b"\x01" + data[-6:])
    with pytest.raises(ModelError, match=rf"{name} is not the file that was fetched .*sha256 {recorded}") as caught:
        load_model(find_spec("small", {}, str(tmp_path / "store")))
    assert "mmkd teachers fetch" in str(caught.value)


# --- Pins and trust.


def test_a_file_that_is_not_the_pinned_one_is_refused(tiny, tmp_path):
    lab, store = tmp_path / "lab", str(tmp_path / "store")
    source = {"files": ["mine.pt"], "sha256": {"mine.pt": "0" * 64}}
    spec = read_catalog(write_bare(lab, tiny, source=source))["mine"]
    with pytest.raises(ModelError, match=r"mine\.pt has sha256 .* and the catalog pins 0000000000000000"):
        fetch(FetchPlan(spec), store)
    assert not Path(store).exists()
    right = {"mine.pt": sha256((lab / "mine.pt").read_bytes())}
    pinned = spec.model_copy(update={"source": Source(files=("mine.pt",), sha256=right)})
    fetch(FetchPlan(pinned), store)
    unpinned = spec.model_copy(update={"name": "other", "source": Source(files=("mine.pt",))})
    fetch(FetchPlan(unpinned), store)
    assert Storage(store).list_folders() == ["mine", "other"]


def test_a_checkpoint_with_more_than_tensors_needs_trust(tiny, tmp_path, published):
    lab, store = tmp_path / "lab", str(tmp_path / "store")
    spec = read_catalog(write_bare(lab, tiny))["mine"]
    whole = torch.load(lab / "mine.pt", weights_only=True)
    torch.save({**whole, "args": argparse.Namespace(lr=0.1)}, lab / "mine.pt")
    with pytest.raises(
        ModelError, match=r"holds more than tensors \(argparse\.Namespace\).* fetch it with --trust mine"
    ):
        fetch(FetchPlan(spec), store)
    assert not Path(store).exists()
    folder = fetch(FetchPlan(spec, trust=True), store)
    assert set(assert_clean(folder)) == {"architecture.json", "mine.safetensors"}
    assert_vectors(find_spec("mine", {}, store), published)


def test_a_model_that_no_loader_serves_is_not_fetched(tmp_path):
    with pytest.raises(ModelError, match="'x' cannot be loaded by mmkd: it needs a program"):
        fetch(FetchPlan(ModelSpec(name="x", needs="it needs a program", hub_id="a/b")), str(tmp_path / "store"))


def test_nothing_at_the_source_is_said(tmp_path):
    with pytest.raises(ModelError, match=r"'small': there is nothing at .*none"):
        fetch(FetchPlan(ModelSpec(name="small", path=str(tmp_path / "none"))), str(tmp_path / "store"))


# --- Archives.


# Like MedCLIP's: one file of an archive that is not on the hub.
ZIPPED = Source(files=("pytorch_model.bin",), url="https://example.org/theirs.zip")


def write_zip(file: Path, members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, data)


@pytest.mark.parametrize("escape", ["../../", "/"])
def test_paths_in_an_archive_lead_nowhere(tiny, tmp_path, published, escape):
    deep = tmp_path / "a" / "b" / "c"
    spec = read_catalog(write_bare(deep, tiny))["mine"].model_copy(update={"source": ZIPPED})
    absolute = str(tmp_path / "absolute" / "evil.bin")
    weights = (deep / "mine.pt").read_bytes()
    write_zip(
        deep / "theirs.zip",
        {
            f"{escape}pytorch_model.bin": weights,
            "../../evil": b"evil",
            absolute: b"evil",
            "../evil.bin": b"evil",
            "notes.txt": b"x",
        },
    )
    before = content(tmp_path)
    folder = fetch(FetchPlan(spec, source=str(deep / "theirs.zip")), str(tmp_path / "store"))
    assert set(assert_clean(folder)) == {"architecture.json", "pytorch_model.safetensors"}
    new = {path: data for path, data in content(tmp_path).items() if path not in before}
    assert all(path.startswith(("store/mine/", "cache/")) for path in new)
    assert b"evil" not in new.values()
    assert not Path("/pytorch_model.bin").exists()
    assert_vectors(find_spec("mine", {}, str(tmp_path / "store")), published)


def test_an_archive_without_the_wanted_file_says_what_it_holds(tmp_path):
    spec = ModelSpec(name="mine", path=str(tmp_path / "theirs.zip"), source=ZIPPED)
    write_zip(tmp_path / "theirs.zip", {"readme.md": b"x", "other.bin": b"y"})
    with pytest.raises(ModelError, match=r"lacks pytorch_model\.bin; it holds readme\.md, other\.bin"):
        fetch(FetchPlan(spec), str(tmp_path / "store"))


@pytest.mark.parametrize("kind", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED], ids=["stored", "deflated"])
@pytest.mark.parametrize("damage", ["cut", "web page", "empty", "flipped"])
def test_a_damaged_archive_is_refused(tmp_path, damage, kind):
    file = tmp_path / "theirs.zip"
    spec = ModelSpec(name="mine", path=str(file), source=ZIPPED)
    write_zip(file, {"pytorch_model.bin": np.random.default_rng(0).integers(0, 16, 60_000, np.uint8).tobytes()}, kind)
    data = bytearray(file.read_bytes())
    middle = len(data) // 2
    if damage == "flipped":
        start = 30 + len("pytorch_model.bin")  # behind the member's header; 0xff begins no deflated block
        data[start : start + 8] = b"\xff" * 8
    file.write_bytes({"cut": data[:middle], "web page": b"<html>Quota exceeded</html>", "empty": b""}.get(damage, data))
    with pytest.raises(ModelError, match=r"'mine': .*theirs\.zip is not a whole zip archive"):
        fetch(FetchPlan(spec), str(tmp_path / "store"))


# --- From a web server.


class FileServer(http.server.ThreadingHTTPServer):
    """Serves one file, in ranges unless told otherwise, and remembers which."""

    def __init__(self, data: bytes) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.data = data
        self.version: dict[str, str] = {"ETag": '"first"'}
        self.password: str | None = None
        self.ranged = self.sized = True
        self.drop_after: int | None = None
        """The connection ends, once, when this many bytes of the file were sent."""
        self.ranges: list[str] = []

    def handle_error(self, request, client_address) -> None:
        """A client that goes away is nothing to talk about."""

    def address(self, user: str = "", query: str = "", name: str = "mine.pt") -> str:
        return f"http://{user}127.0.0.1:{self.server_port}/files/{name}{query}"


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FileServer

    def log_message(self, *_) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, with_body: bool) -> None:
        server = self.server
        if server.password is not None and self.headers.get("Authorization") != server.password:
            self._refuse(401)
            return
        if not self.path.startswith("/files/mine.pt"):
            self._refuse(404)
            return
        start, end = 0, len(server.data) - 1
        asked = self.headers.get("Range") if server.ranged else None
        if asked is not None:
            first, last = asked.removeprefix("bytes=").split("-")
            start, end = int(first), min(int(last or end), end)
            if with_body:
                server.ranges.append(asked)
        self.send_response(200 if asked is None else 206)
        if server.sized:
            self.send_header("Content-Length", str(end + 1 - start))
        else:
            self.send_header("Connection", "close")
        if server.ranged:
            self.send_header("Accept-Ranges", "bytes")
        for name, value in server.version.items():
            self.send_header(name, value)
        if asked is not None:
            self.send_header("Content-Range", f"bytes {start}-{end}/{len(server.data)}")
        self.end_headers()
        if not with_body:
            return
        drop = server.drop_after
        if asked is not None and drop is not None and start <= drop <= end:
            server.drop_after = None
            self.wfile.write(server.data[start:drop])
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        self.wfile.write(server.data[start : end + 1])

    def _refuse(self, status: int) -> None:
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()


@pytest.fixture
def serve():
    """Starts file servers on loopback."""
    started: list[FileServer] = []

    def start(data: bytes) -> FileServer:
        server = FileServer(data)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        started.append(server)
        return server

    yield start
    for server in started:
        server.shutdown()
        server.server_close()


REMOTE = ModelSpec(name="remote", path="/not/used", license="CC0-1.0")


def checkpoint(megabytes: int, first: float = 0) -> bytes:
    """A checkpoint of that size; other numbers make other bytes, and as many."""
    buffer = io.BytesIO()
    torch.save({"w": torch.arange(megabytes << 18, dtype=torch.float32) + first}, buffer)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def large() -> bytes:
    """A checkpoint of several download pieces."""
    return checkpoint(20)


def starts(server: FileServer) -> list[int]:
    """Where the ranges began that were asked for."""
    return [int(asked.removeprefix("bytes=").split("-")[0]) for asked in server.ranges]


def upstream_sha256(folder: str) -> str:
    (facts,) = manifest(folder)["files"].values()
    return facts["from"]["sha256"]


def cut_off(plan: FetchPlan, store: str) -> None:
    """A fetch that does not come to its end; how it says so is looked at elsewhere."""
    with pytest.raises(Exception, match="."):
        fetch(plan, store)
    assert not Path(store).exists()


def test_a_checkpoint_is_fetched_from_a_web_server(tiny, tmp_path, serve, published):
    spec = read_catalog(write_bare(tmp_path / "lab", tiny))["mine"]
    server, store = serve((tmp_path / "lab" / "mine.pt").read_bytes()), str(tmp_path / "store")
    folder = fetch(FetchPlan(spec, source=server.address()), store)
    assert manifest(folder)["source"]["asked"] == server.address()
    assert set(assert_clean(folder)) == {"architecture.json", "mine.safetensors"}
    assert_vectors(find_spec("mine", {}, store), published)
    before = list(server.ranges)
    fetch(FetchPlan(spec, source=server.address()), store)
    assert server.ranges == before


def test_a_download_goes_on_where_it_stopped(tmp_path, serve, large, log):
    server = serve(large)
    server.drop_after = len(large) * 3 // 4
    plan, store = FetchPlan(REMOTE, source=server.address()), str(tmp_path / "store")
    cut_off(plan, store)
    first = starts(server)
    assert first[0] == 0
    assert first[-1] > 0
    server.ranges.clear()
    folder = fetch(plan, store)
    # Nothing that had come whole was asked for again.
    assert starts(server)[0] == first[-1]
    assert upstream_sha256(folder) == sha256(large)
    assert any("going on after" in line for line in log)


def test_a_dropped_connection_is_an_error_for_people(tmp_path, serve, large):
    server = serve(large)
    server.drop_after = len(large) * 3 // 4
    with pytest.raises(MmkdError, match=r"mine\.pt"):
        fetch(FetchPlan(REMOTE, source=server.address()), str(tmp_path / "store"))


@pytest.mark.parametrize("header", ["ETag", "Last-Modified"])
def test_pieces_of_two_versions_are_not_mixed(tmp_path, serve, large, header):
    server = serve(large)
    server.version = {header: "Mon, 01 Jan 2024 00:00:00 GMT"}
    server.drop_after = len(large) * 3 // 4
    plan, store = FetchPlan(REMOTE, source=server.address()), str(tmp_path / "store")
    cut_off(plan, store)
    # New weights of one architecture have the same size.
    server.data, server.version = checkpoint(20, first=1), {header: "Tue, 02 Jan 2024 00:00:00 GMT"}
    assert len(server.data) == len(large)
    assert upstream_sha256(fetch(plan, store)) == sha256(server.data)


def test_a_file_replaced_at_its_source_is_fetched_anew(tmp_path, serve):
    server = serve(checkpoint(1))
    plan = FetchPlan(REMOTE, source=server.address())
    assert upstream_sha256(fetch(plan, str(tmp_path / "one"))) == sha256(server.data)
    size = len(server.data)
    server.data, server.version = checkpoint(1, first=1), {"ETag": '"second"'}
    assert len(server.data) == size
    assert upstream_sha256(fetch(plan, str(tmp_path / "two"))) == sha256(server.data)


@pytest.mark.parametrize(("ranged", "sized"), [(False, True), (False, False)])
def test_a_plain_web_server_will_do(tmp_path, serve, large, ranged, sized):
    server = serve(large)
    server.ranged, server.sized = ranged, sized
    folder = fetch(FetchPlan(REMOTE, source=server.address()), str(tmp_path / "store"))
    assert upstream_sha256(folder) == sha256(large)


def test_a_web_page_in_place_of_the_checkpoint_is_refused(tmp_path, serve):
    server = serve(b"<html>You have exceeded your quota</html>")
    with pytest.raises(ModelError, match=r"mine\.pt \(41 bytes\) is not a whole checkpoint"):
        fetch(FetchPlan(REMOTE, source=server.address()), str(tmp_path / "store"))
    assert not (tmp_path / "store").exists()


# --- Secrets.

USER, QUERY = "someone:password-canary@", "?token=token-canary&x=1"


def assert_no_canary(*places: Path, said: str = "") -> None:
    """Neither in a file, nor in a name, nor in what was said."""
    assert "canary" not in said
    for place in places:
        for path in place.rglob("*"):
            assert "canary" not in str(path.relative_to(place))
            assert path.is_dir() or b"canary" not in path.read_bytes(), path


def protected(server: FileServer) -> FileServer:
    server.password = "Basic " + base64.b64encode(USER.rstrip("@").encode()).decode()
    return server


def test_user_password_and_query_of_an_address_are_written_nowhere(tmp_path, cache, serve, log, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_canary")
    server, store = protected(serve(checkpoint(9))), str(tmp_path / "store")
    plan = FetchPlan(REMOTE, source=server.address(USER, QUERY))
    server.drop_after = len(server.data) - 1
    cut_off(plan, store)
    folder = fetch(plan, store)  # the server gives nothing without the password
    assert manifest(folder)["source"]["asked"] == server.address()
    assert fetch(plan, store) == folder
    assert log
    assert_no_canary(Path(store), cache, said="\n".join(log))
    with pytest.raises(ModelError, match="was asked for") as caught:
        fetch(FetchPlan(REMOTE, source=server.address(USER, QUERY, name="other.pt")), store)
    assert_no_canary(said=str(caught.value))


def failing_address(kind: str, server: FileServer) -> str:
    if kind == "refused connection":
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            return f"http://{USER}127.0.0.1:{probe.getsockname()[1]}/files/mine.pt{QUERY}"
    if kind == "wrong password":
        server.password = "another"
    if kind == "web page":
        server.data = b"<html></html>"
    if kind == "dropped":
        server.drop_after = 100
    return server.address(USER, QUERY, name="none.pt" if kind == "not there" else "mine.pt")


@pytest.mark.parametrize("kind", ["not there", "wrong password", "refused connection", "web page", "dropped"])
def test_an_error_about_an_address_tells_no_secrets(tmp_path, cache, serve, log, kind):
    server = protected(serve(checkpoint(1)))
    address = failing_address(kind, server)
    with pytest.raises(MmkdError, match=r"127\.0\.0\.1|mine\.pt") as caught:
        fetch(FetchPlan(REMOTE, source=address), str(tmp_path / "store"))
    assert_no_canary(tmp_path, cache, said="\n".join([str(caught.value), *log]))


def test_secrets_of_a_users_catalog_are_not_kept_with_the_model(tiny, tmp_path):
    private = f"https://{USER}example.org/mine.pt{QUERY}"
    catalog = write_bare(tmp_path / "lab", tiny, source={"files": ["mine.pt"], "url": private})
    fetch(FetchPlan(read_catalog(catalog)["mine"]), str(tmp_path / "store"))
    assert_no_canary(tmp_path / "store")


@pytest.mark.parametrize(
    ("address", "plain"),
    [
        (f"https://{USER}host:8443/a/b.pt{QUERY}#part-canary", "https://host:8443/a/b.pt"),
        ("https://token-canary@host/b.pt", "https://host/b.pt"),
        ("s3://bucket/folder/b.pt", "s3://bucket/folder/b.pt"),
        ("/home/me/b.pt", "/home/me/b.pt"),
        (f"simplecache::https://{USER}host/b.pt{QUERY}", None),
        (f"zip://b.pt::https://{USER}host/b.zip{QUERY}", None),
    ],
)
def test_addresses_are_stripped_of_secrets(address, plain):
    said = without_secrets(address)
    assert "canary" not in said
    if plain is not None:
        assert said == plain


# --- From the hub's cache.

MAIN, PINNED = "4f" * 20, "b7" * 20


def cached(cache: Path, kind: str, files: dict[str, bytes], commit: str, main: str | None = None) -> None:
    """What huggingface_hub leaves of a repository."""
    folder = cache / f"{kind}s--lab--small"
    for name, data in files.items():
        target = folder / "snapshots" / commit / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
    if main is not None:
        (folder / "refs").mkdir(parents=True, exist_ok=True)
        (folder / "refs" / "main").write_text(main)


def test_models_come_from_the_hubs_cache_without_the_hub(tiny, make_clip_folder, tmp_path, cache, published):
    lab, hub, store = tmp_path / "lab", tmp_path / "hub", tmp_path / "store"
    other = make_clip_folder("other", seed=3)
    write_bare(lab, tiny)
    cached(hub, "model", {**content(tiny), "README.md": b"# small", "extra/more.safetensors": b"x"}, MAIN, MAIN)
    cached(hub, "model", content(other), PINNED)
    cached(hub, "dataset", {"mine.pt": (lab / "mine.pt").read_bytes(), "big.csv": b"1,2"}, MAIN, MAIN)
    terms = {"license": "MIT", "gated": True, "derivatives": "allowed", "derivative_terms": "keep the notice"}
    place = {"hub_id": "lab/small", **terms}
    entries = {
        "newest": place,
        "pinned": {**place, "revision": PINNED},
        "data": {
            **place,
            "source": {"repo_type": "dataset", "files": ["mine.pt"]},
            "architecture": "./architecture.json",
        },
    }
    (lab / "hub.yaml").write_text(yaml.safe_dump(entries))
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_CACHE": str(hub), "HF_HUB_OFFLINE": "1"}
    command = ["teachers", "fetch", "newest", "newest", "pinned", "data"]
    options = ["--store", str(store), "--catalog", str(lab / "hub.yaml")]
    done = subprocess.run(
        [sys.executable, "-m", "cluster.cli", *command, *options],
        capture_output=True,
        text=True,
        check=False,
        env={**environment, "HF_TOKEN": "hf_canary"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("newest is in the store already") == 1
    assert_no_canary(store, cache, said=done.stdout + done.stderr)
    said = {name: manifest(str(store / name)) for name in entries}
    assert {name: m["source"]["revision"] for name, m in said.items()} == {
        "newest": MAIN,
        "pinned": PINNED,
        "data": MAIN,
    }
    assert all(m["source"]["hub_id"] == "lab/small" for m in said.values())
    assert all({key: m[key] for key in terms} == terms for m in said.values())
    assert assert_clean(str(store / "newest")) == content(tiny)
    assert assert_clean(str(store / "pinned")) == content(other)
    assert set(assert_clean(str(store / "data"))) == {"architecture.json", "mine.safetensors"}
    known = read_catalog(str(lab / "hub.yaml"))
    for name in ("newest", "data"):
        assert known[name].path is None
        assert_vectors(find_spec(name, known, str(store)), published)


def test_a_repository_that_is_not_cached_is_explained_without_the_token(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_canary")
    with pytest.raises(ModelError, match=r"lab/none could not be fetched from the model hub") as caught:
        fetch(FetchPlan(ModelSpec(name="x", hub_id="lab/none")), str(tmp_path / "store"))
    assert_no_canary(tmp_path, said=str(caught.value))


def test_a_model_that_is_not_on_the_hub_says_where_to_get_it(tmp_path):
    spec = ModelSpec(name="x", source=Source(files=("a.pth", "b.pth"), url="https://example.org/x"))
    with pytest.raises(ModelError, match=r"Download a\.pth and b\.pth from https://example\.org/x .*--from x=FILE"):
        fetch(FetchPlan(spec), str(tmp_path / "store"))
