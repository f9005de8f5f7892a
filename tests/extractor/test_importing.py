"""Published features become partitions: what is read, what is refused, and that nothing is lost. Without Ray."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from changed_pairs import without_captions
from PIL import Image

from common.errors import SourceError
from common.lake import create_lake
from common.schemas import PAIRS
from extractor import importing
from extractor.config import IngestConfig
from extractor.importing import FeatureFileError, Imported, find_table, find_teachers, import_shard, read_vectors
from extractor.sink import find_valid
from extractor.sources import plan_sources, read_part

CONFIG = IngestConfig(format="mmkd-features")


def manifests_of(teachers: list[Imported]) -> dict[str, dict]:
    return {teacher.partition: {"fingerprint": teacher.identity} for teacher in teachers}


class Published:
    """A folder as MMKD-CLIP's authors distribute them, written pair by pair."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.lines: list[dict] = []

    def add(self, sample: str, vectors: dict | None, folder: str = "data_1", **changes) -> dict:
        place = self.root / "features" / folder / sample
        place.mkdir(parents=True)
        number = len(self.lines)
        Image.fromarray(np.random.default_rng(number).integers(0, 255, (12, 16, 3), dtype=np.uint8)).save(
            place / "a.jpg"
        )
        metadata = {"image_primary_label": ["Clinical Imaging"], "image_secondary_label": ["magnetic resonance"]}
        (place / "a.json").write_text(json.dumps({**metadata, "article_license": "CC BY"}))
        if vectors is not None:
            torch.save(vectors, place / "clips_output.pt")
        base = f"features/{folder}/{sample}"
        line = {"folderid": folder, "id": sample, "imgpath": f"{base}/a.jpg", "metapath": f"{base}/a.json"}
        names = sorted({name.removesuffix("_img") for name in vectors or {} if name.endswith("_img")})
        line |= {"txt": f"caption {number}", "available_clips": names, **changes}
        self.lines.append(line)
        (self.root / "meta.jsonl").write_text("".join(json.dumps(one) + "\n" for one in self.lines))
        return line

    @property
    def table(self) -> str:
        return str(self.root / "meta.jsonl")


def unit(width: int, seed: int) -> torch.Tensor:
    vector = torch.randn(width, generator=torch.Generator().manual_seed(seed))
    return vector / vector.norm()


def speaking(*names: str, width: int = 8, seed: int = 0) -> dict[str, torch.Tensor]:
    entries = [f"{name}{end}" for name in names for end in ("_img", "_txt")]
    return {entry: unit(width, 100 * seed + place) for place, entry in enumerate(entries)}


@pytest.fixture
def published(tmp_path) -> Published:
    root = tmp_path / "published"
    root.mkdir()
    return Published(root)


def lake_of(tmp_path: Path, table: str):
    """A lake with one shard of all pairs of a table, and one row of another source."""
    lake = create_lake(str(tmp_path / "lake"), 16)
    (part,) = plan_sources([table], CONFIG)
    rows = []
    for number, record in enumerate([*read_part(part, CONFIG), None]):
        source = {"source": importing.short_name(table), "source_key": record.source_key} if record else {}
        image, captions = (record.image, list(record.captions)) if record else (b"x", ["other", "further"])
        rows.append(
            {
                "sample_id": f"id-{number}",
                "image": image,
                "captions": captions,
                "modality": "MRI",
                "labels": [],
                "license": None,
                "width": 1,
                "height": 1,
                "sha256": "0",
                "split": "train",
                "source": "elsewhere",
                "source_key": "1",
                **source,
            }
        )
    lake.storage.write_table("pairs/shard-000000.parquet", pa.Table.from_pylist(rows, schema=PAIRS))
    return lake


# --- The pairs.


def test_a_line_is_a_record_with_the_articles_modality_and_licence(published):
    published.add("one", speaking("PLIP"))
    (part,) = plan_sources([published.table], CONFIG)
    (record,) = read_part(part, CONFIG)
    assert record.source_key == "meta.jsonl/data_1/one"
    assert (record.captions, record.modality, record.license) == (("caption 0",), "MRI", "CC BY")
    assert record.image == (published.root / "features/data_1/one/a.jpg").read_bytes()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"txt": {"en": "words"}}, "unreadable cell"),
        ({"imgpath": None}, "no image"),
        ({"imgpath": "features/none.jpg"}, "image not found"),
        ({"metapath": "features/none.json"}, "metadata not found"),
        ({"id": "../one"}, "malformed line"),
        ({"folderid": 3.5, "id": None}, "malformed line"),
    ],
)
def test_a_bad_line_is_a_record_with_its_reason(published, changes, reason):
    published.add("zero", speaking("PLIP"))
    published.add("one", speaking("PLIP"), **changes)
    (part,) = plan_sources([published.table], CONFIG)
    good, bad = read_part(part, CONFIG)
    assert (good.reason, bad.reason) == (None, reason)


def test_ids_groups_and_kept_columns_are_of_the_row_or_its_article(published):
    published.add("one", speaking("PLIP"))
    columns = {"id": "id", "group": "folderid"}
    config = IngestConfig(format="mmkd-features", columns=columns, keep_columns=("article_license",))
    (part,) = plan_sources([published.table], config)
    (record,) = read_part(part, config)
    assert (record.source_id, record.group_id, record.kept) == ("one", "data_1", {"article_license": "CC BY"})
    nobody = config.model_copy(update={"columns": config.columns.model_copy(update={"group": "patient"})})
    (part,) = plan_sources([published.table], nobody)
    assert [record.reason for record in read_part(part, nobody)] == ["no group"]


def test_another_table_is_refused_and_a_missing_one(published, tmp_path):
    (tmp_path / "other.jsonl").write_text('{"image": "a.jpg", "caption": "x"}\n')
    with pytest.raises(SourceError, match=r"first line lacks id, folderid, imgpath, txt"):
        plan_sources([str(tmp_path / "other.jsonl")], CONFIG)
    with pytest.raises(SourceError, match=r"no .*meta\.jsonl"):
        find_table(str(tmp_path))


# --- The teachers and their vectors.


def test_all_teachers_are_found_however_rare_with_the_widths_of_their_vectors(published):
    for number in range(5):
        published.add(f"n{number}", speaking("PLIP", width=8))
    published.add("last", speaking("PLIP", width=8) | speaking("PMCCLIP", width=12))
    found = find_teachers(find_table(str(published.root)))
    assert found == [Imported("PLIP", 8), Imported("PMCCLIP", 12)]
    assert [one.partition for one in found] == ["plip.imported", "pmc-clip.imported"]


def test_a_table_without_features_is_refused(published):
    published.add("one", None)
    with pytest.raises(SourceError, match="no pair has features"):
        find_teachers(published.table)


class Evil:
    def __reduce__(self):
        return (Path.touch, (Path("evil"),))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"A_img": unit(4, 0)}, "not two vectors"),
        ({"A_img": unit(4, 0), "A_txt": unit(5, 0)}, "4 and 5 values"),
        ({"A_img": torch.ones(2, 2), "A_txt": torch.ones(2, 2)}, "not two vectors"),
        ({"A_img": torch.ones(2, dtype=torch.int64), "A_txt": torch.ones(2)}, "not two vectors"),
        ([torch.ones(2)], "holds a list"),
        ({"A_img": Evil()}, "more than tensors"),
    ],
)
def test_a_file_of_another_kind_is_not_readable_and_runs_nothing(published, tmp_path, monkeypatch, content, said):
    monkeypatch.chdir(tmp_path)
    published.add("one", None)
    torch.save(content, published.root / "features/data_1/one/clips_output.pt")
    with pytest.raises(FeatureFileError, match="features not readable") as caught:
        read_vectors(published.table, "data_1/one")
    assert said in caught.value.detail
    assert not (tmp_path / "evil").exists()


def test_a_torn_file_is_not_readable(published):
    published.add("one", speaking("PLIP"))
    file = published.root / "features/data_1/one/clips_output.pt"
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(FeatureFileError, match="features not readable"):
        read_vectors(published.table, "data_1/one")


# --- A shard.


def test_a_shard_holds_what_the_files_hold_and_nulls_elsewhere(published, tmp_path):
    published.add("both", speaking("PLIP", "QuiltNet", seed=1))
    published.add("one", {name: 3 * vector for name, vector in speaking("PLIP", seed=2).items()})
    published.add("none", None)
    published.add("infinite", {"PLIP_img": torch.full((8,), torch.inf), "PLIP_txt": unit(8, 3)})
    published.add("wide", speaking("PLIP", width=9))
    lake, teachers = lake_of(tmp_path, published.table), [Imported("PLIP", 8), Imported("QuiltNet", 8)]
    answer = import_shard(lake, 0, published.table, teachers, manifests_of(teachers))
    assert {name: found["vectors"] for name, found in answer.items()} == {
        "plip.imported": 2,
        "quiltnet-b-32.imported": 1,
    }
    assert answer["plip.imported"]["reasons"] == {
        "features missing": 1,
        "features not finite": 1,
        "features of another width": 1,
    }
    table = lake.read_features("plip.imported", 0)
    assert table["sample_id"].to_pylist() == [f"id-{row}" for row in range(6)]
    assert table["image_embedding"].is_valid().to_pylist() == [True, True, False, False, False, False]
    np.testing.assert_allclose(table["image_norm"].to_pylist()[:2], [1, 3], rtol=1e-6)
    for row, seed in ((0, 1), (1, 2)):
        np.testing.assert_allclose(table["image_embedding"][row].as_py(), unit(8, 100 * seed), atol=1e-3)
        np.testing.assert_allclose(table["text_embedding"][row].as_py(), unit(8, 100 * seed + 1), atol=1e-3)
    assert table["extra_text_embeddings"].to_pylist() == [[], [], [], [], [], [None]]
    # The files stand up to what extract asks of its own.
    assert find_valid(lake, "plip.imported", teachers[0].identity) == {0}
    rejects = lake.storage.read_table("rejects/extract/plip.imported/shard-000000.parquet")
    assert rejects["sample_id"].to_pylist() == ["id-2", "id-3", "id-4"]


def test_a_picture_whose_caption_the_lake_lacks_keeps_its_own_vector_alone(published, tmp_path):
    published.add("told", speaking("PLIP", seed=1))
    published.add("untold", speaking("PLIP", seed=2))
    lake = without_captions(lake_of(tmp_path, published.table), lambda row: row == 1)
    teacher = Imported("PLIP", 8)
    import_shard(lake, 0, published.table, [teacher], manifests_of([teacher]))
    table = lake.read_features("plip.imported", 0)
    assert table["image_embedding"].is_valid().to_pylist() == [True, True, False]
    assert table["text_embedding"].is_valid().to_pylist() == [True, False, False]
    assert table["text_norm"].is_valid().to_pylist() == [True, False, False]
    assert table["extra_text_embeddings"].to_pylist() == [[], [], [None]]
    teacher = Imported("PLIP", 8)
    name = importing.select_present(lake, {teacher.partition: teacher.identity})
    chosen = lake.storage.read_table(f"selection/{name}/teacher={teacher.partition}/shard-000000.parquet")
    assert chosen["admitted"].to_pylist() == [True, False, False]
    assert chosen["cosine"].is_valid().to_pylist() == [True, False, False]


def test_vectors_are_rounded_to_the_precision_that_is_asked_for(published, tmp_path):
    published.add("one", speaking("PLIP", seed=1))
    lake, teacher = lake_of(tmp_path, published.table), Imported("PLIP", 8, precision="bfloat16")
    import_shard(lake, 0, published.table, [teacher], manifests_of([teacher]))
    stored = np.array(lake.read_features("plip.imported", 0)["image_embedding"][0].as_py(), np.float32)
    np.testing.assert_array_equal(stored, unit(8, 100).bfloat16().float().numpy())
    assert find_valid(lake, "plip.imported", teacher.identity) == {0}
    assert find_valid(lake, "plip.imported", Imported("PLIP", 8).identity) == set()


def test_every_teacher_speaks_where_it_has_vectors(published, tmp_path):
    published.add("both", speaking("PLIP", "QuiltNet", seed=1))
    published.add("one", speaking("PLIP", seed=2))
    lake, teachers = lake_of(tmp_path, published.table), [Imported("PLIP", 8), Imported("QuiltNet", 8)]
    import_shard(lake, 0, published.table, teachers, manifests_of(teachers))
    identities = {teacher.partition: teacher.identity for teacher in teachers}
    name = importing.select_present(lake, identities)
    assert importing.select_present(lake, identities) == name
    plip, quilt = (
        lake.storage.read_table(f"selection/{name}/teacher={teacher}/shard-000000.parquet") for teacher in identities
    )
    assert plip["admitted"].to_pylist() == [True, True, False]
    assert quilt["admitted"].to_pylist() == [True, False, False]
    assert plip["cosine"][1].as_py() == pytest.approx(float(unit(8, 200) @ unit(8, 201)), abs=1e-3)
    assert quilt["cosine"].to_pylist()[1:] == [None, None]
    assert lake.storage.read_json(f"manifests/selection/{name}.json")["teachers"] == sorted(identities)
