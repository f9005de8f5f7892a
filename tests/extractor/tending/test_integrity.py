import hashlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from embedded import embed, features_of, identity_of

from common.listing import FileMark, Place
from common.schemas import features_schema
from common.shard_files import ShardFacts, ShardFile, shards_in
from extractor.sink import survey_pairs
from extractor.tending.compact import compact
from extractor.tending.integrity import Expected, check_features, check_file, content_hash, samples_hash


@pytest.fixture
def table(make_lake, tmp_path):
    return features_of(make_lake(tmp_path / "lake", rows=9, shard_rows=9, captions=3), "t", 0)


def expected_of(table: pa.Table) -> Expected:
    return Expected(table.num_rows, samples_hash(table["sample_id"]))


def check(table: pa.Table, content: str | None = None, expected: Expected | None = None):
    facts = ShardFacts(0, table.num_rows, samples_hash(table["sample_id"]), content)
    return check_features(table, facts, expected or expected_of(table), identity_of("t"))


def with_vectors(table: pa.Table, name: str, change) -> pa.Table:
    """The table with a column of vectors passed through ``change``, as float32 [rows, dim]."""
    column = table[name].combine_chunks()
    filled = column.values.to_numpy().copy().reshape(len(column), -1)
    change(filled)
    field = table.schema.field(name)
    array = pa.FixedSizeListArray.from_arrays(pa.array(filled.reshape(-1)), type=field.type, mask=column.is_null())
    return table.set_column(table.column_names.index(name), field, array)


def test_the_samples_hash_is_of_the_ids_joined_by_newlines(table):
    ids = table["sample_id"].to_pylist()
    assert samples_hash(table["sample_id"]) == hashlib.sha256("\n".join(ids).encode()).hexdigest()


@pytest.mark.parametrize("compression", ["zstd", "none"])
def test_the_content_hash_is_the_same_after_parquet_chunked_and_sliced(table, tmp_path, compression):
    pq.write_table(table, tmp_path / "t.parquet", compression=compression, row_group_size=2)
    assert content_hash(pq.read_table(tmp_path / "t.parquet")) == content_hash(table)
    longer = pa.concat_tables([table.slice(5), table, table.slice(0, 3)])
    assert content_hash(longer.slice(4, 9)) == content_hash(table)
    assert content_hash(pa.concat_tables([table.slice(0, 4), table.slice(4)])) == content_hash(table)


def test_what_lies_beneath_a_null_does_not_count(table):
    def scribble(vectors: np.ndarray) -> None:
        vectors[1] = 7

    assert table["image_embedding"][1].as_py() is None
    assert content_hash(with_vectors(table, "image_embedding", scribble)) == content_hash(table)


def test_the_content_hash_tells_every_change(table):
    def nudge(vectors: np.ndarray) -> None:
        vectors[3, 2] = np.nextafter(vectors[3, 2], np.float32(2))

    extra = table["extra_text_embeddings"].to_pylist()
    donor = next(row for row, vectors in enumerate(extra) if vectors)
    moved = [*extra]
    moved[donor], moved[donor - 1] = extra[donor][1:], [*extra[donor - 1], extra[donor][0]]
    norms = table["text_norm"].to_pylist()
    changed = [
        with_vectors(table, "text_embedding", nudge),
        table.take([1, 0, *range(2, 9)]),
        table.slice(0, 8),
        table.set_column(5, table.schema.field(5), pa.array(moved, table.schema.field(5).type)),
        table.set_column(4, table.schema.field(4), pa.array([None, *norms[1:]], pa.float32())),
        table.rename_columns([*table.column_names[:-1], "others"]),
    ]
    hashes = [content_hash(other) for other in (table, *changed)]
    assert len(set(hashes)) == len(hashes)


def test_a_good_table_has_no_fault(table):
    assert check(table, content_hash(table)) is None
    assert check(table) is None  # written before hashes were kept


def test_empty_columns_of_an_image_encoder_are_good(table):
    schema = features_schema(16, None)
    nulls = [pa.nulls(table.num_rows, field.type) for field in list(schema)[3:]]
    images = pa.table([*table.columns[:3], *nulls], schema=schema)
    identity = {**identity_of("t"), "text_dim": None}
    facts = ShardFacts(0, 9, None, content_hash(images))
    assert check_features(images, facts, expected_of(table), identity) is None


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        (np.nan, "1 of 9 vectors of text_embedding are not finite or not of length 1"),
        (np.inf, "1 of 9 vectors of text_embedding are not finite"),
        (0.5, "1 of 9 vectors of text_embedding are not finite or not of length 1"),
    ],
)
def test_values_written_by_hand_are_checked_even_under_a_right_checksum(table, value, sentence):
    def damage(vectors: np.ndarray) -> None:
        vectors[4] = value

    bad = with_vectors(table, "text_embedding", damage)
    fault = check(bad, content_hash(bad))
    assert sentence in fault.sentence
    assert not fault.other_samples


def test_vectors_of_further_captions_are_checked(table):
    extra = [[[0.9] * 16 for _ in vectors] for vectors in table["extra_text_embeddings"].to_pylist()]
    bad = table.set_column(5, table.schema.field(5), pa.array(extra, table.schema.field(5).type))
    assert "of extra_text_embeddings are not finite or not of length 1" in check(bad).sentence


def test_norms_go_with_their_vectors(table):
    for norms in ([1.0] * 9, [1.0, None, *[1.0] * 6, 0.0], [1.0, None, *[1.0] * 6, np.nan]):
        bad = table.set_column(2, table.schema.field(2), pa.array(norms, pa.float32()))
        assert "image_norm is not a positive number wherever image_embedding is there" in check(bad).sentence


def test_other_widths_and_columns_are_named(make_lake, tmp_path, table):
    wide = features_of(make_lake(tmp_path / "wide", rows=9, shard_rows=9), "t", 0, dim=24)
    assert "its column image_embedding is" in check(wide).sentence
    assert "it has the columns sample_id" in check(table.drop_columns(["text_norm"])).sentence


def test_other_values_than_those_written_are_told_by_the_checksum(table):
    assert "checksum in the footer differs" in check(table.take([1, 0, *range(2, 9)]), content_hash(table)).sentence


def test_a_whole_table_of_other_samples_is_told_apart_from_a_damaged_one(table):
    other = table.slice(0, 8)
    assert check(other, content_hash(other), expected_of(table)).other_samples
    # Without a checksum nothing says that a table with fewer rows is whole.
    fault = check(other, None, expected_of(table))
    assert (fault.sentence, fault.other_samples) == ("it has 8 rows and its pairs have 9", False)


@pytest.mark.parametrize("packed", [False, True])
def test_no_changed_byte_goes_unnoticed(make_lake, tmp_path, packed):
    lake = make_lake(tmp_path / "lake", rows=16, shard_rows=8)
    embed(lake, "t")
    if packed:
        compact(lake.uri)
    (name,) = [place.name for index, place in lake.feature_places("t").items() if index == 1]
    shards = list(shards_in(name))
    before = {index: lake.read_features("t", index) for index in shards}
    expected = survey_pairs(lake).expected(shards)
    path = tmp_path / "lake" / "features" / "teacher=t" / name
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    seen = 0
    for position in rng.choice(len(whole), 400, replace=False):
        damaged = bytearray(whole)
        damaged[position] ^= int(rng.integers(1, 256))
        path.write_bytes(damaged)
        place = Place(name, FileMark(len(whole), "1"))
        faults = check_file(lake.storage, "features/teacher=t", place, expected, identity_of("t"))
        seen += any(faults.values())
        for index in (index for index, fault in faults.items() if fault is None):
            # Such as a flip in the statistics, which no reader of values looks at.
            assert ShardFile(lake.storage, f"features/teacher=t/{name}", len(whole)).read(index).equals(before[index])
    assert seen > 100
