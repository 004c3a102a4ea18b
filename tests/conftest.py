"""Fixtures of tests/: a folder of images, a finished run, and a CPU on which results repeat."""

import os

import pytest
import torch
from helpers import image_folder, run


@pytest.fixture(autouse=True, scope="session")
def settings():
    """Compute with one thread, as tensors are small, and repeatably with cuBLAS."""
    torch.set_num_threads(1)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")    # read with its first product


@pytest.fixture(autouse=True)
def repeatable(request, monkeypatch):
    """Run everything but test_cuda_... on the CPU, where results repeat bit for bit."""
    torch.manual_seed(0)
    if not request.node.name.startswith("test_cuda"):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """16 training and 8 validation images in two classes."""
    return image_folder(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="session")
def uninterrupted(folder, tmp_path_factory):
    """The folder of a run from beginning to end, which interrupted ones must equal."""
    output = tmp_path_factory.mktemp("uninterrupted")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        run(folder, output)
    return output
