import io
import json
from itertools import islice

import numpy as np
import pytest
from PIL import Image

from cluster.demo.brushes import PIXELS
from cluster.demo.captions import SIZE_WORDS, Scene, clean_caption, zero_shot_prompts
from cluster.demo.corpus import LICENSE, Pair, draw_picture, specialist_pairs, student_pairs, write_jsonl
from cluster.demo.modalities import MODALITIES


def pixels(pair: Pair) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(pair.image)), np.float32) / 255


def names_its_finding(pair: Pair, caption: str) -> bool:
    return any(name in caption for name in MODALITIES[pair.modality].findings[pair.label].names)


@pytest.fixture(scope="module")
def training_pairs() -> list[Pair]:
    return list(student_pairs(3, {"train": 150}))


def test_the_same_seed_draws_the_same_corpus():
    assert list(student_pairs(1, {"train": 3})) == list(student_pairs(1, {"train": 3}))
    assert list(student_pairs(1, {"train": 3})) != list(student_pairs(2, {"train": 3}))


def test_a_picture_does_not_depend_on_the_others():
    long = {pair.key: pair for pair in student_pairs(1, {"train": 6, "test": 2})}
    short = list(student_pairs(1, {"train": 2}, ["fundus"]))
    assert short == [long[pair.key] for pair in short]


def test_splits_have_the_sizes_asked_for_and_share_no_picture():
    pairs = list(student_pairs(1, {"train": 5, "val": 3, "test": 2}))
    assert [pair.split for pair in pairs].count("train") == 5 * len(MODALITIES)
    assert [pair.split for pair in pairs].count("test") == 2 * len(MODALITIES)
    assert len({pair.key for pair in pairs}) == len({pair.image for pair in pairs}) == 10 * len(MODALITIES)


def test_specialists_see_other_pictures_and_only_their_own_modalities():
    own = list(specialist_pairs(1, ["fundus", "histology"], {"train": 5}))
    assert {pair.modality for pair in own} == {"fundus", "histology"}
    assert not {pair.image for pair in own} & {pair.image for pair in student_pairs(1, {"train": 5})}


def test_images_are_rgb_jpegs_of_one_size(training_pairs: list[Pair]):
    for pair in training_pairs[::50]:
        image = Image.open(io.BytesIO(pair.image))
        assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (PIXELS, PIXELS))


def test_clean_captions_name_finding_place_and_size():
    for pair in islice(specialist_pairs(1, ["ultrasound"], {"train": 40}), 40):
        (caption,) = pair.captions
        assert names_its_finding(pair, caption)
        if pair.label != "normal":
            assert pair.scene.place in caption
            assert any(word in caption for word in SIZE_WORDS[pair.scene.size])


def test_most_of_the_students_training_captions_name_no_finding(training_pairs: list[Pair]):
    named = [names_its_finding(pair, caption) for pair in training_pairs for caption in pair.captions]
    assert 0.2 < np.mean(named) < 0.4
    assert all(1 <= len(pair.captions) <= 2 for pair in training_pairs)


def test_the_students_held_out_captions_are_clean():
    for pair in student_pairs(1, {"test": 10}):
        assert names_its_finding(pair, pair.captions[0])


@pytest.mark.parametrize("modality", MODALITIES)
def test_every_finding_changes_the_picture_around_its_place(modality: str):
    known = MODALITIES[modality]
    for name, finding in known.findings.items():
        if finding.paint is None:
            continue
        place = finding.places[0]
        # the same generator state draws the same anatomy below both pictures
        with_it = draw_picture(Scene(modality, name, place, "large"), np.random.default_rng(5))
        without = known.finish(known.background(np.random.default_rng(5)), np.random.default_rng(6))
        difference = np.abs(np.asarray(with_it, np.float32) / 255 - without.clip(0, 1)).max(axis=2)
        assert difference.max() > 0.15, name


def test_modalities_look_different(training_pairs: list[Pair]):
    def nearest_mean(picture: np.ndarray, means: dict[str, np.ndarray]) -> str:
        return min(means, key=lambda name: float(np.square(picture - means[name]).sum()))

    by_modality = {name: [pixels(p) for p in training_pairs if p.modality == name] for name in MODALITIES}
    means = {name: np.mean(pictures[:100], axis=0) for name, pictures in by_modality.items()}
    hits = [nearest_mean(p, means) == name for name, pictures in by_modality.items() for p in pictures[100:]]
    assert np.mean(hits) > 0.95


def test_prompts_cover_every_label_and_name_it():
    for modality, known in MODALITIES.items():
        prompts = zero_shot_prompts(modality)
        assert list(prompts) == list(known.findings)
        assert all(known.findings[label].names[0] in prompt for label, texts in prompts.items() for prompt in texts)


def test_captions_differ_in_wording():
    scene = Scene("fundus", "scar", "left", "small")
    assert len({clean_caption(scene, np.random.default_rng(number)) for number in range(50)}) > 10


def test_write_jsonl_leaves_images_and_one_line_per_picture(tmp_path):
    pairs = list(student_pairs(1, {"train": 2, "test": 1}, ["radiograph"]))
    rows = [json.loads(line) for line in write_jsonl(pairs, tmp_path).read_text().splitlines()]
    assert [row["split"] for row in rows] == ["train", "train", "test"]
    for row, pair in zip(rows, pairs, strict=True):
        assert (tmp_path / row["image"]).read_bytes() == pair.image
        assert row["captions"] == pair.captions
        assert row["caption"] == pair.captions[0]
        assert (row["modality"], row["label"], row["license"]) == ("radiograph", pair.label, LICENSE)
