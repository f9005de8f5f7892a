"""The demo's models as plain open_clip configurations: small enough to train in seconds on two CPU cores."""

from typing import Any

CONTEXT_LENGTH = 20
MEAN = (0.5, 0.5, 0.5)
STD = (0.25, 0.25, 0.25)

# timm's half-million-weight residual network. With average pooling it learns these pictures several times faster than
# open_clip's own ModifiedResNet or a vision transformer of the same cost.
IMAGE_TOWER = "test_resnet"


def small_clip(vocab_size: int, embed_dim: int, text_width: int = 64, image_size: int = 64) -> dict[str, Any]:
    """A CLIP with timm's small residual network and a one-layer text transformer, for `open_clip.CLIP(**config)`.

    Args:
        vocab_size: The number of tokens of the tokenizer that goes into the model folder.
        embed_dim: The width of the embeddings.
        text_width: The width of the text transformer, a multiple of 32.
        image_size: The side of the pictures.
    """
    vision = {"timm_model_name": IMAGE_TOWER, "timm_pool": "avg", "timm_proj": "linear", "image_size": image_size}
    return {"embed_dim": embed_dim, "vision_cfg": vision, "text_cfg": _text(vocab_size, text_width, layers=1)}


def model_folder_config(model: dict[str, Any]) -> dict[str, Any]:
    """The contents of `open_clip_config.json` for a model folder: architecture and preprocessing."""
    preprocess = {"mean": list(MEAN), "std": list(STD), "interpolation": "bicubic", "resize_mode": "shortest"}
    return {"model_cfg": model, "preprocess_cfg": preprocess}


def _text(vocab_size: int, width: int, layers: int) -> dict[str, Any]:
    """A causal text transformer that pools at the end-of-text token."""
    return {
        "context_length": CONTEXT_LENGTH,
        "vocab_size": vocab_size,
        # Any name makes open_clip read the tokenizer files that lie in the model folder itself.
        "hf_tokenizer_name": "tokenizer-in-this-folder",
        "width": width,
        "heads": width // 32,
        "layers": layers,
        "pool_type": "argmax",
    }
