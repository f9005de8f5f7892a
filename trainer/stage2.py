"""Stage 2: distillation of the stored teacher embeddings into a student that stage 1 has trained."""

from __future__ import annotations

import contextlib
import functools

from common.config import fingerprint
from common.errors import TrainError
from common.lake import Lake, open_lake
from common.logs import logger
from common.storage import Storage, address_within
from trainer.alignment.maps import Alignment, load_alignment
from trainer.checkpoint import MODEL, load_checkpoint
from trainer.config import Stage2Config
from trainer.data import StoredViews, TrainData
from trainer.launch import Session, TrainResult, build_order, check_settings, find_rows, launch, run_identity
from trainer.objectives import DistillObjective
from trainer.record import RUN, Job
from trainer.selection.stored import choose_selection
from trainer.student import Student
from trainer.temperature import fitted_scales

IMAGE_ENCODER_SCALE = 1 / 0.07
"""Factor on the cosines among pictures of a teacher that learned none, having no text tower: CLIP's first value."""


def train_stage2(
    lake_uri: str,
    run: str,
    init: str | None,
    config: Stage2Config,
    *,
    extend: bool = False,
    session: Session = contextlib.nullcontext,
) -> TrainResult:
    """Distil a lake's teachers into a student, or go on where the run of this name stopped.

    Args:
        lake_uri: A lake with pairs, teacher embeddings and a selection.
        run: Name of the folder under ``runs/``.
        init: A stage-1 checkpoint: a run's folder or one of its step folders. The student is built from it.
        config: Everything else. Only ``scale`` and ``data.tasks`` may differ when a run goes on.
        extend: Whether a run that was begun with fewer epochs may go on to those of ``config``.
        session: Context in which Ray is initialised, entered when there is something to train; by default it must be
            already.

    Raises:
        LakeError: No lake, no embeddings, no selection, or the run's name belongs to another configuration.
        TrainError: No usable stage-1 checkpoint, too little data, or the loss diverges.
        ClusterError: The cluster is too small.
    """
    lake = open_lake(lake_uri)
    if init is None:
        raise TrainError(
            f"Stage 2 starts from a stage-1 student and none was given. Run `mmkd train stage1 {lake_uri}` first, then "
            f"`mmkd train stage2 {lake_uri} --init {lake_uri.rstrip('/')}/runs/RUN` with the run that it printed."
        )
    check_settings(config.scale, config.data)
    checkpoint = load_checkpoint(init)
    architecture = checkpoint.architecture()
    selection, teachers = choose_selection(lake, config.selection, config.teachers)
    rows = find_rows(lake, teachers, selection, config.data.seed)
    order = build_order(rows, config.data, lake)
    storage = lake.storage.child(f"runs/{run}")
    scales = recorded_scales(storage, teachers, config) or teacher_scales(lake, teachers, selection, config)
    width = int(architecture.config["model_cfg"]["embed_dim"])
    alignment = load_alignment(lake, config.alignment, teachers) if config.alignment else None
    if alignment is not None and alignment.recipe == "none":
        alignment = None  # teachers speak as they are
    dims = teacher_dims(lake, teachers, alignment)
    if config.distill.feature or config.distill.cross:
        insist_on_one_space(alignment)
        insist_on_width(dims, width)
    start_scale = float(checkpoint.tensors(MODEL)["logit_scale"].exp())
    facts = {
        "init": checkpoint.manifest["files"][MODEL]["sha256"],
        "selection": selection,
        "teachers": {name: lake.read_teacher(name)["fingerprint"] for name in teachers},
        "teacher_scales": scales,
        **({"alignment": alignment.name} if alignment else {}),
    }
    job = Job(
        stage="stage 2",
        run_uri=storage.uri,
        optim=config.optim,
        scale=config.scale,
        tasks=config.data.tasks,
        total_steps=order.steps_per_epoch * config.epochs,
        objective=functools.partial(
            DistillObjective, config.distill, scales, start_scale, width, dims, alignment.maps if alignment else None
        ),
        start=functools.partial(_start, checkpoint.uri),
        validation_places=rows.validation,
        identity=run_identity("stage2", config, rows, architecture, **facts),
        asked={"init": address_within(checkpoint.uri, lake.uri)},
        first_weights=checkpoint.state().get("first_weights", {}),
    )
    # Maps are fitted to unit vectors; what comes out of them has the length that counts then.
    lengths = config.distill.target_length == "stored" and alignment is None
    views = stored_views(lake, teachers, lengths) if config.views == "stored" else None
    data = TrainData(lake.uri, order, architecture, config.data.crop_scale, teachers, selection, lengths, views)
    return launch(lake, run, job, data, extend, session)


def teacher_scales(lake: Lake, teachers: tuple[str, ...], selection: str, config: Stage2Config) -> dict[str, float]:
    """The factor on each teacher's cosines: the configured one, a fitted one, or the one it was trained with."""
    wanted = config.distill.teacher_scale
    if isinstance(wanted, float):
        return dict.fromkeys(teachers, wanted)
    own = {name: float(lake.read_teacher(name)["logit_scale"] or IMAGE_ENCODER_SCALE) for name in teachers}
    weights = config.distill
    if wanted == "own" or not (weights.image_text or weights.image_image or weights.text_text):
        return own  # nobody will ask
    fitted = fitted_scales(lake, selection, teachers, config.data.batch_size, config.data.seed)
    scales = {name: own[name] if scale is None else round(scale, 3) for name, scale in fitted.items()}
    listing = ", ".join(f"{name} {scale:.1f} (own {own[name]:.1f})" for name, scale in scales.items())
    logger.info("stage 2: fitted temperatures, as factors on cosines: %s", listing)
    return scales


def recorded_scales(run: Storage, teachers: tuple[str, ...], config: Stage2Config) -> dict[str, float] | None:
    """The fitted factors that a run began with: fitting again on another machine may end a digit off."""
    if config.distill.teacher_scale != "fitted" or not run.exists(RUN):
        return None
    found = run.read_json(RUN).get("fingerprint", {}).get("teacher_scales", {})
    return found if set(found) == set(teachers) else None


def stored_views(lake: Lake, teachers: tuple[str, ...], lengths: bool) -> StoredViews:
    """Which crops extraction stored, the same for every teacher that sees pictures.

    Raises:
        TrainError: A teacher has none or others, or lengths are asked for, which are not kept for crops.
    """
    producers = {name: lake.read_teacher(name)["fingerprint"] for name in teachers}
    found = {name: made.get("views") for name, made in producers.items() if made.get("image_dim")}
    settings = {fingerprint(views): views for views in found.values()}
    if len(settings) != 1 or None in settings.values():
        listing = "; ".join(f"{name}: {views or 'none'}" for name, views in found.items())
        raise TrainError(
            f"views=stored needs the same stored crops from every teacher, and {lake.uri} has: {listing or 'none'}. "
            "Extract with `--views K` and one setting for all (`--teacher-version` keeps them beside the others), name "
            "the teachers that have them with --teachers, or train with views=clean."
        )
    if lengths:
        raise TrainError(
            "distill.target_length=stored needs the vectors' lengths, which are not kept for crops. Use views=clean or "
            "target_length=unit."
        )
    (views,) = settings.values()
    return StoredViews(int(views["count"]), float(views["least_area"]), int(views["seed"]))


def teacher_dims(
    lake: Lake, teachers: tuple[str, ...], alignment: Alignment | None
) -> dict[str, tuple[int | None, int | None]]:
    """Teacher -> widths of its picture's and its caption's vectors, aligned if so; None for a tower it lacks."""
    dims = {}
    for name in teachers:
        producer = lake.read_teacher(name)["fingerprint"]
        maps = alignment.maps[name] if alignment else {}
        image, text = (
            len(maps[side].shift_W) if side in maps else producer.get(f"{side}_dim") for side in ("image", "text")
        )
        dims[name] = image, text
    return dims


def insist_on_one_space(alignment: Alignment | None) -> None:
    """The terms that compare vectors directly need a teacher's pictures and captions in one space.

    Raises:
        TrainError: The alignment turns each side by itself.
    """
    if alignment is not None and alignment.recipe == "standardise":
        raise TrainError(
            "distill.feature and distill.cross compare the student's pictures and captions with a teacher's in one "
            f"space, and alignment {alignment.name} (--recipe standardise) turns a teacher's pictures and its captions "
            "each by themselves, after which they no longer match. Fit one with `mmkd align LAKE --recipe paper`, or "
            "use distill.heads, which standardise is for."
        )


def insist_on_width(dims: dict[str, tuple[int | None, int | None]], width: int) -> None:
    """The terms that compare vectors directly need teachers in the student's own space.

    Raises:
        TrainError: Names the teachers of other widths.
    """
    others = {name: both for name, both in dims.items() if both != (width, width)}
    if others:
        listing = "; ".join(f"{name} has {image} and {text}" for name, (image, text) in others.items())
        raise TrainError(
            f"distill.feature and distill.cross compare the student's vectors, of {width} dimensions, with a teacher's "
            f"directly, and these teachers' are of others: {listing}. Bring them into one space with `mmkd align LAKE "
            f"--recipe paper --set autoencoder.latent_dim={width}` and --set alignment=newest, import features that "
            "are projected already (`mmkd import mmkd-features --projected`), or use distill.heads instead."
        )


def _start(checkpoint_uri: str, student: Student) -> None:
    checkpoint = load_checkpoint(checkpoint_uri)
    student.load_tensors(checkpoint.tensors(MODEL), checkpoint.uri)
