"""Selection against the same figures worked out row by row, and its rule at the edges."""

import math

import numpy as np
import pyarrow as pa
import pytest
from changed_pairs import without_captions

from common.errors import LakeError, MmkdError
from common.lake import Lake, open_lake, selection_manifest
from trainer.config import SelectConfig
from trainer.selection.select import select
from trainer.selection.stored import choose_selection
from trainer.selection.summary import format_found_first, format_summary

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


def test_rows_without_a_caption_are_neither_scored_nor_candidates(silent_lake, caplog):
    with caplog.at_level("INFO", "mmkd"):
        name = select(silent_lake, EVERYONE)
    rows, found = everything(silent_lake, "alpha"), selected(silent_lake, name, "alpha")
    for row, result in zip(rows, found, strict=True):
        if row["captions"]:
            peers = [
                one
                for one in rows
                if one["modality"] == row["modality"] and one["split"] == "train" and one["captions"]
            ]
            others = [one for one in peers if one["captions"][0] != row["captions"][0]]
            assert result["candidates"] == len(others) + 1
            assert result["admitted"]
        else:
            assert result["cosine"] is result["rank"] is result["cosine_quantile"] is result["candidates"] is None
            assert not result["admitted"]
    silent = sum(not row["captions"] for row in rows)
    assert silent == 24 + 15
    assert f"select: {silent} rows have no caption" in caplog.text
    assert f"0 of {96 - silent} rows (0%) have no teacher" in caplog.text
    assert open_lake(silent_lake).storage.read_json(selection_manifest(name))["without_caption"] == silent


def test_a_modality_without_any_caption_is_no_teachers_fault(lake_without_red_captions, caplog):
    """No warning advises to loosen what would change nothing."""
    uri = lake_without_red_captions
    with caplog.at_level("INFO", "mmkd"):
        name = select(uri, EVERYONE)
    for teacher in ("alpha", "pixels"):
        assert not any(row["admitted"] for row in selected(uri, name, teacher) if row["modality"] == "red")
        assert any(row["admitted"] for row in selected(uri, name, teacher))
    assert "select: 32 rows have no caption" in caplog.text
    assert "WARNING" not in {record.levelname for record in caplog.records}


def test_a_vector_that_was_stored_for_no_caption_does_not_count(tiny_lake):
    """Other tools may have written features of texts that the lake does not have."""
    lake = without_captions(open_lake(tiny_lake), lambda number: number == 3)
    assert lake.read_features("alpha", 0)["text_embedding"][3].is_valid
    row = selected(tiny_lake, select(tiny_lake, EVERYONE), "alpha")[3]
    assert row["cosine"] is None
    assert not row["admitted"]


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
    skills = summary.read_json(f"manifests/selection/{name}.json")["summary"]["alpha"]
    bar = sorted(entry["skill"] for entry in skills.values())[1]
    strict = select(tiny_lake, SelectConfig(min_skill=bar, keep_fraction=1))
    rows = selected(tiny_lake, strict, "alpha")
    for modality, entry in skills.items():
        admitted = [row["admitted"] for row in rows if row["modality"] == modality and row["cosine"] is not None]
        assert all(admitted) if entry["skill"] > bar else entry["skill"] == bar or not any(admitted)
    said = format_summary(summary.read_json(f"manifests/selection/{strict}.json")["summary"])
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


def test_a_selection_that_was_deleted_is_made_anew(tiny_lake):
    lake = open_lake(tiny_lake)
    name = select(tiny_lake, EVERYONE)
    lake.storage.remove(f"selection/{name}")
    with pytest.raises(LakeError, match=f"no selection '{name}'"):
        choose_selection(lake, name, ())
    assert select(tiny_lake, EVERYONE) == name
    assert choose_selection(lake, name, ())[0] == name
    assert len(selected(tiny_lake, name, "alpha")) == 96


def test_half_of_a_selection_is_not_taken_for_the_one_that_was_deleted(tiny_lake):
    lake = open_lake(tiny_lake)
    name = select(tiny_lake, EVERYONE)
    lake.storage.remove(f"selection/{name}")
    lake.storage.write_bytes("features/teacher=beta/shard-000002.parquet", b"torn: the second teacher ends the attempt")
    with pytest.raises(MmkdError):
        select(tiny_lake, EVERYONE)
    assert lake.storage.list_folders(f"selection/{name}") == ["teacher=alpha"]
    assert name not in lake.selections()


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
    lake.storage.write_json("manifests/teachers/alpha.json", other)
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
        if not lake.storage.exists(f"manifests/selection/{name}.svg"):
            continue  # the fixture's own
        summary = lake.storage.read_json(f"manifests/selection/{name}.json")["summary"]
        for teacher in ("alpha", "beta"):
            rows = [row for row in selected(tiny_lake, name, teacher) if row["cosine"] is not None]
            for modality, entry in summary[teacher].items():
                here = [row["admitted"] for row in rows if row["modality"] == modality]
                assert entry["kept"] == pytest.approx(np.mean(here) if here else 0, abs=2e-4)


def test_the_report_shows_keep_rates_and_what_becomes_of_retrieval(tiny_lake, caplog):
    lake = open_lake(tiny_lake)
    with caplog.at_level("INFO", "mmkd"):
        name = select(tiny_lake, SelectConfig(min_skill=0, keep_fraction=0.5))
    chart = lake.storage.read_bytes(f"manifests/selection/{name}.svg").decode()
    assert "alpha" in chart
    assert "green" in chart
    summary = lake.storage.read_json(f"manifests/selection/{name}.json")["summary"]
    before, after = summary["alpha"]["red"]["found_first"]
    assert summary["beta"]["red"]["found_first"] == [None, None]
    table = caplog.text[caplog.text.index("true caption ranked first among up to 1000 sampled others") :]
    assert f"{before:.1%} -> {after:.1%}" in table


@pytest.mark.parametrize("keep_one", [False, True])
@pytest.mark.parametrize("share", [0.2, 0.5])
def test_retrieval_before_and_after_is_that_of_the_rows_themselves(tiny_lake, share, keep_one):
    skills = select(tiny_lake, EVERYONE)
    bar = open_lake(tiny_lake).storage.read_json(f"manifests/selection/{skills}.json")["summary"]["alpha"]
    middle = sorted(entry["skill"] for entry in bar.values())[1]
    name = select(tiny_lake, SelectConfig(min_skill=middle + 1e-3, keep_fraction=share, keep_one=keep_one))
    summary = open_lake(tiny_lake).storage.read_json(f"manifests/selection/{name}.json")["summary"]
    absent = 0
    for teacher, entries in summary.items():
        rows = [row for row in selected(tiny_lake, name, teacher) if row["cosine"] is not None]
        for modality, entry in entries.items():
            here = [row for row in rows if row["modality"] == modality]
            kept = [row["rank"] == 1 for row in here if row["admitted"]]
            assert entry["kept"] == pytest.approx(len(kept) / max(len(here), 1), abs=1e-4)
            for found, ranks in zip(entry["found_first"], ([row["rank"] == 1 for row in here], kept), strict=True):
                assert found == (pytest.approx(np.mean(ranks), abs=1e-4) if ranks else None)
            absent += bool(here) and not kept
    assert absent >= 2  # a teacher below the bar speaks nowhere, whatever the rule would have kept


def test_the_printed_tables_keep_their_columns_apart():
    first = {"skill": 0.4449, "competent": True, "kept": 1.0, "found_first": [0.125, 0.15]}
    second = {"skill": 0.5, "competent": False, "kept": 0.0, "found_first": [0.02, None]}
    third = {"skill": None, "competent": False, "kept": 0.0, "found_first": [None, None]}
    summary = {"t": {"a": first, "b": second, "c": third}}
    assert [line.split("  ") for line in format_summary(summary).splitlines()][1] == [
        "t",
        *[""] * 3,
        "skill 0.44 kept 100%",
        "skill 0.50 kept 0%",
        "no vectors kept 0%",
    ]
    assert format_found_first(summary).splitlines()[1].split() == ["t", "12.5%", "->", "15.0%", "2.0%", "->", "-", "-"]


def make_skilful(uri: str, teacher: str) -> None:
    """Give a teacher text vectors that lie near those of their pictures."""
    lake = open_lake(uri)
    for shard in lake.shards():
        file = f"features/teacher={teacher}/shard-{shard:06d}.parquet"
        table = lake.storage.read_table(file)
        rows = table.to_pylist()
        for row in rows:
            if row["image_embedding"] is not None:
                noise = np.random.default_rng(int(row["sample_id"], 16)).normal(size=len(row["image_embedding"]))
                text = np.array(row["image_embedding"]) + 0.05 * noise
                row["text_embedding"] = (text / np.linalg.norm(text)).tolist()
        lake.storage.write_table(file, pa.Table.from_pylist(rows, schema=table.schema))


def test_by_default_competent_teachers_keep_the_papers_74_percent_in_each_modality(tiny_lake):
    for teacher in ("alpha", "beta"):
        make_skilful(tiny_lake, teacher)
    name = select(tiny_lake, SelectConfig())
    summary = open_lake(tiny_lake).storage.read_json(f"manifests/selection/{name}.json")["summary"]
    train = {row["sample_id"] for row in everything(tiny_lake, "alpha") if row["split"] == "train"}
    checked = 0
    for teacher, entries in summary.items():
        rows = [row for row in selected(tiny_lake, name, teacher) if row["cosine"] is not None]
        for modality, entry in entries.items():
            here = [row for row in rows if row["modality"] == modality]
            if not here:
                continue
            assert entry["competent"]
            learned = [row["admitted"] for row in here if row["sample_id"] in train]
            # Exact among the train rows, by which the threshold is set; a few val rows come on top.
            assert sum(learned) == len(learned) - math.floor(0.26 * len(learned))
            assert entry["kept"] == pytest.approx(0.74, abs=1 / len(learned) + 1 - len(learned) / len(here))
            checked += 1
    assert checked == 5


@pytest.mark.parametrize("keep_one", [False, True])
def test_rows_without_a_teacher_are_counted_and_a_silent_modality_is_warned_of(tiny_lake, keep_one, caplog):
    make_skilful(tiny_lake, "beta")  # which has no vectors of the red ones
    with caplog.at_level("INFO", "mmkd"):
        name = select(tiny_lake, SelectConfig(min_skill=0.9, keep_one=keep_one))
    rows = {teacher: selected(tiny_lake, name, teacher) for teacher in ("alpha", "beta")}
    alone = [not any(both) for both in zip(*([row["admitted"] for row in one] for one in rows.values()), strict=True)]
    counted = open_lake(tiny_lake).storage.read_json(f"manifests/selection/{name}.json")["rows"]
    for modality in ("red", "green", "blue"):
        here = [lonely for lonely, row in zip(alone, rows["alpha"], strict=True) if row["modality"] == modality]
        assert counted[modality] == {"rows": len(here), "without_teacher": sum(here)}
    scored = [row["admitted"] for one in rows.values() for row in one if row["cosine"] is not None]
    assert f"kept {np.mean(scored):.0%} overall ({sum(scored)} of {len(scored)}," in caplog.text
    assert f"{sum(alone)} of 96 rows ({np.mean(alone):.0%}) have no teacher" in caplog.text
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "no teacher may speak for any row of red (32 rows, best skill 0." in warning
    assert " of alpha), so stage 2" in warning
    assert "min_skill=0.9" in warning
    assert ("keep_one does not change that" in warning) is keep_one
    assert "green" not in warning


@pytest.mark.parametrize("keep_one", [False, True])
def test_vectors_are_read_twice_and_the_report_reads_none(tiny_lake, keep_one, monkeypatch):
    read, seen = Lake.read_features, []

    def counting(self, teacher, shard, *columns):
        seen.append((teacher, shard))
        return read(self, teacher, shard, *columns)

    monkeypatch.setattr(Lake, "read_features", counting)
    select(tiny_lake, SelectConfig(min_skill=0, keep_one=keep_one))
    assert sorted(seen) == sorted([(teacher, shard) for teacher in ("alpha", "beta") for shard in range(4)] * 2)


def test_no_warning_where_each_modality_has_a_teacher(tiny_lake, caplog):
    with caplog.at_level("INFO", "mmkd"):
        select(tiny_lake, EVERYONE)
    assert "0 of 96 rows (0%) have no teacher" in caplog.text
    assert "WARNING" not in {record.levelname for record in caplog.records}


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
            everywhere = np.ones(count, bool)
            rows = ShardRows(
                0, [""] * count, np.full(count, "x", object), everywhere, everywhere, keys[here], order[here]
            )
            yield rows, ShardVectors(vectors[0, here], vectors[1, here])

    one, other = (survey_teacher(shards(size), 100)["x"] for size in (700, 1234))
    assert one.order_C.tolist() == other.order_C.tolist() == list(range(100))
    np.testing.assert_array_equal(one.text_CD, other.text_CD)
    cosines = np.einsum("nd,nd->n", *vectors)
    exact = np.searchsorted(np.sort(cosines), cosines, side="right") / 5000
    np.testing.assert_allclose(one.quantiles(cosines), exact, atol=2e-3)
    assert one.count == 5000
