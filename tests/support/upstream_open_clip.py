"""Small checkpoints of the teachers whose towers are open_clip's, as their authors publish them, and their recipes.

The recipes are written out here in plain torch, torchvision and transformers, or are stock open_clip's own where the
authors use the stock package (BMC-CLIP, BiomedCLIP, QuiltNet, GenMedClip). Nothing of this project is called.
"""

import html
import io
import zlib
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional
from upstream import Upstream, unit, vocabulary_size, write_bert_vocabulary, write_json

Tensors = dict[str, torch.Tensor]

OPENAI_MEAN, OPENAI_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BIOMEDBERT = "microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract"
LOG_SCALE = 4.4454
CAPTIONS = (
    "a lung",
    "CT image showing a normal heart, no lesion.",
    "Chest x-ray of the left lung with opacity in view 3",
    "no finding",
    "slide showing tumour cells and a skin lesion " * 60,
)
"""Of several lengths; the last is longer than any context."""

WIDTH, LAYERS, DIM, HEADS = 128, 2, 16, 2
"""Of the native image towers: two heads of open_clip's 64 channels, which no configuration states."""
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
EOT = 49407
BERT = {
    "model_type": "bert",
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "pad_token_id": 0,
}
BERT_CONTEXT = 256
ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": functional.gelu,
    "quickgelu": lambda x: x * torch.sigmoid(1.702 * x),
}


def pictures() -> list[bytes]:
    """Three colour pictures of odd sizes: wide, tall, and smaller than the models' squares."""
    from PIL import Image

    made = []
    for seed, (size, kind) in enumerate((((157, 101), "PNG"), ((99, 203), "JPEG"), ((41, 37), "PNG"))):
        coarse = np.random.default_rng(seed).integers(0, 255, (11, 9, 3), np.uint8)
        picture = Image.fromarray(coarse).resize(size, Image.Resampling.BILINEAR)
        buffer = io.BytesIO()
        picture.save(buffer, kind)
        made.append(buffer.getvalue())
    return made


def prepare(
    encoded: list[bytes],
    size: int,
    mean: tuple[float, ...] = OPENAI_MEAN,
    std: tuple[float, ...] = OPENAI_STD,
    resize: str = "shortest",
    filter_name: str = "bicubic",
) -> torch.Tensor:
    """Upstream's evaluation transform: short side to ``size``, centre crop, RGB, tensor, normalise."""
    from PIL import Image
    from torchvision import transforms

    target = (size, size) if resize == "squash" else size
    transform = transforms.Compose(
        [
            transforms.Resize(target, transforms.InterpolationMode(filter_name)),
            transforms.CenterCrop(size),
            lambda image: image.convert("RGB"),
            transforms.ToTensor(),
            transforms.Normalize(mean, std),
        ]
    )
    return torch.stack([transform(Image.open(io.BytesIO(data))) for data in encoded])


def clip_tokens(captions: list[str], length: int = TEXT["context_length"]) -> torch.Tensor:
    """CLIP's byte pairs, as upstream's ``tokenize``: longer captions keep their end token."""
    return _byte_pairs()(captions, context_length=length)


@cache
def _byte_pairs():
    from open_clip import SimpleTokenizer

    return SimpleTokenizer()


def bert_tokens(captions: list[str], folder: Path, length: int = BERT_CONTEXT) -> torch.Tensor:
    """Lower-cased word pieces padded to one length; upstream's HFTokenizer unescapes HTML twice before."""
    from transformers import BertTokenizer

    tokenizer = BertTokenizer(vocab=str(folder / "vocab.txt"), do_lower_case=True)
    cleaned = [html.unescape(html.unescape(caption)).strip() for caption in captions]
    ids = tokenizer(cleaned, padding="max_length", truncation=True, max_length=length).input_ids
    return torch.tensor(ids)


# --- The towers in plain torch. N = pictures or captions, L = positions, W = width.


def _normed(x: torch.Tensor, tensors: Tensors, name: str) -> torch.Tensor:
    return functional.layer_norm(x, x.shape[-1:], tensors[f"{name}.weight"], tensors[f"{name}.bias"], 1e-5)


def _blocks(x_NLW: torch.Tensor, tensors: Tensors, prefix: str, heads: int, activation: str, causal: bool):
    """The residual attention blocks of OpenAI's CLIP."""
    count = 1 + max(int(name.removeprefix(prefix).split(".")[0]) for name in tensors if name.startswith(prefix))
    samples, positions, width = x_NLW.shape
    future = torch.full((positions, positions), -torch.inf).triu(1) if causal else torch.zeros(positions, positions)
    for index in range(count):
        at = f"{prefix}{index}"
        qkv = functional.linear(
            _normed(x_NLW, tensors, f"{at}.ln_1"),
            tensors[f"{at}.attn.in_proj_weight"],
            tensors[f"{at}.attn.in_proj_bias"],
        )
        q, k, v = (part.view(samples, positions, heads, -1).transpose(1, 2) for part in qkv.chunk(3, dim=-1))
        weights = (q @ k.transpose(-1, -2) / (width // heads) ** 0.5 + future).softmax(-1)
        mixed = (weights @ v).transpose(1, 2).reshape(samples, positions, width)
        x_NLW = x_NLW + functional.linear(
            mixed, tensors[f"{at}.attn.out_proj.weight"], tensors[f"{at}.attn.out_proj.bias"]
        )
        inner = functional.linear(
            _normed(x_NLW, tensors, f"{at}.ln_2"), tensors[f"{at}.mlp.c_fc.weight"], tensors[f"{at}.mlp.c_fc.bias"]
        )
        inner = ACTIVATIONS[activation](inner)
        x_NLW = x_NLW + functional.linear(inner, tensors[f"{at}.mlp.c_proj.weight"], tensors[f"{at}.mlp.c_proj.bias"])
    return x_NLW


def clip_image(tensors: Tensors, pixels: torch.Tensor, activation: str, heads: int = HEADS) -> np.ndarray:
    """OpenAI's vision transformer: patches, class token, pre-norm blocks, class token out, matrix."""
    kernel = tensors["visual.conv1.weight"]
    x_NLW = functional.conv2d(pixels, kernel, stride=kernel.shape[-1]).flatten(2).transpose(1, 2)
    first = tensors["visual.class_embedding"].expand(len(x_NLW), 1, -1)
    x_NLW = torch.cat([first, x_NLW], dim=1) + tensors["visual.positional_embedding"]
    x_NLW = _normed(x_NLW, tensors, "visual.ln_pre")
    x_NLW = _blocks(x_NLW, tensors, "visual.transformer.resblocks.", heads, activation, causal=False)
    return unit(_normed(x_NLW[:, 0], tensors, "visual.ln_post") @ tensors["visual.proj"])


def clip_text(
    tensors: Tensors, tokens: torch.Tensor, activation: str, heads: int = TEXT["heads"], pool: str = "eot"
) -> np.ndarray:
    """OpenAI's causal text transformer, pooled at the end token (the highest id), then a matrix."""
    x_NLW = tensors["token_embedding.weight"][tokens] + tensors["positional_embedding"]
    x_NLW = _blocks(x_NLW, tensors, "transformer.resblocks.", heads, activation, causal=True)
    x_NLW = _normed(x_NLW, tensors, "ln_final")
    at = tokens.argmax(-1) if pool == "eot" else torch.full((len(tokens),), tokens.shape[1] - 1)
    return unit(x_NLW[torch.arange(len(tokens)), at] @ tensors["text_projection"])


def bert_text(
    tensors: Tensors, tokens: torch.Tensor, prefix: str = "text_encoder.", pads: str = "masked", pool: str = "cls"
) -> np.ndarray:
    """BERT, the class token of its last layer, and a perceptron without biases."""
    from transformers import BertConfig, BertModel

    vocabulary = len(tensors[f"{prefix}transformer.embeddings.word_embeddings.weight"])
    model = BertModel(BertConfig(**BERT, vocab_size=vocabulary), add_pooling_layer=False).eval()
    start = f"{prefix}transformer."
    named = {name.removeprefix(start): value for name, value in tensors.items() if name.startswith(start)}
    named.pop("embeddings.position_ids", None)
    model.load_state_dict(named)
    mask = (tokens != 0).long() if pads == "masked" else torch.ones_like(tokens)
    states_NLW = model(input_ids=tokens, attention_mask=mask).last_hidden_state
    pooled = states_NLW[:, 0]
    if pool == "mean":
        pooled = (states_NLW * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)
    inner = functional.gelu(functional.linear(pooled, tensors[f"{prefix}proj.0.weight"]))
    return unit(functional.linear(inner, tensors[f"{prefix}proj.2.weight"]))


# --- Random weights by upstream's names.


class Draw:
    """Random tensors that depend on a name and a seed alone, large enough that each detail of a recipe shows."""

    def __init__(self, name: str, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(zlib.crc32(f"{name} {seed}".encode()))

    def normal(self, *shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator) * scale

    def linear(self, name: str, rows: int, columns: int, gain: float = 1.0, bias: bool = True) -> Tensors:
        made = {f"{name}.weight": self.normal(rows, columns, scale=gain * columns**-0.5)}
        return {**made, f"{name}.bias": self.normal(rows, scale=0.3)} if bias else made

    def norm(self, name: str, width: int) -> Tensors:
        return {f"{name}.weight": 1 + self.normal(width, scale=0.2), f"{name}.bias": self.normal(width, scale=0.2)}


def clip_blocks(draw: Draw, prefix: str, width: int, layers: int) -> Tensors:
    """OpenAI's names of residual attention blocks."""
    made: Tensors = {}
    for index in range(layers):
        at = f"{prefix}{index}"
        made |= {
            f"{at}.attn.in_proj_weight": draw.normal(3 * width, width, scale=1.5 * width**-0.5),
            f"{at}.attn.in_proj_bias": draw.normal(3 * width, scale=0.3),
            **draw.linear(f"{at}.attn.out_proj", width, width),
            **draw.norm(f"{at}.ln_1", width),
            **draw.linear(f"{at}.mlp.c_fc", 4 * width, width, gain=2.0),
            **draw.linear(f"{at}.mlp.c_proj", width, 4 * width),
            **draw.norm(f"{at}.ln_2", width),
        }
    return made


def clip_vision(draw: Draw, patch: int, size: int, dim: int = DIM) -> Tensors:
    """OpenAI's names of a vision transformer, as open_clip and the forks keep them."""
    return {
        "visual.class_embedding": draw.normal(WIDTH),
        "visual.positional_embedding": draw.normal((size // patch) ** 2 + 1, WIDTH, scale=0.5),
        "visual.proj": draw.normal(WIDTH, dim, scale=WIDTH**-0.5),
        "visual.conv1.weight": draw.normal(WIDTH, 3, patch, patch, scale=(3 * patch * patch) ** -0.5),
        **draw.norm("visual.ln_pre", WIDTH),
        **clip_blocks(draw, "visual.transformer.resblocks.", WIDTH, LAYERS),
        **draw.norm("visual.ln_post", WIDTH),
    }


def clip_language(draw: Draw, dim: int = DIM) -> Tensors:
    """OpenAI's names of a text transformer, at the top level."""
    width = TEXT["width"]
    return {
        "positional_embedding": draw.normal(TEXT["context_length"], width, scale=0.5),
        "text_projection": draw.normal(width, dim, scale=width**-0.5),
        **clip_blocks(draw, "transformer.resblocks.", width, TEXT["layers"]),
        "token_embedding.weight": draw.normal(TEXT["vocab_size"], width),
        **draw.norm("ln_final", width),
    }


def clip_tensors(draw: Draw, patch: int, size: int) -> Tensors:
    """A whole CLIP by OpenAI's names."""
    return {**clip_language(draw), "logit_scale": torch.tensor(LOG_SCALE), **clip_vision(draw, patch, size)}


def bert_language(draw: Draw, prefix: str, vocabulary: int, dim: int = DIM) -> Tensors:
    """BERT's names and the perceptron after it, with the ``position_ids`` of transformers up to 4.30."""
    from transformers import BertConfig, BertModel

    shapes = BertModel(BertConfig(**BERT, vocab_size=vocabulary), add_pooling_layer=False).state_dict()
    made: Tensors = {f"{prefix}transformer.embeddings.position_ids": torch.arange(512)[None]}
    for name, value in shapes.items():
        if name.endswith("LayerNorm.weight"):
            drawn = 1 + draw.normal(*value.shape, scale=0.2)
        elif value.ndim == 2:
            drawn = draw.normal(*value.shape, scale=1.0 if "embeddings" in name else 1.5 * value.shape[1] ** -0.5)
        else:
            drawn = draw.normal(*value.shape, scale=0.3)
        made[f"{prefix}transformer.{name}"] = drawn
    width = BERT["hidden_size"]
    inner = (width + dim) // 2
    return {
        **made,
        **draw.linear(f"{prefix}proj.0", inner, width, gain=2.0, bias=False),
        **draw.linear(f"{prefix}proj.2", dim, inner, bias=False),
    }


def timm_vision(draw: Draw, width: int = 64, layers: int = 6, patch: int = 16, size: int = 160) -> Tensors:
    """The names of timm's vision transformer (of its ``test_vit``, the smallest) and the matrix after it."""
    made = {
        "visual.trunk.cls_token": draw.normal(1, 1, width),
        "visual.trunk.pos_embed": draw.normal(1, (size // patch) ** 2 + 1, width, scale=0.5),
        "visual.trunk.patch_embed.proj.weight": draw.normal(width, 3, patch, patch, scale=(3 * patch * patch) ** -0.5),
        "visual.trunk.patch_embed.proj.bias": draw.normal(width, scale=0.3),
    }
    for index in range(layers):
        at = f"visual.trunk.blocks.{index}"
        made |= {
            **draw.norm(f"{at}.norm1", width),
            **draw.linear(f"{at}.attn.qkv", 3 * width, width, gain=1.5),
            **draw.linear(f"{at}.attn.proj", width, width),
            **draw.norm(f"{at}.norm2", width),
            **draw.linear(f"{at}.mlp.fc1", 3 * width, width, gain=2.0),
            **draw.linear(f"{at}.mlp.fc2", width, 3 * width),
        }
    return {
        **made,
        **draw.norm("visual.trunk.norm", width),
        **draw.linear("visual.head.proj", DIM, width, bias=False),
    }


# --- Reading back what was written, for the references.


def published(file: Path) -> Tensors:
    """The tensors of a checkpoint as upstream's loaders see them: unwrapped, without ``module.``, in float32."""
    content = torch.load(file, map_location="cpu", weights_only=True)
    tensors = content.get("state_dict", content)
    return {
        name.removeprefix("module."): value.float() if value.is_floating_point() else value
        for name, value in tensors.items()
    }


def training_checkpoint(tensors: Tensors, **more) -> dict:
    """What open_clip's training program saves: weights under ``module.`` beside an optimizer's state."""
    moments = {0: {"step": torch.tensor(7.0), "exp_avg": torch.zeros(3), "exp_avg_sq": torch.zeros(3)}}
    groups = [{"lr": 1e-5, "betas": (0.9, 0.98), "params": [0]}]
    return {
        "epoch": 7,
        "name": "run-of-the-authors",
        "state_dict": {f"module.{name}": value for name, value in tensors.items()},
        "optimizer": {"state": moments, "param_groups": groups},
        **more,
    }


def expected(size: int, patch: int, context: int, activation: str | None, text_heads: int, heads: int = HEADS) -> dict:
    """What the small model must turn out to be, as the catalog states it for the published one."""
    stated = {"image_size": size, "patch_size": patch, "context_length": context, "image_heads": heads}
    found = {"dim": DIM, **stated, "text_heads": text_heads}
    return found if activation is None else {**found, "activation": activation}


def native_cfg(patch: int, size: int) -> dict:
    """An open_clip configuration of two native towers; like the published ones it does not state a head's width."""
    vision = {"image_size": size, "layers": LAYERS, "width": WIDTH, "patch_size": patch}
    return {"embed_dim": DIM, "vision_cfg": vision, "text_cfg": dict(TEXT)}


def _stock_image(load: Callable[[], torch.nn.Module], size: int, encoded: list[bytes]) -> np.ndarray:
    with torch.no_grad():
        return unit(load().encode_image(prepare(encoded, size)))


def _stock_text(load: Callable[[], torch.nn.Module], tokens: Callable, captions: list[str]) -> np.ndarray:
    with torch.no_grad():
        return unit(load().encode_text(tokens(captions)))


def stock_clip(model_cfg: dict, file: Path) -> torch.nn.Module:
    """Stock open_clip's model, filled by stock open_clip's loader."""
    import open_clip

    model = open_clip.CLIP(**model_cfg)
    open_clip.load_checkpoint(model, str(file))
    return model.eval()


def stock_folder(folder: Path) -> torch.nn.Module:
    """A folder opened by stock open_clip alone."""
    import open_clip

    return open_clip.create_model(f"local-dir:{folder}").eval()


def weights_file(upstream: Upstream) -> Path:
    """The checkpoint of a written teacher."""
    return upstream.place if upstream.place.is_file() else upstream.place / "open_clip_pytorch_model.bin"


def user_catalog(upstream: Upstream, file: Path, **changes) -> str:
    """A user's YAML with a written teacher's entry, and perhaps other values for some of its settings."""
    import yaml

    file.write_text(yaml.safe_dump({upstream.name: {**upstream.entry, **changes}}), encoding="utf-8")
    return str(file)


# --- The writers.


def write_bmca_clip(folder: Path, seed: int = 0) -> Upstream:
    """BMC-CLIP: one training checkpoint, loaded into a built-in architecture (ViT-L/14, GELU)."""
    folder.mkdir(parents=True, exist_ok=True)
    patch, size = 14, 56
    file, model_cfg = folder / "BMC_CLIP_CF.pt", native_cfg(patch, size)
    torch.save(training_checkpoint(clip_tensors(Draw("bmca-clip", seed), patch, size)), file)
    architecture = write_json(folder / "small_architecture.json", {"model_cfg": model_cfg})
    load = cache(partial(stock_clip, model_cfg, file))
    return Upstream(
        name="bmca-clip",
        place=file,
        entry={
            "architecture": str(architecture),
            "expect": expected(size, patch, TEXT["context_length"], "gelu", TEXT["heads"]),
        },
        image=partial(_stock_image, load, size),
        text=partial(_stock_text, load, clip_tokens),
    )


def write_biomedclip(folder: Path, seed: int = 0, old_keys: bool = False) -> Upstream:
    """BiomedCLIP: an open_clip folder of a timm image tower and a BERT, with a legacy ``position_ids``.

    Args:
        folder: Where to write.
        seed: Of the weights.
        old_keys: Name the text tower's settings as the first revisions did, which open_clip 3 refuses.
    """
    write_bert_vocabulary(folder)
    size, draw, vocabulary = 160, Draw("biomedclip", seed), vocabulary_size(folder)
    text_config = write_json(folder / "small_bert.json", {**BERT, "vocab_size": vocabulary})
    named = ("proj", "pooler_type") if old_keys else ("hf_proj_type", "hf_pooler_type")
    text_cfg = {
        "hf_model_name": str(text_config),  # the published one names BiomedBERT-base, which is full size
        "hf_tokenizer_name": BIOMEDBERT,
        named[0]: "mlp",
        named[1]: "cls_last_hidden_state_pooler",
        "context_length": BERT_CONTEXT,
    }
    vision_cfg = {"timm_model_name": "test_vit", "timm_model_pretrained": False, "timm_pool": "", "timm_proj": "linear"}
    config = {
        "model_cfg": {"embed_dim": DIM, "vision_cfg": {**vision_cfg, "image_size": size}, "text_cfg": text_cfg},
        "preprocess_cfg": {"mean": list(OPENAI_MEAN), "std": list(OPENAI_STD)},
    }
    write_json(folder / "open_clip_config.json", config)
    tensors = {
        "logit_scale": torch.tensor(LOG_SCALE),
        **timm_vision(draw),
        **bert_language(draw, "text.", vocabulary),
    }
    torch.save(tensors, folder / "open_clip_pytorch_model.bin")
    load = cache(partial(stock_folder, folder))
    text_heads = BERT["num_attention_heads"]
    return Upstream(
        name="biomedclip",
        place=folder,
        entry={"expect": expected(size, 16, BERT_CONTEXT, "gelu", text_heads, heads=2)},
        image=partial(_stock_image, load, size),
        text=partial(_stock_text, load, partial(bert_tokens, folder=folder)),
    )


def _write_native_folder(name: str, folder: Path, seed: int, patch: int, size: int) -> Upstream:
    folder.mkdir(parents=True, exist_ok=True)
    preprocess = {"mean": list(OPENAI_MEAN), "std": list(OPENAI_STD)}
    config = {"model_cfg": native_cfg(patch, size), "preprocess_cfg": preprocess}
    write_json(folder / "open_clip_config.json", config)
    torch.save(clip_tensors(Draw(name, seed), patch, size), folder / "open_clip_pytorch_model.bin")
    load = cache(partial(stock_folder, folder))
    return Upstream(
        name=name,
        place=folder,
        entry={"expect": expected(size, patch, TEXT["context_length"], None, TEXT["heads"])},
        image=partial(_stock_image, load, size),
        text=partial(_stock_text, load, clip_tokens),
    )


def write_quiltnet(folder: Path, seed: int = 0) -> Upstream:
    """QuiltNet-B-32: an open_clip folder whose configuration does not say QuickGELU."""
    return _write_native_folder("quiltnet-b-32", folder, seed, patch=32, size=96)


def write_genmedclip(folder: Path, seed: int = 0) -> Upstream:
    """GenMedClip: as far as known an open_clip folder like QuiltNet's."""
    return _write_native_folder("genmedclip", folder, seed, patch=16, size=64)


def fork_tensors(draw: Draw, vocabulary: int, patch: int = 16, size: int = 64) -> Tensors:
    """UniMed-CLIP's fork: ``visual.`` as in open_clip, and the BERT as ``text_encoder.``."""
    return {
        "logit_scale": torch.tensor(LOG_SCALE),
        **clip_vision(draw, patch, size),
        **bert_language(draw, "text_encoder.", vocabulary),
    }


def _write_fork(name: str, folder: Path, file_name: str, seed: int, training: bool) -> Upstream:
    write_bert_vocabulary(folder)
    patch, size, vocabulary = 16, 64, vocabulary_size(folder)
    text_config = write_json(folder / "small_bert.json", {**BERT, "vocab_size": vocabulary})
    architecture = write_json(
        folder / "small_architecture.json",
        {
            "model_cfg": {
                "embed_dim": DIM,
                "quick_gelu": True,
                "vision_cfg": {"image_size": size, "layers": LAYERS, "width": WIDTH, "patch_size": patch},
                "text_cfg": {
                    "hf_model_name": str(text_config),
                    "hf_tokenizer_name": BIOMEDBERT,
                    "hf_proj_type": "mlp",
                    "hf_pooler_type": "cls_last_hidden_state_pooler",
                    "context_length": BERT_CONTEXT,
                },
            }
        },
    )
    file, tensors = folder / file_name, fork_tensors(Draw(name, seed), vocabulary, patch, size)
    scaler = {"scale": 65536.0, "growth_factor": 2.0, "_growth_tracker": 7}
    torch.save(training_checkpoint(tensors, scaler=scaler) if training else tensors, file)

    @torch.no_grad()
    def image(encoded: list[bytes]) -> np.ndarray:
        return clip_image(published(file), prepare(encoded, size), "quickgelu")

    @torch.no_grad()
    def text(captions: list[str]) -> np.ndarray:
        return bert_text(published(file), bert_tokens(captions, folder))

    expect = expected(size, patch, BERT_CONTEXT, "quickgelu", BERT["num_attention_heads"])
    return Upstream(
        name=name, place=file, entry={"architecture": str(architecture), "expect": expect}, image=image, text=text
    )


def write_unimed_clip(folder: Path, seed: int = 0) -> Upstream:
    """UniMed-CLIP: a bare state dict by the fork's names."""
    return _write_fork("unimed-clip", folder, "unimed-clip-vit-b16.pt", seed, training=False)


def write_mmkd_clip(folder: Path, seed: int = 0) -> Upstream:
    """MMKD-CLIP: a training checkpoint of the fork, with ``module.``, optimizer and loss scaler."""
    return _write_fork("mmkd-clip", folder, "MMKD_B16.pth", seed, training=True)


def write_pubmedclip_original(folder: Path, seed: int = 0) -> Upstream:
    """PubMedCLIP's own file: OpenAI's names, and half precision where OpenAI's ``convert_weights`` halves."""
    folder.mkdir(parents=True, exist_ok=True)
    patch, size = 32, 96
    tensors = clip_tensors(Draw("pubmedclip-original", seed), patch, size)
    halved = (".attn.", ".mlp.", "visual.conv1.", "visual.proj", "text_projection")
    tensors = {name: value.half() if any(part in name for part in halved) else value for name, value in tensors.items()}
    file = folder / "PubMedCLIP_ViT32.pth"
    optimizer = {"state": {0: {"step": 3, "exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-5, "params": [0]}]}
    torch.save({"best_epoch": 3, "state_dict": tensors, "optimizer_state_dict": optimizer, "best_loss": 1.5}, file)
    model_cfg = {**native_cfg(patch, size), "quick_gelu": True}
    architecture = write_json(folder / "small_architecture.json", {"model_cfg": model_cfg})

    @torch.no_grad()
    def image(encoded: list[bytes]) -> np.ndarray:
        return clip_image(published(file), prepare(encoded, size), "quickgelu")

    @torch.no_grad()
    def text(captions: list[str]) -> np.ndarray:
        return clip_text(published(file), clip_tokens(captions), "quickgelu")

    expect = expected(size, patch, TEXT["context_length"], "quickgelu", TEXT["heads"])
    return Upstream(
        name="pubmedclip-original",
        place=file,
        entry={"architecture": str(architecture), "expect": expect},
        image=image,
        text=text,
    )


WRITERS: dict[str, Callable[..., Upstream]] = {
    "bmca-clip": write_bmca_clip,
    "biomedclip": write_biomedclip,
    "unimed-clip": write_unimed_clip,
    "quiltnet-b-32": write_quiltnet,
    "genmedclip": write_genmedclip,
    "pubmedclip-original": write_pubmedclip_original,
    "mmkd-clip": write_mmkd_clip,
}
"""By the catalog's names."""
