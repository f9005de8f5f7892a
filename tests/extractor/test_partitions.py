"""Who may write a teacher's files, and what a user who deletes them may do then."""

import pytest
from embedded import embed, identity_of

from common.errors import FingerprintError
from common.lake import Lake, teacher_manifest
from common.models.load import read_catalog
from common.version import VERSION
from extractor.partitions import check_partitions, claim_teacher, plan_todo
from extractor.terms import check_terms

OTHER = {**identity_of("t"), "weights_sha256": "other"}


@pytest.fixture(params=["local", "s3"])
def lake(request, make_lake, tmp_path) -> Lake:
    home = tmp_path if request.param == "local" else request.getfixturevalue("s3")
    lake = make_lake(f"{home}/lake", rows=16, shard_rows=8)
    embed(lake, "t")
    return lake


def test_the_same_producer_goes_on_and_the_manifest_stays(lake):
    before = lake.storage.read_bytes(teacher_manifest("t"))
    assert claim_teacher(lake, "t", identity_of("t"), {"license": "another"})["license"] == "MIT"
    assert lake.storage.read_bytes(teacher_manifest("t")) == before
    assert check_partitions(lake, {"t": identity_of("t"), "new": OTHER}) == {"t"}


def test_another_producer_is_refused_while_there_are_files(lake):
    for attempt in (lambda: check_partitions(lake, {"t": OTHER}), lambda: claim_teacher(lake, "t", OTHER, {})):
        with pytest.raises(FingerprintError, match=r"weights_sha256: .* delete features/teacher=t first"):
            attempt()


def test_to_delete_the_folder_is_all_it_takes_for_another_producer(lake):
    """What the message of the refusal advises is enough, although the manifest lies elsewhere."""
    lake.storage.remove("features/teacher=t")
    todo, _ = plan_todo(lake, {"t": OTHER})
    assert todo == {0: ("t",), 1: ("t",)}
    manifest = claim_teacher(lake, "t", OTHER, {"license": "CC0"})
    assert manifest == lake.read_teacher("t")
    assert (manifest["fingerprint"], manifest["license"], manifest["mmkd_version"]) == (OTHER, "CC0", VERSION)


def test_the_same_producer_after_a_deletion_writes_the_same_bytes(lake):
    names = [f"features/teacher=t/{name}" for name in lake.storage.list_files("features/teacher=t")]
    before = [lake.storage.read_bytes(name) for name in names]
    lake.storage.remove("features/teacher=t")
    embed(lake, "t")
    assert [lake.storage.read_bytes(name) for name in names] == before


def test_consent_outlives_the_embeddings(lake):
    claim_teacher(lake, "unimed-clip", OTHER, {"terms_accepted_at": "2026-01-02"})
    assert lake.teachers() == ["t"]
    assert check_terms(lake, [read_catalog()["unimed-clip"]], ()) == {"unimed-clip": "2026-01-02"}
