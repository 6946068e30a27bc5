"""Scores by pretrained networks: FID, KID, precision and recall (torch-fidelity's Inception), CLIP score (open_clip).

Weights are named by path or found where the two libraries keep them. Nothing is downloaded: what is missing is named
together with the command that fetches it.
"""

from __future__ import annotations

import io
import os
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from pickle import UnpicklingError

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

IMAGE_TYPES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
KID_SUBSET = 1000  # torch-fidelity's default; smaller sets take all they have
LARGE = 4000  # pictures from which the distances of precision and recall are taken in parts
# What the libraries raise for files that are no weights, or other ones.
_BROKEN = (OSError, EOFError, UnpicklingError, RuntimeError, SafetensorError, ValueError, TypeError, AssertionError)


def image_files(folder: Path) -> list[Path]:
    """The pictures of a folder, sorted by name. Raises FileNotFoundError if there are none."""
    files = sorted(file for file in folder.glob("*") if file.suffix.lower() in IMAGE_TYPES)
    if not files:
        raise FileNotFoundError(f"{folder} holds no pictures; expected files ending in {', '.join(IMAGE_TYPES)}")
    return files


def square(image: Image.Image, size: int) -> Image.Image:
    """The largest centred square, resized with Lanczos' filter to size x size where it is not so already."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    cropped = image.crop((left, top, left + side, top + side))
    return cropped if side == size else cropped.resize((size, size), Image.Resampling.LANCZOS)


class _Pictures(Dataset):
    def __init__(self, files: Sequence[Path], transform: Callable[[Image.Image], Tensor]) -> None:
        self.files, self.transform = files, transform

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor:
        with Image.open(self.files[index]) as image:
            return self.transform(image.convert("RGB"))


def _batches(files: Sequence[Path], transform: Callable[[Image.Image], Tensor], batch_size: int) -> DataLoader:
    workers = min(4, (os.cpu_count() or 2) // 2) if len(files) > 1000 else 0
    return DataLoader(_Pictures(files, transform), batch_size, num_workers=workers)


# --- Inception -------------------------------------------------------------------------------------------------------


def inception_weights(path: Path | None = None) -> Path:
    """The given file, or torch-fidelity's in the cache of torch.hub. Raises FileNotFoundError saying how to get it."""
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    cached = Path(torch.hub.get_dir()) / "checkpoints" / URL_INCEPTION_V3.rsplit("/", 1)[1]
    file = path or cached
    if not file.is_file():
        raise FileNotFoundError(
            f"FID, KID, precision and recall need torch-fidelity's Inception weights, and {file} is not there. "
            f"Fetch them once:\n  curl -L --create-dirs -o '{cached}' {URL_INCEPTION_V3}\n"
            f"or name the file with --inception-weights. Nothing is downloaded by itself."
        )
    return file


def load_inception(path: Path | None = None, device: str | torch.device = "cpu", layer: str = "2048") -> nn.Module:
    """torch-fidelity's network, giving the features of one of its layers. Raises ValueError for other weights.

    The file is read without running what a pickle may hold, then handed on: torch-fidelity itself would run it.
    """
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    file = inception_weights(path)
    try:
        weights = load_file(file) if file.suffix == ".safetensors" else torch.load(file, "cpu", weights_only=True)
        handed_on = io.BytesIO()
        torch.save(dict(weights), handed_on)
        handed_on.seek(0)
        network = FeatureExtractorInceptionV3("inception-v3-compat", [layer], feature_extractor_weights_path=handed_on)
    except _BROKEN as error:
        raise ValueError(
            f"{file}: expected the state dict of torch-fidelity's Inception v3, found: {_first_line(error)}"
        ) from error
    return network.to(device)


def _pixels(image: Image.Image, size: int | None) -> Tensor:
    """uint8 [3, H, W]."""
    return torch.from_numpy(np.array(square(image, size) if size else image)).permute(2, 0, 1)


@torch.no_grad()
def inception_features(
    files: Sequence[Path], network: nn.Module, size: int | None = None, batch_size: int = 64
) -> Tensor:
    """Features [n, d] on the CPU of pictures, which are first made `square` of size px (None: all are of one size)."""
    prepare = partial(_pixels, size=size)  # which a worker process of any start method can be sent
    device = next(network.parameters()).device
    return torch.cat([network(batch.to(device))[0].float().cpu() for batch in _batches(files, prepare, batch_size)])


@dataclass(frozen=True)
class ReferenceSet:
    """What generated pictures are compared with; a statistics file of others may lack the features."""

    mean: np.ndarray  # [d]
    covariance: np.ndarray  # [d, d]
    features: Tensor | None = None  # [n, d]

    @classmethod
    def of(cls, features: Tensor) -> ReferenceSet:
        from torch_fidelity.metric_fid import fid_features_to_statistics

        statistics = fid_features_to_statistics(features)
        return cls(statistics["mu"], statistics["sigma"], features)

    @classmethod
    def read(cls, file: Path) -> ReferenceSet:
        """From .npz with "mu" and "sigma" (as pytorch-fid and clean-fid write them), and "features" if it has them."""
        try:
            with np.load(file, allow_pickle=False) as arrays:
                features = torch.from_numpy(arrays["features"]) if "features" in arrays else None
                return cls(arrays["mu"], arrays["sigma"], features)
        except (*(KeyError, ValueError, OSError, EOFError, RuntimeError), zipfile.BadZipFile, zlib.error) as error:
            raise ValueError(f"{file}: expected an .npz file with the arrays mu and sigma, found: {error}") from error

    def save(self, file: Path) -> None:
        arrays = {"mu": self.mean, "sigma": self.covariance}
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(file, "wb") as stream:
            np.savez(stream, **arrays, **({} if self.features is None else {"features": self.features.numpy()}))


def inception_scores(features: Tensor, reference: ReferenceSet) -> dict[str, float]:
    """fid; with the reference's features also kid (mean over subsets), kid_std, precision and recall.

    All in the same features, as guided-diffusion's evaluation does; torch-fidelity's command takes those of VGG-16 for
    precision and recall unless it is told --feature-extractor inception-v3-compat.
    features: [n, d] of the generated pictures. Computed by torch-fidelity. Raises ValueError for too few of them.
    """
    from torch_fidelity.metric_fid import fid_statistics_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    generated = ReferenceSet.of(features)
    if len(features) < 5 or generated.mean.shape != reference.mean.shape:
        raise ValueError(
            f"expected 5 pictures or more with {reference.mean.shape[0]} features as the reference has, found "
            f"{len(features)} with {generated.mean.shape[0]}"
        )
    sides = [
        {"mu": one.mean.astype(np.float64), "sigma": one.covariance.astype(np.float64)}
        for one in (generated, reference)
    ]
    scores = {"fid": fid_statistics_to_metric(*sides, False)["frechet_inception_distance"]}
    if reference.features is None:
        return scores
    fewer = min(len(features), len(reference.features))
    kid = kid_features_to_metric(
        features, reference.features, kid_subset_size=min(KID_SUBSET, fewer), verbose=False
    )  # fmt: skip
    prc = prc_features_to_metric(features, reference.features, verbose=False, save_cpu_ram=fewer > LARGE)
    scores |= {
        "kid": kid["kernel_inception_distance_mean"],
        "kid_std": kid["kernel_inception_distance_std"],
        "precision": prc["precision"],
        "recall": prc["recall"],
    }
    return scores


# --- CLIP ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Clip:
    model: nn.Module
    prepare: Callable[[Image.Image], Tensor]
    tokenize: Callable[[list[str]], Tensor]
    name: str


def clip_weights(name: str, pretrained: str) -> Path:
    """Where the Hugging Face cache holds open_clip's weights. Raises FileNotFoundError with the command to get them."""
    import open_clip
    from huggingface_hub import try_to_load_from_cache

    config = open_clip.get_pretrained_cfg(name, pretrained)
    if not config:
        known = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or f"none, for it knows no model {name!r}"
        raise ValueError(f"open_clip knows no weights {pretrained!r} of {name}; it knows {known}")
    repository, _, file = config.get("hf_hub", "").rpartition("/")
    stem = Path(file).stem if file else "open_clip_pytorch_model"
    names = [file] if file else ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"]
    for candidate in [f"{stem}.safetensors", *names]:
        found = try_to_load_from_cache(repository, candidate) if repository else None
        if isinstance(found, str):
            return Path(found)
    cached = Path("~/.cache/clip").expanduser() / Path(config.get("url") or "nothing").name
    if cached.is_file():
        return cached
    raise FileNotFoundError(
        f"the CLIP score needs open_clip's {name} with the weights {pretrained}, and they are not in the cache. Fetch "
        f'them once:\n  python -c "import open_clip as o; '
        f"o.download_pretrained(o.get_pretrained_cfg('{name}', '{pretrained}'))\"\n"
        f"or name their file with --clip-weights. Nothing is downloaded by itself."
    )


def load_clip(
    name: str = "ViT-g-14",
    pretrained: str = "laion2b_s12b_b42k",
    weights: Path | None = None,
    device: str | torch.device = "cpu",
) -> Clip:
    """open_clip's model, or with "local-dir:FOLDER" one of a folder with open_clip_config.json and weights.

    Raises FileNotFoundError for weights that are not there, ValueError for ones that do not fit or an unknown name.
    """
    import open_clip
    from open_clip.transform import PreprocessCfg, image_transform_v2

    local = name.startswith("local-dir:")
    if ":" in name and not local:
        raise ValueError(
            f"{name}: fetch the model's folder and name it as local-dir:FOLDER; nothing is downloaded here"
        )
    if weights is not None and not weights.is_file():
        raise FileNotFoundError(f"--clip-weights {weights} is not there")
    file = None if local else weights or clip_weights(name, pretrained)
    # Weights named by their path bring no picture size, mean and deviation: those of the tag hold.
    config = {} if local else open_clip.get_pretrained_cfg(name, pretrained) or {}
    known = {"mean", "std", "interpolation", "resize_mode", "fill_color"}
    try:
        model = open_clip.create_model(
            name,
            str(file) if file else None,
            device=device,
            force_preprocess_cfg={key: value for key, value in config.items() if key in known},
            require_pretrained=True,
        )
        tokenize = open_clip.get_tokenizer(name)
    except _BROKEN as error:
        raise ValueError(
            f"{file or name}: expected weights of open_clip's {name}, found: {_first_line(error)}"
        ) from error
    prepare = image_transform_v2(PreprocessCfg(**model.visual.preprocess_cfg), is_train=False)
    label = name if local else f"{name} {weights.name if weights else pretrained}"
    return Clip(model.eval().requires_grad_(False), prepare, tokenize, label)


@torch.no_grad()
def clip_score(files: Sequence[Path], captions: Sequence[str], clip: Clip, batch_size: int = 64) -> float:
    """100 times the mean cosine between a picture's embedding and its caption's (Hessel et al., CLIPScore, w = 1)."""
    device = next(clip.model.parameters()).device
    cosines, start = [], 0
    for images in _batches(files, clip.prepare, batch_size):
        texts = clip.tokenize(list(captions[start : start + len(images)])).to(device)
        start += len(images)
        pictures = clip.model.encode_image(images.to(device), normalize=True)
        cosines.append((pictures * clip.model.encode_text(texts, normalize=True)).sum(1).cpu().double())
    return 100 * torch.cat(cosines).mean().item()


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
