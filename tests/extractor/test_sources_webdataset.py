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
        ("evil.tar/link", "link in the tar", b""),
        ("evil.tar/hard", "link in the tar", b""),
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


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_tars_one_behind_the_other_are_read_to_the_last(tmp_path, mode):
    whole = b""
    for index in range(40):
        tar = write_tar(tmp_path / "one.tar", [(f"{index}.jpg", bytes([index]) * 700), (f"{index}.txt", b"c")], mode)
        whole += tar.read_bytes()
    (tmp_path / "all.tar").write_bytes(whole)
    assert [record.image[:1] for record in read(tmp_path / "all.tar")] == [bytes([index]) for index in range(40)]


def test_a_damaged_header_in_the_middle_is_told(tmp_path):
    members = [(f"{i}.{kind}", b"x" * 500) for i in range(3) for kind in ("jpg", "txt")]
    tar = write_tar(tmp_path / "a.tar", members)
    data = bytearray(tar.read_bytes())
    data[4 * 1024 : 4 * 1024 + 512] = b"\xff" * 512
    tar.write_bytes(data)
    records = read(tar)
    assert [record.reason for record in records] == [None, None, "truncated tar"]
    assert "damaged header" in records[-1].detail


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
            ("a.json", b'{"caption": {"en": "text"}}'),
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
        *(
            "unreadable cell",
            "no image",
            "malformed metadata",
            "malformed metadata",
            "caption too long",
            "file too large",
        ),
        *(None, None),
    ]
    g = records[6]
    assert (g.captions, g.modality, g.split, g.license) == (("t",), "MRI", "test", "CC0")
    assert records[7].captions == ("its caption",)


def test_reported_names_with_dots_are_samples(shared_data):
    folder = shared_data / "reports" / "case-03"
    assert [(r.source_key, r.reason) for r in read(folder / "dots.tar")] == [
        ("dots.tar/1.2.840.113619.2.55", None),
        ("dots.tar/PMC123_fig1.2", None),
        ("dots.tar/plain", None),
    ]
    records = read(folder / "dots_only.tar")
    assert [record.source_key.rpartition(".")[2] for record in records] == ["55", "56"]
    assert all(record.captions for record in records)


def test_dotted_names_and_further_files_of_a_sample_are_told_apart(tmp_path, caplog):
    tar = write_tar(
        tmp_path / "a.tar",
        [
            # By name, as tar is usually given them: further files come before, between and behind a sample's own.
            ("case.1/g.cls.txt", b"7"),
            ("case.1/g.depth.png", b"a depth map"),
            ("case.1/g.jpg", b"g"),
            ("case.1/g.json", b"{}"),
            ("case.1/g.seg.png", b"a mask"),
            ("case.1/g.txt", b"caption of g"),
            # A figure and its panels, each a sample.
            ("fig1.jpg", b"fig1"),
            ("fig1.txt", b"whole"),
            ("fig1.1.jpg", b"fig1.1"),
            ("fig1.1.txt", b"left"),
            ("fig1.2.jpg", b"fig1.2"),
            ("fig1.2.txt", b"right"),
            ("fig1.2.pickle", BOMB),
            # Slices, one without a caption and one without a picture: nothing else they could belong to.
            ("1.2.840.1.jpg", b"1"),
            ("1.2.840.2.jpg", b"2"),
            ("1.2.840.2.txt", b"two"),
            ("1.2.840.3.txt", b"three"),
            ("1.2.840.30.JPG", b"30"),
            ("1.2.840.30.txt", b"thirty"),
        ],
    )
    with caplog.at_level("WARNING", "mmkd"):
        records = {record.source_key.partition("/")[2]: record for record in read(tar)}
    assert {key: record.reason or record.captions[:1] or "a picture" for key, record in records.items()} == {
        "case.1/g": ("caption of g",),
        "fig1": ("whole",),
        "fig1.1": ("left",),
        "fig1.2": ("right",),
        "1.2.840.1": "a picture",
        "1.2.840.2": ("two",),
        "1.2.840.3": "no image",
        "1.2.840.30": ("thirty",),
    }
    assert records["case.1/g"].image == b"g"
    assert "passed over 4 members" in caplog.text
    assert "further files of a sample 3, .pickle 1" in caplog.text


def test_members_that_are_passed_over_are_counted_by_rule_in_one_line(tmp_path, caplog):
    members = [(f"{i}.dcm", b"x") for i in range(3)]
    members += [("a.jpg", b"a"), ("a.txt", b"caption"), ("._a.jpg", b"a fork"), ("README", b"x")]
    members += [("l.jpg", (tarfile.SYMTYPE, "a.jpg")), ("h.jpg", (tarfile.LNKTYPE, "a.jpg"))]
    members += [("fifo.jpg", (tarfile.FIFOTYPE, "")), ("folder.jpg", (tarfile.DIRTYPE, "")), ("b.\x1b[31m", b"x")]
    with caplog.at_level("WARNING", "mmkd"):
        records = read(write_tar(tmp_path / "a.tar", members))
    assert [record.captions for record in records if not record.reason] == [("caption",)]
    assert [(r.reason, r.detail) for r in records if r.reason] == [
        ("link in the tar", f"{name} is a link to 'a.jpg'; store the file itself (tar --hard-dereference -h)")
        for name in ("l.jpg", "h.jpg")
    ]
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith(
        "ingest: a.tar: passed over 7 members that are no part of a sample: "
        ".dcm 3, other names 2, hidden files 1, devices and the like 1."
    )
    assert "last dot" in line
    assert "tiff" in line


def test_a_tar_of_dotted_names_that_lack_captions_is_read_in_bounded_memory(tmp_path):
    import tracemalloc

    tar = write_tar(tmp_path / "a.tar", [(f"1.2.{i}.jpg", bytes(200_000)) for i in range(100)])
    config = IngestConfig()
    (part,) = plan_sources([str(tar)], config)
    tracemalloc.start()
    try:
        sizes = [len(record.image) for record in read_part(part, config)]
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert sizes == [200_000] * 100
    assert most < 4_000_000, "of 20 MB"


def test_a_dotted_name_that_breaks_off_is_said_once(tmp_path):
    members = [("1.2.jpg", b"a" * 600), ("1.2.txt", b"caption"), ("1.2.seg.jpg", b"b" * 600), ("1.2.json", b"{}")]
    tar = write_tar(tmp_path / "a.tar", members)
    tar.write_bytes(tar.read_bytes()[: 512 * 6 + 100])
    assert [(r.source_key, r.reason) for r in read(tar)] == [("a.tar/1.2", None), ("a.tar/1.2.seg", "truncated tar")]


def test_reported_texts_in_other_encodings(shared_data):
    records = {r.source_key.partition("/")[2]: r for r in read(shared_data / "reports" / "case-04" / "enc.tar")}
    assert {key: record.reason for key, record in records.items() if record.reason} == {
        "latin1": "malformed row",
        "cp1252": "malformed row",
    }
    assert "not UTF-8 text" in records["latin1"].detail
    assert not records["bom"].captions[0].startswith("\ufeff")
    assert records["utf16"].captions[0].startswith("Chest")
    assert not any("\ufffd" in caption for record in records.values() for caption in record.captions)


def test_texts_and_metadata_are_decoded_alike(tmp_path):
    words = {"utf16": "\u00b5m".encode("utf-16"), "bare": "um".encode("utf-16-le"), "odd": b"\xff\xfea"}
    members = [m for name, text in words.items() for m in ((f"{name}.jpg", b"i"), (f"{name}.txt", text))]
    words = {"j16": json.dumps({"text": "t"}).encode("utf-16"), "latin": b'{"text": "\xf6"}'}
    members += [m for name, text in words.items() for m in ((f"{name}.jpg", b"i"), (f"{name}.json", text))]
    records = read(write_tar(tmp_path / "a.tar", members))
    assert [record.reason or record.captions[0] for record in records] == [
        *("\u00b5m", "malformed row", "malformed row", "t", "malformed row"),
    ]
