"""The unimed family: checkpoints of UniMed-CLIP's fork of open_clip, which MMKD-CLIP shares, in stock open_clip.

The fork keeps its text tower as ``text_encoder`` where open_clip has ``text``; the towers are equal otherwise
(UniMed-CLIP ``src/open_clip/model.py`` 384-391). Loading is strict here, where the fork's is not.
"""

from __future__ import annotations

from common.errors import ModelError
from common.models import open_clip as stock
from common.models.dual_encoder import Tokenize
from common.models.open_clip import OpenClipEncoder
from common.models.spec import ModelDescription, ModelSpec
from common.models.tensors import Tensors, read_tensors, renamed, without

PREFERRED: tuple[str, ...] = stock.PREFERRED
FORK_TEXT, STOCK_TEXT = "text_encoder.", "text."
STRAY = ("text_encoder.transformer.embeddings.position_ids", "text_encoder.transformer.pooler.")


def to_stock_names(tensors: Tensors) -> Tensors:
    """The fork's tensors by stock open_clip's names; tensors that have those already stay as they are.

    Raises:
        ModelError: A tensor is there under both names.
    """
    kept = without(tensors, STRAY)
    towers = {name: value for name, value in kept.items() if not name.startswith(FORK_TEXT)}
    text = renamed(kept, FORK_TEXT, STOCK_TEXT)
    twice = sorted(set(towers) & set(text))
    if twice:
        raise ModelError(
            f"The checkpoint holds tensors both by the fork's names and by stock open_clip's, such as {twice[0]}; "
            "which of them was trained cannot be told."
        )
    return {**towers, **text}


def describe(spec: ModelSpec) -> ModelDescription:
    """Geometry, constants and sizes of the architecture, and the checkpoint's hash."""
    return stock.describe(spec)


def load_tokenizer(spec: ModelSpec) -> Tokenize:
    """BiomedBERT's tokenizer, padded to 256."""
    return stock.load_tokenizer(spec)


def load(spec: ModelSpec) -> OpenClipEncoder:
    """Rename and load strictly into the stock architecture the entry names.

    Raises:
        ModelError: The checkpoint does not fit, or is not a plain tensor file.
    """
    found = stock.find_files(spec)
    return stock.load_found(spec, found, to_stock_names(read_tensors(found.weights(spec.name), spec.name)))
