"""Selection against the same figures worked out row by row, and its rule at the edges."""

import numpy as np
import pytest

from common.errors import LakeError
from common.lake import open_lake
from trainer.config import SelectConfig
from trainer.selection.select import select
from trainer.selection.stored import choose_selection
from trainer.selection.summary import format_summary

EVERYONE = SelectConfig(min_skill=0, keep_fraction=1)


def everything(uri: str, teacher: str) -> list[dict]:
    """Each pair with a teacher's vectors, in order."""
    lake, found = open_lake(uri), []
    for shard in lake.shards():
        pairs, features = lake.read_pairs(shard).to_pylist(), lake.read_features(teacher, shard).to_pylist()
        found += [{**feature, **pair} for pair, feature in zip(pairs, features, strict=True)]
    return found


def selected(uri: str, name: str, teacher: str) -> list[dict]:
    """What a selection says of each pair, in order."""
    lake = open_lake(uri)
    files = [f"selection/{name}/teacher={teacher}/shard-{shard:06d}.parquet" for shard in lake.shards()]
    return [row for file in files for row in lake.storage.read_table(file).to_pylist()]


@pytest.mark.parametrize("teacher", ["alpha", "beta"])
def test_cosine_rank_and_quantile_are_those_of_the_rows_themselves(tiny_lake, teacher):
    rows, found = everything(tiny_lake, teacher), selected(tiny_lake, select(tiny_lake, EVERYONE), teacher)
    assert [row["sample_id"] for row in found] == [row["sample_id"] for row in rows]
    checked = 0
    for row, result in zip(rows, found, strict=True):
        if row["image_embedding"] is None:
            assert result["cosine"] is result["rank"] is result["cosine_quantile"] is None
            assert not result["admitted"]
            continue
        image = np.array(row["image_embedding"])
        peers = [
            one
            for one in rows
            if one["modality"] == row["modality"] and one["split"] == "train" and one["image_embedding"] is not None
        ]
        cosine = float(image @ np.array(row["text_embedding"]))
        assert result["cosine"] == pytest.approx(cosine, abs=1e-5)
        others = [one for one in peers if one["captions"][0] != row["captions"][0]]
        above = sum(float(image @ np.array(one["text_embedding"])) > cosine + 1e-7 for one in others)
        assert result["rank"] == pytest.approx(above + 1, abs=0)
        assert result["candidates"] == len(others) + 1
        matched = [float(np.array(one["image_embedding"]) @ np.array(one["text_embedding"])) for one in peers]
        assert result["cosine_quantile"] == pytest.approx(np.mean(np.array(matched) <= cosine + 1e-7), abs=1e-6)
        assert result["admitted"]
        checked += 1
    assert checked > 50


def test_the_best_matched_share_of_the_train_rows_is_kept_in_each_modality(tiny_lake):
    name = select(tiny_lake, SelectConfig(min_skill=0, keep_fraction=0.5))
    rows = [row for row in selected(tiny_lake, name, "alpha") if row["cosine"] is not None]
    for modality in ("red", "green", "blue"):
        here = sorted((row for row in rows if row["modality"] == modality), key=lambda row: row["cosine"])
        kept = [row["admitted"] for row in here]
        assert kept == sorted(kept)  # a worse match is never kept in place of a better one
        assert 0.35 < np.mean(kept) < 0.65


def test_a_teacher_speaks_only_where_it_beats_chance_by_enough(tiny_lake):
    summary = open_lake(tiny_lake).storage
    name = select(tiny_lake, SelectConfig(min_skill=0.0, keep_fraction=1))
    skills = summary.read_json(f"selection/{name}/selection.json")["summary"]["alpha"]
    bar = sorted(entry["skill"] for entry in skills.values())[1]
    strict = select(tiny_lake, SelectConfig(min_skill=bar, keep_fraction=1))
    rows = selected(tiny_lake, strict, "alpha")
    for modality, entry in skills.items():
        admitted = [row["admitted"] for row in rows if row["modality"] == modality and row["cosine"] is not None]
        assert all(admitted) if entry["skill"] > bar else entry["skill"] == bar or not any(admitted)
    said = format_summary(summary.read_json(f"selection/{strict}/selection.json")["summary"])
    assert "kept 100%" in said
    assert "kept 0%" in said


def test_a_bad_rank_drops_a_sample(tiny_lake):
    rows = selected(
        tiny_lake, select(tiny_lake, SelectConfig(min_skill=0, keep_fraction=1, max_rank_fraction=0.3)), "alpha"
    )
    known = [row for row in rows if row["cosine"] is not None]
    assert any(row["admitted"] for row in known)
    assert not all(row["admitted"] for row in known)
    for row in known:
        assert row["admitted"] == (row["rank"] <= max(1, 0.3 * row["candidates"]))


def test_candidates_are_a_seeded_sample(tiny_lake):
    few = SelectConfig(min_skill=0, keep_fraction=1, candidates=5)
    one, other = (
        selected(tiny_lake, select(tiny_lake, few.model_copy(update={"seed": seed})), "alpha") for seed in (0, 1)
    )
    assert all(row["candidates"] <= 6 for row in one if row["candidates"])
    assert [row["rank"] for row in one] != [row["rank"] for row in other]
    assert [row["cosine"] for row in one] == [row["cosine"] for row in other]


def test_the_same_question_is_answered_once_and_counts_as_the_newest(tiny_lake):
    lake = open_lake(tiny_lake)
    first, second = select(tiny_lake, EVERYONE), select(tiny_lake, SelectConfig())
    assert first != second
    assert choose_selection(lake, None, ())[0] == second
    file = lake.storage.path(f"selection/{first}/teacher=alpha/shard-000000.parquet")
    before = lake.storage.read_bytes(f"selection/{first}/teacher=alpha/shard-000000.parquet")
    assert select(tiny_lake, EVERYONE) == first
    assert choose_selection(lake, None, ())[0] == first
    assert lake.storage.read_bytes(f"selection/{first}/teacher=alpha/shard-000000.parquet") == before, file


def test_a_teacher_whose_shards_are_not_all_there_is_refused(tiny_lake):
    lake = open_lake(tiny_lake)
    lake.storage.remove("features/teacher=beta/shard-000002.parquet")
    with pytest.raises(LakeError, match=r"Teacher 'beta' lacks 1 of 4 shards \(first: \[2\]\)"):
        select(tiny_lake, EVERYONE)


def test_a_selection_of_other_embeddings_or_teachers_is_refused(tiny_lake):
    lake = open_lake(tiny_lake)
    name = select(tiny_lake, SelectConfig(teachers=("alpha",)))
    with pytest.raises(LakeError, match="does not cover beta"):
        choose_selection(lake, name, ("beta",))
    with pytest.raises(LakeError, match="no selection 'none'"):
        choose_selection(lake, "none", ())
    manifest = lake.read_teacher("alpha")
    other = {**manifest, "fingerprint": {**manifest["fingerprint"], "weights_sha256": "other"}}
    lake.storage.write_json("features/teacher=alpha/teacher.json", other)
    with pytest.raises(LakeError, match="made from other embeddings of alpha"):
        choose_selection(lake, name, ())


def test_where_nobody_may_speak_the_best_competent_teacher_does_if_so_asked(tiny_lake):
    settings = SelectConfig(min_skill=0, keep_fraction=0.2)
    without, with_one = (
        {teacher: selected(tiny_lake, name, teacher) for teacher in ("alpha", "beta")}
        for name in (select(tiny_lake, settings), select(tiny_lake, settings.model_copy(update={"keep_one": True})))
    )
    changed = 0
    for place in range(96):
        before = {teacher: rows[place] for teacher, rows in without.items()}
        after = {teacher: rows[place] for teacher, rows in with_one.items()}
        if any(row["admitted"] for row in before.values()):
            assert after == before
            continue
        known = {
            teacher: row["cosine_quantile"] for teacher, row in before.items() if row["cosine_quantile"] is not None
        }
        best = max(known, key=lambda teacher: known[teacher])
        assert {teacher for teacher, row in after.items() if row["admitted"]} == {best}
        changed += 1
    assert changed > 20
    lake = open_lake(tiny_lake)
    for name in lake.storage.list_folders("selection"):
        if not lake.storage.exists(f"selection/{name}/keep-rates.svg"):
            continue  # the fixture's own
        summary = lake.storage.read_json(f"selection/{name}/selection.json")["summary"]
        for teacher in ("alpha", "beta"):
            rows = [row for row in selected(tiny_lake, name, teacher) if row["cosine"] is not None]
            for modality, entry in summary[teacher].items():
                here = [row["admitted"] for row in rows if row["modality"] == modality]
                assert entry["kept"] == pytest.approx(np.mean(here) if here else 0, abs=2e-4)


def test_the_report_shows_keep_rates_and_what_becomes_of_retrieval(tiny_lake):
    lake = open_lake(tiny_lake)
    name = select(tiny_lake, SelectConfig(min_skill=0, keep_fraction=0.5))
    chart = lake.storage.read_bytes(f"selection/{name}/keep-rates.svg").decode()
    assert "alpha" in chart
    assert "green" in chart
    summary = lake.storage.read_json(f"selection/{name}/selection.json")["summary"]
    before, after = summary["alpha"]["red"]["found_first"]
    assert 0 <= before <= 1
    assert 0 <= after <= 1
    assert summary["beta"]["red"]["found_first"] == [None, None]


def test_a_sample_is_of_bounded_size_and_does_not_depend_on_the_shards():
    from trainer.selection.read import ShardRows, ShardVectors
    from trainer.selection.survey import survey_teacher

    draw = np.random.default_rng(0)
    vectors = draw.normal(size=(2, 5000, 4)).astype(np.float32)
    order, keys = draw.permutation(5000), np.arange(5000)

    def shards(size: int):
        for start in range(0, 5000, size):
            here = slice(start, start + size)
            count = len(order[here])
            rows = ShardRows(
                0, [""] * count, np.full(count, "x", object), np.ones(count, bool), keys[here], order[here]
            )
            yield rows, ShardVectors(vectors[0, here], vectors[1, here])

    one, other = (survey_teacher(shards(size), 100)["x"] for size in (700, 1234))
    assert one.order_C.tolist() == other.order_C.tolist() == list(range(100))
    np.testing.assert_array_equal(one.text_CD, other.text_CD)
    cosines = np.einsum("nd,nd->n", *vectors)
    exact = np.searchsorted(np.sort(cosines), cosines, side="right") / 5000
    np.testing.assert_allclose(one.quantiles(cosines), exact, atol=2e-3)
    assert one.count == 5000
