"""Which teachers may speak for a sample: scored from stored embeddings, decided by an explicit rule, kept as a table.

For each teacher and modality: how well the image and its main caption match (cosine), where that lies among the
teacher's other pairs of the modality (quantile), and how many sampled captions of the same modality the true one beats
(rank). ``skill`` is the mean share of captions beaten: 0.5 is guessing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from common.config import fingerprint
from common.errors import LakeError
from common.lake import (
    Lake,
    check_same_samples,
    claim_partition,
    now,
    open_lake,
    require_teachers,
    shard_name,
)
from common.logs import Progress, logger
from common.schemas import SELECTION
from common.seeding import seed_of
from trainer.config import SelectConfig

NO_MODALITY = "unknown"


@dataclass
class Candidates:
    """Sampled captions of one modality, as one teacher embeds them."""

    keys: np.ndarray
    """Int64 [C]: equal for equal captions."""
    text_CD: np.ndarray
    """Float32 [C, D], unit rows."""


@dataclass
class TeacherScores:
    """One teacher's scores over the whole lake, in shard order. N counts all pairs."""

    cosine_N: np.ndarray
    """Float32; NaN where the teacher lacks a vector."""
    rank_N: np.ndarray
    candidates_N: np.ndarray
    beaten_N: np.ndarray
    """Share of the candidates that the true caption beats, ties counting half; NaN where the cosine is."""
    quantile_N: np.ndarray = field(default_factory=lambda: np.empty(0))
    admitted_N: np.ndarray = field(default_factory=lambda: np.empty(0, bool))


@dataclass
class PairColumns:
    """The light columns of all pairs, in shard order."""

    rows: dict[int, int]
    sample_id: np.ndarray
    modality: np.ndarray
    caption_key: np.ndarray
    is_train: np.ndarray


def select(lake_uri: str, config: SelectConfig) -> str:
    """Score every pair with every teacher, decide, and write ``selection/<fingerprint>/teacher=<t>/shard-k``.

    Returns:
        The fingerprint, which is also the folder's name.

    Raises:
        LakeError: No lake, no embeddings, or a teacher's shards are incomplete.
    """
    lake = open_lake(lake_uri)
    teachers = require_teachers(lake, config.teachers)
    identity = {
        "config": {**config.model_dump(mode="json"), "teachers": teachers},
        "teachers": {name: fingerprint(lake.read_teacher(name)["fingerprint"]) for name in teachers},
        "shards": lake.shards(),
    }
    name = fingerprint(identity)
    manifest = f"selection/{name}/selection.json"
    if lake.storage.exists(manifest):
        # Stage 2 takes the newest selection, and this is the one asked for last.
        lake.storage.write_json(manifest, {**lake.storage.read_json(manifest), "created_at": now()})
        logger.info("select: selection/%s is there already, made with the same settings; nothing to do", name)
        return name
    pairs = read_pair_columns(lake)
    summary = {}
    progress = Progress("select", len(teachers), "teachers")
    for teacher in teachers:
        check_complete(lake, teacher, pairs)
        if lake.read_teacher(teacher)["fingerprint"].get("text_dim", 0) is None:
            scores, summary[teacher] = admit_image_encoder(lake, teacher, pairs)
        else:
            scores = score_teacher(lake, teacher, pairs, config)
            summary[teacher] = decide(scores, pairs, config)
        write_selection(lake, f"selection/{name}/teacher={teacher}", pairs, scores)
        progress.advance(1, teacher)
    facts = {"teachers": teachers, "summary": summary}
    # Written last: a folder without it is an unfinished selection, which readers ignore.
    claim_partition(lake.storage, manifest, identity, "", facts)
    logger.info("select: wrote selection/%s at %s\n%s", name, now(), format_summary(summary))
    return name


def read_pair_columns(lake: Lake) -> PairColumns:
    """Read ids, modalities, main captions and splits of all pairs."""
    rows: dict[int, int] = {}
    tables = []
    for index in lake.shards():
        table = lake.read_pairs(index, ["sample_id", "captions", "modality", "split"])
        rows[index] = table.num_rows
        tables.append(table)
    table = pa.concat_tables(tables)
    captions = pc.list_element(table["captions"], 0).to_pylist()
    return PairColumns(
        rows=rows,
        sample_id=np.array(table["sample_id"].to_pylist(), object),
        modality=np.array(table["modality"].fill_null(NO_MODALITY).to_pylist(), object),
        caption_key=np.array([seed_of(caption.strip().lower()) >> 1 for caption in captions], np.int64),
        is_train=np.array([split == "train" for split in table["split"].to_pylist()], bool),
    )


def check_complete(lake: Lake, teacher: str, pairs: PairColumns) -> None:
    """Insist that a teacher has every shard of the pairs.

    Raises:
        LakeError: Names the missing shards and the command that computes them.
    """
    missing = sorted(set(pairs.rows) - set(lake.shards(lake.features_folder(teacher))))
    if missing:
        raise LakeError(
            f"Teacher {teacher!r} lacks {len(missing)} of {len(pairs.rows)} shards (first: {missing[:5]}). "
            f"Run `mmkd extract {lake.uri} --teachers {teacher}` again; it computes only what is missing."
        )


def score_teacher(lake: Lake, teacher: str, pairs: PairColumns, config: SelectConfig) -> TeacherScores:
    """Two passes over a teacher's shards: collect candidate captions, then rank each true caption among them."""
    candidates = collect_candidates(lake, teacher, pairs, config)
    scores = no_scores(len(pairs.sample_id))
    for start, image_ND, text_ND in read_vectors(lake, teacher, pairs):
        place = np.arange(start, start + len(image_ND))
        has_both = np.isfinite(image_ND[:, 0]) & np.isfinite(text_ND[:, 0])
        for modality in np.unique(pairs.modality[place]):
            rows = place[has_both & (pairs.modality[place] == modality)]
            if image_ND.shape[1] != text_ND.shape[1] or not len(rows):
                continue
            image, text = image_ND[rows - start], text_ND[rows - start]
            scores.cosine_N[rows] = np.einsum("nd,nd->n", image, text)
            rank_among(candidates[modality], image, scores, rows, pairs.caption_key[rows])
    return scores


def no_scores(total: int) -> TeacherScores:
    """Scores of a teacher that has said nothing yet."""
    return TeacherScores(
        cosine_N=np.full(total, np.nan, np.float32),
        rank_N=np.zeros(total, np.int32),
        candidates_N=np.zeros(total, np.int32),
        beaten_N=np.full(total, np.nan, np.float32),
        quantile_N=np.full(total, np.nan, np.float32),
        admitted_N=np.zeros(total, bool),
    )


def admit_image_encoder(lake: Lake, teacher: str, pairs: PairColumns) -> tuple[TeacherScores, dict[str, Any]]:
    """A teacher without a text tower cannot be scored by captions: it speaks for every picture it has embedded.

    Stage 2 uses it for the similarities among pictures only.
    """
    scores = no_scores(len(pairs.sample_id))
    for start, image_ND, _ in read_vectors(lake, teacher, pairs):
        scores.admitted_N[start : start + len(image_ND)] = np.isfinite(image_ND[:, 0])
    summary: dict[str, Any] = {}
    for modality in sorted(set(pairs.modality)):
        kept = float(scores.admitted_N[pairs.modality == modality].mean())
        summary[modality] = {"skill": None, "competent": True, "kept": round(kept, 4), "mean_cosine": None}
    return scores, summary


def rank_among(
    candidates: Candidates, image_ND: np.ndarray, scores: TeacherScores, rows: np.ndarray, key_N: np.ndarray
) -> None:
    """Fill rank, candidates and beaten for some rows; captions equal to the true one are not counted against it."""
    cosine_NC = image_ND @ candidates.text_CD.T
    other_NC = candidates.keys[None, :] != key_N[:, None]
    true_N1 = scores.cosine_N[rows][:, None]
    above = ((cosine_NC > true_N1) & other_NC).sum(1)
    level = ((cosine_NC == true_N1) & other_NC).sum(1)
    count = other_NC.sum(1)
    scores.rank_N[rows] = above + 1
    scores.candidates_N[rows] = count + 1
    scores.beaten_N[rows] = np.where(count > 0, 1 - (above + level / 2) / np.maximum(count, 1), 0.5)


def collect_candidates(lake: Lake, teacher: str, pairs: PairColumns, config: SelectConfig) -> dict[str, Candidates]:
    """Sample up to ``config.candidates`` captions of each modality from the train split, whatever the shard order."""
    order = np.array([seed_of(config.seed, sample_id) >> 1 for sample_id in pairs.sample_id], np.int64)
    chosen: dict[str, np.ndarray] = {}
    for modality in np.unique(pairs.modality):
        rows = np.flatnonzero(pairs.modality == modality)
        train = rows[pairs.is_train[rows]]
        rows = train if len(train) else rows
        chosen[modality] = rows[np.argsort(order[rows], kind="stable")[: config.candidates]]
    found: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {modality: [] for modality in chosen}
    for start, _, text_ND in read_vectors(lake, teacher, pairs):
        for modality, rows in chosen.items():
            here = rows[(rows >= start) & (rows < start + len(text_ND))]
            here = here[np.isfinite(text_ND[here - start, 0])]
            found[modality].append((pairs.caption_key[here], text_ND[here - start]))
    return {
        modality: Candidates(np.concatenate([k for k, _ in parts]), np.concatenate([v for _, v in parts]))
        for modality, parts in found.items()
    }


def read_vectors(lake: Lake, teacher: str, pairs: PairColumns) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """For each shard: its first row's position, image vectors [N, D] and text vectors [N, D]; NaN rows for nulls."""
    start = 0
    for index, rows in pairs.rows.items():
        table = lake.read_features(teacher, index, ["sample_id", "image_embedding", "text_embedding"])
        ids = pa.table({"sample_id": pa.array(pairs.sample_id[start : start + rows], pa.string())})
        check_same_samples(
            table.select(["sample_id"]),
            ids,
            f"{lake.uri}/{lake.features_folder(teacher)}/{shard_name(index)}",
        )
        yield start, vectors_of(table["image_embedding"]), vectors_of(table["text_embedding"])
        start += rows


def vectors_of(column: pa.ChunkedArray) -> np.ndarray:
    """A fixed-size-list column as float32 [N, D], with NaN rows where it is null."""
    array = column.combine_chunks()
    width = array.type.list_size
    flat = array.values.slice(array.offset * width, len(array) * width).to_numpy(zero_copy_only=False)
    vectors = flat.reshape(-1, width).astype(np.float32)
    vectors[array.is_null().to_numpy(zero_copy_only=False)] = np.nan
    return vectors


def decide(scores: TeacherScores, pairs: PairColumns, config: SelectConfig) -> dict[str, Any]:
    """Apply the rule to one teacher and fill ``quantile_N`` and ``admitted_N``.

    Returns:
        Modality -> skill, competent, kept share and mean cosine, for people and for ``selection.json``.
    """
    total = len(pairs.sample_id)
    scores.quantile_N = np.full(total, np.nan, np.float32)
    scores.admitted_N = np.zeros(total, bool)
    summary: dict[str, Any] = {}
    for modality in sorted(set(pairs.modality)):
        rows = np.flatnonzero((pairs.modality == modality) & np.isfinite(scores.cosine_N))
        if not len(rows):
            summary[modality] = {"skill": None, "competent": False, "kept": 0.0, "mean_cosine": None}
            continue
        # Thresholds come from the train split, so that test rows do not shape what the student learns.
        train = rows[pairs.is_train[rows]] if pairs.is_train[rows].any() else rows
        reference = np.sort(scores.cosine_N[train])
        scores.quantile_N[rows] = np.searchsorted(reference, scores.cosine_N[rows], side="right") / len(reference)
        skill = float(scores.beaten_N[train].mean())
        keep = scores.quantile_N[rows] > 1 - config.keep_fraction
        keep |= config.keep_fraction == 1
        keep &= scores.rank_N[rows] <= np.maximum(1, config.max_rank_fraction * scores.candidates_N[rows])
        scores.admitted_N[rows] = keep & (skill >= config.min_skill)
        summary[modality] = {
            "skill": round(skill, 4),
            "competent": skill >= config.min_skill,
            "kept": round(float(scores.admitted_N[rows].mean()), 4),
            "mean_cosine": round(float(scores.cosine_N[train].mean()), 4),
        }
    return summary


def write_selection(lake: Lake, folder: str, pairs: PairColumns, scores: TeacherScores) -> None:
    """Write one teacher's decisions, shard by shard, aligned with the pairs."""
    start = 0
    for index, rows in pairs.rows.items():
        part = slice(start, start + rows)
        unknown = ~np.isfinite(scores.cosine_N[part])
        columns = [
            pa.array(pairs.sample_id[part], pa.string()),
            pa.array(pairs.modality[part], pa.string()),
            pa.array(scores.cosine_N[part], mask=unknown),
            pa.array(scores.quantile_N[part].astype(np.float32), mask=unknown),
            pa.array(scores.rank_N[part], mask=unknown),
            pa.array(scores.candidates_N[part], mask=unknown),
            pa.array(scores.admitted_N[part]),
        ]
        lake.storage.write_table(f"{folder}/{shard_name(index)}", pa.table(columns, schema=SELECTION))
        start += rows


def format_summary(summary: dict[str, dict[str, Any]]) -> str:
    """Teachers by modalities: skill and share of samples kept, as an aligned text table."""
    modalities = sorted({modality for by_modality in summary.values() for modality in by_modality})
    width = max(len(name) for name in [*summary, "teacher"]) + 2
    cell = max(20, *(len(modality) + 2 for modality in modalities))
    lines = ["teacher".ljust(width) + "".join(modality.ljust(cell) for modality in modalities)]
    for teacher, by_modality in summary.items():
        cells = []
        for modality in modalities:
            entry = by_modality[modality]
            unscored = "images only" if entry["competent"] else "no vectors"
            skill = unscored if entry["skill"] is None else f"skill {entry['skill']:.2f}"
            cells.append(f"{skill} kept {entry['kept']:.0%}".ljust(cell))
        lines.append(teacher.ljust(width) + "".join(cells))
    return "\n".join(lines)


def choose_selection(lake: Lake, asked: str | None, names: tuple[str, ...]) -> tuple[str, tuple[str, ...]]:
    """The selection to use and its teachers, or those of them that are named.

    Args:
        lake: The lake.
        asked: A fingerprint; None takes the newest.
        names: Teachers; none means all of the selection.

    Raises:
        LakeError: There is no selection, not the one asked for, or it lacks a teacher.
    """
    manifests = {
        name: lake.storage.read_json(f"selection/{name}/selection.json")
        for name in lake.storage.list_folders("selection")
        if lake.storage.exists(f"selection/{name}/selection.json")
    }
    if not manifests:
        raise LakeError(f"{lake.uri} has no selection yet. Run `mmkd select {lake.uri}` first.")
    newest = max(manifests, key=lambda name: (str(manifests[name]["created_at"]), name))
    chosen = asked or newest
    if chosen not in manifests:
        raise LakeError(f"{lake.uri} has no selection {chosen!r}; it has {', '.join(sorted(manifests))}.")
    selected = manifests[chosen]["teachers"]
    teachers = names or tuple(selected)
    missing = sorted(set(teachers) - set(selected))
    if missing:
        raise LakeError(
            f"Selection {chosen} does not cover {', '.join(missing)} (it covers {', '.join(selected)}). "
            f"Run `mmkd select {lake.uri}` again after extracting, or leave these teachers out."
        )
    found = tuple(require_teachers(lake, teachers))
    recorded = manifests[chosen]["fingerprint"]["teachers"]
    changed = [name for name in found if recorded[name] != fingerprint(lake.read_teacher(name)["fingerprint"])]
    if changed:
        raise LakeError(
            f"Selection {chosen} was made from other embeddings of {', '.join(changed)} than the lake holds now. "
            f"Run `mmkd select {lake.uri}` again."
        )
    logger.info("selection %s with %s", chosen, manifests[chosen]["fingerprint"]["config"])
    return chosen, found
