"""What `benchmarks.sampling` measures in ComfyUI's own process, without its server.

    python benchmarks/inside_comfyui.py JOB COMFYUI FOLDER [ARGUMENT ...]

JOB is a function of this file. FOLDER holds `models/`. The last line printed is its result, as JSON.
"""

import gc
import importlib
import importlib.util
import json
import logging
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]
STEPS, SEED = 4, 7


def write(comfyui: str, folder: str, shape: str) -> str:
    """A single file of random weights in fp16, with Stable Diffusion 1.5's text encoder and VAE; its name."""
    sys.path.insert(0, str(ROOT))
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel

    from benchmarks.parity import SHAPES
    from training.models.architectures import ARCHITECTURES
    from training.models.files import ModelFiles, write_single_file

    torch.manual_seed(0)
    known = ARCHITECTURES["sd1"]
    parts = UNet2DConditionModel(**SHAPES[shape].unet), AutoencoderKL(**known.vae), CLIPTextModel(known.clip())
    configs = dict(zip(("unet", "vae"), (dict(part.config) for part in parts), strict=False))
    configs |= {"text_encoder": json.loads(parts[2].config.to_json_string()), "scheduler": known.scheduler}
    unet, vae, text = ({key: weight.half() for key, weight in part.state_dict().items()} for part in parts)
    text = {key.removeprefix("text_model."): w for key, w in text.items() if not key.endswith("position_ids")}
    file = Path(folder) / "models" / "checkpoints" / f"{shape}.safetensors"
    file.parent.mkdir(parents=True, exist_ok=True)
    write_single_file(ModelFiles(unet, vae, [text], "sd1", configs), file, shape)
    return file.name


def sampling(comfyui: str, folder: str, model_name: str, size: str, repeats: str) -> dict:
    """Seconds of SPLAM Sampler ("ours"), KSampler ("stock") and bare UNet forwards ("bare"), each `repeats` times.

    The three take turns, each in every place, on one MODEL; a first turn of each is not timed, but its evaluations of
    the UNet are counted: "evaluations". size: side of the latents.
    """
    nodes = start(comfyui, folder)
    import comfy.model_management
    import torch

    def ours():
        return sampler.execute(model, positive, latent, SEED, STEPS, 1.0)

    def stock():
        return nodes.KSampler().sample(model, SEED, STEPS, 1.0, "lcm", "sgm_uniform", positive, positive, latent)

    def bare():
        for t in times:
            unet(x, t, context=context)

    with torch.inference_mode():  # as ComfyUI runs its nodes
        model, clip, _ = pack("loader").SPLAMLoader.execute(model_name).result
        sampler = pack("sampler").SPLAMSampler
        positive = nodes.CLIPTextEncode().encode(clip, "a yellow star on a red background")[0]
        latent = {"samples": torch.zeros(1, 4, int(size), int(size))}
        comfy.model_management.load_models_gpu([model])
        unet, device = model.model.diffusion_model, model.load_device
        dtype = model.model.manual_cast_dtype or model.model.get_dtype()
        x = torch.randn(latent["samples"].shape, generator=torch.Generator().manual_seed(SEED)).to(device, dtype)
        context = positive[0][0].to(device, dtype)
        times = [torch.tensor([t], device=device, dtype=torch.float32) for t in (999.0, 759.0, 499.0, 259.0)]
        calls: list[int] = []
        hook = unet.register_forward_pre_hook(lambda *_: calls.append(1))
        evaluations = {}
        for route in (ours, stock, bare):
            route()
            evaluations[route.__name__] = len(calls)
            calls.clear()
        hook.remove()
        return {"evaluations": evaluations, **in_turn([ours, stock, bare], int(repeats), device)}


def loading(comfyui: str, folder: str, name: str, repeats: str) -> dict:
    """Seconds from a single file's name to MODEL, CLIP and VAE: SPLAM Loader's ("ours") and the host's ("stock")."""
    start(comfyui, folder)
    import torch

    routes = [loader(kind, name) for kind in ("ours", "stock")]
    with torch.inference_mode():
        for route in routes:
            route()
        return in_turn(routes, int(repeats), torch.device("cpu"))


def memory(comfyui: str, folder: str, name: str, kind: str) -> float:
    """Peak resident MiB of a process that starts ComfyUI and loads this single file once; of no file where kind is "".

    The peak of the process that starts this one counts too, until it is overtaken: start it from a small one.
    """
    start(comfyui, folder)
    import resource  # which Windows has not

    import torch

    pack("loader")
    with torch.inference_mode():
        loaded = loader(kind, name)() if kind else None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    del loaded
    return peak


def imports(comfyui: str, folder: str) -> dict:
    """For `python -X importtime`: lines "begin" and "end" on stderr around the imports of the pack, and "torch" modules
    that they added to those of the host."""
    start(comfyui, folder)
    importlib.import_module("server")
    before = set(sys.modules)
    print("begin", file=sys.stderr, flush=True)
    enter()
    __import__("splam_pack.nodes")  # import_module does not report itself
    rooms = sys.modules["splam_pack.nodes"]
    for module in (*rooms.OFFERS, "few_step"):
        __import__(f"splam_pack.nodes.{module}")
    offered = rooms.offered()
    print("end", file=sys.stderr, flush=True)
    added = sorted(set(sys.modules) - before)
    return {"nodes": len(offered), "torch": [name for name in added if name.partition(".")[0].startswith("torch")]}


# --- the host


def start(comfyui: str, folder: str) -> ModuleType:
    """ComfyUI's `nodes`, with its folders under `folder`."""
    sys.path[:0] = [comfyui, str(ROOT)]
    sys.argv = sys.argv[:1]
    from comfy.cli_args import args

    args.base_directory = folder
    import torch

    args.cpu = not torch.cuda.is_available()
    importlib.import_module("utils.extra_config")  # as main.py does: ComfyUI's nodes then put another `utils` in front
    logging.disable(logging.ERROR)
    return __import__("nodes")  # not this repository's


def pack(module: str):
    """A module of this pack's nodes."""
    enter()
    return importlib.import_module(f"splam_pack.nodes.{module}")


def enter() -> None:
    """This pack's own module, as ComfyUI imports it from custom_nodes."""
    if "splam_pack" not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            "splam_pack", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
        )
        sys.modules["splam_pack"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["splam_pack"])


def loader(kind: str, name: str) -> Callable:
    """What loads a single file of `checkpoints`: "ours" or "stock"."""

    def ours():
        return pack("loader").SPLAMLoader.execute(name)

    def stock():
        return sys.modules["nodes"].CheckpointLoaderSimple().load_checkpoint(name)

    return {"ours": ours, "stock": stock}[kind]


def in_turn(routes: list[Callable], repeats: int, device) -> dict[str, list[float]]:
    """Seconds of each route, `repeats` times, by its name; the order turns, so that each comes first equally often."""
    import torch

    seconds: dict[str, list[float]] = {route.__name__: [] for route in routes}
    for number in range(repeats):
        turn = number % len(routes)
        for route in routes[turn:] + routes[:turn]:
            gc.collect()
            since = time.perf_counter()
            kept = route()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds[route.__name__].append(time.perf_counter() - since)
            del kept
    return seconds


if __name__ == "__main__":
    job, *arguments = sys.argv[1:]
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    found = {job.__name__: job for job in (write, sampling, loading, memory, imports)}[job](*arguments)
    print("\n" + json.dumps(found))
