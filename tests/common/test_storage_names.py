import pyarrow as pa
import pytest

from common.storage import Storage, address_from, address_within

NAMES = [
    "with space",
    " leading and trailing .x",
    "key=value",
    "ü é 試験 \N{MICROSCOPE}",
    "e\N{COMBINING ACUTE ACCENT}",  # is not the composed letter
    "100%",
    "%20",
    "%2F",
    "a+b",
    "x#y",
    "what?",
    "a&b;c,d:e@f!$",
    "'single' \"double\"",
    "[a]*{b}",
    "~",
    "back\\slash",
    "..almost",
    "<tag>|pipe^",
]


@pytest.fixture(params=["local", "s3"])
def storage(request, tmp_path):
    if request.param == "local":
        return Storage(str(tmp_path / "lake #1 50%?"))
    return Storage(request.getfixturevalue("s3") + "/lake #1 50%?")


def test_round_trip(storage, tmp_path):
    for name in NAMES:
        round_trip(storage, f"in {name}", name, tmp_path / "copy")
        assert storage.list_folders() == []


def round_trip(storage, folder, name, copy):
    content = name.encode() * 3
    storage.write_bytes(f"{folder}/{name}", content)
    assert storage.list_folders() == [folder]
    assert storage.list_files(folder) == [name]
    assert storage.child(folder).list_files() == [name]
    assert storage.exists(f"{folder}/{name}")
    assert storage.is_file(f"{folder}/{name}")
    assert storage.size(f"{folder}/{name}") == len(content)
    assert storage.read_bytes(f"{folder}/{name}") == content
    assert b"".join(storage.pieces(f"{folder}/{name}", 1, len(content), 4)) == content[1:]
    storage.download(f"{folder}/{name}", copy)
    storage.upload(copy, f"{folder}/up {name}")
    assert storage.read_bytes(f"{folder}/up {name}") == content
    storage.write_table(f"{folder}/{name}", pa.table({"a": [1, 2]}), {"who": "me"})
    assert storage.read_table(f"{folder}/{name}", ["a"])["a"].to_pylist() == [1, 2]
    assert storage.read_metadata(f"{folder}/{name}")[0] == 2
    assert storage.create(f"{folder}/new {name}", b"1")
    data, version = storage.read_versioned(f"{folder}/new {name}")
    assert storage.replace(f"{folder}/new {name}", data + b"2", version)
    storage.remove(f"{folder}/{name}")
    assert not storage.exists(f"{folder}/{name}")
    assert storage.list_files(folder) == sorted([f"up {name}", f"new {name}"])
    storage.remove(folder)


def test_all_of_them_side_by_side(storage):
    for name in NAMES:
        storage.write_bytes(f"d/{name}", name.encode())
    assert storage.list_files("d") == sorted(NAMES)
    assert all(storage.read_bytes(f"d/{name}") == name.encode() for name in NAMES)


@pytest.mark.parametrize(("name", "alike"), [("what?", "whatX"), ("[a]*", "aaa"), ("*", "other"), ("a/**", "a/b")])
def test_a_name_is_no_pattern(storage, name, alike):
    storage.write_bytes(name, b"1")
    storage.write_bytes(alike, b"2")
    storage.remove(name)
    assert not storage.exists(name)
    assert storage.read_bytes(alike) == b"2"


def test_a_file_named_as_its_folder_is_listed(storage):
    storage.write_bytes("x/x", b"1")
    assert storage.list_files("x") == ["x"]


@pytest.mark.parametrize(
    ("home", "inside", "outside"),
    [
        ("{tmp}/lake", "{tmp}/lake/runs/one", "{tmp}/lake-2/runs/one"),
        ("{tmp}/lake/", "{tmp}/lake/teachers.yaml", "{tmp}/teachers.yaml"),
        ("s3://bucket/lake", "s3://bucket/lake/models/a", "s3://bucket/lakes/models/a"),
    ],
)
def test_what_lies_inside_is_written_down_relative_and_found_again(home, inside, outside, tmp_path):
    home, inside, outside = (text.format(tmp=tmp_path) for text in (home, inside, outside))
    written = address_within(inside, home)
    assert home.rstrip("/") not in written
    assert address_from(written, home) == inside
    assert address_within(outside, home) == outside
    assert address_from(outside, home) == outside
    assert address_from(written, "s3://other/place") == f"s3://other/place/{written}"


def test_a_relative_address_is_inside_if_it_leads_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert address_within("lake/student", "lake") == address_within("lake/student", str(tmp_path / "lake")) == "student"
    assert address_within("elsewhere/student", "lake") == "elsewhere/student"
    assert address_from("student", "lake") == str(tmp_path / "lake/student")
