"""Pictures given by URL: what is wrong with one is that row's reject, in bounded time and memory."""

import json
import time
from collections import Counter

import pytest
from picture_server import PictureServer, closed_url, png, refusing_s3, silent_server, untrusted_server

from common import processes
from common.errors import SourceError, StorageError
from common.lake import open_lake
from extractor.config import FetchConfig, IngestConfig
from extractor.ingest import FEW_UNREACHABLE, describe, ingest
from extractor.sources import lines, plan_sources, read_part
from extractor.sources.addresses import Pictures
from extractor.sources.record import RowFaultError
from extractor.sources.remote import DEAD_ROWS, WebPictures

MIB = 1 << 20


@pytest.fixture
def server():
    with PictureServer() as server:
        server.files.update({"a.png": png(0), "b.png": png(1)})
        yield server


def quick(**fetch):
    return IngestConfig(fetch={"seconds": 0.5, "retries": 1, **fetch}, limits={"max_file_mib": 1})


def table(folder, *urls):
    path = folder / "urls.jsonl"
    path.write_text("".join(json.dumps({"url": url, "caption": f"row {i}"}) + "\n" for i, url in enumerate(urls)))
    return str(path)


def fault(url, **fetch):
    with pytest.raises(RowFaultError) as caught:
        Pictures(quick(**fetch)).read(url)
    return caught.value


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("status/401", "not reachable: HTTP 401"),
        ("status/403", "not reachable: HTTP 403"),
        ("status/404", "image not found"),
        ("status/410", "not reachable: HTTP 410"),
        ("status/429", "not reachable: HTTP 429"),
        ("status/500", "not reachable: HTTP 500"),
        ("status/204", "not reachable: HTTP 204"),
        ("loop/x.png", "not reachable: too many redirects"),
        ("ftp/x.png", "not reachable: bad redirect"),
        ("to/status/403", "not reachable: HTTP 403"),
        ("short/x.png", "not reachable: body cut short"),
        ("reset/x.png", "not reachable: connection lost"),
        ("garbage/x.png", "not reachable: malformed answer"),
        ("drip/x.png", "not reachable: no answer in time"),
    ],
)
def test_each_way_a_url_can_fail_has_its_reason(server, path, reason):
    found = fault(f"{server.url}/{path}")
    assert found.reason == reason
    assert found.detail.startswith(f"{server.url}/{path}: ")


def test_hosts_that_are_gone_silent_unknown_or_not_to_be_trusted(tmp_path):
    assert fault(f"{closed_url()}/x.png").reason == "not reachable: connection refused"
    assert fault("http://[::bad/x.png").reason == "not reachable: bad address"
    # Without a network nobody says at once that there is no such name.
    names = ("not reachable: unknown host", "not reachable: no answer in time")
    assert fault("http://no-such-host.invalid/x.png").reason in names
    with silent_server() as url:
        began = time.monotonic()
        assert fault(f"{url}/x.png").reason == "not reachable: no answer in time"
        assert 0.4 < time.monotonic() - began < 5
    with untrusted_server(tmp_path) as url:
        assert fault(f"{url}/x.png").reason == "not reachable: bad certificate"


def test_what_may_pass_is_tried_again_and_the_rest_is_not(server):
    pictures = Pictures(quick(retries=2, seconds=10))
    assert pictures.read(f"{server.url}/flaky/a.png") == png(0)
    assert server.asked["/flaky/a.png"] == 3
    assert fault(f"{server.url}/flaky/b.png", seconds=10).reason == "not reachable: HTTP 503"
    assert server.asked["/flaky/b.png"] == 2
    for path, tries in (("status/403", 1), ("status/429", 2), ("short/x.png", 2)):
        fault(f"{server.url}/{path}", seconds=10)
        assert server.asked[f"/{path}"] == tries
    assert pictures.read(f"{server.url}/to/b.png") == png(1)


def test_a_body_without_end_is_never_held(server):
    for path in ("endless/x.png", "huge/x.png"):
        assert fault(f"{server.url}/{path}", seconds=30).reason == "file too large"
    # What the server could send before it noticed: the limit, and the buffers of two sockets.
    assert server.sent < 20 * MIB
    assert Pictures(quick()).read(f"{server.url}/a.png") == png(0), "the session is not harmed"


def test_a_silent_host_costs_a_few_rows_their_time_and_no_other_host_anything(server):
    pictures = WebPictures(FetchConfig(seconds=0.3, retries=0, silent_rows=2))
    with silent_server() as url:
        began = time.monotonic()
        reasons = Counter()
        for _ in range(50):
            with pytest.raises(RowFaultError) as caught:
                pictures.read(f"{url}/x.png", MIB)
            reasons[caught.value.reason] += 1
            assert pictures.read(f"{server.url}/a.png", MIB) == png(0)
        assert time.monotonic() - began < 10
    assert reasons == {"not reachable: no answer in time": 2, "not reachable: host does not answer": 48}


def test_one_answer_makes_a_slow_host_welcome_again(server):
    pictures = WebPictures(FetchConfig(seconds=0.3, retries=0, silent_rows=2))
    for path in ("drip/x.png", "status/403", "drip/x.png"):
        with pytest.raises(RowFaultError):
            pictures.read(f"{server.url}/{path}", MIB)
    assert pictures.read(f"{server.url}/a.png", MIB) == png(0)


def test_a_host_that_refuses_gets_one_try_a_row(server):
    pictures, url = WebPictures(FetchConfig(seconds=30, retries=3)), closed_url()
    for rows in (DEAD_ROWS, 100):
        began = time.monotonic()
        for _ in range(rows):
            with pytest.raises(RowFaultError, match="connection refused"):
                pictures.read(f"{url}/x.png", MIB)
    assert time.monotonic() - began < 10, "with retries the hundred would wait for more than a minute"


def test_a_table_of_urls_is_ingested_whatever_became_of_some(server, tmp_path):
    urls = [f"{server.url}/{path}" for path in ("a.png", "status/403", "loop/x.png", "short/x.png", "endless/x.png")]
    urls += [f"{closed_url()}/x.png", f"{server.url}/b.png", f"{server.url}/absent.png"]
    report = ingest(table(tmp_path, *urls), str(tmp_path / "lake"), quick(seconds=20))
    assert (report.input, report.pairs, report.rejects) == (8, 2, 6)
    assert report.reasons == {
        "not reachable: HTTP 403": 1,
        "not reachable: too many redirects": 1,
        "not reachable: body cut short": 1,
        "not reachable: connection refused": 1,
        "file too large": 1,
        "image not found": 1,
    }
    lake = open_lake(str(tmp_path / "lake"))
    host = server.url.removeprefix("http://")
    assert lake.read_pairs(0)["source_key"].to_pylist() == [f"urls.jsonl/{host}/a.png", f"urls.jsonl/{host}/b.png"]
    (name,) = lake.storage.list_files("rejects/ingest")
    rejects = lake.storage.read_table(f"rejects/ingest/{name}").to_pylist()
    assert rejects[0]["detail"] == f"row 2: {server.url}/status/403: HTTP 403"


def test_several_are_under_way_of_each_host_a_few_and_rows_stay_in_order(server, tmp_path):
    hosts = [server.url, server.url.replace("127.0.0.1", "localhost")]
    server.files.update({f"{i}.png": png(i) for i in range(24)})
    urls = [f"{hosts[i % 2]}/{'slow/' if i % 5 else 'status/410/'}{i}.png" for i in range(24)]
    config = quick(at_once=6, per_host=2, seconds=20)
    records = [r for part in plan_sources([table(tmp_path, *urls)], config) for r in read_part(part, config)]
    assert [record.row for record in records] == list(range(1, 25))
    assert [record.image for record in records if not record.reason] == [png(i) for i in range(24) if i % 5]
    assert {count for host, count in server.most.items() if host != "all"} == {2}
    assert server.most["all"] == 4


def test_whoever_stops_reading_leaves_no_fetch_behind(server, tmp_path):
    server.files["a.png"] = png(0)
    urls = [f"{server.url}/slow/a.png?{i}" for i in range(200)]
    config = quick(at_once=4, per_host=4, seconds=20)
    (part,) = plan_sources([table(tmp_path, *urls)], config)
    records = read_part(part, config)
    next(records)
    records.close()
    asked = server.asked.total()
    assert asked <= 4
    time.sleep(0.5)
    assert server.asked.total() == asked


def test_too_large_a_share_of_failures_stops_and_the_same_command_goes_on(server, tmp_path, monkeypatch):
    monkeypatch.setattr(lines, "ROWS_PER_PART", 30)
    bad = [f"{server.url}/status/403?row={row}" for row in range(30)]
    source = table(tmp_path, *([f"{server.url}/a.png"] * 30), *bad)
    lake = str(tmp_path / "lake")
    strict = quick(max_unreachable=0.4, seconds=20)
    monkeypatch.setattr(processes, "FEW_CORES", 1 << 20)  # so that threads do it, and no Ray
    with pytest.raises(SourceError, match=r"Of 60 rows .* 30 name pictures .*HTTP 403 30.* 40%"):
        ingest(source, lake, strict)
    asked = server.asked["/a.png"]
    with pytest.raises(SourceError, match="max_unreachable"):
        ingest(source, lake, strict)
    assert server.asked["/a.png"] == asked, "the part that was well is not read again"
    assert server.asked["/status/403?row=0"] == 2, "the other is"
    assert ingest(source, lake, quick(max_unreachable=1, seconds=20)).rejects == 30
    assert server.asked["/status/403?row=0"] == 2


def test_a_few_failures_never_stop_an_ingest(server, tmp_path):
    urls = [f"{server.url}/status/403"] * FEW_UNREACHABLE
    report = ingest(table(tmp_path, f"{server.url}/a.png", *urls), str(tmp_path / "lake"), quick(max_unreachable=0))
    assert (report.pairs, report.rejects) == (1, FEW_UNREACHABLE)


def test_usual_settings_do_not_change_an_ingests_name(server, tmp_path):
    parts = plan_sources([table(tmp_path, "x.png")], IngestConfig())
    usual = describe(parts, IngestConfig())
    assert "fetch" not in usual["config"], "an ingest of before there were such settings is known again"
    assert describe(parts, IngestConfig(fetch={"max_unreachable": 0.1})) == usual
    assert describe(parts, IngestConfig(fetch={"seconds": 60}))["config"]["fetch"]["seconds"] == 60


def test_an_object_that_is_too_large_or_missing_is_a_rows_reject(s3, tmp_path):
    import fsspec

    store = fsspec.filesystem("s3")
    store.pipe_file(f"{s3}/a.png", png(0))
    store.pipe_file(f"{s3}/large.png", bytes(MIB + 1))
    fsspec.filesystem("memory").pipe_file("/set/large.png", bytes(MIB + 1))
    source = table(tmp_path, *(f"{s3}/{name}.png" for name in ("a", "large", "absent")), "memory://set/large.png")
    records = [record for part in plan_sources([source], quick()) for record in read_part(part, quick())]
    assert [record.reason for record in records] == [None, "file too large", "image not found", "file too large"]
    assert records[0].image == png(0)
    assert str(MIB + 1) in records[1].detail


@pytest.mark.parametrize(("code", "is_of_the_row"), [("AccessDenied", True), ("InvalidAccessKeyId", False)])
def test_one_forbidden_object_is_a_reject_and_bad_credentials_end_the_run(s3, monkeypatch, code, is_of_the_row):
    import fsspec

    with refusing_s3(code) as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        with pytest.raises(RowFaultError if is_of_the_row else StorageError, match="not readable|credentials"):
            Pictures(quick()).read(f"s3://bucket-{code.lower()}/x.png")
