"""SPLAM Loader and SPLAM LoRA Loader in ComfyUI's own process, without its server, on hostile files.

    python tests/fuzz/comfyui_loaders.py COMFYUI FOLDER FIRST LAST

For each seed from FIRST to before LAST, a file of each target. Prints a JSON list of reports.
"""

import importlib.util
import json
import logging
import shutil
import sys
import warnings
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def main(comfyui: str, folder: str, first: str, last: str) -> None:
    sys.path[:0] = [comfyui, str(ROOT)]
    sys.argv = sys.argv[:1]
    from comfy.cli_args import args

    args.base_directory, args.cpu = folder, True
    importlib.import_module("utils.extra_config")  # as main.py does: ComfyUI's nodes then put another `utils` in front
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)
    for target in targets(Path(folder)):
        from harness.hostile import attack

        print(json.dumps({"target": target.name, **asdict(attack(target, range(int(first), int(last)), [folder]))}))


def targets(folder: Path) -> list:
    from harness.hostile import Target, mutated_json, mutated_safetensors

    models, made = folder / "models", folder / "corpus"
    shutil.copytree(made / "pipeline", models / "diffusers" / "p")
    shutil.copytree(made / "shards", models / "diffusers" / "s")
    for kind in ("checkpoints", "diffusion_models", "loras"):
        (models / kind).mkdir(parents=True, exist_ok=True)
    single, unet = models / "checkpoints" / "single.safetensors", models / "diffusion_models" / "unet.safetensors"
    shutil.copy(made / "single.safetensors", single)
    shutil.copy(next((made / "pipeline" / "unet").glob("*.safetensors")), unet)
    kohya, peft = models / "loras" / "kohya.safetensors", models / "loras" / "adapter_model.safetensors"
    shutil.copy(made / "kohya.safetensors", kohya)
    for file in (made / "peft").iterdir():
        shutil.copy(file, models / "loras")
    loader, lora = _pack("loader").SPLAMLoader, _pack("lora").SPLAMLoraLoader
    model, clip, _ = loader.execute("diffusers/p").result

    def load(name):
        if (said := loader.validate_inputs(name)) is not True:
            raise ValueError(said)
        loader.fingerprint_inputs(name)
        loader.execute(name)

    def apply(file):
        if (said := lora.validate_inputs(file.name)) is not True:
            raise ValueError(said)
        patched, _ = lora.execute(model, file.name, 1.0, 1.0, clip).result
        for key in patched.patches:  # as sampling would
            patched.patch_weight_to_device(key)
        patched.unpatch_model()

    def files(where, *kinds):
        found = {}
        for ending, mutation in kinds:
            found |= dict.fromkeys(sorted(where.rglob(f"*.{ending}")), mutation)
        return found

    kinds = (("safetensors", mutated_safetensors), ("json", mutated_json))
    return [
        Target("ComfyUI: a pipeline", files(models / "diffusers" / "p", *kinds), lambda: load("diffusers/p")),
        Target("ComfyUI: shards", files(models / "diffusers" / "s", *kinds), lambda: load("diffusers/s")),
        Target("ComfyUI: a checkpoint", {single: mutated_safetensors}, lambda: load("single.safetensors")),
        Target("ComfyUI: a UNet", {unet: mutated_safetensors}, lambda: load("diffusion_models/unet.safetensors")),
        Target("ComfyUI: kohya's LoRA", {kohya: mutated_safetensors}, lambda: apply(kohya)),
        Target("ComfyUI: peft's LoRA", files(models / "loras", ("json", mutated_json)) | {peft: mutated_safetensors},
               lambda: apply(peft)),
    ]  # fmt: skip


def _pack(module: str):
    if "splam_pack" not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            "splam_pack", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
        )
        sys.modules["splam_pack"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["splam_pack"])
    return importlib.import_module(f"splam_pack.nodes.{module}")


if __name__ == "__main__":
    main(*sys.argv[1:])
