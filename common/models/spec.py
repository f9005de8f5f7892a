"""What a model is, as data: an entry of a catalog or of a user's YAML, and what its files say."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from common.config import StrictModel, fingerprint

OPENAI_MEAN, OPENAI_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Of red, green and blue in 0..1, in OpenAI's data: what most CLIPs are given (open_clip constants.py)."""


class Geometry(StrictModel):
    """How a picture becomes a square of pixels; everything else (mean, standard deviation) happens on the device.

    Teachers that share a geometry share one prepared uint8 tensor.
    """

    size: int = Field(224, gt=0, description="Side of the square in pixels.")
    resize: Literal["shortest", "squash", "longest", "pad-square"] = Field(
        "shortest",
        description="shortest: resize the short side, then centre crop. squash: ignore the aspect. "
        "longest: resize the long side, then pad with black. "
        "pad-square: centre on a black square no smaller than the size, then resize (MedCLIP).",
    )
    resize_to: int | None = Field(None, gt=0, description="Short side before the crop, where it exceeds the size.")
    interpolation: Literal["bicubic", "bilinear"] = Field("bicubic", description="Resampling filter (Pillow).")
    crop_rounding: Literal["round", "floor"] = Field(
        "round",
        description="Where an odd leftover margin goes: torchvision rounds half to even, transformers floors.",
    )
    colour: Literal["rgb", "gray"] = Field("rgb", description="gray: one channel, as Pillow's mode L computes it.")

    @property
    def key(self) -> str:
        """A name that is equal exactly when the pixels are."""
        resize = self.resize if self.resize_to is None else f"{self.resize}{self.resize_to}"
        return f"{self.size}-{resize}-{self.interpolation}-{self.crop_rounding}-{self.colour}"

    @property
    def channels(self) -> int:
        """Values per pixel."""
        return 1 if self.colour == "gray" else 3


class Recipe(StrictModel):
    """How a model is run, where its own files do not say so, or say it wrongly; a field left out follows the files."""

    geometry: Geometry | None = Field(None, description="How a picture becomes pixels.")
    mean: tuple[float, float, float] | None = Field(None, description="Of pixels between 0 and 1, per channel.")
    std: tuple[float, float, float] | None = Field(None, description="Of pixels between 0 and 1, per channel.")
    tokenizer: str | None = Field(None, description="Hub repository or folder of the tokenizer, if not the model's.")
    context_length: int | None = Field(None, gt=0, description="Tokens a caption is padded and cut to.")
    activation: Literal["gelu", "quickgelu"] | None = Field(None, description="Of the native CLIP towers.")
    pool_heads: int | None = Field(None, gt=0, description="Heads of a CLIP ResNet's attention pool (PMC-CLIP).")
    pooling: Literal["cls", "pooler"] | None = Field(None, description="Which BERT output is projected (PMC-CLIP).")
    pads: Literal["dropped", "averaged"] | None = Field(
        None, description="Whether pad positions enter the mean over a caption's tokens (MedCLIP)."
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="Autocast type on a GPU; a CPU always computes in float32."
    )

    @model_validator(mode="after")
    def _resizes_before_a_crop(self) -> Recipe:
        shape = self.geometry
        side = None if shape is None else shape.resize_to
        if shape is not None and side is not None and (shape.resize != "shortest" or side < shape.size):
            raise ValueError(
                f"geometry.resize_to ({side}) is the short side before a crop: it goes with resize: shortest, and must "
                f"not be below the size ({shape.size})"
            )
        return self

    def changed(self, other: Recipe) -> Recipe:
        """This recipe with the fields that ``other`` states."""
        return self.model_copy(update={name: getattr(other, name) for name in other.model_fields_set})


class Expectation(StrictModel):
    """What a loaded model must turn out to be, above all where no tensor's shape would tell."""

    dim: int | None = Field(None, gt=0, description="Width of the embeddings.")
    image_size: int | None = Field(None, gt=0, description="Pixels.")
    patch_size: int | None = Field(None, gt=0, description="Pixels.")
    context_length: int | None = Field(None, gt=0, description="Tokens.")
    activation: Literal["gelu", "quickgelu", "relu"] | None = Field(None, description="Of the image tower.")
    image_heads: int | None = Field(None, gt=0, description="Attention heads of the image tower's first layer.")
    text_heads: int | None = Field(None, gt=0, description="Attention heads of the text tower.")


class Source(StrictModel):
    """Where the authors put the weights, beyond the name of a hub repository."""

    repo_type: Literal["model", "dataset"] = Field("model", description="Kind of hub repository.")
    files: tuple[str, ...] = Field((), description="The weight files; empty: what the family looks for.")
    sha256: dict[str, str] = Field(default_factory=dict, description="File -> sha256, where it is known.")
    url: str | None = Field(None, description="Where to download by hand or with fetch, when it is not on the hub.")


class ModelSpec(StrictModel):
    """One model of the catalog: what it is, which family loads it, from where, how, and under which terms."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$", description="Name used on the command line and in folders.")
    title: str | None = Field(None, description="The authors' name for it.")
    family: str = Field("open_clip", description="Loader family; see common/models/load.py.")
    hub_id: str | None = Field(None, description="Repository on the model hub.")
    revision: str | None = Field(None, description="Commit of the hub repository; pin it to make runs comparable.")
    source: Source = Source()
    path: str | None = Field(None, description="Local or fsspec folder (or checkpoint file); used instead of the hub.")
    architecture: str | None = Field(
        None, description="open_clip, timm or packaged architecture, or a JSON file, when the weights are a bare file."
    )
    pretrained: str | None = Field(None, description="open_clip pretrained tag of the architecture.")
    recipe: Recipe = Recipe()
    recipes: dict[str, Recipe] = Field(
        default_factory=dict, description="Rival recipes by name, each stating what it changes: NAME@RECIPE."
    )
    expect: Expectation = Expectation()
    license: str | None = Field(None, description="Licence of the weights, as far as known.")
    gated: bool | None = Field(None, description="Whether the hub asks for a login; None: not known.")
    derivatives: Literal["allowed", "conditional", "forbidden", "unknown"] = Field(
        "unknown", description="Whether a model may be trained on its outputs; the last two but one need consent."
    )
    derivative_terms: str | None = Field(None, description="What the terms say about models trained on its outputs.")
    golden: str | None = Field(None, description="Its name in MMKD-CLIP's published features.")
    needs: str | None = Field(
        None, description="Why no loader here serves it: one sentence, shown when it is asked for."
    )
    facts: dict[str, str] = Field(default_factory=dict, description="Source of each fact.")
    unverified: tuple[str, ...] = Field((), description="What could not be confirmed.")

    @model_validator(mode="after")
    def _has_a_place(self) -> ModelSpec:
        if self.needs is not None:
            return self
        if self.pretrained is not None and self.architecture is None:
            raise ValueError("pretrained needs an architecture")
        places = [self.hub_id, self.path, self.pretrained, self.source.url]
        if all(place is None for place in places):
            raise ValueError("give one of hub_id, path, source.url, or architecture with pretrained")
        if self.path is not None and self.pretrained is not None:
            raise ValueError("give either path or pretrained, not both")
        return self

    @property
    def needs_consent(self) -> bool:
        """Whether ``--accept-terms`` must name it before its outputs may train a student."""
        return self.derivatives in ("conditional", "forbidden")

    def at(self, path: str) -> ModelSpec:
        """The same model, with its files in a folder or file of the user's."""
        return self.model_copy(update={"path": path, "pretrained": None})

    def with_recipe(self, name: str) -> ModelSpec:
        """The same model under one of its rival recipes; its name says which, so that features never mix.

        Raises:
            KeyError: It has no recipe of that name.
        """
        changed = self.recipe.changed(self.recipes[name])
        expect = self.expect
        if changed.activation is not None and expect.activation in ("gelu", "quickgelu"):
            expect = expect.model_copy(update={"activation": changed.activation})
        return self.model_copy(update={"name": f"{self.name}.{name}", "recipe": changed, "expect": expect})


class ModelDescription(StrictModel):
    """What a model's files say, found without loading its weights; part of every fingerprint."""

    name: str
    family: str
    weights_sha256: str
    architecture: str
    settings: dict[str, str] = Field(default_factory=dict)
    """What the recipe decides beyond the other fields, such as pooling and activation."""
    geometry: Geometry
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    tokenizer_sha256: str | None
    """None: the model has no text tower."""
    context_length: int | None
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
