"""Writers of the teachers that are not open_clip's: PLIP, PubMedCLIP, PMC-CLIP, MedCLIP and LVM-Med.

Every matrix is drawn large enough that a wrong choice (activation, heads, pooling, padding) moves the vectors visibly.
The references read the written files and use plain torch, torchvision or transformers, never this project's code.
"""

import io
import json
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from PIL import Image
from upstream import Upstream, unit, vocabulary_size, write_bert_vocabulary, write_json

OPENAI_MEAN, OPENAI_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MEDCLIP_MEAN, MEDCLIP_STD = 0.5862785803043838, 0.27950088968644304
CONTEXT = 77
CAPTIONS = (
    "a lung",
    "Chest x ray showing opacity in the left lung, no tumour.",
    "",
    "MRI of the heart",
    "slide of tumour cells and normal skin with a lesion 7 " * 12,  # longer than any context here
    "CT",
)
Tensors = dict[str, torch.Tensor]


# --- pictures -------------------------------------------------------------------------------------------------------


def draw(width: int, height: int, seed: int = 0, colours: int = 3) -> Image.Image:
    """Smooth colours with noise: rounding and cropping differences show."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x / 5 + seed) * 70, np.cos(y / 4 + seed) * 70, np.sin((x + y) / 6) * 70][:colours]
    pixels = np.clip(np.stack(waves, -1) + 100 + rng.integers(0, 60, (height, width, colours)), 0, 255).astype(np.uint8)
    return Image.fromarray(pixels if colours == 3 else pixels[..., 0])


def encoded(image: Image.Image) -> bytes:
    """A PNG file's bytes."""
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def opened(data: bytes) -> Image.Image:
    """A picture as upstream code opens it."""
    return Image.open(io.BytesIO(data)).convert("RGB")


def pictures(size: int) -> list[bytes]:
    """Three pictures: one whose short side leaves a margin of 3, a large upright one, and one smaller than the size."""
    shapes = [(2 * size + 6, 2 * size), (2 * size - 3, 3 * size + 19), (2 * size // 3, size // 2 + 1)]
    return [encoded(draw(*shape, seed=seed)) for seed, shape in enumerate(shapes)]


def standardised(pixels: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """One picture's uint8 [H, W, 3] -> float [1, 3, H, W]."""
    values = (torch.from_numpy(np.array(pixels)).float() / 255 - torch.tensor(mean)) / torch.tensor(std)
    return values.permute(2, 0, 1)[None]


def shortest_then_centre(data: bytes, size: int) -> np.ndarray:
    """OpenAI CLIP's preparation, by torchvision: the short side becomes ``size``, then the centre is cut out."""
    from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

    steps = Compose([Resize(size, InterpolationMode.BICUBIC), CenterCrop(size)])
    return np.asarray(steps(opened(data)))


# --- weights --------------------------------------------------------------------------------------------------------


def scramble(module: torch.nn.Module, seed: int, gain: float = 1.5) -> torch.nn.Module:
    """Fill a module with large random values, running statistics included."""
    draws = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in [*module.named_parameters(), *module.named_buffers()]:
            noise = torch.randn(value.shape, generator=draws) if value.is_floating_point() else None
            if noise is None or value.ndim == 0:
                continue  # counters, position ids, the logit scale
            if name.endswith("running_var"):
                value.copy_(0.5 + noise.abs())
            elif value.ndim == 1:
                value.copy_(0.2 * noise + (1.0 if name.endswith("weight") else 0.0))
            else:
                value.copy_(gain * noise / value[0].numel() ** 0.5)
    return module.eval()


def state(module: torch.nn.Module, prefix: str = "") -> Tensors:
    """A module's tensors by name."""
    return {prefix + name: value.detach().clone() for name, value in module.state_dict().items()}


def below(tensors: Tensors, prefix: str) -> Tensors:
    """The tensors under a prefix, without it."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def read(file: Path) -> Tensors:
    """A written file, as upstream reads it."""
    content = torch.load(file, weights_only=False)
    content = content.get("state_dict", content) if isinstance(content, dict) else content
    if isinstance(content, dict):
        content = {name.removeprefix("module."): value for name, value in content.items()}
    return content


# --- what tests do with them ----------------------------------------------------------------------------------------


def find(upstream: Upstream, folder: Path, recipe: str = "", place: Path | None = None, **changes):
    """The model as a user finds it: an entry of a YAML file of theirs, and NAME@RECIPE=PLACE.

    Args:
        upstream: What a writer wrote.
        folder: Where the YAML file goes.
        recipe: A rival recipe.
        place: Another place than the written one.
        changes: Fields of the entry that differ.
    """
    from common.models.load import find_spec, read_catalog

    file = folder / f"{upstream.name}.yaml"
    file.write_text(json.dumps({upstream.name: {**upstream.entry, **changes}}), encoding="utf-8")
    at = f"@{recipe}" if recipe else ""
    return find_spec(f"{upstream.name}{at}={place or upstream.place}", read_catalog(str(file)))


def assert_close(found: np.ndarray, expected: np.ndarray, atol: float = 1e-4) -> None:
    """Two sets of unit vectors are the same."""
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=atol, rtol=0)


def assert_far(found: np.ndarray, wrong: np.ndarray, least: float = 1e-2) -> None:
    """Two sets of unit vectors differ so much that no tolerance hides it: for at least one of the samples."""
    assert found.shape == wrong.shape
    assert np.abs(found - wrong).max() > least


def assert_neighbours_do_not_matter(model, images: Sequence[bytes], captions: Sequence[str] = ()) -> None:
    """A sample's vector is the same alone, in a batch and in another order; float32 within 1e-6."""
    from common.models.embed import embed_images, embed_texts

    for embed, samples in ((embed_images, list(images)), (embed_texts, list(captions))):
        if not samples:
            continue
        together = embed(model, samples)
        many = embed(model, samples * (20 // len(samples) + 1))  # more than one pass
        np.testing.assert_allclose(embed(model, samples[::-1])[::-1], together, atol=1e-6, rtol=0)
        np.testing.assert_allclose(many[-len(samples) :], together, atol=1e-6, rtol=0)
        for row, sample in enumerate(samples):
            np.testing.assert_allclose(embed(model, [sample]), together[row : row + 1], atol=1e-6, rtol=0)


# --- PLIP and PubMedCLIP: transformers folders ------------------------------------------------------------------------

HF_SIZE, HF_CONTEXT = 32, 20


def write_plip(folder: Path, seed: int = 0) -> Upstream:
    """PLIP's folder: an old processor file with bare numbers, and an old configuration with ``eos_token_id`` 2."""
    processor = {"feature_extractor_type": "CLIPFeatureExtractor", "crop_size": HF_SIZE, "size": HF_SIZE}
    recipes = {
        f"crop-{rounding}": {"geometry": {"size": HF_SIZE, "resize": "shortest", "crop_rounding": rounding}}
        for rounding in ("round", "floor")
    }
    legacy_ids = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
    return _write_hf_clip(folder, "plip", "vinid/plip", seed, processor, legacy_ids, {"recipes": recipes})


def write_pubmedclip(folder: Path, seed: int = 0) -> Upstream:
    """The folder of PubMedCLIP's conversion: a later processor file, and the tokenizer's own ids."""
    processor = {
        "image_processor_type": "CLIPImageProcessor",
        "crop_size": {"height": HF_SIZE, "width": HF_SIZE},
        "size": {"shortest_edge": HF_SIZE},
        "do_convert_rgb": True,
    }
    hub_id = "flaviagiammarino/pubmed-clip-vit-base-patch32"
    ids = {"bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 257}
    return _write_hf_clip(folder, "pubmedclip", hub_id, seed, processor, ids, {})


def write_byte_tokenizer(folder: Path, length: int, class_name: str = "PreTrainedTokenizerFast") -> int:
    """A byte-level tokenizer whose start and end tokens have the highest ids; returns the vocabulary's size."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate([*alphabet, "<start>", "<end>"])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    ends = [("<start>", vocab["<start>"]), ("<end>", vocab["<end>"])]
    backend.post_processor = processors.TemplateProcessing(single="<start> $A <end>", special_tokens=ends)
    special = {"bos_token": "<start>", "eos_token": "<end>", "pad_token": "<end>"}
    PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=length, **special).save_pretrained(folder)
    return len(vocab)


def _write_hf_clip(
    folder: Path, name: str, hub_id: str, seed: int, processor: dict, ids: dict, extra: dict
) -> Upstream:
    from transformers import CLIPConfig, CLIPModel

    folder.mkdir(parents=True, exist_ok=True)
    words = write_byte_tokenizer(folder, HF_CONTEXT)
    layers = {"num_hidden_layers": 2, "hidden_act": "quick_gelu"}
    text = {**layers, **ids, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    text |= {"vocab_size": words, "max_position_embeddings": HF_CONTEXT, "model_type": "clip_text_model"}
    vision = {**layers, "hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 4}
    vision |= {"image_size": HF_SIZE, "patch_size": 16, "model_type": "clip_vision_model"}
    config = {"text_config": text, "vision_config": vision, "projection_dim": 24, "logit_scale_init_value": 2.6592}
    write_json(folder / "config.json", {"architectures": ["CLIPModel"], "model_type": "clip", **config})
    steps = {"do_center_crop": True, "do_normalize": True, "do_resize": True, "resample": 3}
    constants = {"image_mean": OPENAI_MEAN, "image_std": OPENAI_STD}
    write_json(folder / "preprocessor_config.json", {**steps, **constants, **processor})
    tensors = state(scramble(CLIPModel(CLIPConfig(**config)), seed, gain=2.0))
    # Buffers that transformers saved until 4.31.
    tensors["text_model.embeddings.position_ids"] = torch.arange(HF_CONTEXT)[None]
    tensors["vision_model.embeddings.position_ids"] = torch.arange((HF_SIZE // 16) ** 2 + 1)[None]
    tensors["logit_scale"] = torch.tensor(4.2)
    torch.save(tensors, folder / "pytorch_model.bin")
    expect = {"dim": 24, "image_size": HF_SIZE, "patch_size": 16, "context_length": HF_CONTEXT}
    expect |= {"activation": "quickgelu", "image_heads": 4, "text_heads": 2}
    source = {"hub_id": hub_id, "source": {"files": ["pytorch_model.bin"]}}  # without the published file's hash
    return Upstream(
        name=name,
        place=folder,
        entry={"expect": expect, **source, **extra},
        image=partial(hf_clip_image, folder),
        text=partial(hf_clip_text, folder),
    )


def _hf_clip(folder: Path, activation: str | None = None):
    from transformers import CLIPConfig, CLIPModel

    config = json.loads((folder / "config.json").read_text())
    for tower in ("text_config", "vision_config"):
        config[tower]["hidden_act"] = activation or config[tower]["hidden_act"]
    model = CLIPModel(CLIPConfig(**config))
    tensors = {name: value for name, value in read(folder / "pytorch_model.bin").items() if "position_ids" not in name}
    model.load_state_dict(tensors, strict=True)
    return model.eval()


@torch.no_grad()
def hf_clip_image(folder: Path, images: Sequence[bytes], activation: str | None = None) -> np.ndarray:
    """PLIP's recipe: the folder's own processor (Pillow's version of it), then ``get_image_features``."""
    from transformers import CLIPImageProcessorPil

    processor, model = CLIPImageProcessorPil.from_pretrained(folder), _hf_clip(folder, activation)
    out = model.get_image_features(**processor([opened(data) for data in images], return_tensors="pt"))
    return unit(out if isinstance(out, torch.Tensor) else out.pooler_output)


@torch.no_grad()
def hf_clip_text(folder: Path, captions: Sequence[str], keep_end: bool = True, activation: str | None = None):
    """Each caption alone and without pads, cut with its end token kept; the state at its last token is projected."""
    from tokenizers import Tokenizer

    tokenizer, model = Tokenizer.from_file(str(folder / "tokenizer.json")), _hf_clip(folder, activation)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    found = []
    for caption in captions:
        ids = tokenizer.encode(caption).ids
        if len(ids) > HF_CONTEXT:
            ids = [*ids[: HF_CONTEXT - 1], ids[-1]] if keep_end else ids[:HF_CONTEXT]
        states = model.text_model(input_ids=torch.tensor([ids])).last_hidden_state
        found.append(model.text_projection(states[:, -1]))
    return unit(torch.cat(found))


# --- BERT captions ----------------------------------------------------------------------------------------------------


def bert_ids(folder: Path, caption: str, length: int = CONTEXT, lower: bool = True) -> list[int]:
    """Word pieces by the tokenizers library, cut with [SEP] kept, not padded."""
    from tokenizers.implementations import BertWordPieceTokenizer

    ids = BertWordPieceTokenizer(str(folder / "vocab.txt"), lowercase=lower).encode(caption).ids
    return ids if len(ids) <= length else [*ids[: length - 1], ids[-1]]


def small_bert(words: int, layers: int) -> dict:
    """Configuration of a small BERT."""
    sizes = {"hidden_size": 32, "num_hidden_layers": layers, "num_attention_heads": 2, "intermediate_size": 64}
    rest = {"hidden_act": "gelu", "max_position_embeddings": 96, "type_vocab_size": 2, "layer_norm_eps": 1e-12}
    return {"model_type": "bert", "vocab_size": words, **sizes, **rest, "pad_token_id": 0}


def bert_of(config: dict):
    """A BERT of a configuration."""
    from transformers import BertConfig, BertModel

    return BertModel(BertConfig(**{key: value for key, value in config.items() if key != "model_type"}))


def _loaded_bert(config: dict, tensors: Tensors):
    model = bert_of(config)
    kept = {name: value for name, value in tensors.items() if not name.endswith("position_ids")}
    model.load_state_dict(kept, strict=True)
    return model.eval()


# --- PMC-CLIP ---------------------------------------------------------------------------------------------------------

PMC_SIZE, PMC_DIM = 64, 32
PMC_IMAGE, PMC_TEXT, PMC_PROJECTION = "image_encoder(resnet50).pth", "text_encoder.pth", "text_projection_layer.pth"
PMC_EXPECT = {"dim": PMC_DIM, "image_size": PMC_SIZE, "context_length": CONTEXT, "activation": "relu", "text_heads": 2}


def _pmc_clip_parts(folder: Path, seed: int) -> tuple[dict, Tensors, Tensors, torch.Tensor]:
    from open_clip.modified_resnet import ModifiedResNet

    write_bert_vocabulary(folder)
    text = small_bert(vocabulary_size(folder), layers=2)
    # 8 wide: the attention pool is 256 wide, which 32 heads divide as well as 8 do, as in the published model.
    vision = {"layers": [1, 2, 1, 1], "width": 8, "image_size": PMC_SIZE}
    visual = ModifiedResNet(vision["layers"], PMC_DIM, heads=32, image_size=PMC_SIZE, width=vision["width"])
    bert = state(scramble(bert_of(text), seed + 1))
    bert["embeddings.position_ids"] = torch.arange(96)[None]
    projection = torch.randn(32, PMC_DIM, generator=torch.Generator().manual_seed(seed + 2)) / 32**0.5
    architecture = {"embed_dim": PMC_DIM, "vision": vision, "text": text}
    return architecture, state(scramble(visual, seed, gain=2.0)), bert, projection


def _pmc_clip(folder: Path, architecture: dict, files: Sequence[str]) -> Upstream:
    # Beside the model's folder, whose content stays what upstream publishes.
    file = write_json(folder.parent / f"{folder.name}-architecture.json", architecture)
    source = {"hub_id": "axiong/pmc_oa", "source": {"repo_type": "dataset", "files": [*files]}}
    return Upstream(
        name="pmc-clip",
        place=folder,
        entry={"architecture": str(file), "expect": PMC_EXPECT, **source},
        image=partial(pmc_clip_image, folder),
        text=partial(pmc_clip_text, folder),
    )


def write_pmc_clip_split(folder: Path, seed: int = 0) -> Upstream:
    """The three split files; the references follow the training code's recipe."""
    architecture, visual, bert, projection = _pmc_clip_parts(folder, seed)
    torch.save(visual, folder / PMC_IMAGE)
    torch.save(bert, folder / PMC_TEXT)
    torch.save(projection, folder / PMC_PROJECTION)
    return _pmc_clip(folder, architecture, (PMC_IMAGE, PMC_TEXT, PMC_PROJECTION))


def write_pmc_clip_full(
    folder: Path, seed: int = 0, numpy_inside: bool = False, extra: Tensors | None = None
) -> Upstream:
    """The full checkpoint with the same towers: ``module.`` names, and the parts embeddings do not pass through.

    Args:
        folder: Where it goes.
        seed: Of the weights.
        numpy_inside: Whether it holds a NumPy scalar, as the published one does; ``weights_only`` refuses it then.
        extra: More tensors, by names without ``module.``.
    """
    architecture, visual, bert, projection = _pmc_clip_parts(folder, seed)
    block = torch.nn.TransformerEncoderLayer(32, 2, 64)
    names = {"self_attn.": "attn.", "linear1.": "mlp.c_fc.", "linear2.": "mlp.c_proj.", "norm1.": "ln_1."}
    fusion = state(block)
    for old, new in {**names, "norm2.": "ln_2."}.items():
        fusion = {name.replace(old, new): value for name, value in fusion.items()}
    tensors = {
        "positional_embedding": torch.randn(CONTEXT, PMC_DIM),
        "text_projection": projection,
        "logit_scale": torch.tensor(math.log(50.0)),
        "mlm_projection": torch.randn(PMC_DIM, architecture["text"]["vocab_size"]),
        "img_special_token": torch.randn(1, 1, PMC_DIM),
        **{f"visual.{name}": value for name, value in visual.items()},
        **{f"text_encoder.{name}": value for name, value in bert.items()},
        **{f"fusion_module.resblocks.0.{name}": value for name, value in fusion.items()},
        "ln_final.weight": torch.ones(PMC_DIM),
        "ln_final.bias": torch.zeros(PMC_DIM),
        **(extra or {}),
    }
    content = {"epoch": 30, "name": "run", "state_dict": {f"module.{name}": value for name, value in tensors.items()}}
    if numpy_inside:
        content["best_acc"] = np.float64(0.25)
    torch.save(content, folder / "checkpoint.pt")
    return _pmc_clip(folder, architecture, ("checkpoint.pt",))


def pmc_clip_tensors(folder: Path) -> Tensors:
    """Either distribution by the full checkpoint's names."""
    if (folder / "checkpoint.pt").is_file():
        return read(folder / "checkpoint.pt")
    visual = {f"visual.{name}": value for name, value in read(folder / PMC_IMAGE).items()}
    bert = {f"text_encoder.{name}": value for name, value in read(folder / PMC_TEXT).items()}
    return {**visual, **bert, "text_projection": read(folder / PMC_PROJECTION)}


@torch.no_grad()
def pmc_clip_image(
    folder: Path, images: Sequence[bytes], heads: int = 32, batch_statistics: bool = False
) -> np.ndarray:
    """CLIP's ModifiedResNet written out: three-convolution stem, pooling before strides, attention pool.

    Args:
        folder: Where the checkpoint lies.
        images: Encoded pictures.
        heads: Of the attention pool.
        batch_statistics: Normalise by the batch, as a module left in training mode would.
    """
    w = below(pmc_clip_tensors(folder), "visual.")

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        mean, variance = w[f"{name}.running_mean"].clone(), w[f"{name}.running_var"].clone()
        return F.batch_norm(x, mean, variance, w[f"{name}.weight"], w[f"{name}.bias"], training=batch_statistics)

    def block(x: torch.Tensor, name: str, stride: int) -> torch.Tensor:
        y = F.relu(norm(F.conv2d(x, w[f"{name}.conv1.weight"]), f"{name}.bn1"))
        y = F.relu(norm(F.conv2d(y, w[f"{name}.conv2.weight"], padding=1), f"{name}.bn2"))
        y = norm(F.conv2d(F.avg_pool2d(y, stride), w[f"{name}.conv3.weight"]), f"{name}.bn3")
        if f"{name}.downsample.0.weight" in w:
            x = norm(F.conv2d(F.avg_pool2d(x, stride), w[f"{name}.downsample.0.weight"]), f"{name}.downsample.1")
        return F.relu(x + y)

    prepared = [standardised(shortest_then_centre(data, PMC_SIZE), OPENAI_MEAN, OPENAI_STD) for data in images]
    x = torch.cat(prepared)
    for number, stride in ((1, 2), (2, 1), (3, 1)):
        x = F.relu(norm(F.conv2d(x, w[f"conv{number}.weight"], stride=stride, padding=1), f"bn{number}"))
    x = F.avg_pool2d(x, 2)
    for layer in (1, 2, 3, 4):
        depth = len({name.split(".")[1] for name in w if name.startswith(f"layer{layer}.")})
        for index in range(depth):
            x = block(x, f"layer{layer}.{index}", 2 if layer > 1 and index == 0 else 1)
    x = x.flatten(2).transpose(1, 2)  # [B, positions, width]
    x = torch.cat([x.mean(dim=1, keepdim=True), x], dim=1) + w["attnpool.positional_embedding"]
    q, k, v = (
        F.linear(y, w[f"attnpool.{part}_proj.weight"], w[f"attnpool.{part}_proj.bias"])
        .unflatten(-1, (heads, -1))
        .transpose(1, 2)
        for part, y in (("q", x[:, :1]), ("k", x), ("v", x))
    )
    weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(dim=-1)
    pooled = (weights @ v).transpose(1, 2).flatten(1)
    return unit(F.linear(pooled, w["attnpool.c_proj.weight"], w["attnpool.c_proj.bias"]))


@torch.no_grad()
def pmc_clip_text(
    folder: Path,
    captions: Sequence[str],
    pooling: str = "cls",
    attend_pads: bool = True,
    transposed: bool = False,
) -> np.ndarray:
    """BERT over 77 tokens without a mask, one of its outputs times the projection.

    Args:
        folder: Where the checkpoint lies.
        captions: The captions.
        pooling: ``cls`` as in the training code, ``pooler`` as in the notebook.
        attend_pads: False masks them, as no recipe does.
        transposed: Whether the projection is used like a linear layer's weight, as no recipe does.
    """
    tensors = pmc_clip_tensors(folder)
    file = folder.parent / f"{folder.name}-architecture.json"
    bert = _loaded_bert(json.loads(file.read_text())["text"], below(tensors, "text_encoder."))
    found = []
    for caption in captions:
        ids = bert_ids(folder, caption)
        mask = [1] * CONTEXT if attend_pads else [1] * len(ids) + [0] * (CONTEXT - len(ids))
        padded = torch.tensor([ids + [0] * (CONTEXT - len(ids))])
        out = bert(input_ids=padded, attention_mask=torch.tensor([mask]))
        found.append(out.last_hidden_state[:, 0] if pooling == "cls" else out.pooler_output)
    projection = tensors["text_projection"]
    return unit(torch.cat(found) @ (projection.T if transposed else projection))


# --- MedCLIP ----------------------------------------------------------------------------------------------------------

MEDCLIP_SIZE, MEDCLIP_DIM, WINDOW = 32, 24, 4
SWIN_NAMES = (  # today's -> transformers 4's, as the fact sheet lists them, backwards
    ("attention.q_proj.", "attention.self.query."),
    ("attention.k_proj.", "attention.self.key."),
    ("attention.v_proj.", "attention.self.value."),
    ("attention.relative_position_bias.", "attention.self."),
    ("attention.o_proj.", "attention.output.dense."),
    ("mlp.fc1.", "intermediate.dense."),
    ("mlp.fc2.", "output.dense."),
)


def relative_position_index(window: int) -> torch.Tensor:
    """Swin's table of pairs of positions in a window (the published code's)."""
    coordinates = torch.stack(torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")).flatten(1)
    relative = (coordinates[:, :, None] - coordinates[:, None, :]).permute(1, 2, 0) + window - 1
    return relative[..., 0] * (2 * window - 1) + relative[..., 1]


def write_medclip(folder: Path, seed: int = 0, logit_scale: float = math.log(1 / 0.07)) -> Upstream:
    """``pytorch_model.bin`` as transformers 4 named its tensors, and the text tower's cased vocabulary."""
    from transformers import SwinConfig, SwinModel

    write_bert_vocabulary(folder, cased=True)
    text = small_bert(vocabulary_size(folder), layers=4)
    vision = {"image_size": MEDCLIP_SIZE, "patch_size": 4, "num_channels": 3, "embed_dim": 16, "depths": [2, 2]}
    vision |= {"num_heads": [2, 4], "window_size": WINDOW, "mlp_ratio": 4.0, "qkv_bias": True, "hidden_act": "gelu"}
    vision |= {"layer_norm_eps": 1e-5, "use_absolute_embeddings": False}
    swin: Tensors = {}
    for name, value in state(scramble(SwinModel(SwinConfig(**vision)), seed)).items():
        for new, old in SWIN_NAMES:
            name = name.replace(new, old)  # noqa: PLW2901 - one after the other
        swin[f"vision_model.model.{name}"] = value
        if name.endswith("relative_position_bias_table"):
            index = name.replace("bias_table", "index")
            swin[f"vision_model.model.{index}"] = relative_position_index(WINDOW)
    draws = torch.Generator().manual_seed(seed + 2)
    tensors = {
        "logit_scale": torch.tensor(logit_scale),
        **swin,
        "vision_model.projection_head.weight": torch.randn(MEDCLIP_DIM, 32, generator=draws) / 32**0.5,
        "text_model.model.embeddings.position_ids": torch.arange(96)[None],
        **state(scramble(bert_of(text), seed + 1), "text_model.model."),
        "text_model.projection_head.weight": torch.randn(MEDCLIP_DIM, 32, generator=draws) / 32**0.5,
    }
    torch.save(tensors, folder / "pytorch_model.bin")
    architecture = {"embed_dim": MEDCLIP_DIM, "vision": vision, "text": text}
    file = write_json(folder.parent / f"{folder.name}-architecture.json", architecture)
    expect = {"dim": MEDCLIP_DIM, "image_size": MEDCLIP_SIZE, "patch_size": 4, "context_length": CONTEXT}
    expect |= {"activation": "gelu", "image_heads": 2, "text_heads": 2}
    return Upstream(
        name="medclip",
        place=folder,
        entry={"architecture": str(file), "expect": expect},
        image=partial(medclip_image, folder),
        text=partial(medclip_text, folder),
    )


def gray_square(data: bytes, size: int) -> np.ndarray:
    """MedCLIP's preparation: pasted on a black one-channel square, then resized; uint8 [size, size]."""
    image = opened(data)
    side = max(size, *image.size)
    square = Image.new("L", (side, side), 0)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return np.asarray(square.resize((size, size), Image.Resampling.BICUBIC))


def medclip_pixels(data: bytes) -> torch.Tensor:
    """Standardised gray pixels, three times: float [1, 3, H, W]."""
    gray = torch.from_numpy(np.array(gray_square(data, MEDCLIP_SIZE))).float() / 255
    return ((gray - MEDCLIP_MEAN) / MEDCLIP_STD).expand(1, 3, -1, -1)


@torch.no_grad()
def medclip_image(folder: Path, images: Sequence[bytes], prepare=medclip_pixels) -> np.ndarray:
    """Swin by transformers 4's names, written out: shifted windows with relative positions, mean over positions."""
    tensors = read(folder / "pytorch_model.bin")
    pooled = [_swin(below(tensors, "vision_model.model."), prepare(data), heads=(2, 4)) for data in images]
    return unit(torch.cat(pooled) @ tensors["vision_model.projection_head.weight"].T)


def _swin(w: Tensors, pixels: torch.Tensor, heads: Sequence[int]) -> torch.Tensor:
    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-5)

    def windows(x: torch.Tensor) -> torch.Tensor:  # [H, W, C] -> [windows, positions, C]
        rows, columns = x.shape[0] // WINDOW, x.shape[1] // WINDOW
        return x.view(rows, WINDOW, columns, WINDOW, -1).transpose(1, 2).reshape(rows * columns, WINDOW**2, -1)

    def attention(x: torch.Tensor, name: str, heads: int, shift: int) -> torch.Tensor:
        height, width, _ = x.shape
        # Positions that the roll brought together from opposite edges must not see each other.
        region = torch.zeros(height, width, 1)
        for number, at in enumerate((height - WINDOW, height - shift) if shift else ()):
            region[at:] += 10 ** (2 * number)
            region[:, at:] += 10 ** (2 * number + 1)
        x, regions = windows(x.roll((-shift, -shift), (0, 1))), windows(region)
        apart = regions != regions.transpose(1, 2)
        q, k, v = (
            linear(x, f"{name}.self.{part}").unflatten(-1, (heads, -1)).transpose(1, 2)
            for part in ("query", "key", "value")
        )
        table = w[f"{name}.self.relative_position_bias_table"][w[f"{name}.self.relative_position_index"]]
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5 + table.permute(2, 0, 1)
        scores = scores.masked_fill(apart[:, None], -math.inf)
        x = linear((scores.softmax(-1) @ v).transpose(1, 2).flatten(2), f"{name}.output.dense")
        x = x.view(height // WINDOW, width // WINDOW, WINDOW, WINDOW, -1).transpose(1, 2).reshape(height, width, -1)
        return x.roll((shift, shift), (0, 1))

    patches = "embeddings.patch_embeddings.projection"
    x = F.conv2d(pixels, w[f"{patches}.weight"], w[f"{patches}.bias"], stride=4)[0].permute(1, 2, 0)
    x = norm(x, "embeddings.norm")
    for stage, stage_heads in enumerate(heads):
        for index in range(2):
            at = f"encoder.layers.{stage}.blocks.{index}"
            shift = WINDOW // 2 if index == 1 and min(x.shape[:2]) > WINDOW else 0
            x = x + attention(norm(x, f"{at}.layernorm_before"), f"{at}.attention", stage_heads, shift)
            hidden = F.gelu(linear(norm(x, f"{at}.layernorm_after"), f"{at}.intermediate.dense"))
            x = x + linear(hidden, f"{at}.output.dense")
        down = f"encoder.layers.{stage}.downsample"
        if f"{down}.reduction.weight" in w:
            corners = (x[0::2, 0::2], x[1::2, 0::2], x[0::2, 1::2], x[1::2, 1::2])
            x = linear(norm(torch.cat(corners, dim=-1), f"{down}.norm"), f"{down}.reduction")
    return norm(x, "layernorm").flatten(0, 1).mean(dim=0, keepdim=True)


@torch.no_grad()
def medclip_text(
    folder: Path,
    captions: Sequence[str],
    layers: Sequence[int] = (1, 2, -1),
    pad_to: int | None = None,
    lower: bool = True,
) -> np.ndarray:
    """Each caption alone: the mean over its tokens and over three hidden states, then a linear map.

    Args:
        folder: Where the checkpoint lies.
        captions: The captions.
        layers: Hidden states that are averaged; 0 would be the embeddings.
        pad_to: None encodes without pads; else pads are masked inside BERT and counted in the mean.
        lower: Whether the tokenizer lower-cases, as everyone's does.
    """
    tensors = read(folder / "pytorch_model.bin")
    file = folder.parent / f"{folder.name}-architecture.json"
    bert = _loaded_bert(json.loads(file.read_text())["text"], below(tensors, "text_model.model."))
    found = []
    for caption in captions:
        ids = bert_ids(folder, caption, lower=lower)
        pads = max(0, (pad_to or 0) - len(ids))
        mask = torch.tensor([[1] * len(ids) + [0] * pads])
        out = bert(input_ids=torch.tensor([ids + [0] * pads]), attention_mask=mask, output_hidden_states=True)
        found.append(torch.stack([out.hidden_states[layer].mean(dim=1) for layer in layers]).mean(dim=0))
    return unit(torch.cat(found) @ tensors["text_model.projection_head.weight"].T)


# --- LVM-Med: image encoders ------------------------------------------------------------------------------------------


def write_lvm_med_resnet50(folder: Path, seed: int = 0, classifier: bool = True) -> Upstream:
    """torchvision's names in a bare ``.torch`` file; a ResNet-18 in place of the published depth."""
    from torchvision.models import resnet18

    folder.mkdir(parents=True, exist_ok=True)
    tensors = state(scramble(resnet18(num_classes=10), seed))
    if not classifier:
        tensors = {name: value for name, value in tensors.items() if not name.startswith("fc.")}
    file = folder / "lvmmed_resnet.torch"
    torch.save(tensors, file)
    entry = {"architecture": "resnet18", "expect": {"dim": 512, "image_size": 224}}
    return Upstream(name="lvm-med-resnet50", place=file, entry=entry, image=partial(lvm_med_resnet50_image, file))


def squashed(data: bytes, size: int) -> np.ndarray:
    """The classification script's preparation: ``size`` by ``size``, bilinear, whatever the aspect."""
    return np.asarray(opened(data).resize((size, size), Image.Resampling.BILINEAR))


@torch.no_grad()
def lvm_med_resnet50_image(file: Path, images: Sequence[bytes], mean=IMAGENET_MEAN, std=IMAGENET_STD, prepare=squashed):
    """torchvision's ResNet up to its mean over positions."""
    from torchvision.models import resnet18

    model = resnet18()
    model.fc = torch.nn.Identity()
    tensors = {name: value for name, value in read(file).items() if not name.startswith("fc.")}
    model.load_state_dict(tensors, strict=True)
    pixels = torch.cat([standardised(prepare(data, 224), mean, std) for data in images])
    return unit(model.eval()(pixels))


SAM_SIZE, SAM_PATCH, SAM_WINDOW, SAM_HEADS = 64, 8, 3, 2
SMALL_SAM = "samvit_mmkd_small"
"""A small Segment Anything encoder; writing one makes timm know it, in this process only."""


def _register_small_sam() -> None:
    import timm
    from timm.models.vision_transformer_sam import VisionTransformerSAM

    if timm.is_model(SMALL_SAM):
        return

    def build(num_classes: int = 0, **_: object):
        sizes = {"img_size": SAM_SIZE, "patch_size": SAM_PATCH, "embed_dim": 32, "depth": 2, "num_heads": SAM_HEADS}
        towers = {"use_rel_pos": True, "window_size": SAM_WINDOW, "global_attn_indexes": (1,), "neck_chans": 16}
        model = VisionTransformerSAM(**sizes, **towers, num_classes=num_classes)
        # As samvit_base_patch16 states it.
        model.pretrained_cfg = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD, "classifier": "head.fc"}
        return model

    build.__name__ = SMALL_SAM
    timm.models.register_model(build)


def write_lvm_med_vit_b(folder: Path, seed: int = 0, prefix: str = "") -> Upstream:
    """Segment Anything's names (``mlp.lin1``, ``mlp.lin2``) in a bare ``.pth`` file.

    Args:
        folder: Where it goes.
        seed: Of the weights.
        prefix: ``image_encoder.`` writes a whole Segment Anything checkpoint, with its decoder's tensors.
    """
    import timm

    _register_small_sam()
    folder.mkdir(parents=True, exist_ok=True)
    encoder = state(scramble(timm.create_model(SMALL_SAM, num_classes=0), seed))
    tensors = {prefix + name.replace(".mlp.fc", ".mlp.lin"): value for name, value in encoder.items()}
    if prefix:
        tensors["prompt_encoder.no_mask_embed.weight"] = torch.randn(1, 16)
        tensors["mask_decoder.iou_token.weight"] = torch.randn(1, 16)
    file = folder / "lvmmed_vit.pth"
    torch.save(tensors, file)
    geometry = {"size": SAM_SIZE, "resize": "squash", "interpolation": "bilinear"}
    entry = {
        "architecture": SMALL_SAM,
        "recipe": {"geometry": geometry, "mean": IMAGENET_MEAN, "std": IMAGENET_STD},
        "expect": {"dim": 16, "image_size": SAM_SIZE},
    }
    return Upstream(name="lvm-med-vit-b", place=file, entry=entry, image=partial(lvm_med_vit_b_image, file))


@torch.no_grad()
def lvm_med_vit_b_image(file: Path, images: Sequence[bytes]) -> np.ndarray:
    """Segment Anything's image encoder written out, and the mean over the neck's positions."""
    w = {name.removeprefix("image_encoder."): value for name, value in read(file).items()}

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:  # over the last dimension, also for the neck's norms
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)

    def attention(x: torch.Tensor, name: str) -> torch.Tensor:  # [windows, H, W, C]
        side, channels = x.shape[1], x.shape[-1]
        qkv = linear(x, f"{name}.qkv").view(len(x), side * side, 3, SAM_HEADS, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        between = torch.arange(side)[:, None] - torch.arange(side)[None, :] + side - 1
        grid = q.unflatten(2, (side, side))
        vertical = torch.einsum("bnhwc,hkc->bnhwk", grid, w[f"{name}.rel_pos_h"][between])
        horizontal = torch.einsum("bnhwc,wkc->bnhwk", grid, w[f"{name}.rel_pos_w"][between])
        bias = vertical[..., :, None] + horizontal[..., None, :]
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5 + bias.flatten(4).flatten(2, 3)
        return linear((scores.softmax(-1) @ v).transpose(1, 2).reshape(len(x), side, side, channels), f"{name}.proj")

    pixels = torch.cat([standardised(squashed(data, SAM_SIZE), IMAGENET_MEAN, IMAGENET_STD) for data in images])
    x = F.conv2d(pixels, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=SAM_PATCH)
    x = x.permute(0, 2, 3, 1) + w["pos_embed"]
    side = x.shape[1]
    for index, window in enumerate((SAM_WINDOW, 0)):
        at, y = f"blocks.{index}", norm(x, f"blocks.{index}.norm1")
        if window:
            wide = -(-side // window) * window
            y = F.pad(y, (0, 0, 0, wide - side, 0, wide - side))
            count = wide // window
            y = (
                y.view(len(x), count, window, count, window, -1)
                .transpose(2, 3)
                .reshape(-1, window, window, y.shape[-1])
            )
            y = attention(y, f"{at}.attn").view(len(x), count, count, window, window, -1).transpose(2, 3)
            y = y.reshape(len(x), wide, wide, -1)[:, :side, :side]
        else:
            y = attention(y, f"{at}.attn")
        x = x + y
        x = x + linear(F.gelu(linear(norm(x, f"{at}.norm2"), f"{at}.mlp.lin1")), f"{at}.mlp.lin2")
    x = norm(F.conv2d(x.permute(0, 3, 1, 2), w["neck.0.weight"]).permute(0, 2, 3, 1), "neck.1")
    x = norm(F.conv2d(x.permute(0, 3, 1, 2), w["neck.2.weight"], padding=1).permute(0, 2, 3, 1), "neck.3")
    return unit(x.mean(dim=(1, 2)))
