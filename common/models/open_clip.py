"""The open_clip family: built-in architectures, folders and repositories in open_clip's layout, bare checkpoints."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.config import fingerprint
from common.errors import ModelError
from common.models.architectures import model_architecture, packaged, text_tower
from common.models.dual_encoder import Tokenize
from common.models.encoder import Encoder
from common.models.expect import activation_of, check_expectation
from common.models.files import (
    ModelFiles,
    locate,
    needs_own_code,
    read_model_json,
    tokenizer_folder,
    tokenizer_sha256,
    weights_sha256,
)
from common.models.preprocessing import OPEN_CLIP_FIELDS, of_open_clip
from common.models.spec import ModelDescription, ModelSpec
from common.models.tensors import Tensors, load_strictly, read_tensors
from common.models.tokenizing import (
    check_tokenizer_code,
    clean_text,
    clip_tokenizer,
    loadable_folder,
    padded,
    pretrained_tokenizer,
)

if TYPE_CHECKING:
    import torch

CONFIG = "open_clip_config.json"
PREFERRED = (  # the order of open_clip.factory._find_checkpoint_in_dir
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pth",
    "model.safetensors",
)
DEFAULT_CONTEXT = 77


@dataclass(frozen=True)
class OpenClipFiles:
    """A model's configuration as its recipe has it, its checkpoint, and where both lie."""

    model_cfg: dict[str, Any]
    preprocess_cfg: dict[str, Any]
    files: ModelFiles | None
    """None: a built-in architecture with a tag or a file of its own."""
    tag_file: Path | None = None

    @property
    def text_cfg(self) -> dict[str, Any]:
        """The text tower's part of the configuration."""
        return dict(self.model_cfg.get("text_cfg", {}))

    @property
    def context_length(self) -> int:
        """Tokens per caption."""
        return int(self.text_cfg.get("context_length", DEFAULT_CONTEXT))

    def weights(self, model: str) -> Path:
        """The checkpoint file."""
        if self.files is None:
            assert self.tag_file is not None
            return self.tag_file
        return self.files.weights(PREFERRED, model)


def find_files(spec: ModelSpec, weights: bool = True) -> OpenClipFiles:
    """Resolve an entry to configuration and checkpoint, with its recipe's choices put into the configuration.

    Args:
        spec: The entry.
        weights: False when only the tokenizer is wanted: then a store's weights are not verified.

    Raises:
        ModelError: Something is missing, unknown or contradictory.
    """
    if spec.pretrained is not None and spec.architecture is not None:
        found = _built_in(spec, spec.architecture, spec.pretrained)
    else:
        files = locate(spec, weights)
        if files.has(CONFIG):
            config = read_model_json(files.folder, CONFIG, spec.name)
            found = OpenClipFiles(config.get("model_cfg", config), config.get("preprocess_cfg", {}), files)
        else:
            config = architecture_config(spec, files.folder)
            found = OpenClipFiles(config["model_cfg"], config.get("preprocess_cfg", {}), files)
    return OpenClipFiles(_with_recipe(found.model_cfg, spec), found.preprocess_cfg, found.files, found.tag_file)


def architecture_config(spec: ModelSpec, folder: Path | None = None) -> dict[str, Any]:
    """``model_cfg`` (and perhaps ``preprocess_cfg``) of the architecture an entry names, or its store folder keeps.

    Raises:
        ModelError: It names none, or one that nobody knows.
    """
    if spec.architecture is None:
        raise ModelError(
            f"Model {spec.name!r}: there is no {CONFIG} beside the weights and the entry names no architecture. State "
            "architecture: (such as ViT-B-16) in the catalog YAML."
        )
    config = model_architecture(spec, folder)
    if config is not None:
        if "model_cfg" not in config:
            raise ModelError(f"Model {spec.name!r}: the architecture {spec.architecture} has no model_cfg.")
        return config
    import open_clip

    model_cfg = open_clip.get_model_config(spec.architecture)
    if model_cfg is None:
        raise ModelError(
            f"Model {spec.name!r}: open_clip knows no architecture {spec.architecture!r}, and it is neither a JSON "
            f"file nor one of {', '.join(packaged())}."
        )
    return {"model_cfg": model_cfg}


def _built_in(spec: ModelSpec, architecture: str, pretrained: str) -> OpenClipFiles:
    import open_clip

    config = architecture_config(spec)
    model_cfg = config["model_cfg"]
    if Path(pretrained).is_file():
        return OpenClipFiles(model_cfg, config.get("preprocess_cfg", {}), None, Path(pretrained))
    tag_cfg = open_clip.get_pretrained_cfg(architecture, pretrained)
    if not tag_cfg:
        known = ", ".join(open_clip.list_pretrained_tags_by_model(architecture)) or "none"
        raise ModelError(
            f"Model {spec.name!r}: {pretrained!r} is neither a file nor a pretrained tag of "
            f"{architecture} (known tags: {known})."
        )
    if bool(tag_cfg.get("quick_gelu")) != bool(model_cfg.get("quick_gelu")):
        raise ModelError(
            f"Model {spec.name!r}: the weights {pretrained!r} were trained with "
            f"{'QuickGELU' if tag_cfg.get('quick_gelu') else 'GELU'} and the architecture {architecture} uses "
            f"the other. Name the architecture {_other_activation(architecture)} instead."
        )
    try:
        weights = Path(open_clip.download_pretrained(tag_cfg))
    except (OSError, RuntimeError, ValueError) as error:
        raise ModelError(
            f"Model {spec.name!r}: the weights {architecture}/{pretrained} could not be fetched "
            f"({type(error).__name__}: {error}). Check the network, or give a file as pretrained."
        ) from error
    preprocess = {name: value for name, value in tag_cfg.items() if name in OPEN_CLIP_FIELDS}  # beside url and the like
    return OpenClipFiles(model_cfg, preprocess, None, weights)


def _other_activation(architecture: str) -> str:
    suffix = "-quickgelu"
    return architecture.removesuffix(suffix) if architecture.endswith(suffix) else architecture + suffix


def _with_recipe(model_cfg: dict[str, Any], spec: ModelSpec) -> dict[str, Any]:
    """The configuration in today's words, with the activation and context length that the recipe states."""
    config = copy.deepcopy(model_cfg)
    text = config.setdefault("text_cfg", {})
    # BiomedCLIP's first revisions use the names of open_clip 2.x.
    for old, new in (("proj", "hf_proj_type"), ("pooler_type", "hf_pooler_type")):
        if old in text and "hf_model_name" in text:
            text[new] = text.pop(old)
    if spec.recipe.activation is not None:
        config["quick_gelu"] = spec.recipe.activation == "quickgelu"
    if spec.recipe.context_length is not None:
        text["context_length"] = spec.recipe.context_length
    return config


def describe(spec: ModelSpec) -> ModelDescription:
    """Read geometry, constants and sizes from the configuration, and hash the checkpoint."""
    return describe_files(spec, find_files(spec))


def describe_files(spec: ModelSpec, found: OpenClipFiles) -> ModelDescription:
    """The description of an open_clip model whose files have been found."""
    image_size, recipe = found.model_cfg.get("vision_cfg", {}).get("image_size"), spec.recipe
    where = f"preprocess_cfg of {found.files.folder / CONFIG if found.files else spec.architecture}"
    pixels = of_open_clip(found.preprocess_cfg, image_size, recipe, spec.name, where)
    _check_tower_code(spec, found)
    return ModelDescription(
        name=spec.name,
        family=spec.family,
        weights_sha256=weights_sha256(found.weights(spec.name), spec.name),
        architecture=f"open_clip:{fingerprint(_whole_architecture(found))}",
        geometry=pixels.geometry,
        mean=pixels.mean,
        std=pixels.std,
        tokenizer_sha256=_tokenizer_sha256(spec, found),
        context_length=found.context_length,
        image_dim=int(found.model_cfg["embed_dim"]),
        text_dim=int(found.model_cfg["embed_dim"]),
        dtype=recipe.dtype,
    )


def _check_tower_code(spec: ModelSpec, found: OpenClipFiles) -> None:
    """Refuse a text tower that only its authors' own Python can build: open_clip would let transformers ask for it.

    Raises:
        ModelError: It is one.
    """
    named = found.text_cfg.get("hf_model_name")
    tower = Path(text_tower(named, found.files.folder if found.files else None)) if named else None
    if tower is None or not tower.exists():
        return
    file = tower / "config.json" if tower.is_dir() else tower
    if "auto_map" not in read_model_json(file.parent, file.name, spec.name):
        return
    from transformers import MODEL_MAPPING, AutoConfig

    try:
        known = type(AutoConfig.from_pretrained(file, trust_remote_code=False)) in MODEL_MAPPING
    except ValueError:
        known = False
    if not known:
        raise needs_own_code(file, spec.name)


def _whole_architecture(found: OpenClipFiles) -> dict[str, Any]:
    """The configuration with the content of its text tower's in place of a name: heads, say, stand only there."""
    config, text = copy.deepcopy(found.model_cfg), found.text_cfg
    if "hf_model_name" in text:
        tower = Path(text_tower(text["hf_model_name"], found.files.folder if found.files else None))
        if tower.is_file():
            config["text_cfg"]["hf_model_name"] = read_model_json(tower.parent, tower.name, "text tower")
    return config


def _tokenizer_sha256(spec: ModelSpec, found: OpenClipFiles) -> str:
    text = found.text_cfg
    named = text.get("hf_tokenizer_name") or text.get("hf_model_name")
    settings = [named is not None, text.get("tokenizer_kwargs"), text.get("tokenizer_mode")]
    if named is None:
        return fingerprint(["clip-bpe", settings])
    if found.files is None:
        return fingerprint([named, settings])
    folder = tokenizer_folder(spec, found.files, named)
    check_tokenizer_code(folder, spec.name)
    return tokenizer_sha256(folder, spec.name, settings)


def load_tokenizer(spec: ModelSpec) -> Tokenize:
    """The tokenizer open_clip itself would choose for the model."""
    found = find_files(spec, weights=False)
    text = found.text_cfg
    named = text.get("hf_tokenizer_name") or text.get("hf_model_name")
    if named is None:
        settings = text.get("tokenizer_kwargs")
        return _stock_byte_pairs(found, settings) if settings else clip_tokenizer(found.context_length)
    if found.files is None:
        return _stock_tokenizer(str(spec.architecture), found, None)
    folder = loadable_folder(tokenizer_folder(spec, found.files, named))
    if text.get("tokenizer_kwargs") or text.get("tokenizer_mode"):
        return _stock_tokenizer(str(folder), found, text)
    return padded(pretrained_tokenizer(folder), found.context_length, clean_text)


def _stock_tokenizer(place: str, found: OpenClipFiles, text: dict[str, Any] | None) -> Tokenize:
    """open_clip's own, for settings that only it knows: of a built-in architecture, or of a folder with ``text``."""
    import open_clip
    from open_clip.tokenizer import HFTokenizer

    if text is None:
        tokenizer = open_clip.get_tokenizer(place, context_length=found.context_length)
    else:
        mode = {"tokenizer_mode": text["tokenizer_mode"]} if text.get("tokenizer_mode") else {}
        # Last, so that no file can allow its own code to run.
        settings = {**mode, **(text.get("tokenizer_kwargs") or {}), "trust_remote_code": False}
        tokenizer = HFTokenizer(place, context_length=found.context_length, **settings)
    return lambda captions: tokenizer(captions).numpy().astype("int32")


def _stock_byte_pairs(found: OpenClipFiles, settings: dict[str, Any]) -> Tokenize:
    """open_clip's own byte pairs, with settings such as another cleaning of captions."""
    import open_clip

    tokenizer = open_clip.SimpleTokenizer(context_length=found.context_length, **settings)
    return lambda captions: tokenizer(captions).numpy().astype("int32")


def build(model_cfg: dict[str, Any], folder: Path | None = None) -> Any:
    """An open_clip model with random weights, as ``open_clip.create_model`` would make it, but without the hub.

    Args:
        model_cfg: open_clip's own configuration; a text tower's comes from this package where it has one.
        folder: The model's folder, which may hold its text tower's configuration.
    """
    import open_clip

    config = copy.deepcopy(model_cfg)
    custom = config.pop("custom_text", False)
    if "timm_model_name" in config["vision_cfg"]:
        config["vision_cfg"]["timm_model_pretrained"] = False
    if "hf_model_name" in config["text_cfg"]:
        custom = True
        config["text_cfg"]["hf_model_name"] = text_tower(config["text_cfg"]["hf_model_name"], folder)
        config["text_cfg"]["hf_model_pretrained"] = False
    if "multimodal_cfg" in config:
        return open_clip.CoCa(**config)
    return open_clip.CustomTextCLIP(**config) if custom else open_clip.CLIP(**config)


def load(spec: ModelSpec) -> OpenClipEncoder:
    """Load strictly, on the CPU, in eval mode.

    Raises:
        ModelError: The checkpoint does not fit the architecture, or is not a plain tensor file.
    """
    found = find_files(spec)
    return load_found(spec, found, read_tensors(found.weights(spec.name), spec.name))


def load_found(spec: ModelSpec, found: OpenClipFiles, tensors: Tensors) -> OpenClipEncoder:
    """Build a model and fill it with tensors by open_clip's names, or by those of an older open_clip."""
    weights = found.weights(spec.name)
    _check_tower_code(spec, found)
    try:
        model = build(found.model_cfg, found.files.folder if found.files else None)
    except (RuntimeError, ValueError, TypeError, KeyError, AssertionError, OSError) as error:
        raise ModelError(
            f"Model {spec.name!r}: open_clip cannot build the architecture of {weights}: {type(error).__name__}: "
            f"{' '.join(str(error).split())[:500]}"
        ) from error
    load_strictly(model, todays_names(model, tensors), f"Model {spec.name!r}: {weights}")
    description = describe_files(spec, found)
    check_expectation(spec, description, inspect(model))
    return OpenClipEncoder(model, description, model.logit_scale, lambda: load_tokenizer(spec))


def todays_names(model: Any, tensors: Tensors) -> Tensors:
    """What ``open_clip.load_checkpoint`` mends in older and foreign layouts; nothing is resized, unlike there."""
    from open_clip.convert import convert_state_dict
    from open_clip.model import convert_to_custom_text_state_dict

    found: Tensors = dict(convert_state_dict(model, tensors))
    if "positional_embedding" in found and not hasattr(model, "positional_embedding"):
        found = convert_to_custom_text_state_dict(found)
    for name in ("logit_scale", "logit_bias"):
        if name in found and getattr(model, name, None) is not None:
            found[name] = found[name].reshape(getattr(model, name).shape)
    # Saved by transformers up to 4.30; BiomedCLIP's file holds it.
    found.pop("text.transformer.embeddings.position_ids", None)
    return found


def inspect(model: Any) -> dict[str, Any]:
    """What the towers are like inside, by the names of ``Expectation``."""
    found: dict[str, Any] = {}
    visual = model.visual
    blocks = getattr(getattr(visual, "transformer", None), "resblocks", None)
    trunk = getattr(getattr(visual, "trunk", None), "blocks", None)
    if blocks is not None:
        found |= {"image_heads": blocks[0].attn.num_heads, "activation": activation_of(blocks[0].mlp.gelu)}
        found["patch_size"] = visual.conv1.kernel_size[0]
    elif trunk is not None:
        found |= {"image_heads": trunk[0].attn.num_heads, "activation": activation_of(trunk[0].mlp.act)}
        found["patch_size"] = visual.trunk.patch_embed.patch_size[0]
    elif hasattr(visual, "attnpool"):
        found |= {"image_heads": visual.attnpool.num_heads, "activation": "relu"}
    text = getattr(model, "text", model)
    tower = text.transformer
    if hasattr(tower, "resblocks"):
        found["text_heads"] = tower.resblocks[0].attn.num_heads
    elif hasattr(tower, "config"):
        found["text_heads"] = getattr(tower.config, "num_attention_heads", None)
    return found


class OpenClipEncoder(Encoder):
    """A dual encoder around an open_clip model."""

    def image_features(self, pixels_BCHW: torch.Tensor) -> torch.Tensor:
        """Standardised pixels -> [B, D]."""
        features_BD: torch.Tensor = self.model.encode_image(pixels_BCHW, normalize=False)
        return features_BD

    def text_features(self, tokens_BL: torch.Tensor) -> torch.Tensor:
        """Token ids -> [B, D]."""
        features_BD: torch.Tensor = self.model.encode_text(tokens_BL, normalize=False)
        return features_BD
