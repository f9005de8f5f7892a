import io
import json

import open_clip
import torch
from PIL import Image
from safetensors.torch import save_file

from cluster.demo.architectures import CONTEXT_LENGTH, model_folder_config, small_clip
from cluster.demo.corpus import specialist_pairs
from cluster.demo.tokenizer import END, build_tokenizer

CAPTIONS = ["Large cyst in the liver.", "small cyst , left liver", "no finding"]


def ids(tokenizer, text: str) -> list[int]:
    return tokenizer(text, padding="max_length", max_length=CONTEXT_LENGTH, truncation=True).input_ids


def test_known_words_are_one_token_and_come_back():
    tokenizer = build_tokenizer(CAPTIONS)
    assert tokenizer.decode(tokenizer("Small CYST").input_ids, skip_special_tokens=True) == "small cyst"
    assert len(tokenizer("large cyst").input_ids) == 3


def test_unknown_words_are_spelled_out():
    tokenizer = build_tokenizer(CAPTIONS)
    pieces = tokenizer.convert_ids_to_tokens(tokenizer("zebra (x2)").input_ids)
    assert pieces == ["z", "##e", "##b", "##r", "##a", "(", "x", "##2", ")", END]


def test_end_of_text_has_the_highest_id_and_survives_truncation():
    tokenizer = build_tokenizer(CAPTIONS)
    end = tokenizer.convert_tokens_to_ids(END)
    assert end == len(tokenizer) - 1
    assert ids(tokenizer, "cyst")[1] == end
    assert ids(tokenizer, "cyst " * 99)[-1] == end


def test_the_vocabulary_is_a_function_of_the_captions_and_has_a_ceiling():
    assert build_tokenizer(CAPTIONS).get_vocab() == build_tokenizer(CAPTIONS[::-1]).get_vocab()
    assert "cyst" in build_tokenizer(CAPTIONS, max_words=2).get_vocab()
    assert "finding" not in build_tokenizer(CAPTIONS, max_words=2).get_vocab()


def test_stock_open_clip_loads_a_demo_model_folder_and_embeds_the_same(tmp_path):
    pairs = list(specialist_pairs(0, ["fundus"], {"train": 6}))
    tokenizer = build_tokenizer(caption for pair in pairs for caption in pair.captions)
    config = small_clip(len(tokenizer), embed_dim=64)
    torch.manual_seed(0)
    model = open_clip.CLIP(**config).eval()
    (tmp_path / "open_clip_config.json").write_text(json.dumps(model_folder_config(config)))
    save_file(model.state_dict(), tmp_path / "open_clip_model.safetensors")
    tokenizer.save_pretrained(tmp_path)

    loaded, _, transform = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}")
    tokens = open_clip.get_tokenizer(f"local-dir:{tmp_path}")([pair.captions[0] for pair in pairs])
    images = torch.stack([transform(Image.open(io.BytesIO(pair.image))) for pair in pairs])
    assert tokens.tolist() == [ids(tokenizer, pair.captions[0]) for pair in pairs]
    with torch.no_grad():
        loaded.eval()
        assert torch.equal(loaded.encode_image(images), model.encode_image(images))
        assert torch.equal(loaded.encode_text(tokens), model.encode_text(tokens))
        junk = tokens.masked_fill(tokens == tokenizer.pad_token_id, 5)
        assert torch.allclose(loaded.encode_text(junk), model.encode_text(tokens), atol=1e-6)
