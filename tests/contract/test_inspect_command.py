"""``mmkd inspect`` as its user meets it: what is printed, where the page lies, what a mistake looks like."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest

from common.lake import Lake
from common.schemas import features_schema
from extractor.sink import write_features

DIM = 4


def mmkd(*arguments: str, cwd: str | None = None, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "cluster.cli", "inspect", *arguments]
    path = os.pathsep.join(filter(None, [os.getcwd(), os.environ.get("PYTHONPATH", "")]))
    env = {**os.environ, "COLUMNS": "100", "PYTHONPATH": path, **environment}
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd, env=env)


def printed(*arguments: str, **more: str) -> str:
    done = mmkd(*arguments, **more)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout


@pytest.fixture
def lake(make_lake, tmp_path) -> Lake:
    return make_lake(tmp_path / "lake", rows=10, shard_rows=4)


def embed(lake: Lake, teacher: str) -> None:
    """Unit vectors of both towers for every pair, drawn from a seed."""
    draw = np.random.default_rng(len(teacher))
    lake.storage.write_json(f"manifests/teachers/{teacher}.json", {"fingerprint": {"made": "by hand"}})
    schema = features_schema(DIM, DIM)
    for index in lake.shards():
        ids = lake.read_pairs(index, ["sample_id"])["sample_id"]
        columns = [ids.combine_chunks()]
        for _ in ("image", "text"):
            vectors = draw.standard_normal((len(ids), DIM)).astype(np.float32)
            vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
            columns.append(pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), DIM))
            columns.append(pa.array(np.full(len(ids), 3.5, np.float32)))
        columns.append(pa.nulls(len(ids), schema.field("extra_text_embeddings").type))
        write_features(lake, teacher, index, pa.table(columns, schema=schema), [], {"fingerprint": {"made": "by hand"}})


def test_it_prints_tables_and_leaves_a_page_in_a_local_lake(lake):
    embed(lake, "chest")
    before = set(os.listdir(lake.uri))
    said = printed(lake.uri)
    assert said.startswith(f"{lake.uri}: 10 pairs in 3 shards\n\nPairs by modality\nmodality  pairs\nct            5\n")
    assert re.search(r"^Pairs with an image vector\nmodality +chest\nct +100 %\nmri +100 %$", said, re.MULTILINE)
    assert re.search(r"^chest +image +3\.5 +3\.5 +3\.5$", said, re.MULTILINE)
    assert re.search(r"^chest +\(all\) +10 ", said, re.MULTILINE)
    assert "Vectors of 10 of 10 pairs were looked at, drawn from 3 of 3 shards with seed 0" in said
    assert said.rstrip().endswith(f"The page with pictures: {lake.uri}/inspection.html")
    assert set(os.listdir(lake.uri)) - before == {"inspection.html"}
    page = lake.storage.read_bytes("inspection.html").decode()
    assert page.startswith("<!doctype html>")
    assert "data:image/jpeg;base64," in page


def test_json_is_the_only_thing_on_standard_output(lake, tmp_path):
    embed(lake, "chest")
    embed(lake, "sono")
    page = tmp_path / "deep" / "er" / "page.html"
    found = json.loads(printed(lake.uri, "--json", "--teachers", "sono", "--sample", "4", "--out", str(page)))
    assert list(found["teachers"]) == ["sono"]
    assert found["sampled"]["pairs"] == 4
    assert found["page"] == str(page)
    assert page.read_text(encoding="utf-8").rstrip().endswith("</html>")
    assert not lake.storage.exists("inspection.html")


def test_a_lake_without_embeddings_says_what_to_run(lake):
    said = printed(lake.uri)
    assert f"There are no embeddings yet. Run `mmkd extract {lake.uri} --teachers NAME,...`" in said
    assert "Pairs by modality" in said


def test_the_page_of_a_lake_on_object_storage_lies_in_the_working_directory(make_lake, s3, tmp_path):
    lake = make_lake(f"{s3}/lake", rows=4)
    said = printed(lake.uri, cwd=str(tmp_path))
    assert f"The page with pictures: {tmp_path}/inspection.html" in said
    assert (tmp_path / "inspection.html").is_file()
    assert "canary" not in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{tmp}/none"], "There is no lake at"),
        (["{lake}", "--teachers", "nobody"], "no embeddings of teacher 'nobody' .it has: none.. Run `mmkd extract"),
    ],
)
def test_a_mistake_is_one_paragraph(lake, tmp_path, arguments, message):
    done = mmkd(*(argument.format(tmp=tmp_path, lake=lake.uri) for argument in arguments))
    assert (done.returncode, done.stdout) == (1, "")
    assert "Traceback" not in done.stderr
    assert re.search(message, " ".join(done.stderr.split()))


def test_a_sample_of_nothing_is_refused(lake):
    assert mmkd(lake.uri, "--sample", "0").returncode == 2
