"""Tokenizers that load in a moment: workers that only prepare batches never import torch for them.

open_clip's own two tokenizers live in a package that imports torch, torchvision and timm, seven seconds of a core in
every worker; transformers' ``AutoTokenizer`` imports torch to find out which class it wants. Both are left for the
models that need them. Tests compare the ids with theirs.
"""

from __future__ import annotations

import gzip
import html
import importlib.util
import json
import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from common.config import fingerprint
from common.errors import ModelError
from common.models.dual_encoder import Tokenize

PAD = 0
"""Id of the padding token in the vocabularies of BiomedBERT and Bio_ClinicalBERT, and what open_clip pads with."""
CLIP_MERGES = 49152 - 256 - 2
"""How many lines of the file of byte pairs count: the vocabulary without single bytes and the two marks."""
# What splits a caption into words (open_clip tokenizer.py, SimpleTokenizer).
CLIP_WORDS = r"(?i)'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
CLIP_MARKS = ("<start_of_text>", "<end_of_text>")
PLAIN_CLASSES = {"bert": "BertTokenizer", "clip": "CLIPTokenizer"}
"""Model type of a ``config.json`` -> the class that ``AutoTokenizer`` would choose when the folder names no other."""
GENERIC_CLASS = "TokenizersBackend"
"""What runs any ``tokenizer.json``; up to transformers 4 it is called by the other of its names."""
GENERIC_NAMES = (GENERIC_CLASS, "PreTrainedTokenizerFast")


def clean_text(caption: str) -> str:
    """Mended encoding, no HTML entities (some are escaped twice), single spaces: what open_clip does first."""
    import ftfy

    return " ".join(html.unescape(html.unescape(ftfy.fix_text(caption))).split())


def clip_tokenizer(length: int) -> Tokenize:
    """CLIP's byte pairs as open_clip's ``SimpleTokenizer`` uses them: cleaned, lower case, zeros behind the end mark.

    Only where a caption spells out one of the two marks in the middle of other signs may ids differ from open_clip's.

    Args:
        length: Every caption becomes this many ids; longer ones are cut, keeping the end mark.
    """
    pairs = _byte_pairs()
    start, end = (pairs.token_to_id(mark) for mark in CLIP_MARKS)

    def tokenize(captions: list[str]) -> np.ndarray:
        encoded = pairs.encode_batch_fast([clean_text(caption).lower() for caption in captions])
        ids = np.full((len(captions), length), PAD, np.int32)
        for row, words in enumerate(encoded):
            whole = [start, *words.ids[: length - 2], end]
            ids[row, : len(whole)] = whole
        return ids

    return tokenize


@cache
def _byte_pairs() -> Any:
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    # The package's folder without importing the package.
    package = importlib.util.find_spec("open_clip")
    if package is None or package.origin is None:
        raise ModelError("The package open_clip_torch is not installed, which brings CLIP's byte pairs.")
    published = gzip.decompress(Path(package.origin).with_name("bpe_simple_vocab_16e6.txt.gz").read_bytes())
    lines = published.decode().split("\n")[1 : CLIP_MERGES + 1]
    merges = [(first, second) for first, second in (line.split() for line in lines)]
    # Printable bytes stand for themselves, the others for the signs from 256 on, in this order.
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = [chr(code) for code in (*printable, *range(0x100, 0x200 - len(printable)))]
    words = [*letters, *(f"{letter}</w>" for letter in letters), *(first + second for first, second in merges)]
    vocabulary = {word: place for place, word in enumerate([*words, *CLIP_MARKS])}
    pairs = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, end_of_word_suffix="</w>"))
    split = pre_tokenizers.Split(Regex(CLIP_WORDS), behavior="removed", invert=True)
    pairs.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    pairs.add_special_tokens(list(CLIP_MARKS))
    return pairs


def pretrained_tokenizer(folder: Path, **settings: Any) -> Any:
    """What ``AutoTokenizer.from_pretrained`` gives for a folder, without importing torch for the usual classes.

    Raises:
        OSError, ValueError: The folder holds no whole tokenizer, as transformers says, or one that needs code of its
            own, which never runs.
    """
    import transformers

    chosen = _plain_class(folder)
    loader = transformers.AutoTokenizer if chosen is None else getattr(transformers, chosen)
    return loader.from_pretrained(folder, **{**settings, "trust_remote_code": False})


def check_tokenizer_code(folder: Path, model: str) -> None:
    """Refuse a tokenizer that only its authors' own Python can build, before a worker tries.

    Raises:
        ModelError: It is one.
    """
    from common.models.files import needs_own_code

    if not any("auto_map" in _json(folder / name) for name in ("tokenizer_config.json", "config.json")):
        return
    try:
        pretrained_tokenizer(folder)
    except (OSError, ValueError) as error:
        if "trust_remote_code" in str(error):
            raise needs_own_code(folder / "tokenizer_config.json", model) from error


def _plain_class(folder: Path) -> str | None:
    """The one class that both of a folder's files agree on; None where it takes ``AutoTokenizer`` to tell.

    A folder without ``config.json``, as a student's, has only one to ask.
    """
    stated = _json(folder / "tokenizer_config.json")
    if "auto_map" in stated:
        return None
    full = str(stated.get("tokenizer_class", ""))
    named = full.removesuffix("Fast")
    if not (folder / "config.json").exists():
        if full in GENERIC_NAMES:
            return GENERIC_CLASS
        return named if named in PLAIN_CLASSES.values() else None
    expected = PLAIN_CLASSES.get(_json(folder / "config.json").get("model_type", ""))
    return expected if expected == named else None


def _json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}  # transformers will say what is wrong with it
    return content if isinstance(content, dict) else {}


def padded(tokenizer: Any, length: int, clean: Callable[[str], str] | None = None) -> Tokenize:
    """A tokenizer of transformers as a function: every caption becomes ``length`` ids, padded or cut.

    Args:
        tokenizer: From :func:`pretrained_tokenizer`.
        length: Longer captions are cut, keeping the end token.
        clean: Applied to each caption first.
    """

    def tokenize(captions: list[str]) -> np.ndarray:
        texts = captions if clean is None else [clean(caption) for caption in captions]
        ids = tokenizer(texts, padding="max_length", truncation=True, max_length=length).input_ids
        return np.asarray(ids, dtype=np.int32)

    return tokenize


def load_bert_tokenizer(folder: Path, length: int) -> Tokenize:
    """Word pieces from a folder's vocabulary.

    Lower case also for Bio_ClinicalBERT, whose vocabulary is cased: its repository has no tokenizer configuration, so
    that everyone's ``AutoTokenizer`` lower-cases (EmilyAlsentzer/clinicalBERT issue 26), and MedCLIP was trained so.

    Args:
        folder: Holds ``vocab.txt`` or ``tokenizer.json``.
        length: Every caption becomes this many ids; longer ones are cut, keeping the end token.
    """
    from transformers import BertTokenizer

    vocabulary = folder / "vocab.txt"
    if vocabulary.is_file():
        tokenizer: Any = BertTokenizer(vocab=str(vocabulary), do_lower_case=True)
    else:
        tokenizer = pretrained_tokenizer(folder, do_lower_case=True)
    return padded(tokenizer, length)


def loadable_folder(folder: Path) -> Path:
    """A folder that ``AutoTokenizer`` loads: the given one, or one made from its bare vocabulary once.

    Older BERT repositories hold ``vocab.txt`` and leave it to the model's ``config.json`` to say what that is.
    """
    from transformers import BertTokenizer

    from common.models.files import cache_folder, file_sha256

    vocabulary = folder / "vocab.txt"
    if (folder / "tokenizer.json").is_file() or not vocabulary.is_file():
        return folder
    stated = folder / "tokenizer_config.json"
    settings = json.loads(stated.read_text(encoding="utf-8")) if stated.is_file() else {}
    lower = bool(settings.get("do_lower_case", True))
    target = cache_folder().parent / "tokenizers" / fingerprint([file_sha256(vocabulary), lower])
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=target.parent))
        BertTokenizer(vocab=str(vocabulary), do_lower_case=lower).save_pretrained(partial)
        try:
            partial.rename(target)
        except OSError:  # another process was first, with the same content
            shutil.rmtree(partial)
    return target
