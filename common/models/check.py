"""Prove a teacher before it costs GPU hours: loading, sane vectors, agreement, and its authors' published features."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from common.captions import captioned
from common.errors import LakeError, ModelError
from common.images import UndecodableImageError
from common.lake import open_lake
from common.models.dual_encoder import DualEncoder
from common.models.embed import embed_images, embed_texts
from common.models.load import load_model
from common.models.spec import ModelSpec
from common.models.tensors import read_checkpoint
from common.seeding import rng

# N = samples, D = width.

GOLDEN_COSINE = 0.999
"""Below this, the recipe is another one; mixed precision and resize backends stay well above."""
ALONE_TOLERANCE = 1e-6
SAME = 1e-5
"""Vectors that differ by less from their mean are one vector and rounding."""
PERMUTATIONS = 2000
MAX_CHANCE = 0.01
MIN_PAIRS = 6
"""Five pairs can be shuffled in 120 ways, of which the right one is too large a share to be unlikely."""
LAKE_PAIRS = 64
GOLDEN_FILE = "clips_output.pt"


@dataclass(frozen=True)
class Finding:
    """One line of the table."""

    model: str
    what: str
    verdict: str
    """pass, FAIL, or skip."""
    detail: str


@dataclass(frozen=True)
class Pairs:
    """Pictures with their captions, and for some of them the authors' vectors of some teachers."""

    images: list[bytes]
    captions: list[str]
    golden: list[dict[str, np.ndarray]] = field(default_factory=list)
    """For each pair: ``<name>_img`` and ``<name>_txt`` -> float32 [D], unit length."""


def read_golden(folder: str) -> Pairs:
    """Read a folder in the layout of MMKD-CLIP's demonstration data.

    Args:
        folder: Holds ``meta.jsonl`` (``imgpath``, ``txt``) and, beside each picture, ``clips_output.pt``.

    Raises:
        ModelError: It is not such a folder.
    """
    root = Path(folder)
    index = root / "meta.jsonl"
    if not index.is_file():
        raise ModelError(
            f"{folder} holds no meta.jsonl. Give a folder in the layout of MMKD-CLIP's demonstration data: meta.jsonl "
            f"with imgpath and txt, and {GOLDEN_FILE} beside each picture."
        )
    images, captions, golden = [], [], []
    for number, line in enumerate(index.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            picture = root / row["imgpath"]
            images.append(picture.read_bytes())
            captions.append(str(row["txt"]))
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise ModelError(f"{index} line {number} does not name a picture and a caption: {error}.") from error
        vectors = read_checkpoint(picture.parent / GOLDEN_FILE, "golden features")
        golden.append({name: value.float().numpy() for name, value in vectors.items()})
    return Pairs(images, captions, golden)


def read_lake_pairs(lake_uri: str, count: int = LAKE_PAIRS) -> Pairs:
    """The first pairs of a lake with distinct captions; pictures without a caption are passed over.

    Raises:
        LakeError: There is no lake.
    """
    lake = open_lake(lake_uri)
    chosen: dict[str, bytes] = {}
    for shard in lake.shards():
        table = lake.read_pairs(shard, ["image", "captions"])
        table = table.filter(captioned(table["captions"]))
        for image, captions in zip(table["image"], table["captions"], strict=True):
            if len(chosen) < count:
                chosen.setdefault(captions[0].as_py(), image.as_py())
        if len(chosen) >= count:
            break
    if len(chosen) < MIN_PAIRS:
        raise LakeError(f"{lake_uri} holds {len(chosen)} pairs with distinct captions; {MIN_PAIRS} are needed.")
    return Pairs(list(chosen.values()), list(chosen))


def check_teacher(spec: ModelSpec, pairs: Pairs | None, golden: Pairs | None) -> list[Finding]:
    """All checks of one teacher; a check that cannot be made is a line that says why.

    Args:
        spec: The entry, with its files in reach.
        pairs: A sample on which picture and caption must agree better than chance; None takes the golden pairs.
        golden: The authors' published vectors.
    """

    def finding(what: str, verdict: str, detail: str) -> Finding:
        return Finding(spec.name, what, verdict, detail)

    try:
        model = load_model(spec)
    except ModelError as error:
        return [finding("load", "FAIL", str(error))]
    description = model.description
    widths = f"image {description.image_dim}, text {description.text_dim or 'none'}"
    found = [finding("load", "pass", f"strict; {widths}; {description.geometry.key}; {_recipe_of(spec)}")]
    sample = pairs or golden or _drawn_pairs()
    try:
        found += [finding(*row) for row in check_embeddings(model, sample)]
    except UndecodableImageError as error:
        raise ModelError(
            f"A picture of the sample cannot be decoded ({error}). Mend or leave out that picture; nothing is wrong "
            "with the teachers."
        ) from error
    if description.text_dim is None:
        return [*found, finding("agreement", "skip", "image encoder without a text tower")]
    if pairs is None and golden is None:
        found.append(finding("agreement", "skip", "give --lake or --golden: nothing here pairs pictures with captions"))
    else:
        found.append(finding(*check_agreement(model, sample)))
    if golden is not None:
        found += [finding(*row) for row in check_golden(spec, golden)]
    return found


def _recipe_of(spec: ModelSpec) -> str:
    stated = spec.recipe.model_dump(exclude_defaults=True, exclude={"geometry", "tokenizer", "mean", "std"})
    return ", ".join(f"{name} {value}" for name, value in stated.items()) or "the files' own recipe"


def _drawn_pairs() -> Pairs:
    """Eight noise pictures: enough to see whether the towers run."""
    import io

    from PIL import Image

    images = []
    for number in range(8):
        pixels = rng("check", number).integers(0, 255, (64, 80, 3), np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        images.append(buffer.getvalue())
    return Pairs(images, [f"picture number {number}" for number in range(8)])


Row = tuple[str, str, str]
"""What, verdict, detail."""


def check_embeddings(model: DualEncoder, sample: Pairs) -> list[Row]:
    """Finite unit vectors that do not depend on what else is in the batch."""
    towers = {"image": (embed_images(model, sample.images), embed_images(model, sample.images[:1]))}
    if model.description.text_dim is not None:
        towers["text"] = (embed_texts(model, sample.captions), embed_texts(model, sample.captions[:1]))
    rows: list[Row] = []
    for name, (all_ND, alone_1D) in towers.items():
        finite = bool(np.isfinite(all_ND).all())
        unit = finite and bool(np.allclose(np.linalg.norm(all_ND, axis=1), 1, atol=1e-3))
        spread = float(np.abs(all_ND - all_ND.mean(0)).max()) if finite else 0.0
        apart = float(np.abs(all_ND[:1] - alone_1D).max()) if finite else float("inf")
        problems = [
            *([] if finite else ["not finite"]),
            *([] if unit else ["not of unit length"]),
            *([] if spread > SAME else ["the same for every sample"]),
            *([] if apart <= ALONE_TOLERANCE else [f"changed by its neighbours by {apart:.1e}"]),
        ]
        detail = "; ".join(problems) or f"{len(all_ND)} unit vectors; alone and in a batch equal within {apart:.0e}"
        rows.append((f"{name} vectors", "FAIL" if problems else "pass", detail))
    return rows


def check_agreement(model: DualEncoder, sample: Pairs) -> Row:
    """Are pictures closer to their own captions than to shuffled ones? A permutation test on the mean cosine."""
    if len(sample.images) < MIN_PAIRS:
        return "agreement", "skip", f"{len(sample.images)} pairs are too few to tell (at least {MIN_PAIRS})"
    cosine_NN = embed_images(model, sample.images) @ embed_texts(model, sample.captions).T
    if not np.isfinite(cosine_NN).all():
        return "agreement", "FAIL", "the vectors are not finite"
    matched = float(np.diag(cosine_NN).mean())
    others = float(cosine_NN[~np.eye(len(cosine_NN), dtype=bool)].mean())
    draw, rows = rng("agreement"), np.arange(len(cosine_NN))
    shuffled = [cosine_NN[rows, draw.permutation(len(rows))].mean() for _ in range(PERMUTATIONS)]
    chance = (1 + sum(value >= matched for value in shuffled)) / (1 + PERMUTATIONS)
    first = float((cosine_NN.argmax(1) == rows).mean())
    detail = f"matched cosine {matched:.3f}, others {others:.3f}, right caption first {first:.0%}, chance {chance:.4f}"
    return "agreement", "pass" if chance < MAX_CHANCE else "FAIL", f"{detail} ({len(rows)} pairs)"


def check_golden(spec: ModelSpec, golden: Pairs) -> list[Row]:
    """Compare every rival recipe with the authors' vectors; the entry's own must be the one that fits."""
    name = spec.golden
    wanted = {f"{name}_img", f"{name}_txt"}
    rows = [i for i, vectors in enumerate(golden.golden) if name is not None and wanted <= set(vectors)]
    if not rows:
        known = sorted({key.rsplit("_", 1)[0] for vectors in golden.golden for key in vectors})
        return [("golden", "skip", f"no published vectors under {name or 'its name'} (there are: {', '.join(known)})")]
    trials = {"": spec, **{f"@{recipe}": spec.with_recipe(recipe) for recipe in spec.recipes}}
    scores = {label: _golden_cosines(trial, golden, rows) for label, trial in trials.items()}
    best = max(scores, key=lambda label: min(scores[label]))
    own = min(scores[""])
    found: list[Row] = []
    for label, (image, text) in scores.items():
        fits = min(image, text) >= GOLDEN_COSINE
        what = f"golden{label}" if label else "golden"
        detail = f"least cosine with the authors' vectors: image {image:.4f}, text {text:.4f} ({len(rows)} samples)"
        if label:
            verdict = "fits" if fits else "-"
        else:
            verdict = "pass" if fits else "FAIL"
            if not fits and best and min(scores[best]) > own:
                detail += f"; {spec.name}{best} comes closest: extract with that, or correct the entry"
        found.append((what, verdict, detail))
    return found


def _golden_cosines(spec: ModelSpec, golden: Pairs, rows: Sequence[int]) -> tuple[float, float]:
    """The least cosine over the samples, of pictures and of captions; -1 where the widths differ."""
    model = load_model(spec)
    image_ND = embed_images(model, [golden.images[i] for i in rows])
    text_ND = embed_texts(model, [golden.captions[i] for i in rows])
    return (
        _least_cosine(image_ND, [golden.golden[i][f"{spec.golden}_img"] for i in rows]),
        _least_cosine(text_ND, [golden.golden[i][f"{spec.golden}_txt"] for i in rows]),
    )


def _least_cosine(mine_ND: np.ndarray, theirs: Sequence[np.ndarray]) -> float:
    theirs_ND = np.stack(theirs)
    if theirs_ND.shape != mine_ND.shape:
        return -1.0
    theirs_ND = theirs_ND / np.linalg.norm(theirs_ND, axis=1, keepdims=True)
    return float((mine_ND * theirs_ND).sum(1).min())


def format_findings(findings: Sequence[Finding]) -> str:
    """An aligned table for people."""
    head = ("teacher", "check", "verdict", "detail")
    rows = [head, *((f.model, f.what, f.verdict, f.detail) for f in findings)]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join("  ".join([*(row[c].ljust(widths[c]) for c in range(3)), row[3]]) for row in rows)
