"""What tests of the model families share: one torch thread, no network, and a teacher that is written only once."""

import socket

import pytest


@pytest.fixture(autouse=True, scope="session")
def _one_torch_thread():
    """Models this small are slower on several threads, and very slow on cores that others use."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def no_network(monkeypatch):
    """Nothing may even try to reach a network: files are made, described, loaded and run without one."""
    tried = []

    def refuse(*given, **_):
        tried.append(given)
        raise OSError("there is no network here")

    for what in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, what, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    yield
    assert tried == []
