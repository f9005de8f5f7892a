"""What an inspection found, for people: tables for the terminal, and one self-contained HTML page with pictures."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape

from common.lake import now
from common.storage import without_secrets
from common.version import VERSION
from extractor.inspecting.inspection import NEAR_COSINE, Found, Inspection, Picture, TeacherFigures
from extractor.inspecting.similarity import QUANTILES, Spread
from extractor.pages.charts import histogram_chart, number_text
from extractor.pages.page import Table, html_table, printable, render_page, section, text_table, tiles

UNKNOWN = "-"
REASONS_SHOWN = 40


def render_text(found: Inspection) -> str:
    """Everything but the pictures, for a terminal."""
    parts = [f"{without_secrets(found.lake)}: {len(found.census.codes):,} pairs in {len(found.census.rows):,} shards"]
    parts += [text_table(table).rstrip("\n") for table in tables(found)]
    parts.append("\n".join(remarks(found)))
    return "\n\n".join(part for part in parts if part)


def render_html(found: Inspection) -> str:
    """The whole page as text."""
    shown = [(f"{len(found.census.codes):,}", "pairs"), (f"{len(found.census.rows):,}", "shards")]
    shown += [(str(len(found.teachers)), "teachers")]
    shown += [(f"{found.equal_pictures:,}", "pictures whose bytes another one has too")]
    if found.space is not None:
        shown.append((f"{found.near_count:,}", f"pairs of sampled pictures with a cosine above {NEAR_COSINE}"))
    words = "".join(f"<p>{escape(remark)}</p>" for remark in remarks(found))
    modalities, rows, images, texts, norms, cosines, rejects = tables(found)
    counted = "".join(html_table(table) for table in (modalities, rows, images, texts))
    norm_charts = "".join(_norm_chart(teacher) for teacher in found.teachers)
    cosine_charts = "".join(_cosine_chart(teacher) for teacher in found.teachers)
    space, matcher = found.space, found.matcher
    return render_page(
        f"Inspection of {without_secrets(found.lake)}",
        f"Seen at {now().replace('T', ' ').removesuffix('+00:00')} UTC by mmkd {VERSION}.",
        [
            section("In short", "", tiles(shown) + words),
            section("Pairs and embeddings", "Counted over all rows.", counted),
            section("Rows that were rejected", "", html_table(rejects)),
            section("Lengths before normalisation", "Of all vectors.", html_table(norms) + norm_charts),
            section("Cosines of pictures and captions", COSINES_HINT, html_table(cosines) + cosine_charts),
            section("Equal pictures", "The same bytes; the captions may differ.", _twins(found, found.equals)),
            section("Near-duplicates", f"Closest pictures in the eyes of {space}.", _twins(found, found.near)),
            section(
                "Unlike their modality",
                f"Lowest mean cosine with the other pictures of their modality, in the eyes of {space}.",
                _gallery(found, found.strange),
            ),
            section(
                "Poorly matched",
                f"Lowest cosine between a picture and its own caption, in the eyes of {matcher}.",
                _gallery(found, found.poor),
            ),
        ],
    )


COSINES_HINT = (
    "Of the sample: how many pairs, and below which cosine a share of them lies. Mismatched captions are those of "
    "other pictures of the modality, unless they read the same; the true caption wins as often as it is closer to its "
    "picture than one of them (50 % is guessing)."
)


def remarks(found: Inspection) -> list[str]:
    """Sentences: what was looked at, what was found, what to do."""
    said = []
    if not found.is_embedded:
        said.append(
            "There are no embeddings yet. Run "
            f"`mmkd extract {without_secrets(found.lake)} --teachers NAME,...` and inspect again."
        )
    if found.sampled:
        said.append(
            f"Vectors of {found.sampled:,} of {len(found.census.codes):,} pairs were looked at, drawn from "
            f"{found.sampled_shards:,} of {len(found.census.rows):,} shards with seed {found.seed}; "
            "everything else is counted over all rows."
        )
    if found.census.without_caption:
        said.append(
            f"{found.census.without_caption:,} pairs have no caption, and so no text vector and no cosine: they serve "
            "evaluation by label."
        )
    said.append(f"{found.equal_pictures:,} pictures in {found.equal_groups:,} groups have the same bytes as another.")
    if found.space is not None:
        said.append(
            f"{found.near_count:,} pairs of different pictures in the sample have a cosine above {NEAR_COSINE} in the "
            f"eyes of {found.space}."
        )
    for teacher in found.teachers:
        missing, unreadable = teacher.coverage.missing, teacher.coverage.unreadable
        if missing:
            said.append(
                f"Teacher {teacher.name} lacks {len(missing):,} shards; `mmkd extract` computes what is missing."
            )
        if unreadable:
            said.append(
                f"Teacher {teacher.name} has {len(unreadable):,} shards that cannot be read ({unreadable[:5]}); see "
                f"`mmkd verify {without_secrets(found.lake)}`."
            )
    return said


def tables(found: Inspection) -> list[Table]:
    """Modalities, rows, image and text coverage, norms, cosines and rejects."""
    pairs = found.census.by_modality()
    names = [teacher.name for teacher in found.teachers]
    images = [teacher for teacher in found.teachers if sum(teacher.coverage.images.values())]
    texts = [teacher for teacher in found.teachers if sum(teacher.coverage.texts.values())]
    rows = [
        [name, *(f"{teacher.coverage.rows.get(name, 0):,}" for teacher in found.teachers)] for name in pairs if names
    ]
    norms = [
        [teacher.name, tower, *(number_text(value) for value in values)]
        for teacher in found.teachers
        for tower, values in teacher.norms.items()
    ]
    cosines = [
        [teacher.name, modality, *_spread_cells(one.matched), *_spread_cells(one.mismatched), _percent(one.true_wins)]
        for teacher in found.teachers
        for modality, one in teacher.cosines.items()
    ]
    rejects = [[stage, reason, f"{rows:,}"] for (stage, reason), rows in list(found.rejects.items())[:REASONS_SHOWN]]
    quantiles = [f"{100 * share:.0f} %" for share in QUANTILES]
    return [
        Table("Pairs by modality", ("modality", "pairs"), [[name, f"{count:,}"] for name, count in pairs.items()]),
        Table("Rows by modality and teacher", ("modality", *names), rows),
        _coverage("Pairs with an image vector", pairs, {t.name: t.coverage.images for t in images}),
        _coverage("Pairs with a text vector", pairs, {t.name: t.coverage.texts for t in texts}),
        Table("Lengths before normalisation", ("teacher", "tower", "least", "median", "greatest"), norms),
        Table(
            "Cosines of matched and of mismatched pairs",
            ("teacher", "modality", "matched", *quantiles, "mismatched", *quantiles, "true caption wins"),
            cosines,
        ),
        Table("Rejected rows", ("stage", "reason", "rows"), rejects),
    ]


def _coverage(title: str, pairs: dict[str, int], vectors: dict[str, dict[str, int]]) -> Table:
    rows = [
        [name, *(_percent(counts.get(name, 0) / total) for counts in vectors.values())]
        for name, total in pairs.items()
        if vectors
    ]
    return Table(title, ("modality", *vectors), rows)


def _spread_cells(spread: Spread | None) -> list[str]:
    if spread is None:
        return ["0", *[UNKNOWN] * len(QUANTILES)]
    return [f"{spread.count:,}", *(f"{value:.3f}" for value in spread.quantiles)]


def _percent(share: float | None) -> str:
    """Rounded down to a tenth, so that 100 % means all."""
    return UNKNOWN if share is None else f"{int(1000 * share + 1e-9) / 10:g} %"


def _norm_chart(teacher: TeacherFigures) -> str:
    chart = histogram_chart(f"Lengths of {teacher.name}'s vectors", teacher.norm_histograms, "length")
    return f"<h3>{escape(teacher.name)}</h3>{chart}" if chart else ""


def _cosine_chart(teacher: TeacherFigures) -> str:
    chart = histogram_chart(f"Cosines of {teacher.name}", teacher.cosine_histograms, "cosine")
    return f"<h3>{escape(teacher.name)}</h3>{chart}" if chart else ""


def _twins(found: Inspection, shown: Sequence[Found]) -> str:
    if not shown:
        return ""
    items = []
    for one in shown:
        figure = "same bytes" if one.figure is None else f"cosine {one.figure:.4f}"
        pictures = "".join(_figure(found.pictures[position]) for position in one.positions)
        items.append(f'<div class="twin"><div class="where">{figure}</div>{pictures}</div>')
    return f'<div class="gallery twins">{"".join(items)}</div>'


def _gallery(found: Inspection, shown: Sequence[Found]) -> str:
    items = [_figure(found.pictures[one.positions[0]], f", {one.figure:.3f}") for one in shown]
    return f'<div class="gallery">{"".join(items)}</div>' if items else ""


def _figure(picture: Picture, figure: str = "") -> str:
    if picture.jpeg is None:
        seen = f'<div class="broken">{escape(printable(picture.broken or ""))}</div>'
    else:
        seen = f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(picture.jpeg).decode()}">'
    return (
        f'<figure>{seen}<figcaption><div class="where">{escape(picture.modality)}{figure}</div>'
        f'{escape(printable(picture.caption))}<div class="where"><code>{escape(picture.sample_id)}</code></div>'
        "</figcaption></figure>"
    )
