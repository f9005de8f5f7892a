"""What a model is, as data: an entry of a catalog or of a user's YAML, and what its files say."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from common.config import StrictModel, fingerprint


class Geometry(StrictModel):
    """How a picture becomes a square of pixels; everything else (mean, standard deviation) happens on the device.

    Teachers that share a geometry share one prepared uint8 tensor.
    """

    size: int = Field(224, gt=0, description="Side of the square in pixels.")
    resize: Literal["shortest", "squash", "longest"] = Field(
        "shortest",
        description="shortest: resize the short side, then centre crop. squash: ignore the aspect. "
        "longest: resize the long side, then pad with black.",
    )
    interpolation: Literal["bicubic", "bilinear"] = Field("bicubic", description="Resampling filter (Pillow).")
    crop_rounding: Literal["round", "floor"] = Field(
        "round",
        description="Where an odd leftover margin goes: torchvision rounds half to even, transformers floors.",
    )

    @property
    def key(self) -> str:
        """A name that is equal exactly when the pixels are."""
        return f"{self.size}-{self.resize}-{self.interpolation}-{self.crop_rounding}"


class ModelSpec(StrictModel):
    """One model of the catalog: which family loads it, from where, and under which terms."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$", description="Name used on the command line and in folders.")
    family: str = Field("open_clip", description="Loader family; see common/models/load.py.")
    hub_id: str | None = Field(None, description="Repository on the model hub.")
    revision: str | None = Field(None, description="Commit of the hub repository; pin it to make runs comparable.")
    path: str | None = Field(None, description="Local or fsspec folder (or checkpoint file) instead of a hub id.")
    architecture: str | None = Field(None, description="open_clip architecture, when the checkpoint is a bare file.")
    pretrained: str | None = Field(None, description="open_clip pretrained tag of the architecture.")
    geometry: Geometry | None = Field(None, description="Only to override what the model's own files say.")
    mean: tuple[float, float, float] | None = Field(None, description="Only to override the model's own constants.")
    std: tuple[float, float, float] | None = Field(None, description="Only to override the model's own constants.")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="Autocast type on a GPU; a CPU always computes in float32."
    )
    license: str | None = Field(None, description="Licence of the weights, as far as known.")
    derivative_terms: str | None = Field(None, description="What the terms say about models trained on its outputs.")
    facts: dict[str, str] = Field(default_factory=dict, description="Source of each fact, and what is unverified.")

    @model_validator(mode="after")
    def _has_a_place(self) -> ModelSpec:
        places = [self.hub_id, self.path, self.pretrained and self.architecture]
        if sum(place is not None for place in places) != 1:
            raise ValueError("give exactly one of hub_id, path, or architecture with pretrained")
        return self


class ModelDescription(StrictModel):
    """What a model's files say, found without loading its weights; part of every fingerprint."""

    name: str
    family: str
    weights_sha256: str
    architecture: str
    geometry: Geometry
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    tokenizer_sha256: str
    context_length: int
    image_dim: int | None
    text_dim: int | None
    dtype: str

    @property
    def tokenizer_key(self) -> str:
        """Equal exactly when token ids are, so that teachers can share them."""
        return fingerprint([self.family, self.tokenizer_sha256, self.context_length])

    def identity(self) -> dict[str, Any]:
        """Everything that determines the embeddings, as JSON-able values."""
        return self.model_dump(mode="json", exclude={"name"})
