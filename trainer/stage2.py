"""Stage 2: distillation of the stored teacher embeddings into a student that stage 1 has trained."""

from __future__ import annotations

import functools

from common.errors import TrainError
from common.lake import Lake, open_lake
from trainer.alignment.maps import Alignment, load_alignment
from trainer.checkpoint import MODEL, load_checkpoint
from trainer.config import Stage2Config
from trainer.data import TrainData
from trainer.launch import TrainResult, build_order, check_cluster, find_rows, launch, run_identity
from trainer.objectives import DistillObjective
from trainer.record import Job
from trainer.selection.stored import choose_selection
from trainer.student import Student

IMAGE_ENCODER_SCALE = 1 / 0.07
"""Factor on the cosines among pictures of a teacher that learned none, having no text tower: CLIP's first value."""


def train_stage2(lake_uri: str, run: str, init: str | None, config: Stage2Config) -> TrainResult:
    """Distil a lake's teachers into a student, or go on where the run of this name stopped.

    Args:
        lake_uri: A lake with pairs, teacher embeddings and a selection.
        run: Name of the folder under ``runs/``.
        init: A stage-1 checkpoint: a run's folder or one of its step folders. The student is built from it.
        config: Everything else. Only ``scale`` and ``data.tasks`` may differ when a run goes on.

    Raises:
        LakeError: No lake, no embeddings, no selection, or the run's name belongs to another configuration.
        TrainError: No usable stage-1 checkpoint, too little data, or the loss diverges.
        ClusterError: The cluster is too small. Ray must be initialised.
    """
    lake = open_lake(lake_uri)
    if init is None:
        raise TrainError(
            f"Stage 2 starts from a stage-1 student and none was given. Run `mmkd train stage1 {lake_uri}` first, then "
            f"`mmkd train stage2 {lake_uri} --init {lake_uri.rstrip('/')}/runs/RUN` with the run that it printed."
        )
    placement = check_cluster(config.scale, config.data)
    checkpoint = load_checkpoint(init)
    architecture = checkpoint.architecture()
    selection, teachers = choose_selection(lake, config.selection, config.teachers)
    rows = find_rows(lake, teachers, selection, config.data.seed)
    order = build_order(rows, config.data, lake)
    scales = teacher_scales(lake, teachers, config)
    width = int(architecture.config["model_cfg"]["embed_dim"])
    alignment = load_alignment(lake, config.alignment, teachers) if config.alignment else None
    dims = teacher_dims(lake, teachers, alignment)
    if config.distill.feature or config.distill.cross:
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
        run_uri=lake.storage.child(f"runs/{run}").uri,
        optim=config.optim,
        scale=config.scale,
        tasks=config.data.tasks,
        gpu=placement.gpu,
        threads=placement.threads,
        total_steps=order.steps_per_epoch * config.epochs,
        objective=functools.partial(
            DistillObjective, config.distill, scales, start_scale, width, dims, alignment.maps if alignment else None
        ),
        start=functools.partial(_start, checkpoint.uri),
        validation_places=rows.validation,
        identity=run_identity("stage2", config, rows, architecture, **facts),
    )
    # Maps are fitted to unit vectors; what comes out of them has the length that counts then.
    lengths = config.distill.target_length == "stored" and alignment is None
    data = TrainData(lake.uri, order, architecture, config.data.crop_scale, teachers, selection, lengths)
    return launch(lake, run, job, data, placement)


def teacher_scales(lake: Lake, teachers: tuple[str, ...], config: Stage2Config) -> dict[str, float]:
    """The factor on each teacher's cosines: the configured one for all, else the one it was trained with."""
    own = {name: lake.read_teacher(name)["logit_scale"] or IMAGE_ENCODER_SCALE for name in teachers}
    return {name: float(config.distill.teacher_scale or scale) for name, scale in own.items()}


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
