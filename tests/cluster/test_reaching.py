"""A cluster that is gone, and a home that cannot be written, are told before Ray is asked."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from cluster import reaching
from cluster.doctor import check_home
from cluster.reaching import TOKEN, home_fault, insist_on_answer

PROGRAM = """
import sys
from cluster import reaching
from cluster.session import ray_session
from common.logs import configure_logs

configure_logs()
reaching.PATIENCE_SECONDS = float(sys.argv[1])
with ray_session():
    print("joined")
"""


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(reaching, "PATIENCE_SECONDS", 0.1)


@pytest.fixture
def closed():
    """A port at which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def listening():
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("form", ["127.0.0.1:{port}", "ray://127.0.0.1:{port}", "localhost:{port}, 127.0.0.1:{port}"])
def test_an_address_that_nobody_answers_is_told(form, closed):
    with pytest.raises(ConnectionError, match=rf"nobody answers there .*127\.0\.0\.1:{closed}: .*refused"):
        insist_on_answer(form.format(port=closed))


@pytest.mark.parametrize("form", ["127.0.0.1:{port}", "ray://localhost:{port}", "127.0.0.1:{closed},127.0.0.1:{port}"])
def test_one_that_somebody_answers_is_rays_affair(form, listening, closed):
    insist_on_answer(form.format(port=listening, closed=closed))


@pytest.mark.parametrize("address", ["somewhere", "http://127.0.0.1:1", ""])
def test_what_names_no_port_is_left_to_ray(address):
    insist_on_answer(address)


@pytest.mark.usefixtures("impatient")
def test_auto_is_the_cluster_that_was_started_last(tmp_path, monkeypatch, closed):
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    insist_on_answer("auto")
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text(f"127.0.0.1:{closed}\n")
    with pytest.raises(ConnectionError, match=f"127.0.0.1:{closed}"):
        insist_on_answer("auto")


def test_a_session_on_a_cluster_that_is_gone_ends_in_a_sentence(closed):
    environment = {**os.environ, "RAY_ADDRESS": f"127.0.0.1:{closed}"}
    command = [sys.executable, "-c", PROGRAM, "1"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    last = done.stderr.splitlines()[-1]
    assert last.startswith(
        f"common.errors.ClusterError: Ray could not be reached or started (RAY_ADDRESS=127.0.0.1:{closed})"
    )
    assert "nobody answers there" in last
    assert "Unset RAY_ADDRESS" in last


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_wait(number, closed):
    environment = {**os.environ, "RAY_ADDRESS": f"127.0.0.1:{closed}"}
    command = [sys.executable, "-c", PROGRAM, "60"]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        assert any("joining" in line for line in process.stderr)
        began = time.monotonic()
        process.send_signal(number)
        process.communicate(timeout=30)
        assert time.monotonic() - began < 5
        # Python makes an exception of Ctrl-C.
        assert process.returncode in ((143,) if number == signal.SIGTERM else (-number, 1))


def test_a_home_that_cannot_be_written_is_told_by_the_doctor(tmp_path, monkeypatch):
    for name in (*TOKEN, "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert home_fault() is None
    assert check_home()[0]
    monkeypatch.setenv("HOME", "/proc")
    assert "(HOME=/proc) cannot be written" in str(home_fault())
    good, text = check_home()
    assert not good
    assert "set HOME to a folder that can" in text
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    assert home_fault() is None
