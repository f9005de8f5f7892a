"""Batches from a lake: in order, with the teachers' vectors of the drawn caption, the same on any number of workers."""

import dataclasses
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from common.errors import LakeError, TrainError
from common.images import decode_rgb, fit
from common.lake import Lake, open_lake
from common.schemas import features_schema
from common.storage import Storage
from common.views import cut_view, view_boxes
from trainer.architecture import read_architecture
from trainer.config import DataConfig
from trainer.data import (
    StoredViews,
    TrainData,
    block_bytes,
    decode_block,
    digest_rows,
    draw_caption,
    draw_view,
    read_blocks,
    read_shard,
    rows_per_block,
    validation_batches,
)
from trainer.feed import local_batches, started
from trainer.launch import build_order, find_rows
from trainer.order import split_places
from trainer.stage2 import stored_views

CONFIG = DataConfig(batch_size=16, lanes=4, crop_scale=0.5)


@pytest.fixture
def data(tiny_lake, student_folder) -> TrainData:
    lake = open_lake(tiny_lake)
    rows = find_rows(lake, ("alpha", "beta"), "sel", 0)
    order = build_order(rows, CONFIG, lake)
    architecture = read_architecture(Storage(str(student_folder)))
    return TrainData(tiny_lake, order, architecture, CONFIG.crop_scale, ("alpha", "beta"), "sel")


def pairs_by_id(uri) -> dict[str, dict]:
    lake = Lake(uri)
    return {row["sample_id"]: row for shard in lake.shards() for row in lake.read_pairs(shard).to_pylist()}


def teacher_by_id(uri, teacher) -> dict[str, tuple[dict, bool]]:
    lake, found = Lake(uri), {}
    for shard in lake.shards():
        features = lake.read_features(teacher, shard).to_pylist()
        admitted = lake.storage.read_table(f"selection/sel/teacher={teacher}/shard-{shard:06d}.parquet")["admitted"]
        found.update({f["sample_id"]: (f, a) for f, a in zip(features, admitted.to_pylist(), strict=True)})
    return found


def test_only_admitted_train_rows_are_drawn_at_the_places_of_the_order(data, tiny_lake):
    pairs, steps = pairs_by_id(tiny_lake), data.order.steps_per_epoch
    for step, batch in enumerate(local_batches(data, 0, steps)):
        assert np.array_equal(batch.place_B, data.order.step_places(step))
        shards, rows = split_places(batch.place_B)
        for sample_id, shard, row in zip(batch.sample_ids, shards, rows, strict=True):
            assert int(sample_id, 16) == shard * 24 + row
            assert pairs[sample_id]["split"] == "train"
            assert int(sample_id, 16) % 7 != 0
    assert step + 1 == steps


def test_vectors_are_of_the_drawn_caption_and_masked_where_absent(data, tiny_lake):
    pairs, seen = pairs_by_id(tiny_lake), set()
    teachers = {name: teacher_by_id(tiny_lake, name) for name in data.teachers}
    for step, batch in enumerate(local_batches(data, 0, 2 * data.order.steps_per_epoch)):
        for i, sample_id in enumerate(batch.sample_ids):
            which = draw_caption(0, data.order.epoch_of(step), sample_id, pairs[sample_id]["captions"])
            seen.add(which)
            for name, rows in batch.teachers.items():
                stored, admitted = teachers[name][sample_id]
                known = admitted and stored["image_embedding"] is not None
                assert rows.image_mask_B[i] == rows.text_mask_B[i] == known
                if known:
                    text = [stored["text_embedding"], *stored["extra_text_embeddings"]][which]
                    assert np.allclose(rows.text_BT[i], text)
                    assert np.allclose(rows.image_BT[i], stored["image_embedding"])
                elif stored["image_embedding"] is None:
                    assert not rows.image_BT[i].any()
    assert seen == {0, 1}
    assert not all(rows.image_mask_B.all() for rows in batch.teachers.values())


def test_workers_side_by_side_give_the_global_batch(data):
    total = data.order.steps_per_epoch + 1
    alone = list(local_batches(data, 0, total))
    pairs = zip(*(local_batches(data, 0, total, rank, 2) for rank in range(2)), strict=True)
    for one, (left, right) in zip(alone, pairs, strict=True):
        assert one.sample_ids == left.sample_ids + right.sample_ids
        assert np.array_equal(one.pixels_BHWC, np.concatenate([left.pixels_BHWC, right.pixels_BHWC]))
        assert np.array_equal(one.tokens_BL, np.concatenate([left.tokens_BL, right.tokens_BL]))
        assert np.array_equal(digest_rows(one), np.concatenate([digest_rows(left), digest_rows(right)]))


def test_resuming_repeats_the_same_crops_and_draws(data):
    total = 2 * data.order.steps_per_epoch
    whole, rest = list(local_batches(data, 0, total)), list(started(local_batches(data, 3, total)))
    assert len(rest) == total - 3
    for one, other in zip(whole[3:], rest, strict=True):
        assert one.sample_ids == other.sample_ids
        assert np.array_equal(one.pixels_BHWC, other.pixels_BHWC)
        assert np.array_equal(one.tokens_BL, other.tokens_BL)
        assert np.array_equal(one.draws_BK, other.draws_BK)
        assert np.array_equal(digest_rows(one), digest_rows(other))


def test_a_shard_is_the_same_from_an_object_store(data, tiny_lake, s3):
    remote = Lake(f"{s3}/lake")
    for path in Path(tiny_lake).rglob("*"):
        if path.is_file():
            remote.storage.write_bytes(str(path.relative_to(tiny_lake)), path.read_bytes())
    away = dataclasses.replace(data, lake_uri=remote.uri)
    for shard in Lake(tiny_lake).shards():
        assert read_shard(away, remote, shard).equals(read_shard(data, Lake(tiny_lake), shard))
    remote.storage.remove("features/teacher=beta/shard-000001.parquet")
    with pytest.raises(LakeError, match="no embeddings of teacher 'beta' for shard 1"):
        read_shard(away, remote, 1)


@pytest.mark.parametrize("rows", [4, 16, 300])
def test_the_size_of_a_block_is_known_beforehand(data, rows):
    segment = next(data.order.segments(0, 2))
    block = next(read_blocks(data, segment, range(4)))
    share = rows_per_block(rows) / block.num_rows
    assert rows_per_block(rows) % rows == 0
    for table in (block, decode_block(data, block)):
        assert table.nbytes * share < 1.5 * block_bytes(data, rows)  # ids and masks are small change at real widths
        assert table.nbytes * share > block_bytes(data, rows) / 10


@pytest.mark.parametrize("part", ["pixels_BHWC", "tokens_BL", "draws_BK"])
def test_a_digest_tells_which_row_differs(data, part):
    batch = next(local_batches(data, 0, 1))
    changed = getattr(batch, part).copy()
    changed[5].reshape(-1)[0] += 1
    other = digest_rows(dataclasses.replace(batch, **{part: changed}))
    assert np.flatnonzero(other != digest_rows(batch)).tolist() == [5]


def test_a_digest_sees_the_teachers(data):
    batch = next(local_batches(data, 0, 1))
    mask = batch.teachers["beta"].text_mask_B.copy()
    mask[3] = ~mask[3]
    teachers = {**batch.teachers, "beta": dataclasses.replace(batch.teachers["beta"], text_mask_B=mask)}
    other = digest_rows(dataclasses.replace(batch, teachers=teachers))
    assert np.flatnonzero(other != digest_rows(batch)).tolist() == [3]


# --- Stored crops, shown to the student again.

VIEWS = StoredViews(3, 0.4, 7)


def store_views(uri, teachers, seed=7):
    """Give teachers vectors of three crops of each picture: of crop k the k-th unit vector; each fifth row has none."""
    lake = open_lake(uri)
    for name in teachers:
        for shard in lake.shards():
            table = lake.read_features(name, shard)
            dim = table["image_embedding"].type.list_size
            rows = table.to_pylist()
            for row in rows:
                row["view_boxes"] = view_boxes(row["sample_id"], 3, 0.4, seed).tolist()
                vectors = [np.eye(dim)[k].tolist() for k in range(3)]
                row["view_embeddings"] = None if int(row["sample_id"], 16) % 5 == 0 else vectors
            stored = pa.Table.from_pylist(rows, schema=features_schema(dim, dim, views=True))
            lake.storage.write_table(f"{lake.features_folder(name)}/shard-{shard:06d}.parquet", stored)
        manifest = lake.storage.read_json(f"manifests/teachers/{name}.json")
        manifest["fingerprint"]["views"] = {"count": 3, "least_area": 0.4, "seed": seed}
        lake.storage.write_json(f"manifests/teachers/{name}.json", manifest)


def test_student_and_teachers_see_the_same_stored_crop(data, tiny_lake):
    store_views(tiny_lake, ("alpha", "beta"))
    data, pairs = dataclasses.replace(data, views=VIEWS), pairs_by_id(tiny_lake)
    geometry, seen = data.architecture.geometry, set()
    for step, batch in enumerate(local_batches(data, 0, 2 * data.order.steps_per_epoch)):
        for i, sample_id in enumerate(batch.sample_ids):
            which = draw_view(0, data.order.epoch_of(step), sample_id, 3)
            seen.add(which)
            box = view_boxes(sample_id, 3, 0.4, 7)[which]
            picture = cut_view(decode_rgb(pairs[sample_id]["image"]), box)
            assert np.array_equal(batch.pixels_BHWC[i], fit(picture, geometry))
            rows = batch.teachers["alpha"]
            if int(sample_id, 16) % 5 == 0:
                assert not rows.image_mask_B[i]
                assert not rows.image_BT[i].any()
                assert rows.text_mask_B[i]
            else:
                assert rows.image_BT[i].argmax() == which
    assert seen == {0, 1, 2}


def test_stored_crops_have_to_be_the_same_for_all(data, tiny_lake):
    lake = open_lake(tiny_lake)
    with pytest.raises(TrainError, match=r"alpha: none.*--views K"):
        stored_views(lake, ("alpha", "beta"), lengths=False)
    store_views(tiny_lake, ("alpha",))
    with pytest.raises(TrainError, match="same stored crops"):
        stored_views(lake, ("alpha", "beta"), lengths=False)
    store_views(tiny_lake, ("beta",), seed=8)
    with pytest.raises(TrainError, match="same stored crops"):
        stored_views(lake, ("alpha", "beta"), lengths=False)
    assert stored_views(lake, ("alpha",), lengths=False) == VIEWS
    with pytest.raises(TrainError, match="target_length"):
        stored_views(lake, ("alpha",), lengths=True)


def test_validation_sees_whole_pictures_even_then(data, tiny_lake):
    places = find_rows(open_lake(tiny_lake), (), None, 0).validation
    (plain,), (viewed,) = (list(validation_batches(d, places)) for d in (data, dataclasses.replace(data, views=VIEWS)))
    assert np.array_equal(plain.pixels_BHWC, viewed.pixels_BHWC)


def test_epochs_see_other_crops(data):
    views: dict[str, list[bytes]] = {}
    for batch in local_batches(data, 0, 2 * data.order.steps_per_epoch):
        for sample_id, pixels in zip(batch.sample_ids, batch.pixels_BHWC, strict=True):
            views.setdefault(sample_id, []).append(pixels.tobytes())
    twice = [found for found in views.values() if len(found) == 2]
    assert twice
    assert all(first != second for first, second in twice)


def test_validation_is_clean_and_always_the_same(data, tiny_lake):
    places = find_rows(open_lake(tiny_lake), (), None, 0).validation
    pairs = pairs_by_id(tiny_lake)
    first, again = (list(validation_batches(data, places)) for _ in range(2))
    assert len(places) > 1
    assert sum(len(batch.sample_ids) for batch in first) == len(places)
    assert {pairs[sample_id]["split"] for batch in first for sample_id in batch.sample_ids} == {"val"}
    assert np.array_equal(first[0].pixels_BHWC, again[0].pixels_BHWC)
    assert list(validation_batches(data, places[:0])) == []


def test_a_teachers_shard_of_other_samples_is_refused(data, tiny_lake):
    lake = Lake(tiny_lake)
    name = "features/teacher=alpha/shard-000001.parquet"
    table = lake.storage.read_table(name)
    lake.storage.write_table(name, table.take(pa.array(range(table.num_rows - 1, -1, -1))))
    with pytest.raises(LakeError, match="does not hold the same samples"):
        list(local_batches(data, 0, data.order.steps_per_epoch))


def test_a_picture_that_no_longer_decodes_is_named(data, tiny_lake):
    lake = Lake(tiny_lake)
    for shard in lake.shards():
        table = lake.read_pairs(shard)
        broken = pa.array([b"no picture"] * table.num_rows, pa.binary())
        position = table.schema.get_field_index("image")
        lake.storage.write_table(
            f"pairs/shard-{shard:06d}.parquet", table.set_column(position, table.schema.field("image"), broken)
        )
    with pytest.raises(LakeError, match=r"16 pictures .* cannot be decoded.*: 0000"):
        next(local_batches(data, 0, 1))


def test_missing_shards_say_what_to_run(data, tiny_lake):
    Lake(tiny_lake).storage.remove("features/teacher=beta/shard-000002.parquet")
    with pytest.raises(LakeError, match="no embeddings of teacher 'beta' for shard 2.*mmkd extract"):
        list(local_batches(data, 0, data.order.steps_per_epoch))
    Lake(tiny_lake).storage.remove("selection/sel/teacher=beta/shard-000003.parquet")
    with pytest.raises(LakeError, match="Run `mmkd select` again"):
        find_rows(open_lake(tiny_lake), ("alpha", "beta"), "sel", 0)


def test_a_lake_smaller_than_a_batch_is_refused(tiny_lake):
    lake = open_lake(tiny_lake)
    rows = find_rows(lake, (), None, 0)
    with pytest.raises(TrainError, match="fewer than one batch of 512"):
        build_order(rows, DataConfig(batch_size=512), lake)


def test_the_data_fingerprint_follows_ids_and_admissions(tiny_lake):
    lake = open_lake(tiny_lake)
    everything, admitted = find_rows(lake, (), None, 0), find_rows(lake, ("beta",), "sel", 0)
    assert everything.identity != admitted.identity
    assert everything.identity == find_rows(lake, (), None, 1).identity
    assert sum(map(len, admitted.train)) < sum(map(len, everything.train))
    assert dataclasses.asdict(everything)["shards"] == (0, 1, 2, 3)


@pytest.mark.parametrize("teachers", [(), ("alpha", "beta")])
def test_rows_without_a_caption_are_neither_trained_on_nor_validated_on(silent_lake, student_folder, teachers, caplog):
    lake, selection = open_lake(silent_lake), "sel" if teachers else None
    with caplog.at_level("INFO", "mmkd"):
        rows = find_rows(lake, teachers, selection, 0)
    pairs = [row for shard in lake.shards() for row in lake.read_pairs(shard).to_pylist()]
    silent = [sum(not row["captions"] and row["split"] == split for row in pairs) for split in ("train", "val")]
    assert all(silent)
    assert f"{silent[0]} of the train split, {silent[1]} of the val split" in caplog.text
    assert rows.without_caption == silent[0]
    chosen = [(int(shard), int(row)) for shard, found in zip(rows.shards, rows.train, strict=True) for row in found]
    chosen += [(int(place) >> 32, int(place) & 0xFFFFFFFF) for place in rows.validation]
    tables = {shard: lake.read_pairs(shard)["captions"].to_pylist() for shard in lake.shards()}
    assert all(tables[shard][row] for shard, row in chosen)
    if not teachers:
        assert len(chosen) == sum(bool(row["captions"]) and row["split"] != "test" for row in pairs)
    order = build_order(rows, CONFIG, lake)
    architecture = read_architecture(Storage(str(student_folder)))
    data = TrainData(silent_lake, order, architecture, CONFIG.crop_scale, teachers, selection)
    seen = [name for batch in local_batches(data, 0, order.steps_per_epoch) for name in batch.sample_ids]
    told = {row["sample_id"] for row in pairs if row["captions"]}
    assert len(seen) == order.steps_per_epoch * CONFIG.batch_size
    assert set(seen) <= told
    assert next(validation_batches(data, rows.validation)).sample_ids


def test_a_lake_without_captions_cannot_be_trained_on(lake_without_captions):
    lake = open_lake(lake_without_captions)
    with pytest.raises(TrainError, match=r"rows of its train split have no caption.*Ingest pairs with captions"):
        build_order(find_rows(lake, (), None, 0), CONFIG, lake)


def test_a_lake_with_few_captions_says_what_was_left_out(silent_lake):
    lake = open_lake(silent_lake)
    rows = find_rows(lake, (), None, 0)
    with pytest.raises(TrainError, match=f"fewer than one batch of 512.* {rows.without_caption} rows were left out"):
        build_order(rows, DataConfig(batch_size=512), lake)
