"""WebDataset tars, BIOMEDICA's layout, and tars that are damaged or mean harm."""

import io
import json
import tarfile

import pytest

from extractor.config import IngestConfig
from extractor.sources import plan_sources, read_part

BOMB = b"cos\nsystem\n(S'touch /tmp/mmkd-pickle-was-run'\ntR."


def write_tar(path, members, mode="w"):
    with tarfile.open(path, mode) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if isinstance(content, tuple):
                info.type, info.linkname = content
                tar.addfile(info)
                continue
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def read(path, **settings):
    config = IngestConfig(**settings)
    return [record for part in plan_sources([str(path)], config) for record in read_part(part, config)]


@pytest.fixture
def biomedica(shared_data, tmp_path):
    """The eight real figures of BIOMEDICA as a tar in its layout."""
    texts = {}
    for line in (shared_data / "mmkd-demo" / "meta.jsonl").read_text().splitlines():
        row = json.loads(line)
        texts[row["imgpath"].rsplit("/", 1)[1][:-4]] = row["txt"]
    members = []
    for metadata in sorted((shared_data / "mmkd-demo" / "features").glob("*/*/*.json")):
        image = metadata.with_suffix(".jpg")
        members.append((image.name, image.read_bytes()))
        members.append((metadata.with_suffix(".txt").name, texts[metadata.stem].encode()))
        members.append((metadata.name, metadata.read_bytes()))
    assert len(members) == 24
    return write_tar(tmp_path / "shard-000.tar", members)


def test_biomedica_figures_become_records(biomedica):
    records = read(biomedica)
    assert len(records) == 8
    assert not [record.reason for record in records if record.reason]
    assert {record.license for record in records} == {"CC BY"}
    modalities = sorted(record.modality for record in records)
    assert modalities == ["CT", "endoscopy", "intraoral imaging", *["light microscopy"] * 4, "surgical procedure"]
    assert all(record.source_key.startswith("shard-000.tar/filelist_commercial_batch") for record in records)
    assert any("hypermetabolic left supraclavicular" in record.captions[0] for record in records)


def test_biomedica_filters(biomedica):
    def kept(**filters):
        records = read(biomedica, **filters)
        assert len(records) == 8
        return sum(not record.filtered for record in records)

    assert kept(keep_labels=["Microscopy"]) == 4
    assert kept(keep_labels=["endoscopy", "plot"]) == 2
    assert kept(keep_panels=["single"]) == 3
    assert kept(keep_panels=["single"], keep_labels=["microscopy"]) == 2
    assert kept(keep_licenses=["CC BY"]) == 8
    assert kept(keep_licenses=["CC BY-NC", "CC0"]) == 0


def test_hostile_names_are_only_keys_and_pickles_stay_closed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tar = write_tar(
        tmp_path / "evil.tar",
        [
            ("../../escape.jpg", b"one"),
            ("../../escape.txt", b"caption one"),
            ("../../escape.pickle", BOMB),
            ("/etc/absolute.png", b"two"),
            ("/etc/absolute.txt", b"caption two"),
            ("/etc/absolute.pyd", BOMB),
            ("link.jpg", (tarfile.SYMTYPE, "/etc/passwd")),
            ("link.txt", b"caption of a link"),
            ("hard.jpg", (tarfile.LNKTYPE, "../../escape.jpg")),
            ("device.jpg", (tarfile.CHRTYPE, "")),
            ("only.pkl", BOMB),
            ("lone\udcff.jpg".encode("utf-8", "surrogateescape").decode("utf-8", "surrogateescape"), b"three"),
            ("lone\udcff.json", b'{"caption": "from json"}'),
        ],
    )
    before = sorted(path for path in tmp_path.parent.rglob("*"))
    records = read(tar)
    assert sorted(path for path in tmp_path.parent.rglob("*")) == before
    assert [(r.source_key, r.reason, r.image) for r in records] == [
        ("evil.tar/../../escape", None, b"one"),
        ("evil.tar//etc/absolute", None, b"two"),
        ("evil.tar/link", "no image", b""),
        ("evil.tar/lone?", None, b"three"),
    ]


@pytest.mark.parametrize(("name", "mode"), [("a.tar", "w"), ("a.tar.gz", "w:gz")])
def test_a_tar_that_breaks_off_keeps_what_came_before(tmp_path, name, mode):
    import random

    noise = random.Random(0)
    members = [m for i in range(6) for m in ((f"{i}.jpg", noise.randbytes(30_000)), (f"{i}.txt", b"caption"))]
    tar = write_tar(tmp_path / name, members, mode)
    tar.write_bytes(tar.read_bytes()[:100_000])
    records = read(tar)
    assert [record.reason for record in records[:3]] == [None] * 3
    assert [record.reason for record in records[3:]] == ["truncated tar"]


def test_what_is_not_a_tar_is_one_reject(tmp_path):
    (tmp_path / "page.tar").write_bytes(b"<html>404</html>" * 100)
    (record,) = read(tmp_path / "page.tar")
    assert record.reason == "truncated tar"
    assert "page.tar" in record.source_key


def test_samples_lacking_something_have_reasons(tmp_path):
    tar = write_tar(
        tmp_path / "a.tar",
        [
            ("a.jpg", b"image"),
            ("b.txt", b"caption"),
            ("c.png", b"image"),
            ("c.json", b"{broken"),
            ("d.png", b"image"),
            ("d.json", b"[]"),
            ("e.png", b"image"),
            ("e.txt", b"c" * 900_000),
            ("f.png", b"i" * (2 << 20)),
            ("f.txt", b"caption"),
            ("g.png", b"image"),
            ("g.json", json.dumps({"text": "t", "modality": "MRI", "split": "test", "licence": "CC0"}).encode()),
            ("g.seg.png", b"a mask, not the image"),
            ("g.png", b"again: another sample"),
            ("g.txt", b"its caption"),
        ],
    )
    records = read(tar, limits={"max_file_mib": 1})
    assert [record.reason for record in records] == [
        *("no caption", "no image", "malformed metadata", "malformed metadata", "caption too long", "file too large"),
        *(None, None),
    ]
    g = records[6]
    assert (g.captions, g.modality, g.split, g.license) == (("t",), "MRI", "test", "CC0")
    assert records[7].captions == ("its caption",)
