"""Errors on their way between processes: none is lost, none comes as another's traceback."""

import pytest
from ray_errors import as_ray_gives_it

from common import errors
from common.errors import LakeError, LeaseError, MmkdError, StoppedError, from_row, root_cause, to_row
from common.shard_files import DamagedFileError
from common.storage import Storage

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, MmkdError)]


@pytest.mark.parametrize("kind", KINDS)
def test_every_class_of_the_tree_comes_back_as_itself(kind):
    found = from_row(to_row(kind("It is not there.")))
    assert (type(found), str(found), found.exit_code) == (kind, "It is not there.", kind.exit_code)


def test_a_class_from_elsewhere_comes_back_as_the_nearest_of_the_tree(tmp_path):
    damaged = DamagedFileError(Storage(str(tmp_path)), "shards-000000-000003.parquet", "shard 1 does not read")
    found = from_row(to_row(damaged))
    assert type(found) is LakeError
    assert str(found) == str(damaged)


def test_a_class_of_another_version_is_still_the_users_error():
    found = from_row({"kind": "TomorrowsError", "message": "Wait a day."})
    assert (type(found), str(found)) == (MmkdError, "Wait a day.")


def test_rays_wrapper_is_seen_through():
    wrapped = as_ray_gives_it(LeaseError("Another run is at work."))
    assert "\x1b" in str(wrapped)  # or there is nothing to see through
    assert to_row(wrapped) == {"kind": "LeaseError", "message": "Another run is at work."}
    assert str(root_cause(wrapped)) == "Another run is at work."


def test_the_root_of_a_chain_is_found_and_a_bug_has_none():
    outer = RuntimeError("a library's")
    outer.__cause__ = StoppedError("SIGTERM came.")
    assert root_cause(outer) is outer.__cause__
    assert root_cause(KeyError("x")) is None
