"""The encoder alone, as a plain state dict: `evaluate.py export`."""

from pathlib import Path

from support.checkpoint import check_output, save


def run(args, encoder, size, processes):
    """Write the encoder alone, as a plain state dict."""
    check_output("output", args.output)
    if args.image_size and encoder.heads:
        encoder.resize(args.image_size)
    if processes.rank == 0:
        save(encoder.cpu().state_dict(), Path(args.output))
    names = "timm's vit_*_patch* (num_classes=0) and DINO's"
    names = names if encoder.heads else "torchvision's resnet50 (but fc)"
    processes.say(f"{args.output}: {len(encoder.state_dict())} keys, as in {names}; a strict load")
    if encoder.heads:
        processes.say(f"elsewhere, build it with {encoder.heads} heads: its shapes don't tell")
    return {}
