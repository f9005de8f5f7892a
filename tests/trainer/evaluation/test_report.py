import io
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from changed_pairs import change_rows, without_captions
from PIL import Image

from common.errors import EvaluateError
from common.schemas import SCORES
from trainer.config import EvaluateConfig
from trainer.evaluation.charts import bar_chart, loss_chart, map_chart
from trainer.evaluation.gallery import EmbeddingMap, pictures_of, principal_plane
from trainer.evaluation.models import find_model
from trainer.evaluation.run import evaluate
from trainer.evaluation.summary import summarise
from trainer.evaluation.tables import sections
from trainer.report import ReportContent, render_html, write_report

CONFIG = EvaluateConfig(bootstraps=20)
CURVES = {
    "stage 1": [{"step": i, "total": 3 - i / 100, "contrastive": 3 - i / 100} for i in range(10)],
    "stage 2": [
        {"step": i, "total": 2.0, "contrastive": 1.0, "image_text": 1.5 - i / 9, "text_text": 0.0} for i in range(5)
    ],
}


@pytest.fixture
def content(small_lake, model_folder, checkpoint) -> ReportContent:
    run = Path(small_lake.uri) / "runs" / "stage2"
    checkpoint(run, seed=3)
    student = find_model(f"distilled={run}", {})
    models = [find_model(f"teacher-a={model_folder('a')}", {}), student]
    gallery, embedding_map = pictures_of(small_lake.uri, student, CONFIG, pictures=5, captions=2)
    return ReportContent(
        title="A <small> report",
        scores=evaluate(small_lake.uri, models, CONFIG).scores,
        curves=CURVES,
        gallery=gallery,
        embedding_map=embedding_map,
        notes=["Drawn by a program & honest."],
        places={"lake": small_lake.uri},
        next_steps=["Try `mmkd evaluate LAKE`."],
    )


def scores_of(rows: list[tuple]) -> pa.Table:
    """Zero-shot accuracies: (model, kind, modality, value, low, high)."""
    names = ("model", "model_kind", "modality", "value", "low", "high")
    fixed = {"task": "zero_shot", "dataset": "d", "split": "test", "metric": "accuracy", "n": 9, "weights_sha256": None}
    full = [{**dict(zip(names, row, strict=True)), **fixed, "created_at": "2030-01-01T00:00:00+00:00"} for row in rows]
    return pa.Table.from_pylist(full, schema=SCORES)


def test_the_page_needs_nothing_from_elsewhere_and_is_reproducible(content, tmp_path):
    uri = write_report(str(tmp_path / "report"), content)
    page = Path(uri).read_text()
    assert page == render_html(content)
    without_namespaces = re.sub(r'xmlns(:\w+)?="[^"]*"', "", page)
    assert not re.search(r"https?://|<script|<link|@import", without_namespaces)
    addresses = re.findall(r'(?:src|href)="([^"]+)"', page)
    assert all(address.startswith(("data:image/jpeg;base64,", "#")) for address in addresses)
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert "A &lt;small&gt; report" in page
    assert "program &amp; honest" in page
    assert "<code>mmkd evaluate LAKE</code>" in page
    for heading in ("In short", "By modality", "All figures", "How training went", "What the student sees", "A map"):
        assert heading in page
    assert page.count("<figure>") == 5
    assert "teacher-a" in (tmp_path / "report" / "report.md").read_text()


def test_every_chart_is_well_formed_and_says_what_it_shows(content):
    charts = [bar_chart(content.scores), loss_chart(content.curves, content.terms), map_chart(content.embedding_map)]
    for chart in charts:
        root = ElementTree.fromstring(chart.svg)  # noqa: S314 - our own output
        assert root.attrib["role"] == "img"
        assert root.attrib["aria-label"]
        assert chart.legend


def test_terms_that_are_always_zero_are_not_drawn():
    svg = loss_chart(CURVES, ("total", "image_text", "text_text", "validation")).svg
    assert "image text" in svg
    assert "text text" not in svg
    assert loss_chart({"run": []}, ("total",)) is None


def test_the_gallery_deals_pictures_to_modalities_and_marks_right_captions(content):
    assert [item.modality for item in content.gallery] == ["fundus", "specimen", "x-ray", "fundus", "specimen"]
    for item in content.gallery:
        with Image.open(io.BytesIO(item.jpeg)) as picture:
            assert max(picture.size) <= 224
        assert len(item.found) == 2
        assert item.found[0].cosine >= item.found[1].cosine
        assert all(found.right == (found.caption in item.captions) for found in item.found)


def test_the_gallery_shows_labels_and_leaves_out_pictures_without_captions(small_lake, checkpoint):
    run = Path(small_lake.uri) / "runs" / "stage2"
    checkpoint(run, seed=3)
    student = find_model(f"distilled={run}", {})
    change_rows(small_lake, lambda number, row: {**row, "labels": [*row["labels"], "second"][: number % 3]})
    without_captions(small_lake, lambda number: number % 2 == 0)
    gallery, _ = pictures_of(small_lake.uri, student, CONFIG, pictures=9, captions=2)
    assert all(item.captions for item in gallery)
    assert len({item.labels for item in gallery}) > 2
    scores = scores_of([("t1", "teacher", "ct", 0.8, 0.7, 0.9)])
    page = render_html(ReportContent("Labels", scores, gallery=gallery))
    (both, *_) = [item for item in gallery if len(item.labels) == 2]
    assert f"{both.modality}, {both.labels[0]}, second</div>its caption" in page
    without_captions(small_lake)
    gallery, embedding_map = pictures_of(small_lake.uri, student, CONFIG)
    assert gallery == []
    assert len(embedding_map.points_N2) == 48


def test_tables_and_summary_say_what_guessing_gives(content):
    page, (text, *_) = render_html(content), summarise(content.scores)
    assert "% zero-shot accuracy on average over 2 modalities (guessing: 41.7 %)" in text
    assert page.count("<td>(guessing)</td>") == 4  # accuracy, AUC and two tables of recall; for F1 it is no one number
    assert page.count("<td>(n)</td>") == 5
    assert "Measured on lake/test," in page
    dashes = bar_chart(content.scores).svg.count("stroke-dasharray")
    unknown = content.scores.set_column(
        content.scores.schema.get_field_index("chance"), "chance", pa.nulls(content.scores.num_rows, pa.float64())
    )
    assert bar_chart(unknown).svg.count("stroke-dasharray") == dashes - 3  # fundus, x-ray, mean
    assert "guessing" not in summarise(unknown)[0]


def test_splits_of_one_lake_have_tables_of_their_own():
    scores = scores_of([("t1", "teacher", "ct", 0.8, 0.7, 0.9)])
    place = scores.schema.get_field_index("split")
    other = scores.set_column(place, scores.schema.field(place), pa.array(["val"]))
    assert [section.title for section in sections(pa.concat_tables([scores, other]))] == [
        "Zero-shot accuracy, percent on d/test",
        "Zero-shot accuracy, percent on d/val",
    ]


def test_the_principal_plane_is_the_one_of_a_full_decomposition():
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(200, 5)) * np.array([5, 3, 1, 0.5, 0.1]) @ np.linalg.qr(rng.normal(size=(5, 5)))[0] + 7
    points, explained = principal_plane(vectors)
    left, values, _ = np.linalg.svd(vectors - vectors.mean(0), full_matrices=False)
    np.testing.assert_allclose(np.abs(points), np.abs(left[:, :2] * values[:2]), atol=1e-8)
    np.testing.assert_allclose(explained, values[:2] ** 2 / (values**2).sum(), rtol=1e-9)


def test_the_summary_claims_no_more_than_the_intervals():
    rows = [
        ("t1", "teacher", "ct", 0.8, 0.7, 0.9),
        ("t1", "teacher", "mean", 0.5, 0.45, 0.55),
        ("t2", "teacher", "ct", 0.3, 0.2, 0.4),
        ("t2", "teacher", "mean", 0.6, 0.55, 0.65),
        ("before", "student", "ct", 0.5, 0.4, 0.6),
        ("before", "student", "mean", 0.5, 0.45, 0.54),
        ("after", "student", "ct", 0.75, 0.7, 0.8),
        ("after", "student", "mean", 0.64, 0.59, 0.69),
    ]
    (text,) = summarise(scores_of(rows))
    assert "after reaches 64.0 % zero-shot accuracy" in text
    assert "best teacher on average, t2, reaches 60.0 % (4.0 points higher; the 95 % intervals overlap)" in text
    assert "before) it was 50.0 % (14.0 points higher; the 95 % intervals do not overlap)" in text


def test_teachers_alone_make_a_report_too(tmp_path):
    scores = scores_of([("t1", "teacher", "ct", 0.8, None, None), ("t1", "teacher", "mean", 0.8, 0.7, 0.9)])
    page = Path(write_report(str(tmp_path), ReportContent("Teachers", scores))).read_text()
    assert "All figures" in page
    assert "What the student sees" not in page


def test_a_map_of_many_modalities_still_tells_them_apart():
    names = tuple(f"modality {i}" for i in range(20))
    legend = map_chart(EmbeddingMap("m", np.random.default_rng(0).normal(size=(20, 2)), names, (0.5, 0.2))).legend
    assert len({(entry.colour, entry.mark) for entry in legend}) == 20


def test_no_scores_is_an_error(tmp_path):
    with pytest.raises(EvaluateError, match="no scores"):
        write_report(str(tmp_path), ReportContent("Empty", SCORES.empty_table()))
