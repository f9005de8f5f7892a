"""Selections as they lie in a lake: which one to use, and whether it still fits."""

from __future__ import annotations

from common.config import fingerprint
from common.errors import LakeError
from common.lake import Lake, require_teachers, selection_manifest
from common.logs import logger


def choose_selection(lake: Lake, asked: str | None, names: tuple[str, ...]) -> tuple[str, tuple[str, ...]]:
    """The selection to use and its teachers, or those of them that are named.

    Args:
        lake: The lake.
        asked: A fingerprint; None takes the newest.
        names: Teachers; none means all of the selection.

    Raises:
        LakeError: There is no selection, not the one asked for, or it lacks a teacher.
    """
    manifests = {name: lake.storage.read_json(selection_manifest(name)) for name in lake.selections()}
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
