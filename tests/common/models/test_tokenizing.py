"""The tokenizers that need no torch give the ids of the libraries whose place they take."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from common.models.tokenizing import (
    clean_text,
    clip_tokenizer,
    loadable_folder,
    padded,
    pretrained_tokenizer,
)

WORDS = (
    *("CT", "scan", "of", "the", "chest,", "3.5cm", "mass;", "doesn't", "we'll", "I'M", "naïve", "(left)", "__init__"),
    *("&amp;amp;", "&lt;b&gt;", "µm", "α-synuclein", "北京", "x²", "½", "😀", "~", "'", "''", '"quoted"', "12345"),
    *(
        "\xa0",
        "\u200b",
        "\u212a",
        "Å",
        "IL-6/IL-8",
        "\x85",
        "\x1c",
        "\u3000",
        "TNF\u2010α",
        "ŉ",
        "İ",
        "ﬁ",
        "ſ",
        "sâ€™s",
    ),
)
# Nothing that Unicode 16 added: libraries differ in how new their tables are.
ALPHABETS = ((0x20, 0x7F), (0xA0, 0x250), (0x370, 0x377), (0x2010, 0x2060), (0x4E00, 0x4E80), (0x20, 0x21))


def _captions(count: int, seed: int) -> list[str]:
    """Half of words that trip tokenizers, half of characters at random; the first is empty."""
    draw = random.Random(seed)
    words = [" ".join(draw.choices(WORDS, k=draw.randint(0, 60))) for _ in range(count // 2)]
    signs = ["".join(chr(draw.randrange(*draw.choice(ALPHABETS))) for _ in range(draw.randint(0, 150))) for _ in words]
    return ["", *words, *signs]


@pytest.fixture(scope="module")
def bert_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A lower-casing BERT vocabulary as the oldest repositories hold it: letters, a few pieces, marks."""
    folder = tmp_path_factory.mktemp("bert")
    letters = [chr(code) for code in range(33, 127) if not chr(code).isupper()]
    pieces = [*letters, *(f"##{letter}" for letter in letters), "chest", "##st", "scan", "mass", "the", "of"]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *pieces]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    return folder


@pytest.mark.parametrize("length", [77, 16])
def test_byte_pairs_are_open_clips(length):
    from open_clip import SimpleTokenizer

    captions = _captions(1000, seed=length)
    theirs = SimpleTokenizer(context_length=length)(captions).numpy()
    mine = clip_tokenizer(length)(captions)
    assert mine.dtype == np.int32
    np.testing.assert_array_equal(mine, theirs)


def test_a_mark_spelled_out_is_a_mark_as_in_open_clip():
    from open_clip import SimpleTokenizer

    captions = ["chest <end_of_text> x-ray", "<start_of_text>", "left<end_of_text>right"]
    np.testing.assert_array_equal(clip_tokenizer(77)(captions), SimpleTokenizer()(captions).numpy())


def test_word_pieces_of_a_folder_are_open_clips(bert_folder, monkeypatch, tmp_path):
    from open_clip.tokenizer import HFTokenizer

    monkeypatch.setenv("MMKD_CACHE", str(tmp_path / "cache"))
    folder, captions = loadable_folder(bert_folder), _captions(500, seed=1)
    theirs = HFTokenizer(str(folder), context_length=40)(captions).numpy()
    np.testing.assert_array_equal(padded(pretrained_tokenizer(folder), 40, clean_text)(captions), theirs)


@pytest.mark.parametrize(
    ("config", "stated", "loaded"),
    [
        ({"model_type": "bert"}, {"tokenizer_class": "BertTokenizerFast"}, "BertTokenizer"),
        ({"model_type": "bert"}, {"tokenizer_class": "PreTrainedTokenizerFast"}, None),
        ({"model_type": "siglip"}, {"tokenizer_class": "BertTokenizer"}, None),
        (
            {"model_type": "bert"},
            {"tokenizer_class": "BertTokenizer", "auto_map": {"AutoTokenizer": ["a", None]}},
            None,
        ),
        ({}, {}, None),
        ({}, {"tokenizer_class": "TokenizersBackend"}, None),
        (None, {"tokenizer_class": "BertTokenizerFast"}, "BertTokenizer"),
        (None, {"tokenizer_class": "CLIPTokenizer"}, "CLIPTokenizer"),
        (None, {"tokenizer_class": "PreTrainedTokenizerFast"}, "TokenizersBackend"),
        (None, {"tokenizer_class": "TokenizersBackend", "auto_map": {}}, None),
        (None, {"tokenizer_class": "SiglipTokenizer"}, None),
        (None, {}, None),
    ],
)
def test_only_a_folder_whose_files_agree_is_spared_auto_tokenizer(tmp_path, config, stated, loaded):
    from common.models import tokenizing

    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(stated))
    assert tokenizing._plain_class(tmp_path) == loaded


@pytest.mark.parametrize("chosen", ["BertTokenizer", "TokenizersBackend", "PreTrainedTokenizerFast"])
@pytest.mark.parametrize("with_config", [True, False])
def test_what_a_plain_class_loads_is_what_auto_tokenizer_loads(bert_folder, tmp_path, chosen, with_config):
    from transformers import AutoTokenizer, BertTokenizer

    BertTokenizer(vocab=str(bert_folder / "vocab.txt"), do_lower_case=True).save_pretrained(tmp_path)
    stated = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**stated, "tokenizer_class": chosen}))
    if with_config:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    captions = _captions(300, seed=2)
    mine, theirs = pretrained_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert type(mine) is type(theirs)
    assert padded(mine, 32)(captions).tolist() == padded(theirs, 32)(captions).tolist()


def test_byte_pairs_come_without_torch_and_open_clip():
    program = (
        "import sys; from common.models.tokenizing import clip_tokenizer; import common.models.open_clip, "
        "common.models.hf_clip, common.models.unimed, extractor.engine; clip_tokenizer(77)(['chest']); "
        "sys.exit(', '.join({'torch', 'open_clip', 'torchvision', 'timm'} & set(sys.modules)) or 0)"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
