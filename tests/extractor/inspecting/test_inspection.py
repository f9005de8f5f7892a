import base64
import hashlib
import io
import json
import re

import numpy as np
import pyarrow as pa
import pytest
from changed_pairs import without_captions
from PIL import Image

from common.errors import LakeError
from common.images import decode_rgb
from common.lake import Lake, create_lake, shard_name
from common.schemas import PAIRS, features_schema
from extractor.inspecting.census import count_pairs
from extractor.inspecting.inspection import Inspection, inspect_lake
from extractor.inspecting.inspection_page import render_html, render_text
from extractor.inspecting.sampling import SHARDS_DRAWN, draw_sample
from extractor.inspecting.similarity import mean_similarity, mismatched_cosines, near_pairs
from extractor.sink import write_features

DIM = 8
HOSTILE = '<script>alert("x")</script><img src=http://x.example/a.png> & \x1b[31mred'


def directions(count: int, seed: int = 0, dim: int = DIM) -> np.ndarray:
    """Random unit vectors, float32 [count, dim]."""
    drawn = np.random.default_rng(seed).standard_normal((count, dim)).astype(np.float32)
    return drawn / np.linalg.norm(drawn, axis=1, keepdims=True)


def vector_column(vectors: np.ndarray, absent: set[int] = frozenset()) -> pa.FixedSizeListArray:
    mask = pa.array([row in absent for row in range(len(vectors))])
    return pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1], mask=mask)


def norm_column(count: int, value: float, absent: set[int] = frozenset()) -> pa.Array:
    return pa.array([None if row in absent else value + row for row in range(count)], pa.float32())


def embed(
    lake: Lake,
    teacher: str,
    images: np.ndarray | None,
    texts: np.ndarray | None,
    absent: set[int] = frozenset(),
    shards: list[int] | None = None,
) -> None:
    """Write a teacher's files by hand: vectors [pairs, D] of either tower; ``absent`` rows have no image vector."""
    lake.storage.write_json(f"manifests/teachers/{teacher}.json", {"fingerprint": {"made": "by hand"}})
    start = 0
    for index in lake.shards():
        ids = lake.read_pairs(index, ["sample_id"])["sample_id"]
        count, span = len(ids), slice(start, start + len(ids))
        missing = {row - start for row in absent if start <= row < start + count}
        rejects = [(ids[row].as_py(), "image not decodable", "torn") for row in sorted(missing)]
        none = pa.nulls(count, pa.list_(pa.float32(), 1)), pa.nulls(count, pa.float32())
        image = none if images is None else (vector_column(images[span], missing), norm_column(count, 10.0, missing))
        text = none if texts is None else (vector_column(texts[span]), norm_column(count, 2.0))
        schema = features_schema(None if images is None else DIM, None if texts is None else DIM)
        extra = pa.nulls(count, schema.field("extra_text_embeddings").type)
        table = pa.table([ids.combine_chunks(), *image, *text, extra], schema=schema)
        if shards is None or index in shards:
            write_features(lake, teacher, index, table, rejects, {"fingerprint": {"made": "by hand"}})
        start += count


@pytest.fixture
def lake(make_lake, tmp_path) -> Lake:
    """Twenty pairs in shards of 8, 8 and 4; even rows are ct, odd ones mri; caption row says ``row % 5``."""
    return make_lake(tmp_path / "lake")


def change_pairs(lake: Lake, row: int, **values) -> None:
    """Change a row of the first shard."""
    rows = lake.read_pairs(0).to_pylist()
    rows[row].update(values)
    lake.storage.write_table(f"pairs/{shard_name(0)}", pa.Table.from_pylist(rows, schema=PAIRS))


def ids_of(lake: Lake) -> list[str]:
    return [name for index in lake.shards() for name in lake.read_pairs(index)["sample_id"].to_pylist()]


def shown(found: Inspection, what: str) -> list[tuple[list[str], float | None]]:
    return [(one["samples"], one["figure"]) for one in found.to_json()[what]["shown"]]


def test_rows_coverage_norms_and_rejects_are_counted_over_all_rows(lake):
    images, texts = directions(20), directions(20, 1)
    embed(lake, "both", images, texts, absent={2, 3, 4})
    embed(lake, "sight", images, None)
    embed(lake, "words", None, texts, shards=[0, 2])
    found = inspect_lake(lake.uri, sample=5).to_json()
    assert (found["pairs"], found["shards"], found["modalities"]) == (20, 3, {"ct": 10, "mri": 10})
    both, sight, words = (found["teachers"][name] for name in ("both", "sight", "words"))
    assert both["rows"] == {"ct": 10, "mri": 10}
    assert both["image_vectors"] == {"ct": 8, "mri": 9}
    assert both["text_vectors"] == {"ct": 10, "mri": 10}
    assert sight["text_vectors"] == words["image_vectors"] == {"ct": 0, "mri": 0}
    assert (words["rows"], words["missing_shards"]) == ({"ct": 6, "mri": 6}, 1)
    # Rows of a shard have norms 10, 11, ...: the three absent ones are 12, 13 and 14 of the first shard.
    kept = [10 + row for count in (8, 8, 4) for row in range(count)]
    for gone in (12, 13, 14):
        kept.remove(gone)
    assert both["norms"]["image"] == {"min": 10, "median": np.median(kept), "max": 17}
    assert set(sight["norms"]) == {"image"}
    assert set(words["norms"]) == {"text"}
    assert found["rejects"] == [{"stage": "extract:both", "reason": "image not decodable", "rows": 3}]
    assert found["sampled"] == {"pairs": 5, "shards": found["sampled"]["shards"], "seed": 0}


def test_cosines_are_those_of_a_plain_loop(lake):
    images, texts = directions(20), directions(20, 1)
    embed(lake, "both", images, texts, absent={6})
    found = inspect_lake(lake.uri, sample=1000)
    cosines = found.teachers[0].cosines
    assert list(cosines) == ["(all)", "ct", "mri"]
    for modality, parity in (("ct", 0), ("mri", 1)):
        rows = [row for row in range(20) if row % 2 == parity and row != 6]
        matched = [float(images[row] @ texts[row]) for row in rows]
        mismatched = [float(images[a] @ texts[b]) for a in rows for b in rows if a != b]
        one = cosines[modality]
        assert one.matched.count == len(rows)
        assert (one.matched.low, one.matched.high) == (pytest.approx(min(matched)), pytest.approx(max(matched)))
        assert one.matched.quantiles[2] == pytest.approx(np.median(matched))
        # Drawn at random, so bounded by those of all.
        assert one.mismatched.low >= min(mismatched) - 1e-6
        assert one.mismatched.high <= max(mismatched) + 1e-6
        assert 0 <= one.true_wins <= 1


def test_pictures_without_captions_have_no_cosine_and_are_counted(lake):
    without_captions(lake, lambda row: row in (0, 2, 19))
    embed(lake, "both", directions(20), directions(20, 1))
    found = inspect_lake(lake.uri, sample=1000)
    matched = {modality: one.matched.count for modality, one in found.teachers[0].cosines.items()}
    assert matched == {"(all)": 17, "ct": 8, "mri": 9}
    assert found.to_json()["without_caption"] == 3
    assert "3 pairs have no caption" in render_text(found)
    assert "3 pairs have no caption" in render_html(found)


def test_a_teacher_that_knows_wins_and_one_that_guesses_does_not():
    images = directions(400, dim=64)
    captions = [f"caption {row}" for row in range(400)]
    draw = np.random.default_rng(0)
    cosines, wins = mismatched_cosines(images, images, captions, draw)
    assert (wins, len(cosines)) == (1.0, 400 * 16)
    assert mismatched_cosines(images, directions(400, 5, 64), captions, draw)[1] == pytest.approx(0.5, abs=0.05)
    # Captions that read the same are no mismatches.
    cosines, wins = mismatched_cosines(images, images, ["a", "b"] * 200, draw)
    assert 0.4 < len(cosines) / (400 * 16) < 0.6
    assert mismatched_cosines(images, images, ["same"] * 400, draw)[1] is None
    assert mismatched_cosines(images[:1], images[:1], ["one"], draw)[1] is None


def test_near_pairs_are_those_of_the_whole_matrix():
    vectors = directions(700, dim=3)
    digests = np.arange(700).astype(np.uint64)
    digests[5] = digests[6]
    vectors[6] = vectors[5]
    full = vectors @ vectors.T
    wanted = {(a, b) for a, b in np.argwhere(np.triu(full > 0.999, 1)).tolist() if (a, b) != (5, 6)}
    count, best = near_pairs(vectors, digests, 0.999, 10_000)
    assert count == len(wanted) > 100
    assert {(a, b) for a, b, _ in best} == wanted
    count, best = near_pairs(vectors, digests, 0.999, 3)
    assert count == len(wanted)
    assert [cosine for *_, cosine in best] == pytest.approx(
        sorted((full[a, b] for a, b in wanted), reverse=True)[:3], abs=1e-6
    )


def test_mean_similarity_leaves_the_vector_itself_out():
    vectors = directions(9)
    full = vectors @ vectors.T
    wanted = [(full[row].sum() - full[row, row]) / 8 for row in range(9)]
    np.testing.assert_allclose(mean_similarity(vectors), wanted, rtol=1e-5)
    assert np.isnan(mean_similarity(vectors[:2])).all()


def planted(lake: Lake) -> tuple[np.ndarray, np.ndarray]:
    """Vectors in one cone, with a twin (4 of 12), a stranger (9) and a pair that does not match (15)."""
    base = directions(1, 3)[0]
    images = base + 0.3 * directions(20, 4)
    images[12] = images[4] + 0.01
    images[9] = -base
    images /= np.linalg.norm(images, axis=1, keepdims=True)
    texts = images.copy()
    texts[15] = -images[15]
    return images.astype(np.float32), texts.astype(np.float32)


def test_planted_twins_strangers_and_mismatches_are_found(lake):
    images, texts = planted(lake)
    embed(lake, "seer", images, texts)
    ids = ids_of(lake)
    first = lake.read_pairs(0).to_pylist()
    change_pairs(lake, 7, image=first[1]["image"], sha256=first[1]["sha256"])
    found = inspect_lake(lake.uri)
    assert (found.equal_pictures, found.equal_groups) == (2, 1)
    assert shown(found, "equal_pictures") == [([ids[1], ids[7]], None)]
    near = shown(found, "near_duplicates")
    assert near[0][0] == [ids[4], ids[12]]
    assert near[0][1] == pytest.approx(float(images[4] @ images[12]), abs=1e-4)
    assert all(samples != [ids[1], ids[7]] for samples, _ in near)
    assert shown(found, "unlike_their_modality")[0][0] == [ids[9]]
    assert shown(found, "poorly_matched")[0] == ([ids[15]], pytest.approx(-1, abs=1e-4))


def test_the_named_teacher_says_what_is_alike(lake):
    images, texts = planted(lake)
    embed(lake, "a", directions(20, 8), None)
    embed(lake, "z", images, texts)
    assert inspect_lake(lake.uri).space == "a"
    found = inspect_lake(lake.uri, ["z", "a"])
    assert (found.space, found.matcher, [teacher.name for teacher in found.teachers]) == ("z", "z", ["z", "a"])
    assert inspect_lake(lake.uri, ["a"]).matcher is None


def test_the_page_stands_alone_and_shows_the_planted_pictures(lake):
    images, texts = planted(lake)
    change_pairs(lake, 4, captions=[HOSTILE], modality="<b>ct</b>")
    embed(lake, "seer", images, texts)
    page = render_html(inspect_lake(lake.uri))
    assert not re.search(r"<script|<link|@import|url\(|href\s*=", page)
    assert set(re.findall(r'src="([^,"]*)', page)) == {"data:image/jpeg;base64"}
    assert "&lt;script&gt;alert(&quot;x&quot;)&lt;/script&gt;&lt;img src=http" in page
    assert "<b>ct</b>" not in page
    assert "\x1b" not in page
    twins = page[page.index("<h2>Near-duplicates</h2>") :]
    assert twins.index(ids_of(lake)[4]) < twins.index(ids_of(lake)[12]) < twins.index("</section>")
    picture = re.search(r'src="data:image/jpeg;base64,([^"]+)"', twins).group(1)
    assert decode_rgb(base64.b64decode(picture)).size == (48, 40)
    assert page.count("<polygon") >= 4  # norms of two towers, matched and mismatched cosines
    assert len(re.findall("<svg", page)) == 2


def test_a_picture_that_does_not_decode_is_shown_as_text(make_lake, tmp_path):
    lake = make_lake(tmp_path / "lake", damaged=(9,))
    images, texts = planted(lake)
    embed(lake, "seer", images, texts)
    page = render_html(inspect_lake(lake.uri))
    assert '<div class="broken">not an image: no decoder' in page


def test_a_lake_without_embeddings_says_what_to_run(lake):
    found = inspect_lake(lake.uri)
    said = render_text(found)
    assert f"There are no embeddings yet. Run `mmkd extract {lake.uri} --teachers NAME,...`" in said
    assert re.search(r"^ct +10$", said, re.MULTILINE)
    page = render_html(found)
    assert "There are no embeddings yet" in page
    assert "Near-duplicates" not in page
    assert json.loads(json.dumps(found.to_json()))["teachers"] == {}


def test_one_row_is_enough(make_lake, tmp_path):
    lake = make_lake(tmp_path / "lake", rows=1)
    embed(lake, "both", directions(1), directions(1, 1))
    found = inspect_lake(lake.uri)
    one = found.to_json()["teachers"]["both"]["cosines"]["ct"]
    assert one["matched"]["count"] == 1
    assert one["mismatched"] is one["true_caption_wins"] is None
    assert found.strange == []
    assert "100 %" in render_text(found)
    assert render_html(found).rstrip().endswith("</html>")


def test_rows_that_are_all_null_and_pairs_without_a_modality(make_lake, tmp_path):
    lake = make_lake(tmp_path / "lake", rows=3)
    change_pairs(lake, 1, modality=None, captions=[])
    embed(lake, "blind", directions(3), None, absent={0, 1, 2})
    found = inspect_lake(lake.uri)
    assert found.to_json()["modalities"] == {"(none)": 1, "ct": 2}
    assert found.space is None
    assert render_html(found)
    assert found.teachers[0].norms == {}


def test_vectors_that_are_not_numbers_are_left_out(lake):
    images = directions(20)
    images[3], images[5] = np.nan, 0
    embed(lake, "odd", images, directions(20, 1))
    found = inspect_lake(lake.uri)
    assert found.teachers[0].cosines["(all)"].matched.count == 18
    assert "nan" not in json.dumps(found.to_json()).lower()


def test_a_damaged_file_is_told_and_the_rest_is_shown(lake):
    embed(lake, "both", directions(20), directions(20, 1))
    lake.storage.write_bytes(f"features/teacher=both/{shard_name(1)}", b"PAR1 torn")
    found = inspect_lake(lake.uri)
    assert found.teachers[0].coverage.unreadable == [1]
    assert found.teachers[0].cosines["(all)"].matched.count == 12
    assert "Teacher both has 1 shards that cannot be read ([1])" in render_text(found)


def test_embeddings_of_other_pairs_are_refused(lake):
    embed(lake, "both", directions(20), directions(20, 1))
    change_pairs(lake, 2, sample_id="0" * 32)
    with pytest.raises(LakeError, match="same samples in the same order"):
        inspect_lake(lake.uri)


def test_a_teacher_that_is_not_there_is_named_with_those_that_are(lake):
    embed(lake, "both", directions(20), directions(20, 1))
    with pytest.raises(LakeError, match=r"no embeddings of teacher 'other' \(it has: both\)"):
        inspect_lake(lake.uri, ["other"])


def test_the_same_seed_looks_at_the_same_rows(lake):
    census = count_pairs(lake)
    positions = [draw_sample(lake, census, 6, seed).positions.tolist() for seed in (0, 0, 1)]
    assert positions[0] == positions[1] == sorted(set(positions[0]))
    assert positions[0] != positions[2]
    drawn = draw_sample(lake, census, 6, 0)
    captions = [row[0] for index in lake.shards() for row in lake.read_pairs(index)["captions"].to_pylist()]
    assert drawn.captions == [captions[place] for place in drawn.positions]


def test_few_shards_of_many_are_read(tmp_path):
    lake = create_lake(str(tmp_path / "lake"), 2)
    image = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(image, "PNG")
    row = {"image": image.getvalue(), "captions": ["red"], "modality": "x", "source": "t", "split": "train"}
    for shard in range(SHARDS_DRAWN + 36):
        rows = [
            {**row, "sample_id": f"{shard}-{i}", "source_key": "k", "width": 8, "height": 8, "sha256": f"{shard}{i}"}
            for i in range(2)
        ]
        lake.storage.write_table(f"pairs/{shard_name(shard)}", pa.Table.from_pylist(rows, schema=PAIRS))
    census = count_pairs(lake)
    drawn = draw_sample(lake, census, 10_000, 0)
    assert (len(census.codes), len(drawn.rows), len(drawn.positions)) == (200, SHARDS_DRAWN, 2 * SHARDS_DRAWN)


def test_a_lake_on_object_storage(make_lake, s3):
    lake = make_lake(f"{s3}/lake")
    embed(lake, "both", directions(20), directions(20, 1))
    found = inspect_lake(lake.uri)
    assert found.teachers[0].cosines["(all)"].matched.count == 20
    assert "canary" not in render_html(found)


def test_real_pictures_known_twins_are_found_by_their_bytes_and_by_a_real_model(
    shared_data, make_clip_folder, tmp_path
):
    """BUSI holds benign (433) and malignant (145) with equal bytes; a re-encoded copy is planted beside it."""
    from common.models.embed import embed_images
    from common.models.load import load_model

    source = shared_data / "cls-busi-us"
    listed = [json.loads(line) for line in (source / "pairs.jsonl").read_text().splitlines()]
    twins = ("busi_benign_433", "busi_malignant_145")
    chosen = [row for row in listed if row["id"] in twins] + [row for row in listed if row["id"] not in twins][:20]
    rows = [pair_of(row["id"], (source / row["image"]).read_bytes(), row["caption"]) for row in chosen]
    copy = io.BytesIO()
    decode_rgb(rows[5]["image"]).save(copy, "JPEG", quality=60)
    rows.append(pair_of("re-encoded", copy.getvalue(), rows[5]["captions"][0]))
    lake = create_lake(str(tmp_path / "lake"), 32)
    lake.storage.write_table(f"pairs/{shard_name(0)}", pa.Table.from_pylist(rows, schema=PAIRS))
    model = load_model(str(make_clip_folder("tiny", dim=DIM)))
    embed(lake, "tiny", embed_images(model, [row["image"] for row in rows]), None)
    found = inspect_lake(lake.uri)
    assert [samples for samples, _ in shown(found, "equal_pictures")] == [sorted(twins)]
    assert shown(found, "near_duplicates")[0][0] == [rows[5]["sample_id"], "re-encoded"]


def pair_of(name: str, image: bytes, caption: str) -> dict:
    width, height = decode_rgb(image).size
    return {
        "sample_id": name,
        "image": image,
        "captions": [caption],
        "modality": "ultrasound",
        "source": "busi",
        "source_key": name,
        "width": width,
        "height": height,
        "sha256": hashlib.sha256(image).hexdigest(),
        "split": "train",
    }
