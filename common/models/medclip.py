"""The medclip family: MedCLIP's Swin transformer and Bio_ClinicalBERT, without its package.

The image is one gray channel on a black square (RyanWangZf/MedCLIP ``dataset.py`` 30-141); the caption's feature is the
mean over its tokens and over hidden states 1, 2 and last (``modeling_medclip.py`` 28-43). Upstream averages over pads
too, so that its features depend on the longest caption of the batch; here a caption counts its own tokens only, which
is what upstream gives for a caption alone (``pads: averaged`` pads to 77 and averages over all of it).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from common.config import fingerprint
from common.models.architectures import bert_config, two_towers
from common.models.dual_encoder import Tokenize
from common.models.encoder import Encoder
from common.models.expect import activation_of, check_expectation
from common.models.files import locate, tokenizer_folder, tokenizer_sha256, weights_sha256
from common.models.spec import Geometry, ModelDescription, ModelSpec
from common.models.tensors import Tensors, load_strictly, read_tensors, without
from common.models.tokenizing import PAD, load_bert_tokenizer

ARCHITECTURE = "medclip-vit"
"""The packaged architecture, for entries that name none."""
CONTEXT_LENGTH = 77
MEAN, STD = 0.5862785803043838, 0.27950088968644304
MAX_LOG_SCALE = 4.6052
PREFERRED = ("pytorch_model.safetensors", "pytorch_model.bin")
STRAY_ENDS = ("embeddings.position_ids", "relative_position_index")
SWIN_RENAMES = (  # names up to transformers 4 -> since 5, in this order: the last line is part of an earlier one
    ("attention.self.query.", "attention.q_proj."),
    ("attention.self.key.", "attention.k_proj."),
    ("attention.self.value.", "attention.v_proj."),
    (
        "attention.self.relative_position_bias_table",
        "attention.relative_position_bias.relative_position_bias_table",
    ),
    ("attention.output.dense.", "attention.o_proj."),
    ("intermediate.dense.", "mlp.fc1."),
    ("output.dense.", "mlp.fc2."),
)


class MedClip(nn.Module):
    """Both towers by the checkpoint's own names."""

    def __init__(self, architecture: dict[str, Any]) -> None:
        from transformers import BertModel, SwinConfig, SwinModel

        super().__init__()
        dim = int(architecture["embed_dim"])
        self.vision_model = _Tower(SwinModel(SwinConfig(**architecture["vision"])), dim)
        self.text_model = _Tower(BertModel(bert_config(architecture["text"])), dim)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))


class _Tower(nn.Module):
    def __init__(self, model: Any, dim: int) -> None:
        super().__init__()
        self.model = model
        self.projection_head = nn.Linear(getattr(model, "num_features", model.config.hidden_size), dim, bias=False)


def to_todays_names(tensors: Tensors) -> Tensors:
    """The published tensors by the names of transformers 5; those that are buffers no longer saved are left out."""
    found: Tensors = {}
    for name, value in without(tensors, suffixes=STRAY_ENDS).items():
        if name.startswith("vision_model.model."):
            for old, new in SWIN_RENAMES:
                name = name.replace(old, new)  # noqa: PLW2901 - the renames apply one after the other
        found[name] = value
    return found


def describe(spec: ModelSpec) -> ModelDescription:
    """Sizes of the architecture, the recipe's choices, and the checkpoint's hash."""
    files = locate(spec)
    architecture = two_towers(spec, files.folder, ARCHITECTURE)
    size = architecture["vision"]["image_size"]
    return ModelDescription(
        name=spec.name,
        family="medclip",
        weights_sha256=weights_sha256(files.weights(PREFERRED, spec.name), spec.name),
        architecture=f"medclip:{fingerprint(architecture)}",
        settings={"layers": "1,2,last", "pads": spec.recipe.pads or "dropped"},
        geometry=spec.recipe.geometry or Geometry(size=size, resize="pad-square", colour="gray"),
        mean=spec.recipe.mean or (MEAN, MEAN, MEAN),
        std=spec.recipe.std or (STD, STD, STD),
        tokenizer_sha256=tokenizer_sha256(tokenizer_folder(spec, files), spec.name, "lower case"),
        context_length=spec.recipe.context_length or CONTEXT_LENGTH,
        image_dim=architecture["embed_dim"],
        text_dim=architecture["embed_dim"],
        dtype=spec.recipe.dtype,
    )


def load_tokenizer(spec: ModelSpec) -> Tokenize:
    """Bio_ClinicalBERT's word pieces in lower case, padded and cut to 77."""
    folder = tokenizer_folder(spec, locate(spec, weights=False))
    return load_bert_tokenizer(folder, spec.recipe.context_length or CONTEXT_LENGTH)


def load(spec: ModelSpec) -> MedClipEncoder:
    """Rename and load strictly.

    Raises:
        ModelError: The checkpoint is missing or does not fit.
    """
    files = locate(spec)
    weights = files.weights(PREFERRED, spec.name)
    model = MedClip(two_towers(spec, files.folder, ARCHITECTURE))
    load_strictly(model, to_todays_names(read_tensors(weights, spec.name)), f"Model {spec.name!r}: {weights}")
    description = describe(spec)
    block = model.vision_model.model.encoder.layers[0].blocks[0]
    heads = {
        "image_heads": model.vision_model.model.config.num_heads[0],
        "text_heads": model.text_model.model.config.num_attention_heads,
    }
    found = {"patch_size": model.vision_model.model.config.patch_size, **heads}
    check_expectation(spec, description, {**found, "activation": activation_of(block.mlp.activation_fn)})
    log_scale = model.logit_scale.detach().clamp(0, MAX_LOG_SCALE)
    return MedClipEncoder(model, description, log_scale, lambda: load_tokenizer(spec))


class MedClipEncoder(Encoder):
    """Runs the module as the description's settings say."""

    def image_features(self, pixels_BCHW: torch.Tensor) -> torch.Tensor:
        """Standardised pixels, the one channel three times -> [B, D]."""
        tower = self.model.vision_model
        features_BD: torch.Tensor = tower.projection_head(tower.model(pixels_BCHW).pooler_output)
        return features_BD

    def text_features(self, tokens_BL: torch.Tensor) -> torch.Tensor:
        """Token ids -> [B, D]."""
        tower = self.model.text_model
        mask_BL = (tokens_BL != PAD).long()
        states = tower.model(input_ids=tokens_BL, attention_mask=mask_BL, output_hidden_states=True).hidden_states
        layers_BKLD = torch.stack([states[1], states[2], states[-1]], dim=1)
        if self.description.settings["pads"] == "averaged":
            token_mean_BKD = layers_BKLD.mean(dim=2)
        else:
            own_BL = mask_BL.to(layers_BKLD.dtype)
            token_sum_BKD = (layers_BKLD * own_BL[:, None, :, None]).sum(dim=2)
            token_mean_BKD = token_sum_BKD / own_BL.sum(dim=1).clamp_min(1)[:, None, None]
        features_BD: torch.Tensor = tower.projection_head(token_mean_BKD.mean(dim=1))
        return features_BD
