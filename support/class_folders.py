"""Find class folders in train/ and val/, and refuse what can't be meant."""

import os
from collections import Counter, defaultdict

from support.errors import UserError
from support.files import EXTENSIONS, walk

# Names of a split's folder; the second is ImageNet-S's.
SPLITS = {"train": ("train",), "val": ("val", "validation")}


def find_split(root, split):
    """Return the folder of a split below root, or None if it has none.

    split: "train" or "val". Raises UserError where images of val would be trained on, or those of
    one class taken for train/.
    """
    top = next(walk(root, levels=0))
    known = [name for names in SPLITS.values() for name in names]
    there = [name for name in top.folders if name in known]
    if odd := [name for name in top.folders if name.lower() in known and name not in known]:
        renamed = ", ".join(f"{name}/ to {name.lower()}/" for name in odd)
        raise UserError(f"{root}: rename {renamed}, or to something else if it is no split")
    if there and "train" not in there:
        raise UserError(f"{root} has {there[0]}/ but no train/: add it, or give the one folder of "
                        "images to train on")
    if there == ["train"]:
        flat = [folder.parts[0] for folder in walk(root, levels=1)
                if folder.parts and folder.images and not folder.folders]
        if others := [name for name in flat if name != "train" and "train" in flat]:
            raise UserError(f"{root}: is train/ a class beside {others[0]}/? Then rename it. If "
                            f"not, give {root}/train alone, as it has no class folders")
    for name in SPLITS[split]:
        if name in there:
            return os.path.join(root, name)
    return None


def find_classes(root, label_depth, listed=None):
    """Return the sorted names of the class folders below root.

    label_depth: on which level, from 1, or None, which is 1. listed: a file that names those that
    are wanted, one a line; None: all.
    """
    depth = label_depth or 1
    parents = [folder for folder in walk(root, depth - 1) if len(folder.parts) == depth - 1]
    names = sorted({name for folder in parents for name in folder.folders})
    if depth > 1 and not names:
        raise UserError(f"--label_depth {label_depth}: {root} has no folders on that level")
    if names == ["images", "masks"]:
        raise UserError(f"{root} is laid out for segmentation; give {root}/images to train on its "
                        "images")
    return choose(names, listed, root) if listed else names


def choose(names, listed, root):
    """Return the names that the file `listed` has, sorted."""
    try:
        with open(listed, encoding="utf-8") as file:
            wanted = sorted({line.strip() for line in file} - {""})
    except (OSError, ValueError) as error:
        raise UserError(f"--classes {listed} can't be read: {error}") from error
    if len(wanted) < 2:
        raise UserError(f"--classes {listed} names {len(wanted)} classes; two at least")
    if missing := [name for name in wanted if name not in names]:
        raise UserError(f"--classes {listed}: {root} has no class folder {some(missing)}")
    return wanted


def class_of(folder, depth):
    """Return the class folder that a Folder is or is in, None above that level."""
    return folder.parts[depth - 1] if len(folder.parts) >= depth else None


def check_classes(root, folders, label_depth):
    """Raise UserError for class folders without images, or one level too deep.

    folders: of a walk of root, train/ or val/. label_depth: None where it is to be asked for.
    """
    depth = label_depth or 1
    images, own, inner, unread = Counter(), Counter(), {}, defaultdict(set)
    for folder in folders:
        if (name := class_of(folder, depth)) is None:
            continue
        images[name] += len(folder.images)
        unread[name] |= folder.unread
        if len(folder.parts) == depth:
            own[name] += len(folder.images)
        elif folder.images:
            inner.setdefault(name, folder.parts[depth])
    if empty := [name for name in images if not images[name]]:
        found = sorted({ending or "no ending" for name in empty for ending in unread[name]})
        found = f", but files with {', '.join(found)}" if found else ""
        raise UserError(f"no images in the class folders {some(empty)} of {root}{found}; images "
                        f"end in {' '.join(EXTENSIONS)}")
    if deep := [name for name in images if not own[name]]:
        if label_depth is None:
            a, b = deep[0], f"{deep[0]}/{inner[deep[0]]}"
            raise UserError(f"{root}/{a} holds its images in folders: is {a} their class "
                            f"(--label_depth 1), or {b} (--label_depth 2)?")


def some(names, most=5):
    """List the first few of some names."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(str, names[:most])) + more
