"""The protocols, one a row, and the captions that they draw."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from ..files import read_text


@dataclass(frozen=True)
class Protocol:
    """A row of PROTOCOLS."""

    images: int  # pictures to generate
    captions: int | None  # different ones among them; each is drawn images / captions times. None: as many as there are
    image_size: int | None  # px, of generation; None is the model's own
    score_size: int | None  # px that both sides are centre-cropped and resized to (Lanczos); None: the detector's
    fetch: str  # where captions and reference pictures come from; "" when they are built in


_COCO = "http://images.cocodataset.org"
PROTOCOLS = {
    "embedded": Protocol(512, None, None, None, ""),
    "coco2014-30k": Protocol(
        30_000,
        30_000,
        512,
        256,
        f"--reference: the folder val2014 (40,504 pictures) of {_COCO}/zips/val2014.zip; --captions: your "
        f"list of 30,000 captions, one a line, or annotations/captions_val2014.json of "
        f"{_COCO}/annotations/annotations_trainval2014.zip, of which a fixed 30,000 are taken",
    ),
    "coco2017-5k": Protocol(
        5_000,
        5_000,
        512,
        256,
        f"--reference: the folder val2017 (5,000 pictures) of {_COCO}/zips/val2017.zip; --captions: "
        f"annotations/captions_val2017.json of {_COCO}/annotations/annotations_trainval2017.zip, one a picture",
    ),
    "laion-10k": Protocol(
        30_000,
        10_000,
        512,
        256,
        "--captions and --reference: 10,000 captions, one a line, and the folder of their pictures, of "
        "LAION-Aesthetics 6+ and held out of training. Its addresses are listed under "
        "https://huggingface.co/datasets/ChristophSchuhmann/improved_aesthetics_6plus; many are dead by now",
    ),
}
SUBSET_SEED = 2014  # which pictures of a COCO annotation file are taken, when it has more than the protocol


def read_captions(file: Path) -> list[str]:
    """Captions of a text file (one a line, blank lines skipped), a JSON list of them, or a COCO annotation file.

    Of COCO, the first caption (lowest id) of each picture, in an order of the pictures that is random and always the
    same, so that the first n are a fixed sample. Raises ValueError naming the file, FileNotFoundError without it.
    """
    if not file.is_file():
        raise FileNotFoundError(
            f"{file} is not there; expected captions: one a line, or a COCO annotation file (.json)"
        )
    text = read_text(file)
    try:
        captions = _from_json(json.loads(text)) if file.suffix.lower() == ".json" else text.split("\n")
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{file}: expected a JSON list of captions, or COCO's annotations with 'id', 'image_id' and 'caption', "
            f"found {type(error).__name__}: {error}"
        ) from error
    captions = [" ".join(line.split()) for line in captions if line.strip()]
    if not captions:
        raise ValueError(f"{file} holds no captions; expected one a line, e.g. 'a yellow star on a red background'")
    return captions


def _from_json(content: list | dict) -> list[str]:
    if isinstance(content, list):
        if not all(isinstance(entry, str) for entry in content):
            raise ValueError("entries that are not text")
        return content
    first: dict[int, str] = {}
    for entry in sorted(content["annotations"], key=lambda entry: entry["id"]):
        if not isinstance(entry["caption"], str):
            raise ValueError(f"a caption that is not text: {entry['caption']!r:.40}")
        first.setdefault(entry["image_id"], entry["caption"])
    pictures = sorted(first)
    order = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(SUBSET_SEED))
    return [first[pictures[index]] for index in order.tolist()]


def protocol_captions(name: str, file: Path | None, num_images: int | None) -> list[str]:
    """One caption for each picture of a protocol other than "embedded".

    num_images None is the protocol's own number. Raises FileNotFoundError without a file, ValueError for too few.
    """
    protocol = PROTOCOLS[name]
    count = num_images or protocol.images
    if file is None:
        raise FileNotFoundError(f"--protocol {name} needs --captions and --reference. {protocol.fetch}")
    captions = read_captions(file)
    wanted = min(count, protocol.captions)
    if len(captions) < wanted:
        raise ValueError(
            f"{file} holds {len(captions)} captions, and --protocol {name} takes {wanted} for {count} pictures: name a "
            f"longer list, or a smaller --num-images for a trial"
        )
    return [captions[index % wanted] for index in range(count)]
