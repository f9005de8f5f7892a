"""Settings of the extracting half, one class per step, in the order of the flow: ingest, extract."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt, field_validator

from common.config import StrictModel
from common.kept_columns import parse_kept
from extractor.placement import TeacherPlacement

DecodeMode = Literal["exact", "fast", "scaled"]
StoredPrecision = Literal["float16", "bfloat16"]


class ColumnNames(StrictModel):
    """Which column (or key) of a source holds what; None tries the usual names."""

    image: str | None = Field(None, description="Image path, URI or bytes, when it is not called image, filepath, ...")
    caption: str | None = Field(None, description="Caption or list of captions, when not captions, caption, title, ...")
    modality: str | None = Field(None, description="Kind of picture, when it is not called modality.")
    label: str | None = Field(None, description="Class or list of classes, when it is not called label or labels.")
    license: str | None = Field(None, description="Licence, when it is not called license or licence.")
    split: str | None = Field(None, description="train, val or test, when it is not called split.")
    dataset: str | None = Field(None, description="Name of the set a row belongs to, when it is not called dataset.")
    id: str | None = Field(None, description="Your own name for each row, unique in the lake; kept as source_id.")
    group: str | None = Field(None, description="What never straddles splits: patient, lesion, slide, article.")


class DecodeLimits(StrictModel):
    """What one picture may cost before it is given up."""

    max_pixels: PositiveInt = Field(100_000_000, description="Larger pictures are rejected before decoding.")
    max_seconds: PositiveFloat = Field(20.0, description="Decoding longer than this is killed.")
    max_memory_mib: PositiveInt = Field(3072, description="Address space of the decoding process.")
    max_file_mib: PositiveInt = Field(256, description="Larger image files are rejected.")


class FetchConfig(StrictModel):
    """How pictures are fetched that a table gives by http(s) URL."""

    seconds: PositiveFloat = Field(
        20.0, description="One picture may take so long, retries included; raise it for large pictures on slow hosts."
    )
    retries: int = Field(
        3, ge=0, description="After a lost connection, or HTTP 408, 429 or 5xx; lower it where most links are dead."
    )
    at_once: PositiveInt = Field(
        16, description="Pictures of one part that are fetched at the same time, from the web or an object store."
    )
    per_host: PositiveInt = Field(4, description="Of these, from one host on the web; be kind to small ones.")
    silent_rows: PositiveInt = Field(
        3, description="A host that was too slow for so many rows in a row is not asked again within the part."
    )
    max_unreachable: float = Field(
        0.9,
        ge=0,
        le=1,
        description="Ingest stops if more than this share of the rows is 'not reachable'; lower it to notice outages.",
    )


class IngestConfig(StrictModel):
    """How a source becomes pairs."""

    format: Literal["auto", "webdataset", "jsonl", "csv", "parquet", "mmkd-features"] = Field(
        "auto", description="auto looks at the extension; name it when the extension does not tell."
    )
    columns: ColumnNames = ColumnNames()
    keep_columns: tuple[str, ...] = Field(
        (),
        description="Further columns to keep, as NAME or NAME:TYPE (string, int64, float64, bool, date, timestamp). "
        "Without a type, Parquet's own, and string elsewhere. The same for all ingests into a lake.",
    )
    dataset: str | None = Field(None, description="The set that rows belong to whose source does not say.")
    label_separator: str | None = Field(
        None, min_length=1, description="What stands between several labels in one text, such as '|'."
    )
    no_captions: bool = Field(
        False, description="Tables with neither a caption nor a label column are pictures without captions, no mistake."
    )
    contradictions: Literal["reject", "keep"] = Field(
        "reject",
        description="Rows with the picture and the captions of another that differ elsewhere, in more than labels.",
    )
    quotes: bool | None = Field(
        None,
        description="false (--no-quotes): quotes in CSV and TSV are ordinary characters. true: cells may be quoted. "
        "None: they may, but between tabs only where a cell with doubled quotes shows it.",
    )
    keep_labels: tuple[str, ...] = Field((), description="Keep only rows with one of these image labels (BIOMEDICA).")
    keep_panels: tuple[str, ...] = Field((), description="Keep only rows with one of these panel types (BIOMEDICA).")
    keep_licenses: tuple[str, ...] = Field(
        (), description="Keep only rows under one of these: 'CC BY' keeps 'CC BY 4.0' but not 'CC BY-NC'."
    )
    max_side: int | None = Field(
        None, gt=0, description="Re-encode pictures whose long side exceeds this, to save space."
    )
    min_contrast: int = Field(
        3, ge=0, le=256, description="Reject pictures whose 8-bit values span less (blank ones); 0 keeps all."
    )
    val_fraction: float = Field(
        0.02, ge=0, lt=1, description="Share put in val by hash of group or picture, where the source has no split."
    )
    test_fraction: float = Field(
        0.05, ge=0, lt=1, description="Share put in test by hash of group or picture, where the source has no split."
    )
    shard_rows: PositiveInt = Field(1024, description="Rows per shard; fixed for a lake. Fewer means finer resume.")
    lease_seconds: PositiveFloat = Field(
        60.0, description="An ingest that gives no sign of life for so long may be taken over by another."
    )
    reread: int = Field(
        0, ge=0, description="Another number reads a source again that is in the lake, if pictures it names changed."
    )
    fetch: FetchConfig = FetchConfig()
    limits: DecodeLimits = DecodeLimits()

    @field_validator("keep_columns")
    @classmethod
    def _can_be_kept(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        parse_kept(value)
        return value


class HardwareConfig(StrictModel):
    """What extraction may use, and how it is dealt out."""

    gpus: Literal["auto"] | None = Field(
        None, description="auto: measure the teachers and split the GPUs so that the slowest stage is fastest."
    )
    gpus_per_teacher: float | None = Field(
        None,
        ge=0,
        description="GPUs per actor, or a fraction; None: one each where there are enough, else an equal share.",
    )
    actors_per_teacher: PositiveInt = Field(
        1, description="Actors per teacher; raise it where one teacher is the bottleneck."
    )
    teachers: dict[str, TeacherPlacement] = Field(
        default_factory=dict, description="Placement of single teachers, by name; overrides everything else."
    )
    prepare_tasks: PositiveInt | None = Field(
        None, description="Shards decoded at the same time; None: one per CPU but one."
    )
    shards_in_flight: PositiveInt | None = Field(
        None, description="Prepared shards in memory at once; None: two for each actor of the largest teacher."
    )
    share_process: bool | None = Field(
        None,
        description="Teachers without a GPU that are placed alike share a process and take turns: half a GiB less for "
        "each. Should it die, all of them lose the shards at work, and go on in processes of their own. None: where "
        "each would have fewer than four cores.",
    )
    threads: int = Field(0, ge=0, description="torch threads per actor on a CPU; 0 shares the cores out.")


class ViewsConfig(StrictModel):
    """Augmented views, stored with their crops so that training can show the student the same pixels."""

    count: int = Field(0, ge=0, description="Crops per picture; 0 stores the clean picture only.")
    least_area: float = Field(0.4, gt=0, le=1, description="Smallest share of the picture's area in a crop.")
    seed: int = Field(0, description="Another seed gives other crops.")


class ExtractConfig(StrictModel):
    """Which teachers embed the pairs, and with what."""

    teachers: tuple[str, ...] = Field((), description="Catalog names, or NAME=FOLDER.")
    catalog: str | None = Field(None, description="YAML file with models of your own.")
    store: str | None = Field(None, description="Model store (`mmkd teachers fetch`); workers then never need the hub.")
    accept_terms: tuple[str, ...] = Field(
        (), description="Teachers whose conditions on models trained on their outputs you accept."
    )
    teacher_version: str | None = Field(
        None,
        pattern=r"^[a-z0-9_-]+$",
        description="Keep what these teachers give now beside what they gave before, as NAME.VERSION.",
    )
    towers: Literal["both", "image", "text"] = Field("both", description="Embed pictures, captions, or both.")
    views: ViewsConfig = ViewsConfig()
    decode: DecodeMode = Field(
        "exact",
        description="fast: resized by torch, in half the time; one pixel value in a hundred differs, by 1 or 2 of 255. "
        "scaled: large JPEGs are also decoded at a fraction of their size, and pixels differ a little more.",
    )
    stored_precision: StoredPrecision = Field(
        "float16",
        description="What vectors are rounded to; they are stored as float32 either way. bfloat16: a fifth less to "
        "store, and cosines that differ by 0.0001 to 0.00025 instead of 0.00001 to 0.00003.",
    )
    micro_batch: PositiveInt = Field(64, description="Pictures per forward pass; larger fills a GPU better.")
    hardware: HardwareConfig = HardwareConfig()
    limits: DecodeLimits = DecodeLimits()
    max_reject_fraction: float = Field(
        0.1,
        ge=0,
        le=1,
        description="A teacher that rejects more than this share of the rows it has seen stops.",
    )
    lease_seconds: PositiveFloat = Field(
        60.0, description="A run that shows no sign of life for so long may be taken over."
    )
    grace_seconds: float = Field(
        2.0, ge=0, description="After SIGTERM, files at work have so long to be finished; `ray job stop` allows 3."
    )
