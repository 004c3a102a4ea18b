"""What several files of tests/ use."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import train
from model import VisionTransformer
from support.run import TERMS

# A few seconds of training: 3 epochs, of 4 steps on 16 images.
SMALL = """--recipe dino --arch vit_nano --patch_size 8 --global_crops_size 32
--local_crops_size 16 --local_crops_number 2 --out_dim 32 --hidden_dim 64 --overlap_global 4
--overlap_local 2 --batch_size_per_gpu 4 --epochs 3 --warmup_epochs 1
--warmup_teacher_temp_epochs 1 --knn_every 2 --num_workers 0 --log_every 1""".split()


def close(a, b, rtol=1e-5, atol=1e-6):
    """Assert equality to the rounding of float32 sums in another order."""
    torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


def image_folder(root, classes=2, train=8, val=4, size=(40, 48)):
    """Write images of noise, train and val of each class; return root."""
    rng = np.random.default_rng(0)
    for split, number in (("train", train), ("val", val)):
        for label in range(classes):
            (root / split / f"class{label}").mkdir(parents=True)
            for i in range(number):
                pixels = rng.integers(256, size=(*size, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / f"class{label}" / f"{i}.png")
    return root


def tiny_vit(**rest):
    shape = dict(image_size=32, patch_size=8, dim=12, depth=2, heads=3)
    return VisionTransformer(**(shape | rest)).eval()


def picture(H=90, W=120):
    """A smooth uint8 image with some of everything in it."""
    y, x = torch.meshgrid(torch.linspace(0, 1, H), torch.linspace(0, 1, W), indexing="ij")
    waves = 0.6 + 0.4 * torch.sin(20 * x * y)
    return (255 * torch.stack([x, (x + y) / 2, 1 - y * x]) * waves).to(torch.uint8)


def run(folder, output, *flags):
    """Train in this process."""
    train.main([*SMALL, "--data_path", str(folder), "--output_dir", str(output), *map(str, flags)])


def one_line(capsys, function, *arguments, program="train.py"):
    """Return the one line that a program ends with, its status 1 or 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        function(*arguments)
    assert stopped.value.code in (1, 2)
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith(f"{program}: error")
    return line


def log_of(output):
    """Return {step: (loss, L_I, L_p, L_c)} and {step: kNN} of a run's log."""
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "step"]
    assert [line["step"] for line in steps] == sorted({line["step"] for line in steps})
    losses = {line["step"]: tuple(line[name] for name in TERMS) for line in steps}
    return losses, {line["step"]: line["kNN"] for line in lines if "kNN" in line}


def assert_same_run(a, b):
    """Assert that two runs have the same weights, bit for bit, and the same log."""
    assert (a / "backbone.pth").read_bytes() == (b / "backbone.pth").read_bytes()
    assert log_of(a) == log_of(b)
