"""What a run leaves under output/splam/: the LoRA as it is now, and the state from which the run goes on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, is_dataclass
from pathlib import Path

import folder_paths
import torch

from ...splam_core.checkpoint import load_file, lora_to_kohya, read_metadata, save_file
from ...splam_core.lora import LoraAdapters
from .host import NAME
from .run import Run

FOLDER = "splam"
STATE = ".state.safetensors"
FACTS = "splam_state"  # in the state's metadata


def folder() -> Path:
    return Path(folder_paths.get_output_directory()) / FOLDER


def as_lora(adapters: LoraAdapters, role: str) -> dict[str, torch.Tensor]:
    """A role's LoRA under kohya's names, in fp16, on the CPU: what is saved is what is used."""
    weights = {key: one.detach().to("cpu", torch.float16).contiguous() for key, one in adapters.weights[role].items()}
    return {key: one.to(torch.float16) for key, one in lora_to_kohya(weights).items()}


def existing_loras() -> list[str]:
    """The host's LoRAs, and the autosaves, whose names begin with "output/splam/"."""
    found = [name for name in folder_paths.get_filename_list("loras") if name.endswith(".safetensors")]
    autosaved = sorted(path.name for path in folder().glob("*.safetensors") if not path.name.endswith(STATE))
    return [*found, *(f"output/{FOLDER}/{name}" for name in autosaved)]


def locate(name: str) -> Path:
    """Raises ValueError for a LoRA that the host does not list."""
    if name not in existing_loras():
        raise ValueError(f"{NAME}: there is no LoRA {name!r} in models/loras or output/{FOLDER}; refresh the page.")
    if name.startswith(f"output/{FOLDER}/"):
        return folder() / name.rpartition("/")[2]
    return Path(folder_paths.get_full_path_or_raise("loras", name))


def read_lora(path: Path, adapters: LoraAdapters) -> dict[str, torch.Tensor]:
    """A LoRA file as weights of these adapters. Raises ValueError for one of another model, kind or rank."""
    modules = {key.rpartition(".lora_")[0] for key in adapters.weights["student"]}
    names = {module.replace(".", "_"): module for module in modules}
    found, ranks = {}, set()
    try:
        lora = lora_to_kohya(load_file(path))
    except ValueError as error:
        raise ValueError(f"{NAME}: existing_lora {path.name} cannot be read: {error}") from error
    for key, weight in lora.items():
        module, _, part = key.removeprefix("lora_unet_").partition(".")
        side = {"lora_down.weight": "lora_A", "lora_up.weight": "lora_B"}.get(part)
        if module not in names or (side is None and part != "alpha"):
            raise ValueError(
                f"{NAME}: {path.name} cannot be gone on from: it holds {key!r}, which no LoRA of SPLAM Distil for this "
                "MODEL has. Choose one that SPLAM Distil or training/distill.py --lora made for this family."
            )
        if side == "lora_A":
            ranks.add(weight.shape[0])
            scale = float(lora.get(f"lora_unet_{module}.alpha", weight.shape[0])) / weight.shape[0]
            weight = weight.float() * scale
        if side is not None:
            found[f"{names[module]}.{side}.weight"] = weight.float()
    if ranks != {adapters.rank}:
        said = ", ".join(map(str, sorted(ranks))) or "unknown"
        raise ValueError(f"{NAME}: {path.name} has rank {said}, the input rank is {adapters.rank}. Make them equal.")
    try:
        adapters.load("student", found)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{NAME}: {path.name} does not fit this MODEL: {error}.") from error
    return found


@dataclass(frozen=True)
class Autosave:
    """Two files, each whole or as it was before. Their name tells which run they are of."""

    identity: str
    metadata: Mapping[str, str]

    @property
    def lora(self) -> Path:
        return folder() / f"distil-{self.identity}.safetensors"

    @property
    def name(self) -> str:
        """The LoRA's, as the user finds it."""
        return f"output/{FOLDER}/{self.lora.name}"

    @property
    def state(self) -> Path:
        return folder() / f"distil-{self.identity}{STATE}"

    def save(self, run: Run, role: str = "target") -> None:
        """Raises OSError or a SafetensorError where it cannot be written: what was there before stays."""
        folder().mkdir(parents=True, exist_ok=True)
        # The state first: the LoRA can be made of it, and not the other way round.
        save_file({key: value.cpu() for key, value in run.state().items()}, self.state,
                  {FACTS: json.dumps(run.facts())})  # fmt: skip
        save_file(as_lora(run.adapters, role), self.lora, {**self.metadata, "splam_steps": str(run.step)})

    def go_on(self, run: Run) -> bool:
        """Takes up the state of this run, if there is one. Raises ValueError for a damaged one."""
        if not self.state.is_file():
            return False
        try:
            run.load_state(load_file(self.state), json.loads(read_metadata(self.state)[FACTS]))
        except (ValueError, KeyError, RuntimeError, OSError) as error:
            raise ValueError(
                f"{NAME}: output/{FOLDER}/{self.state.name} cannot be gone on from ({str(error).splitlines()[0]}). "
                "Delete it to begin anew."
            ) from error
        return True


def metadata(run: Run, title: str, family: str, graph: object) -> dict[str, str]:
    """Of the LoRA's file: what A1111 and kohya's tools read, and the graph that was queued."""
    settings = {name: vars(one) if is_dataclass(one) else one for name, one in vars(run.settings).items()}
    return {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.title": title,
        "modelspec.architecture": {"sdxl": "stable-diffusion-xl-v1-base/lora", "sd2": "stable-diffusion-v2-512/lora"}
        .get(family, "stable-diffusion-v1/lora"),
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(run.settings.rank),
        "ss_network_alpha": str(run.settings.rank),
        "ss_base_model_version": {"sdxl": "sdxl_base_v1-0", "sd2": "sd_v2"}.get(family, "sd_v1"),
        "splam_settings": json.dumps(settings),
        "prompt": json.dumps(graph),
    }  # fmt: skip
