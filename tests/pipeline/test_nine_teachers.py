"""The paper's nine teachers at once, from checkpoints in their authors' layouts, against recipes computed apart."""

import json
from pathlib import Path

import numpy as np
import pytest

from common.errors import TermsError
from common.models.load import find_spec, read_catalog
from common.models.store import FetchPlan, fetch
from extractor.config import ExtractConfig
from extractor.pipeline import extract

pytestmark = pytest.mark.ray

NINE = (
    *("bmca-clip", "biomedclip", "unimed-clip", "quiltnet-b-32", "genmedclip"),
    *("plip", "pmc-clip", "pubmedclip", "medclip"),
)


@pytest.fixture(scope="module")
def nine(tmp_path_factory):
    """Name -> the written checkpoint; small, with random weights."""
    import upstream_open_clip as a
    import upstream_others as b

    home = tmp_path_factory.mktemp("upstream")
    writers = dict(
        zip(
            NINE,
            (
                *(a.write_bmca_clip, a.write_biomedclip, a.write_unimed_clip, a.write_quiltnet, a.write_genmedclip),
                *(b.write_plip, b.write_pmc_clip_split, b.write_pubmedclip, b.write_medclip),
            ),
            strict=True,
        )
    )
    return {name: write(home / name, seed) for seed, (name, write) in enumerate(writers.items())}


@pytest.fixture(scope="module")
def catalog(nine, tmp_path_factory) -> str:
    """A user's YAML that says how small they are."""
    entries = {name: {**upstream.entry, "path": str(upstream.place)} for name, upstream in nine.items()}
    file = tmp_path_factory.mktemp("catalog") / "small.yaml"
    file.write_text(json.dumps(entries), encoding="utf-8")
    return str(file)


@pytest.fixture(scope="module")
def lake(make_lake, tmp_path_factory):
    return make_lake(tmp_path_factory.mktemp("nine") / "lake", rows=10, shard_rows=5)


def config(catalog: str, **more) -> ExtractConfig:
    return ExtractConfig(teachers=NINE, catalog=catalog, micro_batch=8, **more)


def test_terms_come_before_everything(lake, catalog):
    with pytest.raises(TermsError, match="--accept-terms unimed-clip;"):
        extract(lake.uri, config(catalog))
    assert lake.teachers() == []


def test_nine_at_once_give_their_authors_vectors(ray_local, lake, nine, catalog):
    report = extract(lake.uri, config(catalog, accept_terms=("unimed-clip",)))
    assert (report.shards, report.rows) == (18, 90)
    assert not report.rejects
    pairs = [row for shard in lake.shards() for row in lake.read_pairs(shard).to_pylist()]
    for name, upstream in nine.items():
        rows = [row for shard in lake.shards() for row in lake.read_features(name, shard).to_pylist()]
        assert [row["sample_id"] for row in rows] == [pair["sample_id"] for pair in pairs]
        image = np.array([row["image_embedding"] for row in rows], np.float32)
        text = np.array([row["text_embedding"] for row in rows], np.float32)
        # Stored vectors are rounded to half precision.
        np.testing.assert_allclose(
            image, upstream.image([pair["image"] for pair in pairs]), atol=1e-3, err_msg=f"{name}: images"
        )
        np.testing.assert_allclose(
            text, upstream.text([pair["captions"][0] for pair in pairs]), atol=1e-3, err_msg=f"{name}: captions"
        )
        extra = [vector for row in rows for vector in row["extra_text_embeddings"]]
        others = [caption for pair in pairs for caption in pair["captions"][1:]]
        np.testing.assert_allclose(np.array(extra, np.float32), upstream.text(others), atol=1e-3)
    facts = lake.read_teacher("unimed-clip")
    assert facts["license"] == "CC BY-NC 4.0"
    assert facts["terms_accepted_at"]
    assert lake.read_teacher("biomedclip")["terms_accepted_at"] is None


def test_from_a_store_they_are_the_same_teachers(lake, nine, catalog, tmp_path, monkeypatch):
    """Converted, hashed and stored, the same weights have the same identity: nothing is computed again."""
    monkeypatch.setenv("MMKD_CACHE", str(tmp_path / "cache"))
    known, store = read_catalog(catalog), str(tmp_path / "store")
    for name in NINE:
        fetch(FetchPlan(known[name], source=str(nine[name].place)), store)
    # The authors' files are out of reach now, and so are the small architectures: only the store can be read.
    kept = {name: {k: v for k, v in u.entry.items() if k != "architecture"} for name, u in nine.items()}
    moved = {name: {**entry, "path": "/nowhere"} for name, entry in kept.items()}
    (tmp_path / "moved.yaml").write_text(json.dumps(moved), encoding="utf-8")
    report = extract(lake.uri, config(str(tmp_path / "moved.yaml"), store=store))
    assert (report.shards, report.skipped) == (0, 18)
    for name in NINE:
        folder = Path(find_spec(name, read_catalog(str(tmp_path / "moved.yaml")), store).path)
        assert {file.suffix for file in folder.iterdir()} <= {".safetensors", ".json", ".txt"}
