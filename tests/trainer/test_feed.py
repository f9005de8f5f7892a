"""What a task of the stream of batches could not read travels to the worker as a block."""

import pytest

from common.errors import LakeError
from common.shard_files import DamagedFileError
from common.storage import Storage
from trainer.feed import _checked, _error_block, _pack, _unpack


def test_a_damaged_pack_is_the_users_sentence_in_the_worker(tmp_path):
    damaged = DamagedFileError(Storage(str(tmp_path)), "shards-000000-000003.parquet", "shard 1 does not read")
    (blob,) = _pack(_error_block(damaged))["block"]
    with pytest.raises(LakeError, match="shard 1 does not read.*mmkd verify") as raised:
        _checked(_unpack(blob))
    assert str(raised.value) == str(damaged)
