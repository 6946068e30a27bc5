"""How far this pack's nodes and the host's own LCM sampling are from diffusers, on the same weights and noises.

    python dev.py python benchmarks/parity.py --json FILE [--full-size]

Writes a list of {"case", "steps", "route", "error"}. The error is the largest absolute difference of the final latents
over the standard deviation of the reference's. The reference is an explicit loop over diffusers' UNet2DConditionModel
and LCMScheduler, with ComfyUI's mask rule on top for inpainting. Where diffusers has a whole pipeline for a case, route
"splam" is compared with that too, and the larger of the two differences is written. Both sides compute in fp32 on the
CPU, on random weights.

Route "splam" is SPLAM Loader (for SDXL UNETLoader and SPLAM LoRA Loader) and SPLAM Sampler. Route "stock" is what
LCM tutorials say: UNETLoader, ModelSamplingDiscrete "lcm", KSampler with lcm and sgm_uniform; its reference takes the
host's noises. The small shapes are as wide as the real ones at their first level, since ComfyUI recognises no other,
and less deep. A schedule with zero terminal SNR has no stock route. benchmarks/parity_training.py says what the routes
"trainer" and "export" are.
--full-size adds the true SD1.5 (860 M parameters, with and without cond_proj; needs 8 GB of memory).
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load, load_file, save_file

if __name__ == "__main__":  # by path, the folder of this file is where Python looks
    sys.path[0] = str(Path(__file__).resolve().parents[1])
from benchmarks import parity_training
from harness.reference import (
    SCHEDULER,
    add_adapter,
    few_step,
    host_noises,
    load_unet,
    node_noises,
    random_lora,
    relative_error,
    whole_pipeline,
    write_pipeline,
)
from harness.server import ROOT, ComfyServer, exit_on_sigterm
from splam_core.checkpoint import UNET_PREFIX, diffusers_to_ldm

STEPS = (1, 2, 3, 4, 6, 8)
STRENGTHS = (0.3, 0.5, 0.7, 1.0)
SEED = 1234
LATENT = (1, 4, 16, 16)

_SD15 = {
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "layers_per_block": 1,
    "block_out_channels": (320, 320),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
_SD21 = _SD15 | {"cross_attention_dim": 1024, "attention_head_dim": 5, "use_linear_projection": True}
_SDXL = {
    "cross_attention_dim": 2048,
    "attention_head_dim": 5,
    "use_linear_projection": True,
    "block_out_channels": (320, 320, 320),
    # The depths of Segmind-Vega, the smallest SDXL that ComfyUI recognises.
    "layers_per_block": 2,
    "transformer_layers_per_block": (1, 1, 2),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 1280 + 6 * 256,
}
_SD15_TRUE = {
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "layers_per_block": 2,
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
}


@dataclass(frozen=True)
class Shape:
    """A UNet of random weights."""

    unet: dict
    cond_proj: bool = False
    prediction_type: str = "epsilon"
    zero_snr: bool = False
    lora: bool = False
    scaling_factor: float = 0.18215  # of the host's latent format, from the pipeline's scale
    true_size: bool = False

    @property
    def is_sdxl(self) -> bool:
        return "addition_embed_type" in self.unet

    @property
    def routes(self) -> tuple[str, ...]:
        """No tutorial says how to sample zero terminal SNR with lcm."""
        return ("splam",) if self.zero_snr else ("splam", "stock")

    @property
    def scheduler(self) -> dict:
        return {"prediction_type": self.prediction_type, "rescale_betas_zero_snr": self.zero_snr}


SHAPES = {
    "sd15": Shape(_SD15),
    "sd15-cond_proj": Shape(_SD15, cond_proj=True),
    "sd21": Shape(_SD21),
    "sd21-v": Shape(_SD21, prediction_type="v_prediction"),
    "sdxl-lora": Shape(_SDXL, lora=True, scaling_factor=0.13025),
    "sd15-true-size": Shape(_SD15_TRUE, true_size=True),
    "sd15-true-size-cond_proj": Shape(_SD15_TRUE, cond_proj=True, true_size=True),
    "sd21-v-zero-snr": Shape(_SD21, prediction_type="v_prediction", zero_snr=True),
    "sdxl-v-zero-snr": Shape(_SDXL, prediction_type="v_prediction", zero_snr=True, scaling_factor=0.13025),
}


@dataclass(frozen=True)
class Task:
    """What is drawn: from noise, from an image at a strength, or inside a soft mask."""

    kind: str  # "txt2img", "img2img" or "inpaint"
    steps: int
    strength: float = 1.0

    @property
    def name(self) -> str:
        return f"{self.kind} {self.strength:g}" if self.kind == "img2img" else self.kind


@dataclass
class Case:
    """A task on a shape, and what diffusers makes of it: expected[route] is one tensor a reference."""

    shape: str
    task: Task
    expected: dict[str, list[torch.Tensor]] = field(default_factory=dict)


def tasks(steps=STEPS, strengths=STRENGTHS) -> list[Task]:
    kinds = [("txt2img", 1.0), *(("img2img", strength) for strength in strengths), ("inpaint", 1.0)]
    return [Task(kind, count, strength) for kind, strength in kinds for count in steps]


def true_size_tasks() -> list[Task]:
    """Every step count from noise, and two steps of everything else: minutes, not an hour."""
    return [task for task in tasks() if task.kind == "txt2img" or task.steps == 2]


def ways(case: Case, routes: tuple[str, ...]) -> list[tuple[str, str, str]]:
    """(route, scheduler, name) of every graph to run for a case."""
    from_noise, true_size = case.task.kind == "txt2img", SHAPES[case.shape].true_size
    found = [(route, "sgm_uniform", case.task.name) for route in routes if case.expected[route]]
    if "stock" in routes and case.expected["stock"] and from_noise and not true_size:
        found.append(("stock", "simple", "txt2img, scheduler simple"))
    return found


# --- the files both sides read


def write_shape(name: str, models: Path, inputs: Path) -> None:
    """Random weights where the host looks: a diffusers folder, the UNet alone, a LoRA; and prompt embeddings."""
    shape, seed = SHAPES[name], 10 + list(SHAPES).index(name)
    folder = write_pipeline(
        models / "diffusers" / name,
        cond_proj=shape.cond_proj,
        scheduler=shape.scheduler,
        scaling_factor=shape.scaling_factor,
        seed=seed,
        **shape.unet,
    )
    source = folder / "unet" / "diffusion_pytorch_model.safetensors"
    alone = models / "diffusion_models" / f"{name}.safetensors"
    alone.parent.mkdir(parents=True, exist_ok=True)
    if shape.true_size:
        os.link(source, alone)  # the host knows the diffusers keys of the true sizes by itself
    else:
        single = diffusers_to_ldm(load_file(source))
        marks = {key: torch.zeros(0) for key in ("v_pred", "ztsnr")} if shape.zero_snr else {}
        save_file({key.removeprefix(UNET_PREFIX): weight for key, weight in single.items()} | marks, alone)
    generator = torch.Generator().manual_seed(seed)
    context = shape.unet["cross_attention_dim"]
    tensors = {"embeds": torch.randn((1, 77, context), generator=generator)}
    if shape.is_sdxl:
        tensors["pooled"] = torch.randn((1, 1280), generator=generator)
    save_file(tensors, inputs / f"{name}.embeds")
    if shape.lora:
        (models / "loras").mkdir(exist_ok=True)
        save_file(random_lora(load_unet(folder)), models / "loras" / f"{name}.safetensors")


def write_pictures(inputs: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """(image latents, soft mask [1, 1, H, W]); the mask also as a picture that the host reads back exactly."""
    from PIL import Image

    generator = torch.Generator().manual_seed(5)
    image = torch.randn(LATENT, generator=generator)
    levels = torch.randint(0, 256, LATENT[2:], generator=generator, dtype=torch.int32).to(torch.uint8)
    levels[:, :5], levels[:, -5:] = 0, 255
    pixels = levels.repeat_interleave(8, 0).repeat_interleave(8, 1)
    Image.fromarray(pixels.numpy()).convert("RGB").save(inputs / "mask.png")
    return image, levels[None, None].float() / 255


# --- diffusers


def expect(
    name: str, todo: list[Task], models: Path, inputs: Path, pictures: tuple, host_offset: int
) -> Iterator[Case]:
    """The cases of a shape with the references' latents, for either route's noises."""
    shape, folder = SHAPES[name], models / "diffusers" / name
    unet = load_unet(folder)
    if shape.lora:
        add_adapter(unet)
    config = SCHEDULER | shape.scheduler
    tensors = load_file(inputs / f"{name}.embeds")
    options = {}
    if shape.is_sdxl:
        size = [LATENT[2] * 8.0, LATENT[3] * 8.0]
        options["added_cond_kwargs"] = {
            "text_embeds": tensors["pooled"],
            "time_ids": torch.tensor([[*size, 0, 0, *size]]),
        }
    image, mask = pictures
    for task in todo:
        case = Case(name, task)
        given = {"image": image, "strength": task.strength} if task.kind != "txt2img" else {}
        given |= {"mask": mask} if task.kind == "inpaint" else {}
        noises = {"splam": node_noises, "stock": partial(host_noises, offset=host_offset)}
        for route, draw in noises.items():
            runs = (few_step, whole_pipeline) if route == "splam" else (few_step,)
            if route not in shape.routes or (route == "stock" and shape.true_size and task.kind != "txt2img"):
                runs = ()  # of the true size the small shapes show as much
            found = [
                run(unet, config, tensors["embeds"], *draw(LATENT, SEED), task.steps, **given, **options)
                for run in runs
            ]
            case.expected[route] = [latents for latents in found if latents is not None]
        yield case


def host_renoise_offset(comfyui: Path) -> int:
    """What the host adds to a seed for the noise between the steps: 0 in 0.3.75, 1 later."""
    code = (
        "import comfy.options; comfy.options.enable_args_parsing(); import torch, comfy.k_diffusion.sampling as s; "
        "print(s.default_noise_sampler(torch.zeros(4), seed=100)(1, 0).tolist())"
    )
    command = [sys.executable, "-c", code, "--cpu"]
    run = subprocess.run(command, cwd=comfyui, capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"{comfyui}: its noise could not be asked for:\n{run.stderr[-2000:]}")
    found = torch.tensor(json.loads(run.stdout.splitlines()[-1]))
    for offset in range(3):
        if torch.allclose(torch.randn(4, generator=torch.Generator().manual_seed(100 + offset)), found):
            return offset
    raise RuntimeError(f"{comfyui}: its noise between steps is not that of the seed or the two after it.")


# --- the host


def graph_of(case: Case, route: str, scheduler: str = "sgm_uniform") -> dict:
    """The API-form graph of a case, ending in SaveLatent."""
    shape, task = SHAPES[case.shape], case.task
    file = f"{case.shape}.safetensors"
    latent = (
        _node("EmptyLatentImage", width=LATENT[3] * 8, height=LATENT[2] * 8, batch_size=1)
        if task.kind == "txt2img"
        else _node("LoadLatent", latent=f"{shape.scaling_factor}.latent")
    )
    graph = {"positive": _node("ConditioningFromFile", name=f"{case.shape}.embeds"), "latent": latent}
    source = ["latent", 0]
    if task.kind == "inpaint":
        graph["mask"] = _node("LoadImageMask", image="mask.png", channel="red")
        graph["masked"] = _node("SetLatentNoiseMask", samples=source, mask=["mask", 0])
        source = ["masked", 0]
    if route == "splam" and not shape.is_sdxl:
        graph["model"] = _node("SPLAMLoader", model_name=f"diffusers/{case.shape}")
    else:
        graph["model"] = _node("UNETLoader", unet_name=file, weight_dtype="default")
    model = ["model", 0]
    if shape.lora:
        lora = {"model": model, "lora_name": file, "strength_model": 1.0}
        ours = _node("SPLAMLoraLoader", **lora, strength_clip=1.0)
        graph["lora"] = ours if route == "splam" else _node("LoraLoaderModelOnly", **lora)
        model = ["lora", 0]
    common = {"positive": ["positive", 0], "latent_image": source, "seed": SEED, "steps": task.steps}
    common["denoise"] = task.strength
    if route == "splam":
        graph["sampled"] = _node("SPLAMSampler", model=model, **common)
    else:
        graph["lcm"] = _node("ModelSamplingDiscrete", model=model, sampling="lcm", zsnr=False)
        common |= {"negative": ["positive", 0], "cfg": 1.0, "sampler_name": "lcm", "scheduler": scheduler}
        graph["sampled"] = _node("KSampler", model=["lcm", 0], **common)
    graph["saved"] = _node("SaveLatent", samples=["sampled", 0], filename_prefix="parity")
    return graph


def _node(kind: str, **inputs) -> dict:
    return {"class_type": kind, "inputs": inputs}


def measure(
    comfyui: Path,
    folder: Path,
    todo: dict[str, list[Task]],
    routes=("splam", "stock"),
    report=lambda row: None,
    training: bool = False,
) -> list[dict]:
    """The rows of these tasks (shape name -> tasks), measured in a ComfyUI that runs under `folder`.

    training: also those of parity_training.
    """
    models, inputs = folder / "models", folder / "input"
    inputs.mkdir(parents=True, exist_ok=True)
    pictures = write_pictures(inputs)
    for factor in {SHAPES[name].scaling_factor for name in todo}:
        content = {"latent_tensor": pictures[0] / factor, "latent_format_version_0": torch.tensor([])}
        save_file(content, inputs / f"{factor}.latent")
    offset = host_renoise_offset(comfyui)
    cases = []
    for name, of_shape in todo.items():  # diffusers first and alone: a full-size UNet is 3.4 GB
        write_shape(name, models, inputs)
        cases += expect(name, of_shape, models, inputs, pictures, offset)
        gc.collect()
    (folder / "custom_nodes").mkdir(exist_ok=True)
    helper = folder / "custom_nodes" / "conditioning_node"
    helper.symlink_to(ROOT / "harness" / "conditioning_node", target_is_directory=True)
    rows = []

    def add(row: dict) -> None:
        rows.append(row)
        report(row)

    if training:
        teacher = parity_training.write_teacher(models)
        for row in parity_training.trainer_rows(teacher):
            add(row)
        exported = parity_training.export(teacher, models, folder)
    with ComfyServer(comfyui, folder, arguments=("--cpu",)) as server:
        for case in cases:
            for route, scheduler, name in ways(case, routes):
                (file,) = server.files(server.run(graph_of(case, route, scheduler)))
                found = load(file)["latent_tensor"] * SHAPES[case.shape].scaling_factor
                error = max(relative_error(found, expected) for expected in case.expected[route])
                add({"case": f"{case.shape} {name}", "steps": case.task.steps, "route": route, "error": error})
        if training:
            for row in parity_training.export_rows(server, teacher, exported):
                add(row)
    return rows


def summary(rows: list[dict]) -> str:
    """Markdown: the largest error over the step counts, a line a case, a column a route."""
    cases = list(dict.fromkeys(row["case"] for row in rows))
    routes = list(dict.fromkeys(row["route"] for row in rows))
    lines = [f"| case | {' | '.join(routes)} |", "| --- |" + " ---: |" * len(routes)]
    for case in cases:
        cells = []
        for route in routes:
            errors = [row["error"] for row in rows if (row["case"], row["route"]) == (case, route)]
            cells.append(f"{max(errors):.1e}" if errors else "")
        lines.append(f"| {case} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="where the rows go")
    parser.add_argument("--full-size", action="store_true", help="also the true SD1.5, 860 M parameters")
    parser.add_argument(
        "--shapes", nargs="+", choices=SHAPES, metavar="SHAPE", help="these alone: " + ", ".join(SHAPES)
    )
    options = parser.parse_args()
    if not os.environ.get("COMFYUI_PATH"):
        parser.error("COMFYUI_PATH names no ComfyUI; run this through `python dev.py python`.")
    exit_on_sigterm()
    names = options.shapes or [name for name, shape in SHAPES.items() if options.full_size or not shape.true_size]
    todo = {name: true_size_tasks() if SHAPES[name].true_size else tasks() for name in names}
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(
            Path(os.environ["COMFYUI_PATH"]),
            Path(folder),
            todo,
            report=lambda row: print(
                f"{row['case']:44} {row['steps']} steps  {row['route']:7} {row['error']:.2e}", flush=True
            ),
            training=not options.shapes,
        )
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print(summary(rows))


if __name__ == "__main__":
    main()
