"""One step of train.Training: half precision, SGD, compiling."""

import itertools

import pytest
import torch
from helpers import SMALL, close

import train
from data import build_dataset
from support.distributed import Processes, configure
from support.options import parse_train_args


def trained(folder, *flags, steps=1, scale=None):
    """Return a Training after some steps, and what the last one put out.

    scale: of fp16's loss, small enough for no step to be skipped.
    """
    args = parse_train_args([*SMALL, "--data_path", str(folder), *flags])
    processes, images = Processes("train.py"), build_dataset(folder, "train")
    configure(args, processes.device)
    training = train.Training(args, processes, len(images))
    (batch, _), output = next(iter(train.build_loader(args, images, processes))), None
    if scale and args.precision == "fp16":
        training.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    for step in range(steps):
        output = training.step(step, itertools.repeat(batch))
    return training, output


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains_like_single_precision(precision, folder):
    """Encoders compute in half precision, losses do not, and fp16's scale is taken out again."""
    flags = ["--optimizer", "sgd", "--warmup_epochs", "0", "--clip_grad", "0.1"]
    start, _ = trained(folder, *flags, steps=0)
    expected, output = trained(folder, *flags, "--precision", "fp32")
    half, half_output = trained(folder, *flags, "--precision", precision, scale=1024.0)
    assert half_output.losses.dtype == torch.float32
    assert not torch.equal(half_output.losses, output.losses)    # it is half precision
    close(half_output.losses, output.losses, rtol=2e-3)    # of 8 bits, averaged; measured: 3e-4
    names = [name for name, _ in start.student.named_parameters()]
    networks = (training.student.parameters() for training in (start, expected, half))
    for name, a, b, c in zip(names, *networks):
        # Clipped gradients have one length, so that a scale left in the others would show.
        assert (c - b).norm() <= 0.2 * (b - a).norm() + 1e-9, name    # measured: 0.1


def test_sgd_has_momentum(folder):
    """Without weight decay, the second step adds 0.9 of the first one's gradient."""
    flags = "--optimizer sgd --weight_decay 0 --weight_decay_end 0 --warmup_epochs 0 --lr 30"
    training, _ = trained(folder, *flags.split())
    name = "backbone.blocks.0.mlp.fc1.weight"
    weight = training.student.get_parameter(name)
    first = training.optimizer.state[weight]["momentum_buffer"].clone()
    weight.grad = torch.zeros_like(weight)
    before, lr = weight.detach().clone(), training.optimizer.param_groups[0]["lr"]
    training.optimizer.step()
    close(weight.data, before - lr * 0.9 * first)


def test_what_computes_is_compiled_if_asked(folder):
    training, _ = trained(folder, steps=0)
    training.args.compile = True
    compiled, parts = [], [training.student, training.teacher, training.photometric,
                           training.embedding_loss, training.relation_loss]
    for part in parts:
        part.compile = lambda part=part, **options: compiled.append((part, options))
    training.distribute()
    assert compiled == [(part, {"dynamic": False}) for part in parts]
