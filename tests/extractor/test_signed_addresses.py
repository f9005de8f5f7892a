"""What signs an address gets into no file, no log and no name: a picture keeps its id when it is signed anew."""

import json
import logging
import re

import pyarrow.parquet as pq
import pytest
from picture_server import PictureServer, png

from common.errors import SourceError, StorageError
from common.lake import open_lake
from common.logs import logger
from common.storage import Storage
from common.storage_errors import unsigned, without_secrets
from extractor.config import IngestConfig
from extractor.ingest import describe, ingest
from extractor.sources import plan_sources, read_part
from extractor.sources.addresses import base_name, kind_of, short_name

FORMS = {  # who signs -> the query, with slashes and signs as they come
    "S3, version 2": "AWSAccessKeyId=AKIA-{c}&Signature={c}/a+b%2Fc=&Expires=1&x-amz-security-token={c}/t==",
    "S3, version 4": "X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential=AKIA-{c}/20260101/us-east-1/s3/aws4_request"
    "&X-Amz-Date=20260101T000000Z&X-Amz-Security-Token={c}%2F&X-Amz-Signature={c}0f",
    "Azure": "sv=2024-01-01&st=2026&se=2027&sr=b&sp=r&spr=https&sip={c}&skoid={c}&sig={c}%2Fx/y%3D",
    "Google, version 2": "GoogleAccessId={c}@project.iam.gserviceaccount.com&Expires=1&Signature={c}/%2B",
    "Google, version 4": "X-Goog-Algorithm=GOOG4-RSA-SHA256&X-Goog-Credential={c}%40p&X-Goog-Signature={c}",
}
CANARY = re.compile(rb"canary", re.IGNORECASE)


def query(form, canary="canary"):
    return FORMS[form].format(c=canary)


@pytest.fixture
def server():
    with PictureServer() as server:
        yield server


@pytest.fixture
def log(caplog):
    logger.addHandler(caplog.handler)
    caplog.set_level(logging.DEBUG, logger="mmkd")
    yield caplog
    logger.removeHandler(caplog.handler)


def signed_table(server, canary, failing=()):
    """A table in which each form signs a picture, and each signs one that cannot be had."""
    rows = []
    for number, form in enumerate(FORMS):
        server.files[f"{number}.png"] = png(number)
        rows.append({"url": f"{server.url}/{number}.png?{query(form, canary)}", "caption": f"picture {number}"})
        rows += [
            {"url": f"{server.url}/{path}?{query(form, canary)}", "caption": f"{number} {path}"} for path in failing
        ]
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def everything_below(folder):
    """All bytes of the files of a lake, and what the packed ones among them say."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            yield path, path.read_bytes()
            if path.suffix == ".parquet":
                table = pq.read_table(path)
                yield path, repr([table.to_pylist(), table.schema.metadata]).encode()


@pytest.mark.parametrize("form", FORMS)
def test_no_file_and_no_log_of_an_ingest_holds_what_signs(server, tmp_path, log, form):
    failing = ("status/403", "absent dir/with blank's.png", "to/status/403", "loop", "short", "endless/")
    server.files["pairs.jsonl"] = signed_table(server, "canary", failing)
    source = f"{server.url}/pairs.jsonl?{query(form)}"
    config = IngestConfig(fetch={"seconds": 20, "retries": 0}, limits={"max_file_mib": 1})
    report = ingest(source, str(tmp_path / "lake"), config)
    assert (report.pairs, report.rejects) == (len(FORMS), len(FORMS) * len(failing))
    found = [path for path, content in everything_below(tmp_path / "lake") if CANARY.search(content)]
    assert found == []
    assert not [line for line in log.messages if CANARY.search(line.encode())]
    pairs = open_lake(str(tmp_path / "lake")).read_pairs(0)
    assert pairs["source_key"].to_pylist() == [f"pairs.jsonl/{number}.png" for number in range(len(FORMS))]
    assert set(pairs["source"].to_pylist()) == {f"{server.url.removeprefix('http://')}/pairs.jsonl"}
    manifest = json.loads(next((tmp_path / "lake" / "ingests").glob("*.json")).read_text())
    assert manifest["sources"] == [f"{server.url}/pairs.jsonl"]


def test_a_picture_that_is_signed_anew_keeps_its_id(server, tmp_path):
    lakes = []
    for canary in ("first", "second"):
        server.files["pairs.jsonl"] = signed_table(server, canary)
        lakes.append(tmp_path / canary)
        ingest(f"{server.url}/pairs.jsonl?{query('Azure', canary)}", str(lakes[-1]), IngestConfig())
    first, second = (open_lake(str(lake)).read_pairs(0)["sample_id"].to_pylist() for lake in lakes)
    assert first == second
    again = ingest(f"{server.url}/pairs.jsonl?{query('Azure', 'third')}", str(lakes[0]), IngestConfig())
    assert (again.pairs, again.duplicates) == (0, len(FORMS))


def test_a_source_that_is_signed_anew_is_the_same_ingest(server):
    server.files["pairs.jsonl"] = signed_table(server, "same")
    names = [
        describe(plan_sources([f"{server.url}/pairs.jsonl?{query(form, canary)}"], IngestConfig()), IngestConfig())
        for form, canary in (("Azure", "one"), ("S3, version 4", "two"))
    ]
    assert names[0] == names[1]


@pytest.mark.parametrize("form", FORMS)
def test_errors_of_a_signed_source_do_not_quote_the_signature(server, form):
    server.files |= {"prose.jsonl": b"once upon\n", "x.csv": b"a,b\n1,2\n", "x.parquet": b"PAR0", "x.gz": b"x"}
    server.files["latin.csv"] = "B\u00fcld,caption\n".encode("latin-1")
    server.files["cut.jsonl.gz"] = b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03not deflated"
    names = ("absent.jsonl", "absent*.jsonl", "status/403", "prose.jsonl", "x.csv", "x.parquet", "latin.csv", "x.gz")
    for name in (*names, "cut.jsonl.gz", "pairs-{1..2}.jsonl"):
        with pytest.raises((SourceError, StorageError)) as caught:
            plan_sources([f"{server.url}/{name}?{query(form)}"], IngestConfig())
        assert not CANARY.search(str(caught.value).encode()), name


def test_a_source_whose_signature_runs_out_while_it_is_read_ends_in_a_sentence(server):
    server.files["pairs.jsonl"] = signed_table(server, "canary")
    (part,) = plan_sources([f"{server.url}/pairs.jsonl?{query('S3, version 2')}"], IngestConfig())
    server.files = {}
    with pytest.raises((StorageError, FileNotFoundError)) as caught:
        list(read_part(part, IngestConfig()))
    assert isinstance(caught.value, FileNotFoundError) or not CANARY.search(str(caught.value).encode())


@pytest.mark.parametrize("form", FORMS)
def test_names_are_of_what_stays(form):
    address = f"https://me:canary@host/set/x.jsonl.gz?{query(form)}"
    assert unsigned(address) == without_secrets(address) == "https://host/set/x.jsonl.gz"
    assert base_name(address) == "x.jsonl.gz"
    assert short_name(address) == "set/x.jsonl.gz"
    assert kind_of(address) == "jsonl"
    assert base_name(f"saved/1.png?{query(form)}") == "1.png"
    assert not CANARY.search(without_secrets(f"no https://host/o'hara 1.png?{query(form)} there").encode())
    assert unsigned(f"https://host/get?id=5&{query(form)}") == "https://host/get"


def test_a_query_that_only_says_which_file_stays_in_names_and_not_in_messages():
    assert unsigned("https://host/get?id=5&size=big") == "https://host/get?id=5&size=big"
    assert base_name("https://host/get?id=5") == "get?id=5"
    assert unsigned("https://host/get?design=2&resign=1") == "https://host/get?design=2&resign=1"
    assert without_secrets("https://host/get?id=5") == "https://host/get"


def test_pictures_beside_a_signed_table_are_found(server):
    server.files["set/pairs.jsonl"] = json.dumps({"image": "images/1.png?sig=canary", "caption": "c"}).encode()
    server.files["set/images/1.png"] = png(1)
    parts = plan_sources([f"{server.url}/set/pairs.jsonl?sig=a/b/c"], IngestConfig())
    (record,) = read_part(parts[0], IngestConfig())
    assert (record.source_key, record.image) == ("pairs.jsonl/images/1.png", png(1))


def test_storage_of_a_signed_address_says_nothing(server):
    with pytest.raises(StorageError) as caught:
        Storage(f"{server.url}/status").read_bytes(f"403?{query('Azure')}")
    assert not CANARY.search(str(caught.value).encode())
