"""``mmkd select``: score every pair with every teacher, decide, and keep the table and a report."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from common.config import fingerprint
from common.lake import (
    Lake,
    claim_partition,
    now,
    open_lake,
    require_teachers,
    selection_chart,
    selection_manifest,
    shard_name,
)
from common.logs import Progress, logger
from common.schemas import SELECTION
from trainer.config import SelectConfig
from trainer.selection.read import check_complete, read_shards
from trainer.selection.rule import Rule
from trainer.selection.summary import format_found_first, format_silent, format_summary, format_totals, keep_rates_chart
from trainer.selection.survey import survey_teacher
from trainer.selection.tally import NO_ROWS, Tally, tally


def select(lake_uri: str, config: SelectConfig) -> str:
    """Score every pair with every teacher, decide, and write ``selection/<fingerprint>/teacher=<t>/shard-k``.

    Two passes over each teacher's vectors, then one over the decisions; memory is that of a shard and of the
    candidates.

    Returns:
        The fingerprint, which is also the folder's name.

    Raises:
        LakeError: No lake, no embeddings, or a teacher's shards are incomplete.
    """
    lake = open_lake(lake_uri)
    teachers, shards = require_teachers(lake, config.teachers), lake.shards()
    identity = {
        "config": {**config.model_dump(mode="json"), "teachers": teachers},
        "teachers": {name: fingerprint(lake.read_teacher(name)["fingerprint"]) for name in teachers},
        "shards": shards,
    }
    name = fingerprint(identity)
    manifest, folder = selection_manifest(name), lake.selection_folder(name)
    if name in lake.selections():
        # Stage 2 takes the newest selection, and this is the one asked for last.
        lake.storage.write_json(manifest, {**lake.storage.read_json(manifest), "created_at": now()})
        logger.info("select: selection/%s is there already, made with the same settings; nothing to do", name)
        return name
    lake.storage.remove(manifest)  # of a selection that was deleted: it must not vouch for half of a new one
    for teacher in teachers:
        check_complete(lake, teacher, shards)
    progress = Progress("select", len(teachers), "teachers")
    summary = {}
    for teacher in teachers:
        summary[teacher] = select_for(lake, f"{folder}/teacher={teacher}", teacher, shards, config)
        progress.advance(1, teacher)
    if config.keep_one:
        keep_one(lake, folder, teachers, shards, summary)
    counts = tally(lake, folder, teachers, shards)
    for teacher, modalities in summary.items():
        for modality, entry in modalities.items():
            entry.update(counts.teachers.get((teacher, modality), NO_ROWS).report)
    lake.storage.write_bytes(selection_chart(name), keep_rates_chart(summary).encode())
    rows = {modality: heard._asdict() for modality, heard in counts.modalities.items()}
    facts = {"teachers": teachers, "summary": summary, "rows": rows, "without_caption": counts.without_caption}
    # Written last: a folder of tables without it is an unfinished selection, which readers ignore.
    claim_partition(lake.storage, manifest, identity, "", facts)
    _report(name, config, counts, summary)
    return name


def _report(name: str, config: SelectConfig, counts: Tally, summary: dict[str, dict[str, Any]]) -> None:
    logger.info("select: wrote selection/%s at %s\n%s", name, now(), format_summary(summary))
    logger.info(
        "select: true caption ranked first among up to %d sampled others, of all rows -> of those kept\n%s",
        config.candidates,
        format_found_first(summary),
    )
    logger.info("select: %s", format_totals(counts))
    if counts.without_caption:
        logger.info(
            "select: %d rows have no caption: they are not scored, no teacher speaks for them, and they are in none of "
            "these figures",
            counts.without_caption,
        )
    silent = format_silent(counts, summary)
    if silent:
        logger.warning(
            "select: no teacher may speak for any row of %s, so stage 2 leaves these rows out. A teacher may speak "
            "where its skill is at least min_skill=%g%s. Lower min_skill, loosen keep_fraction or max_rank_fraction, "
            "or extract with a teacher that knows them.",
            silent,
            config.min_skill,
            ", and keep_one does not change that" if config.keep_one else "",
        )


def select_for(lake: Lake, folder: str, teacher: str, shards: list[int], config: SelectConfig) -> dict[str, Any]:
    """Write one teacher's shards of a selection; returns what it is judged by, by modality."""
    if lake.read_teacher(teacher)["fingerprint"].get("text_dim", 0) is None:
        return admit_image_encoder(lake, folder, teacher, shards)
    rule = Rule.of(survey_teacher(read_shards(lake, teacher, shards, config.seed), config.candidates), config)
    for rows, vectors in read_shards(lake, teacher, shards, config.seed):
        lake.storage.write_table(f"{folder}/{shard_name(rows.shard)}", rule.decide(rows, vectors))
    return rule.summary()


def admit_image_encoder(lake: Lake, folder: str, teacher: str, shards: list[int]) -> dict[str, Any]:
    """A teacher without a text tower cannot be scored by captions: it speaks for all pairs whose picture it embedded.

    Stage 2 uses it for the similarities among pictures, and for its head.
    """
    modalities: set[str] = set()
    for rows, vectors in read_shards(lake, teacher, shards, 0):
        present_N = np.isfinite(vectors.image_ND[:, 0]) & rows.has_caption_N
        columns = {
            **{field.name: pa.nulls(len(present_N), field.type) for field in SELECTION},
            "sample_id": pa.array(rows.sample_id, pa.string()),
            "modality": pa.array(rows.modality_N, pa.string()),
            "admitted": pa.array(present_N),
        }
        lake.storage.write_table(f"{folder}/{shard_name(rows.shard)}", pa.table(columns, schema=SELECTION))
        modalities.update(rows.modality_N)
    return {modality: {"skill": None, "competent": True, "mean_cosine": None} for modality in sorted(modalities)}


def keep_one(
    lake: Lake, folder: str, teachers: list[str], shards: list[int], summary: dict[str, dict[str, Any]]
) -> None:
    """Where nobody may speak, admit the competent teacher whose cosine lies highest among its own.

    Shards are written again one by one, all teachers' that change; that is safe, since the manifest is not there yet.
    """
    for shard in shards:
        names = {teacher: f"{folder}/teacher={teacher}/{shard_name(shard)}" for teacher in teachers}
        tables = {teacher: lake.storage.read_table(name) for teacher, name in names.items()}
        modality_N = np.array(next(iter(tables.values()))["modality"].to_pylist(), object)
        admitted = {teacher: table["admitted"].to_numpy() for teacher, table in tables.items()}
        quantile_KN = np.stack(
            [
                np.where(
                    [summary[teacher][modality]["competent"] for modality in modality_N],
                    table["cosine_quantile"].fill_null(-1).to_numpy(),
                    -1,
                )
                for teacher, table in tables.items()
            ]
        )
        nobody_N = ~np.any(list(admitted.values()), axis=0) & (quantile_KN.max(axis=0) >= 0)
        best_N = quantile_KN.argmax(axis=0)
        for number, teacher in enumerate(teachers):
            chosen_N = nobody_N & (best_N == number)
            if chosen_N.any():
                place = tables[teacher].schema.get_field_index("admitted")
                column = pa.array(admitted[teacher] | chosen_N)
                changed = tables[teacher].set_column(place, SELECTION.field("admitted"), column)
                lake.storage.write_table(names[teacher], changed)
