"""Look at the installation the way a failing job would meet it, and say what to mend."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import sys
from collections.abc import Callable
from pathlib import Path

from cluster.reaching import home_fault

Check = tuple[bool, str]
PACKAGES = ("ray", "torch", "torchvision", "open_clip_torch", "transformers", "pyarrow", "s3fs", "pydantic", "typer")


def check_python() -> Check:
    """Python is new enough."""
    version = ".".join(str(part) for part in sys.version_info[:3])
    return sys.version_info >= (3, 11), f"Python {version} (needs 3.11 or newer)"


def check_packages() -> Check:
    """The libraries are installed."""
    found = {name: _version(name) for name in PACKAGES}
    missing = [name for name, version in found.items() if version is None]
    if missing:
        return False, f"not installed: {', '.join(missing)}; run `make env`, or pip install -c constraints.txt -e ."
    return True, ", ".join(f"{name} {version}" for name, version in found.items())


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_own_packages() -> Check:
    """``common``, ``extractor``, ``trainer`` and ``cluster`` are generic names: are they this project's?"""
    home = Path(__file__).resolve().parent.parent
    for name in ("common", "extractor", "trainer", "cluster"):
        file = importlib.import_module(name).__file__
        if file is None or Path(file).resolve().parent.parent != home:
            return False, f"`import {name}` finds {file}, not {home / name}; another package shadows it on sys.path"
    return True, f"imported from {home}"


def check_gpus() -> Check:
    """CUDA devices; none is fine."""
    import torch

    if not torch.cuda.is_available():
        return True, "no CUDA device; everything runs on the CPU"
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return True, f"{len(names)} CUDA device(s): {', '.join(names)}"


def check_shared_memory() -> Check:
    """Ray's object store lives in /dev/shm; a container often has far too little of it."""
    folder = Path("/dev/shm")
    if not folder.exists():
        return True, "no /dev/shm on this system"
    stat = os.statvfs(folder)
    gib = stat.f_bavail * stat.f_frsize / 2**30
    return gib >= 1, f"{gib:.1f} GiB free in /dev/shm (give containers --shm-size of 30 % of the memory)"


def check_home() -> Check:
    """The home folder can be written, or nothing is wanted there; a container's user often has none."""
    home, fault = os.environ.get("HOME", "not set"), home_fault()
    if fault is None:
        return True, f"Ray finds or keeps its token (HOME={home})"
    return False, (
        f"{fault}; set HOME to a folder that can. Without one a local Ray starts all the same, `ray status` does not "
        "reach it, and models need MMKD_CACHE and HF_HOME"
    )


def check_environment() -> Check:
    """Which credentials and addresses the environment names; never their values."""
    names = (
        "RAY_ADDRESS",
        "AWS_ACCESS_KEY_ID",
        "AWS_PROFILE",
        "AWS_ENDPOINT_URL",
        "HF_TOKEN",
        "HF_HUB_OFFLINE",
        "MMKD_STORE",
        "MMKD_CACHE",
    )
    present = [name for name in names if os.environ.get(name)]
    return True, f"set: {', '.join(present) or 'none'} (of {', '.join(names)})"


CHECKS: dict[str, Callable[[], Check]] = {
    "python": check_python,
    "packages": check_packages,
    "own code": check_own_packages,
    "gpu": check_gpus,
    "shared memory": check_shared_memory,
    "home": check_home,
    "environment": check_environment,
}


def run_doctor() -> int:
    """Print one line per check.

    Returns:
        0 when all is well, else 1.
    """
    failed = 0
    for name, check in CHECKS.items():
        good, text = check()
        failed += not good
        print(f"{'ok  ' if good else 'FAIL'}  {name.ljust(14)} {text}")
    return 1 if failed else 0
