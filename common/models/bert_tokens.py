"""BERT tokenizers for the families that bring their own recipe: always lower-cased, padded to one length, cut there."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from common.config import fingerprint
from common.models.dual_encoder import Tokenize

PAD = 0
"""Id of the padding token in the vocabularies of BiomedBERT and Bio_ClinicalBERT."""


def load_bert_tokenizer(folder: Path, length: int) -> Tokenize:
    """Word pieces from a folder's vocabulary.

    Lower case also for Bio_ClinicalBERT, whose vocabulary is cased: its repository has no tokenizer configuration, so
    that everyone's ``AutoTokenizer`` lower-cases (EmilyAlsentzer/clinicalBERT issue 26), and MedCLIP was trained so.

    Args:
        folder: Holds ``vocab.txt`` or ``tokenizer.json``.
        length: Every caption becomes this many ids; longer ones are cut, keeping the end token.
    """
    from transformers import AutoTokenizer, BertTokenizer

    vocabulary = folder / "vocab.txt"
    if vocabulary.is_file():
        tokenizer: Any = BertTokenizer(vocab=str(vocabulary), do_lower_case=True)
    else:
        tokenizer = AutoTokenizer.from_pretrained(folder, do_lower_case=True)

    def tokenize(captions: list[str]) -> np.ndarray:
        ids = tokenizer(captions, padding="max_length", truncation=True, max_length=length).input_ids
        return np.asarray(ids, dtype=np.int32)

    return tokenize


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
