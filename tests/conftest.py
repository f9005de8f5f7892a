"""Fixtures every package's tests share: real data, a local Ray, an S3 server on loopback."""

import os
import socket
import threading
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Tests never reach a network: a model asked for by mistake must fail at once, not hang.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_DATA_LOG_LEVEL", "WARNING")
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")


@pytest.fixture(autouse=True)
def no_log_is_left():
    """A command that ran in this process has sent the log to a stream that is closed by now."""
    from common.logs import logger

    before = list(logger.handlers)
    yield
    for handler in set(logger.handlers) - set(before):
        logger.removeHandler(handler)
    logger.propagate = True


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real test data, which is not part of the repository."""
    folder = Path(os.environ.get("MMKD_SHARED_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no shared test data at {folder}; set MMKD_SHARED_DATA to its folder")
    return folder


@pytest.fixture(scope="session")
def ray_local():
    """One local Ray for all pipeline tests of a session."""
    import ray

    started = not ray.is_initialized()
    if started:
        ray.init(
            address="local",  # not the one of another test session on this machine
            num_cpus=4,
            object_store_memory=1 << 30,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="warning",
        )
    yield ray
    if started:
        ray.shutdown()


@pytest.fixture(scope="session")
def s3_server():
    """A moto S3 server on loopback; its address goes into the environment before Ray starts workers."""
    from moto.server import ThreadedMotoServer

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=port, verbose=False)
    server.start()
    yield f"http://127.0.0.1:{port}"
    server.stop()


@pytest.fixture
def s3(s3_server, monkeypatch):
    """URI of a fresh bucket, with endpoint and credentials in the usual environment variables."""
    import fsspec

    values = {
        "AWS_ENDPOINT_URL": s3_server,
        "AWS_ACCESS_KEY_ID": "test-key",
        "AWS_SECRET_ACCESS_KEY": "test-secret-canary",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    bucket = f"lake-{os.getpid()}-{threading.get_ident() % 10000}-{os.urandom(3).hex()}"
    filesystem = fsspec.filesystem("s3")
    filesystem.mkdir(bucket)
    yield f"s3://{bucket}"
    fsspec.get_filesystem_class("s3").clear_instance_cache()


CLIP_TEXT = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}


@pytest.fixture(scope="session")
def make_clip_folder(tmp_path_factory):
    """Factory of real, tiny open_clip models with random weights, in the folder layout open_clip publishes."""

    def make(name: str, dim: int = 16, size: int = 32, seed: int = 0, context_length: int = 16) -> Path:
        import json

        import open_clip
        import torch
        from safetensors.torch import save_file

        folder = tmp_path_factory.mktemp("models") / name
        folder.mkdir()
        config = {
            "embed_dim": dim,
            "vision_cfg": {"image_size": size, "layers": 1, "width": 32, "patch_size": 16, "head_width": 16},
            "text_cfg": {**CLIP_TEXT, "context_length": context_length},
        }
        torch.manual_seed(seed)
        model = open_clip.CLIP(**config)
        state = {key: value.contiguous() for key, value in model.state_dict().items()}
        save_file(state, str(folder / "open_clip_model.safetensors"))
        preprocess = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25], "interpolation": "bicubic"}
        text = json.dumps({"model_cfg": config, "preprocess_cfg": preprocess})
        (folder / "open_clip_config.json").write_text(text)
        return folder

    return make


@pytest.fixture(scope="session")
def make_hf_clip_folder(tmp_path_factory):
    """Factory of real, tiny transformers CLIP models with random weights and a byte-level tokenizer."""

    def make(name: str, dim: int = 24, size: int = 32, seed: int = 0) -> Path:
        import torch
        from tokenizers import Tokenizer, models, pre_tokenizers, processors
        from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, PreTrainedTokenizerFast

        folder = tmp_path_factory.mktemp("models") / name
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        vocab = {token: index for index, token in enumerate([*alphabet, "<start>", "<end>"])}
        backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        ends = [("<start>", vocab["<start>"]), ("<end>", vocab["<end>"])]
        backend.post_processor = processors.TemplateProcessing(single="<start> $A <end>", special_tokens=ends)
        special = {"bos_token": "<start>", "eos_token": "<end>", "pad_token": "<end>"}
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=20, **special)
        tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
        ids = {"bos_token_id": vocab["<start>"], "eos_token_id": vocab["<end>"], "pad_token_id": vocab["<end>"]}
        config = CLIPConfig(
            text_config={**tower, **ids, "vocab_size": len(vocab), "max_position_embeddings": 20},
            vision_config={**tower, "image_size": size, "patch_size": 16},
            projection_dim=dim,
        )
        torch.manual_seed(seed)
        CLIPModel(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        edges = {"size": {"shortest_edge": size}, "crop_size": {"height": size, "width": size}}
        CLIPImageProcessor(**edges).save_pretrained(folder)
        return folder

    return make


def draw_jpeg(seed: int, width: int = 48, height: int = 40) -> bytes:
    """A small smooth picture that depends on the seed."""
    import io

    import numpy as np
    from PIL import Image

    coarse = np.random.default_rng(seed).integers(0, 255, (6, 6, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


@pytest.fixture(scope="session")
def make_lake():
    """Factory of small lakes written through the storage layer, without ingest."""

    def make(uri: str, rows: int = 20, shard_rows: int = 8, damaged: tuple[int, ...] = (), captions: int = 2):
        import hashlib

        import pyarrow as pa

        from common.lake import create_lake, shard_name
        from common.schemas import PAIRS

        lake = create_lake(str(uri), shard_rows)
        made = []
        for row in range(rows):
            image = b"not an image" if row in damaged else draw_jpeg(row)
            texts = [f"finding {row % 5} in picture {row}", *[f"view {row} of {j}" for j in range(row % captions)]]
            made.append(
                {
                    "sample_id": hashlib.sha256(str(row).encode()).hexdigest()[:32],
                    "image": image,
                    "captions": texts,
                    "modality": ["ct", "mri"][row % 2],
                    "labels": [f"finding {row % 3}"],
                    "source": "test",
                    "source_key": str(row),
                    "license": "CC0-1.0",
                    "width": 48,
                    "height": 40,
                    "sha256": hashlib.sha256(image).hexdigest(),
                    "split": "test" if row % 5 == 4 else "train",
                }
            )
        for index in range(0, rows, shard_rows):
            table = pa.Table.from_pylist(made[index : index + shard_rows], schema=PAIRS)
            lake.storage.write_table(f"pairs/{shard_name(index // shard_rows)}", table)
        return lake

    return make
