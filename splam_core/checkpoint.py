"""Weights on disk and in state dicts: safetensors files, diffusers <-> LDM single-file names, the fold of gamma."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from .gamma import authors_embedding, fold, guidance_embedding
from .keys import LORA_PARTS, LoraKey, Pair, lora_key, rename, unet_pairs, vae_pairs
from .quantization import METADATA as QUANTIZATION
from .quantization import companions, dequantized, factor_of

StateDict = dict[str, Tensor]

UNET_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."
CLIP_PREFIX = "cond_stage_model.transformer."

_SAFETENSORS = (".safetensors", ".sft")
PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
# What libraries and arithmetic raise where a file's tensors or settings are not what they should be.
_MISFITS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, SafetensorError, TypeError)
# Names that hosts know as they are: kohya's, and the host's own paths of modules.
_HOST_LORA_PREFIXES = ("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_", "lycoris_", "diffusion_model.")
# cond_proj's name and the layer that it feeds, in diffusers and in LDM.
_COND_PROJ: list[Pair] = [
    ("time_embedding.cond_proj.weight", "time_embedding.linear_1"),
    ("time_embed.cond_proj.weight", "time_embed.0"),
]


def diffusers_to_ldm(
    unet: Mapping[str, Tensor],
    vae: Mapping[str, Tensor] | None = None,
    text_encoder: Mapping[str, Tensor] | None = None,
) -> StateDict:
    """One LDM state dict (an SD1.x single file) from the state dicts of a diffusers folder, tensors shared, not copied.

    Widths, levels and layers are read off the keys. text_encoder keys may carry "text_model." or, as transformers 5
    names them, not. Raises ValueError for a key that Stable Diffusion does not have.
    """
    single = {UNET_PREFIX + new: unet[old] for old, new in _renamed(unet, unet_pairs(unet), "UNet").items()}
    vae = vae or {}
    for old, new in _renamed(vae, vae_pairs(vae), "VAE").items():
        # The VAE's attention layers are linear in diffusers and 1x1 convolutions in LDM.
        linear = ".attn_1." in new and vae[old].ndim == 2
        single[VAE_PREFIX + new] = vae[old][:, :, None, None] if linear else vae[old]
    for key, weight in (text_encoder or {}).items():
        if not key.endswith("position_ids"):
            single[CLIP_PREFIX + "text_model." + key.removeprefix("text_model.")] = weight
    return single


def ldm_to_diffusers(
    state_dict: Mapping[str, Tensor], text_prefix: str = "text_model."
) -> tuple[StateDict, StateDict, StateDict]:
    """(unet, vae, text_encoder) of an LDM single file; a part that the file lacks comes back empty.

    Weights under other prefixes (EMA copies, schedule buffers) and CLIP's position_ids, which is 0..76, are left out.
    text_prefix: what text encoder keys begin with; "" for a CLIPTextModel of transformers 5.
    Raises ValueError for no UNet, for an OpenCLIP text encoder (SD2.x) and for keys that Stable Diffusion lacks.
    """
    unet, vae, clip = (_under(state_dict, prefix) for prefix in (UNET_PREFIX, VAE_PREFIX, CLIP_PREFIX))
    if not unet:
        raise ValueError(
            f"expected an LDM single file with keys under {UNET_PREFIX!r}, found {sorted(state_dict)[:3]}. "
            "A diffusers folder needs no conversion."
        )
    if any(key.startswith("cond_stage_model.model.") for key in state_dict):
        raise ValueError(
            "this file holds an OpenCLIP text encoder (Stable Diffusion 2.x), expected CLIP (1.x): "
            "use the model's diffusers folder instead."
        )
    unet_names = _renamed(unet, _swapped(unet_pairs(unet)), "UNet")
    vae_names = _renamed(vae, _swapped(vae_pairs(vae)), "VAE")
    clip = {key: weight for key, weight in clip.items() if not key.endswith("position_ids")}
    return (
        {new: unet[old] for old, new in unet_names.items()},
        {new: _linear_if_attention(old, vae[old]) for old, new in vae_names.items()},
        {text_prefix + key.removeprefix("text_model."): weight for key, weight in clip.items()},
    )


def fold_gamma(
    state_dict: Mapping[str, Tensor], embedded: str | float = "splam", dtype: torch.dtype | None = None
) -> tuple[StateDict, bool]:
    """(state dict without cond_proj, whether there was one): its constant at gamma = 1 goes into a bias, exactly.

    Works on diffusers UNets and on LDM UNets, with any prefix; computed in float64, then cast to dtype, or without it
    to the bias's own. The keys cannot tell what a checkpoint embeds, so `embedded` says:
      "splam"   the authors' released checkpoints, phi at gamma = 1;
      "zero"    an embedding that is zero at gamma = 1 (`gamma_embedding`): the weights are only dropped;
      a number  an LCM checkpoint at that guidance_scale (its pipeline's default is 8.5).
    Raises ValueError for another `embedded`, or when the layer that cond_proj feeds is missing.
    """
    found = [(key, name, feeds) for key in state_dict for name, feeds in _COND_PROJ if _is_or_ends(key, name)]
    folded = dict(state_dict)
    for key, name, feeds in found:
        layer = key.removesuffix(name) + feeds
        cond_proj = _as_double(folded, key)
        for gone in (key, *companions(key)):
            folded.pop(gone, None)
        phi = _constant_embedding(embedded, cond_proj.shape[1])
        if f"{layer}.weight" not in folded or f"{layer}.bias" not in folded:
            raise ValueError(f"found {key!r} without the layer it feeds, {layer!r} (weight and bias): incomplete UNet.")
        bias = folded[f"{layer}.bias"]
        delta = fold(_as_double(folded, f"{layer}.weight"), cond_proj, phi)
        folded[f"{layer}.bias"] = (bias.double().cpu() + delta).to(bias.device, dtype or bias.dtype)
    return folded, bool(found)


def lora_to_kohya(
    lora: Mapping[str, Tensor],
    alpha: float | None = None,
    adapters: Mapping[str, Mapping[str, Any]] | None = None,
) -> StateDict:
    """A LoRA from peft's or diffusers' names to kohya's, which every host loads; kohya's own keys pass.

    Keys are those of a diffusers UNet or of its text encoders, each with or without "unet.", "text_encoder.",
    "text_encoder_2." or "base_model.model." in front. Each module gets an alpha, its weight being alpha/rank * up @
    down: the file's own, else the argument, else what `adapters` (see `lora_adapters`) says of its part, else its rank.
    Bias deltas are `<module>.diff_b`. Raises ValueError for a key that is none of these, and for peft's DoRA, whose
    magnitudes (`lora_magnitudes`) the format cannot hold.
    """
    parsed = _parsed(lora)
    magnitude = next((key for key, found in parsed.items() if found.role == "magnitude"), None)
    if magnitude is not None:
        raise ValueError(
            f"LoRA: it is a DoRA of peft's ({magnitude!r}), whose magnitudes go with the norm of the changed weight; "
            "kohya's names cannot say so, and programs that read them divide by other norms. Use it with SPLAM LoRA "
            "Loader in ComfyUI, or merge it into its model with peft."
        )
    # transformers 5 has no "text_model." in a CLIPTextModel's names, and diffusers' writer takes them as they are.
    kohya: StateDict = {
        re.sub("^(lora_te[12]?_)encoder_", r"\1text_model_encoder_", key): weight
        for key, weight in lora.items()
        if key not in parsed
    }
    for key, module in _kohya_modules(parsed).items():
        found = parsed[key]
        kohya[f"{module}.{found.role}"] = lora[key]
        if found.role == "lora_down.weight":
            rank = lora[key].shape[0]
            chosen = alpha if alpha is not None else _alpha(found, rank, (adapters or {}).get(found.part, {}))
            kohya.setdefault(f"{module}.alpha", torch.tensor(float(chosen)))
    return kohya


def lora_magnitudes(lora: Mapping[str, Tensor]) -> StateDict:
    """{module under kohya's name: [C]} of peft's DoRA: the norms that the changed weight's rows are to have.

    (Liu et al., DoRA; a convolution's row is all that makes one output channel.) Raises as `lora_to_kohya`.
    """
    parsed = _parsed(lora)
    modules = _kohya_modules(parsed)
    return {modules[key]: lora[key].flatten() for key, found in parsed.items() if found.role == "magnitude"}


def lora_adapters(metadata: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """{part: peft's LoraConfig} that diffusers writes into a LoRA file's metadata; empty if there is none."""
    try:
        flat = json_object(metadata.get("lora_adapter_metadata", "{}"), "")
    except ValueError:
        return {}
    return {
        part: {key.removeprefix(part + "."): value for key, value in flat.items() if key.startswith(part + ".")}
        for part in LORA_PARTS
    }


def is_safetensors(path: str | os.PathLike[str]) -> bool:
    """Whether the name is a safetensors file's: .safetensors or .sft, in any case."""
    return Path(path).suffix.lower() in _SAFETENSORS


def load_file(path: str | os.PathLike[str], device: str = "cpu") -> StateDict:
    """The tensors of a safetensors file, fp8 weights times their factors (see quantization.py).

    Raises FileNotFoundError or ValueError, naming the file and the remedy.
    """
    return load_files([path], device)


def load_files(paths: Sequence[str | os.PathLike[str]], device: str = "cpu") -> StateDict:
    """The tensors of a model that lies in several files, as `load_file`."""
    weights: StateDict = {}
    metadata: dict[str, str] = {}
    for path in paths:
        with _open(path, device) as file, reading(path):
            weights |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (safe_open does not iterate)
            metadata |= file.metadata() or {}
    with reading(paths[0]):
        try:
            return dequantized(weights, metadata)
        except ValueError as error:
            raise ValueError(f"{paths[0]}: {error}") from error


@contextmanager
def reading(
    path: str | os.PathLike[str],
    problem: str = "its weights do not fit together",
    remedy: str = "The file is damaged or of another architecture: fetch it again, or take another",
) -> Iterator[None]:
    """What goes wrong inside because of what a file holds is a ValueError that names the file."""
    try:
        yield
    except torch.OutOfMemoryError:  # of the machine, not of the file: the host's to deal with
        raise
    except _MISFITS as error:
        raise ValueError(f"{path}: {problem} ({type(error).__name__}: {shortened(str(error))}). {remedy}.") from error


def read_json(file: Path) -> dict[str, Any]:
    """A file that holds a JSON object. Raises FileNotFoundError or ValueError, naming it."""
    try:
        return json_object(file.read_bytes(), str(file))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{file}: no such file. The download is incomplete: fetch the whole folder.") from error


def json_object(text: str | bytes, name: str) -> dict[str, Any]:
    """Raises ValueError for text that is no JSON object; name: what it is, for the message."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{name}: expected JSON, found something else ({shortened(str(error))}). Fetch the file again."
        ) from error
    if not isinstance(found, dict):
        raise ValueError(f"{name}: expected JSON of one object, found a {type(found).__name__}. Fetch the file again.")
    return found


def shortened(text: str, most: int = 300) -> str:
    """The text, or its beginning and end where it is longer: names in a file may be megabytes long."""
    half = (most - 5) // 2
    return text if len(text) <= most else f"{text[:half]} ... {text[-half:]}"


def with_names(text: str, folders: Mapping[Path, str], most: int = 4000) -> str:
    """An error's text for whoever sees a shared server's page, `shortened` to `most` characters.

    folders: path -> the name that takes its place, wherever the path stands in the text.
    """
    # Also as links lead to them, and as Python's own errors quote them where a name has backslashes.
    written = {
        str(form): name for path, name in folders.items() for form in (path, path.resolve()) if len(path.parts) > 1
    }
    written |= {repr(path)[1:-1]: name for path, name in written.items()}
    for path in sorted(written, key=len, reverse=True):
        text = text.replace(path, written[path])
    return shortened(text, most)


def weight_files(folder: str | os.PathLike[str], stem: str) -> list[Path]:
    """The files of one part of a diffusers pipeline: <stem>.safetensors, its fp16 variant, or shards and their index.

    stem: "diffusion_pytorch_model" of a UNet or VAE, "model" of a text encoder. Empty if there are none.
    Raises ValueError for an index that names files which are not beside it.
    """
    folder = Path(folder)
    for variant in ("", ".fp16"):
        if (folder / f"{stem}{variant}.safetensors").is_file():
            return [folder / f"{stem}{variant}.safetensors"]
        # The second is what diffusers and transformers write for a variant.
        for name in (f"{stem}{variant}.safetensors.index.json", f"{stem}.safetensors.index{variant}.json"):
            if (folder / name).is_file():
                return _shards(folder / name)
    return []


def not_finite(state_dict: Mapping[str, Tensor]) -> str | None:
    """The first key whose tensor holds NaN or infinite values; None if all are numbers.

    As quick as the memory is read: no sum with NaN or an infinite value in it is finite, and only where a sum is not,
    which large numbers too may bring about, is the tensor looked at.
    """
    for key, weight in state_dict.items():
        if weight.is_floating_point():
            # 8-bit floats have neither sum nor aminmax.
            weight = weight.detach().half() if weight.itemsize == 1 else weight.detach()
            # aminmax lets NaN through and is ten times as fast as isfinite.
            if not math.isfinite(weight.sum().item()) and not torch.stack(torch.aminmax(weight)).isfinite().all():
                return key
    return None


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """The metadata of a safetensors file, empty if it has none. Errors as `load_file`; reads no tensor.

    Without what it says of quantisation, which is not true of what `load_file` gives.
    """
    with _open(path, "cpu") as file:
        return {key: value for key, value in (file.metadata() or {}).items() if key != QUANTIZATION}


def save_file(
    state_dict: Mapping[str, Tensor], path: str | os.PathLike[str], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a .safetensors file whole or not at all. Metadata values must be strings (JSON for anything else).

    Raises FileNotFoundError for a missing folder, ValueError for another extension or metadata that is not text.
    """
    path = Path(path)
    _require_name(path, (".safetensors",))
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: the folder {path.parent} does not exist; create it first.")
    for key, value in (metadata or {}).items():
        if not isinstance(value, str):
            raise ValueError(f"{path}: metadata {key!r} must be a string, got {value!r}; write it as JSON text.")
    partial = path.with_name(path.name + ".part")
    try:
        tensors = {key: tensor.detach().contiguous() for key, tensor in state_dict.items()}
        safetensors.torch.save_file(tensors, partial, {"format": "pt", **(metadata or {})})
        # The library makes files for their owner alone; a web UI may run as another user.
        umask = os.umask(0)
        os.umask(umask)
        partial.chmod(0o666 & ~umask)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _open(path: str | os.PathLike[str], device: str) -> safetensors.safe_open:
    path = Path(path)
    _require_name(path, _SAFETENSORS)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file. Check the path, or download the model again.")
    try:
        return safetensors.safe_open(str(path), framework="pt", device=device)
    except SafetensorError as error:
        raise ValueError(
            f"{path}: expected a safetensors file, found {path.stat().st_size} bytes that do not parse "
            f"({shortened(str(error))}). The download was probably cut off, or is a Git LFS pointer or an error page: "
            "fetch it again."
        ) from error


def _shards(index: Path) -> list[Path]:
    with reading(index, "expected JSON with a weight_map, found something else", "Fetch the file again"):
        shards = sorted(set(map(str, read_json(index)["weight_map"].values())))
    beside = {file.name for file in index.parent.iterdir() if file.is_file()}
    missing = [shard for shard in shards if shard not in beside]
    if missing or not shards:
        shown = shortened(", ".join(missing[:3])) or "no file"
        raise ValueError(f"{index}: names {shown}, not found in its folder. Fetch it.")
    return [index.parent / shard for shard in shards]


def _require_name(path: Path, extensions: tuple[str, ...]) -> None:
    suffix = path.suffix.lower()
    if suffix in extensions:
        return
    found = "a pickle, which can run code when opened" if suffix in PICKLES else f"the extension {path.suffix!r}"
    raise ValueError(
        f"{path}: expected a .safetensors file, found {found}. Convert it to safetensors, or use the model's "
        ".safetensors download."
    )


def _parsed(lora: Mapping[str, Tensor]) -> dict[str, LoraKey]:
    """The keys of a LoRA that are not a host's own, read."""
    parsed = {}
    for key in lora:
        if key.startswith(_HOST_LORA_PREFIXES):
            continue
        found = lora_key(key)
        if found is None:
            raise ValueError(
                f"LoRA: expected keys ending in lora_A.weight, lora_B.weight, alpha, diff or diff_b, found {key!r}."
            )
        parsed[key] = found
    return parsed


def _kohya_modules(parsed: Mapping[str, LoraKey]) -> dict[str, str]:
    """{key: its module's name in kohya's format}."""
    two_encoders = any(found.part == "text_encoder_2" for found in parsed.values())
    prefixes = {"unet": "lora_unet_", "text_encoder_2": "lora_te2_"}
    prefixes["text_encoder"] = "lora_te1_" if two_encoders else "lora_te_"
    return {key: prefixes[found.part] + found.module.replace(".", "_") for key, found in parsed.items()}


def _alpha(key: LoraKey, rank: int, adapter: Mapping[str, Any]) -> float:
    """The alpha in alpha/rank that peft means for a module: its pattern's, else the adapter's, else the rank."""
    found: float = adapter.get("lora_alpha", rank)
    for pattern, value in (adapter.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", key.module):
            found = value
    return found * rank**0.5 if adapter.get("use_rslora") else found


def _as_double(state_dict: Mapping[str, Tensor], key: str) -> Tensor:
    """A weight in float64, times the factor that may lie beside it."""
    factor = factor_of(state_dict, key)
    return state_dict[key].double() * (1.0 if factor is None else factor.double())


def _constant_embedding(embedded: str | float, dim: int) -> Tensor:
    """The phi [dim] that a checkpoint saw at gamma = 1, or at its guidance."""
    if embedded == "splam":
        return authors_embedding(torch.ones(1), dim)[0]
    if embedded == "zero":
        return torch.zeros(dim)
    if isinstance(embedded, (int, float)):
        return guidance_embedding(torch.tensor([embedded - 1.0]), dim)[0]
    raise ValueError(f"embedded must be 'splam', 'zero' or an LCM guidance scale, got {embedded!r}.")


def _renamed(weights: Mapping[str, Tensor], pairs: list[Pair], what: str) -> dict[str, str]:
    return rename(weights, dict(pairs), what)


def _swapped(pairs: list[Pair]) -> list[Pair]:
    return [(ldm, diffusers) for diffusers, ldm in pairs]


def _linear_if_attention(key: str, weight: Tensor) -> Tensor:
    return weight[:, :, 0, 0] if ".attn_1." in key and weight.ndim == 4 else weight


def _under(state_dict: Mapping[str, Tensor], prefix: str) -> StateDict:
    return {key.removeprefix(prefix): weight for key, weight in state_dict.items() if key.startswith(prefix)}


def _is_or_ends(key: str, name: str) -> bool:
    return key == name or key.endswith("." + name)
