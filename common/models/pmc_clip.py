"""The pmc_clip family: PMC-CLIP's CLIP ResNet-50 and PubMedBERT, in both distributions and under both recipes.

The authors' training code and their inference notebook contradict each other (heads of the attention pool, which BERT
output is projected), and no tensor's shape decides between them; ``recipe`` does. What both share: captions are padded
to 77 and the pads are attended to, and the projection is ``x @ text_projection``
(WeixiongLin/PMC-CLIP ``pmc_clip.py`` 66, 162-169; VectorInstitute/pmc-data-extraction ``pmc_clip.py``).
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import nn

from common.config import fingerprint
from common.models.architectures import bert_config, two_towers
from common.models.dual_encoder import Tokenize
from common.models.encoder import Encoder
from common.models.expect import check_expectation
from common.models.files import (
    CHECKPOINT_SUFFIXES,
    ModelFiles,
    locate,
    tokenizer_folder,
    tokenizer_sha256,
    weights_sha256,
)
from common.models.spec import OPENAI_MEAN, OPENAI_STD, Geometry, ModelDescription, ModelSpec
from common.models.tensors import Tensors, load_strictly, read_checkpoint, read_tensors, renamed, unwrap, without
from common.models.tokenizing import load_bert_tokenizer

ARCHITECTURE = "pmc-clip"
"""The packaged architecture, for entries that name none."""
CONTEXT_LENGTH = 77
HEAD_WIDTH = 64
NOTEBOOK_LOG_SCALE = 4.4292
"""The constant of the authors' notebook; the split files hold no scale."""
SPLIT = ("image_encoder(resnet50)", "text_encoder", "text_projection_layer")
PREFERRED = ("checkpoint.safetensors", "checkpoint.pt")
# Of the masked-language-modelling half, and of a text tower that was replaced; embeddings do not pass through them.
STRAY = ("positional_embedding", "ln_final.", "mlm_projection", "img_special_token", "fusion_module.")
STRAY_ENDS = ("embeddings.position_ids",)


class PmcClip(nn.Module):
    """Both towers by the full checkpoint's own names. B = batch, L = context length, D = width."""

    def __init__(self, architecture: dict[str, Any], pool_heads: int) -> None:
        from open_clip.modified_resnet import ModifiedResNet
        from transformers import BertModel

        super().__init__()
        dim, vision = int(architecture["embed_dim"]), architecture["vision"]
        self.visual = ModifiedResNet(
            vision["layers"], dim, pool_heads, image_size=vision["image_size"], width=vision["width"]
        )
        self.text_encoder = BertModel(bert_config(architecture["text"]))
        self.text_projection = nn.Parameter(torch.zeros(self.text_encoder.config.hidden_size, dim))
        self.logit_scale = nn.Parameter(torch.tensor(NOTEBOOK_LOG_SCALE))


def describe(spec: ModelSpec) -> ModelDescription:
    """Sizes of the architecture, the recipe's choices, and the hash of the checkpoint or of the three files."""
    files = locate(spec)
    architecture = two_towers(spec, files.folder, ARCHITECTURE)
    return ModelDescription(
        name=spec.name,
        family="pmc_clip",
        weights_sha256=_weights_sha256(files, spec.name),
        architecture=f"pmc_clip:{fingerprint(architecture)}",
        settings={
            "pool_heads": str(_pool_heads(spec, architecture)),
            "pooling": spec.recipe.pooling or "cls",
            "pads": "attended",
        },
        geometry=spec.recipe.geometry or Geometry(size=architecture["vision"]["image_size"]),
        mean=spec.recipe.mean or OPENAI_MEAN,
        std=spec.recipe.std or OPENAI_STD,
        tokenizer_sha256=tokenizer_sha256(tokenizer_folder(spec, files), spec.name, "lower case"),
        context_length=spec.recipe.context_length or CONTEXT_LENGTH,
        image_dim=architecture["embed_dim"],
        text_dim=architecture["embed_dim"],
        dtype=spec.recipe.dtype,
    )


def _pool_heads(spec: ModelSpec, architecture: dict[str, Any]) -> int:
    # Stock open_clip and the training code: width * 32 / 64.
    return spec.recipe.pool_heads or architecture["vision"]["width"] * 32 // HEAD_WIDTH


def _split_files(files: ModelFiles) -> tuple[Path, Path, Path] | None:
    """The three files of the split distribution, whatever they are stored as; None where they are not."""
    if files.file is not None:
        return None
    image, text, projection = (_stored_as(files.folder, stem) for stem in SPLIT)
    return (image, text, projection) if image and text and projection else None


def _stored_as(folder: Path, stem: str) -> Path | None:
    candidates = (folder / f"{stem}{end}" for end in CHECKPOINT_SUFFIXES)
    return next((file for file in candidates if file.is_file()), None)


def _weights_sha256(files: ModelFiles, model: str) -> str:
    split = _split_files(files)
    if split is None:
        return weights_sha256(files.weights(PREFERRED, model), model)
    return hashlib.sha256("".join(weights_sha256(file, model) for file in split).encode()).hexdigest()


def load_tokenizer(spec: ModelSpec) -> Tokenize:
    """PubMedBERT's word pieces, padded and cut to 77."""
    folder = tokenizer_folder(spec, locate(spec, weights=False))
    return load_bert_tokenizer(folder, spec.recipe.context_length or CONTEXT_LENGTH)


def load(spec: ModelSpec) -> PmcClipEncoder:
    """Load either distribution strictly.

    Raises:
        ModelError: A file is missing or does not fit.
    """
    files = locate(spec)
    split = _split_files(files)
    architecture = two_towers(spec, files.folder, ARCHITECTURE)
    model = PmcClip(architecture, _pool_heads(spec, architecture))
    if split is not None:
        where, tensors = f"Model {spec.name!r}: {files.folder}", _read_split(split, spec.name)
    else:
        weights = files.weights(PREFERRED, spec.name)
        where, tensors = f"Model {spec.name!r}: {weights}", without(read_tensors(weights, spec.name), STRAY, STRAY_ENDS)
    load_strictly(model, tensors, where)
    description = describe(spec)
    found = {"image_heads": model.visual.attnpool.num_heads, "activation": "relu"}
    check_expectation(spec, description, {**found, "text_heads": model.text_encoder.config.num_attention_heads})
    return PmcClipEncoder(model, description, model.logit_scale, lambda: load_tokenizer(spec))


def _read_split(split: tuple[Path, Path, Path], model: str) -> Tensors:
    """The three files as one state dict by the full checkpoint's names."""
    image, text, projection = split
    content = read_checkpoint(projection, model)
    if not isinstance(content, torch.Tensor):
        content = next(iter(unwrap(content, str(projection)).values()))
    return {
        **renamed(read_tensors(image, model), "", "visual."),
        **without(renamed(read_tensors(text, model), "", "text_encoder."), suffixes=STRAY_ENDS),
        "text_projection": content,
        "logit_scale": torch.tensor(NOTEBOOK_LOG_SCALE),
    }


class PmcClipEncoder(Encoder):
    """Runs the module as the description's settings say."""

    def image_features(self, pixels_BCHW: torch.Tensor) -> torch.Tensor:
        """Standardised pixels -> [B, D]."""
        features_BD: torch.Tensor = self.model.visual(pixels_BCHW)
        return features_BD

    def text_features(self, tokens_BL: torch.Tensor) -> torch.Tensor:
        """Token ids -> [B, D]; pads are attended to, as in training."""
        out = self.model.text_encoder(input_ids=tokens_BL, attention_mask=torch.ones_like(tokens_BL))
        pooler = self.description.settings["pooling"] == "pooler"
        chosen_BD = out.pooler_output if pooler else out.last_hidden_state[:, 0]
        features_BD: torch.Tensor = chosen_BD @ self.model.text_projection
        return features_BD
