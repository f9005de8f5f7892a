"""Credentials of the environment appear in no error and no log, whatever goes wrong."""

import logging
import traceback

import fsspec
import pyarrow as pa
import pytest
from fault_proxy import FaultProxy

from common.errors import MmkdError
from common.lease import hold
from common.logs import logger
from common.s3 import RetryingS3
from common.storage import Storage

CANARIES = {
    "AWS_ACCESS_KEY_ID": "CANARYKEYID0123456789",
    "AWS_SECRET_ACCESS_KEY": "canary+secret/key",
    "AWS_SESSION_TOKEN": "canary-session-token",
}
WORDS = ("canary", "CANARY")


def ways_to_fail(storage: Storage, proxy: FaultProxy):
    """Pairs of the faults to inject and what to do then."""
    storage.write_bytes("torn.parquet", b"PAR1 and then nothing")
    storage.write_bytes("no.json", b"{")
    for kind in ("error", "throttle", "deny", "reset", "hang", "truncate", "lost_ack", "damage"):
        yield {kind: 1.0}, lambda: storage.read_bytes("no.json")
        yield {kind: 1.0}, lambda: storage.write_bytes("x", b"12")
        yield {kind: 1.0}, lambda: storage.list_files()
    yield {"error": 1.0}, lambda: storage.write_table("t.parquet", pa.table({"a": [1]}))
    yield {"deny": 1.0}, lambda: storage.remove("no.json")
    yield {"deny": 1.0}, lambda: storage.create("new", b"1")
    yield {"deny": 1.0}, lambda: hold(storage, "a", "run", seconds=1)
    yield {}, lambda: storage.read_bytes("missing")
    yield {}, lambda: storage.read_table("torn.parquet")
    yield {}, lambda: storage.read_json("no.json")
    yield {}, lambda: Storage("s3://no-such-bucket/lake").write_bytes("x", b"1")
    yield {}, lambda: Storage("s3://Not A Bucket/lake").write_bytes("x", b"1")
    yield {}, lambda: Storage("nope://user:canary@host/x?token=canary").list_files()
    yield {}, lambda: Storage("http://user:canary@127.0.0.1:9/x?signature=canary").read_bytes("y")


def test_no_error_and_no_log_shows_them(s3, s3_server, monkeypatch, caplog):
    for name, value in CANARIES.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("common.retries.PATIENCE_SECONDS", 0.5)
    monkeypatch.setattr("common.retries.BACKOFF_SECONDS", 0.01)
    monkeypatch.setattr(RetryingS3, "read_timeout", 0.2)
    logger.addHandler(caplog.handler)
    caplog.set_level(logging.DEBUG, logger="mmkd")
    texts = []
    try:
        with FaultProxy(s3_server) as proxy:
            monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
            fsspec.get_filesystem_class("s3").clear_instance_cache()
            storage = Storage(f"{s3}/lake")
            for rates, fail in ways_to_fail(storage, proxy):
                proxy.rates = rates
                try:
                    fail()
                except (MmkdError, FileNotFoundError) as error:
                    texts += [repr(error), *traceback.format_exception(error)]
                proxy.rates = {}
    finally:
        logger.removeHandler(caplog.handler)
    own = [record.getMessage() for record in caplog.records if record.name == "mmkd"]
    assert len(texts) > 100
    assert any("retry" in line for line in own)
    # A trace quotes the lines above that hold addresses with canaries of their own.
    lines = [line for text in texts for line in text.splitlines() if "lambda" not in line]
    found = [line for line in (*lines, *caplog.messages) if any(word in line for word in WORDS)]
    assert found == []


def test_an_address_loses_its_secrets_in_an_error():
    with pytest.raises(MmkdError) as caught:
        Storage("nope://user:canary@host/x?token=canary").list_files()
    assert "canary" not in str(caught.value)
