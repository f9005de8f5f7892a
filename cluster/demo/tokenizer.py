"""A small word tokenizer, made from a corpus's own captions, that stock open_clip loads from a model folder.

CLIP's 49,408 tokens would put most of a small model's weights into an embedding table that hardly ever trains.
"""

from collections import Counter
from collections.abc import Iterable

from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

PAD, UNKNOWN, END = "[PAD]", "[UNK]", "[EOS]"
CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
PUNCTUATION = "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"


def build_tokenizer(captions: Iterable[str], max_words: int = 4096) -> PreTrainedTokenizerFast:
    """A tokenizer whose vocabulary is the most frequent words of the captions, the same for the same captions.

    A word outside the vocabulary is spelled out in single characters, so no text is lost. The end-of-text token has
    the highest id, because open_clip's text tower pools at the position of the highest id; padding comes after it,
    where a causal text tower does not see it.

    Args:
        captions: Every caption the model will be trained on.
        max_words: Words kept, by frequency; ties go by the alphabet.
    """
    reader = Tokenizer(WordPiece({UNKNOWN: 0}, unk_token=UNKNOWN))
    reader.normalizer = BertNormalizer(lowercase=True)
    reader.pre_tokenizer = BertPreTokenizer()
    counts: Counter[str] = Counter()
    for caption in captions:
        text = reader.normalizer.normalize_str(caption)
        counts.update(word for word, _ in reader.pre_tokenizer.pre_tokenize_str(text))
    words = sorted(counts, key=lambda word: (-counts[word], word))[:max_words]
    pieces = [*CHARACTERS, *(f"##{character}" for character in CHARACTERS), *PUNCTUATION]
    tokens = list(dict.fromkeys([PAD, UNKNOWN, *pieces, *words]))
    vocabulary = {token: number for number, token in enumerate([*tokens, END])}

    reader.model = WordPiece(vocabulary, unk_token=UNKNOWN)
    reader.post_processor = TemplateProcessing(single=f"$A {END}", special_tokens=[(END, vocabulary[END])])
    return PreTrainedTokenizerFast(tokenizer_object=reader, pad_token=PAD, unk_token=UNKNOWN, eos_token=END)
