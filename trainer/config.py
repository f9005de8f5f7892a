"""Settings of the training half, one class per step, in the order of the flow: select, train, evaluate, export."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from common.config import StrictModel


class SelectConfig(StrictModel):
    """Which teachers may speak for a sample, from how well they match its image with its caption."""

    teachers: tuple[str, ...] = Field((), description="Empty means all teachers with embeddings in the lake.")
    min_skill: float = Field(
        0.6,
        ge=0,
        le=1,
        description="A teacher speaks for a modality only if, there, the true caption beats a random other one this "
        "often (0.5 is chance). Raise it when teachers speak outside their field.",
    )
    keep_fraction: float = Field(
        0.74,
        gt=0,
        le=1,
        description="Share of a teacher's samples kept in a modality, best matched cosine first. The paper: 0.74.",
    )
    max_rank_fraction: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Drop a sample for a teacher when its true caption ranks below this share of the candidates. "
        "Lower it on data whose captions are specific; generic captions rank badly through no fault of the picture.",
    )
    keep_one: bool = Field(
        False,
        description="Where no teacher may speak for a sample, admit the competent one whose cosine ranks highest among "
        "its own.",
    )
    candidates: PositiveInt = Field(
        1000, description="Captions of the same modality each true caption is ranked among."
    )
    seed: int = Field(0, description="Which captions are sampled as candidates.")


class AutoencoderConfig(StrictModel):
    """The paper's shared autoencoder; what its authors do not publish is marked so."""

    latent_dim: PositiveInt = Field(512, description="Width of the common space: the student's. The paper: 512.")
    hidden_dim: PositiveInt = Field(1024, description="Width of the shared branches. Not published.")
    dropout: float = Field(0.2, ge=0, lt=1, description="In the branches' encoders. The paper's code: 0.2.")
    noise: float = Field(0.01, ge=0, description="Deviation of the noise on latent vectors. The paper's code: 0.01.")
    lr: float = Field(1e-3, gt=0, description="Learning rate of Adam. Not published.")
    epochs: PositiveInt = Field(10, description="Passes over the train rows. Not published.")
    batch_size: PositiveInt = Field(256, description="Rows per step, within a shard. Not published.")


class AlignConfig(StrictModel):
    """Maps that bring teachers' vectors into spaces in which stage 2 can learn them."""

    recipe: Literal["paper", "standardise", "none"] = Field(
        "standardise",
        description="paper: one space for all teachers by a linear autoencoder, for distill.feature and distill.cross. "
        "standardise: PHI-S, each teacher's pictures and captions in spaces of their own with mean 0 and variance 1, "
        "for distill.heads. none: no maps; how far the teachers agree as they are.",
    )
    teachers: tuple[str, ...] = Field((), description="Empty means every teacher of the selection.")
    selection: str | None = Field(None, description="Fingerprint of the selection; None takes the newest.")
    autoencoder: AutoencoderConfig = AutoencoderConfig()
    sample_rows: PositiveInt = Field(1000, description="Train rows by which the change is described.")
    seed: int = Field(0, description="Of the autoencoder's weights, order and dropout, and of the sample.")


class ModelConfig(StrictModel):
    """The student's architecture and where its first weights come from."""

    architecture: str = Field(
        "ViT-B-16",
        description="An open_clip architecture name, mmkd-b16 (the paper's student), or a folder with "
        "open_clip_config.json (and tokenizer files).",
    )
    tokenizer: str | None = Field(
        None,
        description="Folder with the tokenizer's files, where the architecture's is neither open_clip's nor cached.",
    )
    weights: str | None = Field(
        None, description="open_clip pretrained tag or checkpoint file (MMKD_B16.pth too); None starts from random."
    )
    vision_weights: str | None = Field(
        None,
        description="Image tower alone, from a CLIP checkpoint file or ARCHITECTURE/TAG. The paper: MetaCLIP's "
        "ViT-B-16-quickgelu/metaclip_400m.",
    )
    text_weights: str | None = Field(
        None, description="Text tower alone, from a BERT's checkpoint file or folder. The paper: BiomedBERT."
    )
    weights_license: str | None = Field(
        None, description="Licence of these first weights, for the student's card. Known of MetaCLIP's tags."
    )


class OptimConfig(StrictModel):
    """AdamW with linear warm-up and cosine decay."""

    lr: float = Field(5e-4, gt=0, description="Peak learning rate. The paper: 5e-5 in stage 1, 1e-6 in stage 2.")
    weight_decay: float = Field(0.2, ge=0, description="Applied to matrices only, not to biases, norms and scalars.")
    beta1: float = Field(0.9, ge=0, lt=1, description="Rarely changed.")
    beta2: float = Field(0.98, ge=0, lt=1, description="Raise towards 0.999 for small batches.")
    epsilon: float = Field(1e-6, gt=0, description="Rarely changed.")
    warmup_steps: int = Field(100, ge=0, description="Steps of linear warm-up. The paper: 2000.")
    clip_norm: float | None = Field(1.0, gt=0, description="Gradients longer than this are shortened; null: none is.")


class DataConfig(StrictModel):
    """Which samples, in which order, with which augmentation."""

    batch_size: PositiveInt = Field(256, description="Global batch: samples per optimiser step over all workers.")
    lanes: PositiveInt = Field(
        4,
        description="The epoch is cut into this many independent streams, dealt to the workers; the order does not "
        "depend on the number of workers. Must be a multiple of the workers and divide batch_size.",
    )
    shuffle_shards: PositiveInt = Field(2, description="Shards whose rows are shuffled together; more costs memory.")
    crop_scale: float = Field(
        0.9, gt=0, le=1, description="Least area share of the random crop; 1 turns augmentation off."
    )
    tasks: PositiveInt = Field(
        2, description="Decode tasks in flight per worker; raise it when training waits for data."
    )
    seed: int = Field(0, description="Order, crops and caption draws follow from it.")

    @model_validator(mode="after")
    def _lanes_divide_the_batch(self) -> DataConfig:
        if self.batch_size % self.lanes:
            raise ValueError(f"batch_size {self.batch_size} is not a multiple of lanes {self.lanes}")
        return self


class ScaleConfig(StrictModel):
    """Where the training runs, and how often it saves and to whom it reports."""

    workers: PositiveInt = Field(1, description="Ray Train workers; with GPUs, one each.")
    max_workers: PositiveInt | None = Field(
        None,
        description="Elastic: at least scale.workers and up to this many, as the cluster has room; at every change the "
        "run goes on from its last checkpoint. data.lanes must be a multiple of each number in between.",
    )
    use_gpu: bool | None = Field(None, description="None: use GPUs when the cluster has them.")
    cpus_per_worker: float = Field(1.0, gt=0, description="CPUs reserved for each worker beside the decode tasks.")
    threads: int = Field(
        0, ge=0, description="torch threads per worker on a CPU; 0 takes the cores that decoding leaves."
    )
    compile: bool = Field(
        False,
        description="Let torch.compile make the student's kernels: a minute or more at each start, faster steps after.",
    )
    accumulate: PositiveInt = Field(1, description="Micro-batches per step, for batches that do not fit the device.")
    checkpoint_every: PositiveInt = Field(500, description="Steps between checkpoints.")
    checkpoint_minutes: PositiveFloat = Field(5.0, description="A checkpoint at least so often, whatever the steps.")
    keep_checkpoints: PositiveInt = Field(2, description="Newest checkpoints kept, beside the best one.")
    log_every: PositiveInt = Field(10, description="Steps between metric rows.")
    track: tuple[Literal["tensorboard", "mlflow", "wandb"], ...] = Field(
        ("tensorboard",),
        description="Where metric rows go beside metrics.jsonl: tensorboard writes event files into the run's folder; "
        "mlflow and wandb (to be installed beside) are configured by their own environment variables.",
    )
    max_bad_steps: PositiveInt = Field(
        3, description="Steps in a row with a loss that is not finite, each skipped, after which the run stops."
    )
    max_failures: int = Field(2, ge=0, description="How often a lost worker group is restarted from its checkpoint.")


class Stage1Config(StrictModel):
    """Contrastive pre-training on the pairs."""

    loss: Literal["clip", "siglip"] = Field(
        "clip", description="siglip judges each pairing by itself, which suits small batches; the paper: clip."
    )

    model: ModelConfig = ModelConfig()
    optim: OptimConfig = OptimConfig()
    data: DataConfig = DataConfig()
    scale: ScaleConfig = ScaleConfig()
    epochs: PositiveInt = Field(20, description="Passes over the train split. The paper: 20.")
    init_temperature: float = Field(0.07, gt=0, description="Start of the learned softmax temperature.")


class DistillConfig(StrictModel):
    """Weights of the stage-2 loss terms; each term is logged by name."""

    contrastive: float = Field(1.0, ge=0, description="CLIP loss on the pairs.")
    image_text: float = Field(3.0, ge=0, description="Image-text similarity matrix of the teachers, both directions.")
    image_image: float = Field(3.0, ge=0, description="Image-image similarity matrix of the teachers.")
    text_text: float = Field(3.0, ge=0, description="Text-text similarity matrix of the teachers.")
    graph: float = Field(
        0.0,
        ge=0,
        description="Each sample finds itself in each teacher's graph of similarities by its edges (LVM-Med).",
    )
    queue: int = Field(
        0,
        ge=0,
        description="Samples of the last steps that the similarity terms compare with beside the batch's own, for "
        "batches that are small.",
    )
    teacher_scale: Literal["own", "fitted"] | Annotated[float, Field(gt=0)] = Field(
        "fitted",
        description="Factor on teacher cosines before softmax. own: each teacher's logit scale. fitted: for each "
        "teacher the one by which it tells the train pairs it may speak for apart best, batch_size (at most 2048) at a "
        "time. Or a number for all.",
    )
    heads: float = Field(
        3.0, ge=0, description="Each teacher's vectors, through a head of its own that is thrown away after training."
    )
    head_smooth: float = Field(
        0.1, ge=0, le=1, description="Share of the smooth L1 distance in a head's error; the rest is on the cosine."
    )
    drop_teachers: float = Field(
        0.0, ge=0, lt=1, description="Chance that a head is left out for a sample; the worst one always stays."
    )
    feature: float = Field(
        0.0,
        ge=0,
        description="Squared error to the vectors of one teacher drawn for each sample, which must be of the student's "
        "width. The paper: 50.",
    )
    cross: float = Field(
        0.0, ge=0, description="Contrastive loss between the student and the drawn teacher, crosswise. The paper: 1."
    )
    cross_scale: Literal["learned", "constant"] = Field(
        "learned",
        description="constant: ln(1/0.07) itself as the factor, never trained, as in the paper's code; learned: its "
        "exponential, trained.",
    )
    target_length: Literal["unit", "stored"] = Field(
        "unit",
        description="Of the vectors for feature and cross. stored: with an alignment as they come out of it, else as "
        "they were before they were stored, so that longer ones weigh more, as in the paper's code.",
    )

    @model_validator(mode="after")
    def _a_queue_has_a_use(self) -> DistillConfig:
        if self.queue and not (self.image_text or self.image_image or self.text_text):
            raise ValueError(
                f"queue {self.queue} changes nothing while image_text, image_image and text_text are all 0; weigh one "
                "of them or set queue to 0"
            )
        return self


class Stage2Config(StrictModel):
    """Distillation from stored embeddings, starting from a stage-1 checkpoint."""

    teachers: tuple[str, ...] = Field((), description="Empty means every teacher of the selection.")
    selection: str | None = Field(None, description="Fingerprint of the selection; None takes the newest.")
    alignment: str | None = Field(
        None,
        description="Fingerprint of an alignment (`mmkd align`), or newest; heads, feature and cross then see the "
        "aligned vectors. None: the teachers' own.",
    )
    views: Literal["clean", "stored"] = Field(
        "clean",
        description="stored: the student sees one of the crops that `mmkd extract --views K` stored, drawn anew each "
        "epoch, with the teachers' vectors of that very crop. clean: a random crop by data.crop_scale, with the "
        "teachers' vectors of the whole picture.",
    )
    distill: DistillConfig = DistillConfig()
    optim: OptimConfig = OptimConfig()
    data: DataConfig = DataConfig()
    scale: ScaleConfig = ScaleConfig()
    epochs: PositiveInt = Field(20, description="Passes over the admitted train samples. The paper: 20.")


class EvaluateConfig(StrictModel):
    """What is measured, on which samples."""

    tasks: tuple[Literal["zero_shot", "retrieval"], ...] = Field(
        ("zero_shot", "retrieval"), description="zero_shot needs labels; retrieval needs captions."
    )
    split: Literal["train", "val", "test"] = Field("test", description="Choose settings on val, report test.")
    templates: str | None = Field(None, description="YAML file of prompt templates; None uses the packaged ones.")
    captions: Literal["all", "main"] = Field(
        "all", description="Captions that take part in retrieval; main when a sample's further ones are too generic."
    )
    bootstraps: PositiveInt = Field(1000, description="Resamples behind each 95 % interval.")
    batch_size: PositiveInt = Field(64, description="Pictures or captions per forward pass.")
    limit: int | None = Field(None, gt=0, description="Only the first samples, for a quick look.")
    seed: int = Field(0, description="Of the bootstrap.")
