"""API-form ComfyUI graphs of this pack's nodes, as the demo, the tests and the benchmarks queue them."""

from __future__ import annotations


def text_to_image(model_name: str, prompt: str, *, size: int = 128, batch_size: int = 1, **sampling) -> dict:
    """SPLAM Sampler on an empty latent; outputs are added by `save_image` and `save_latent`."""
    latent = {"class_type": "EmptyLatentImage", "inputs": {"width": size, "height": size, "batch_size": batch_size}}
    return _splam(model_name, prompt, {"latent": latent}, ["latent", 0], sampling)


def latent_to_image(model_name: str, prompt: str, latent: str, *, mask: str | None = None, **sampling) -> dict:
    """SPLAM Sampler on a latent file in the server's input folder, with an image of that folder as mask."""
    nodes = {"latent": {"class_type": "LoadLatent", "inputs": {"latent": latent}}}
    source = ["latent", 0]
    if mask:
        nodes["mask"] = {"class_type": "LoadImageMask", "inputs": {"image": mask, "channel": "red"}}
        nodes["masked"] = {"class_type": "SetLatentNoiseMask", "inputs": {"samples": source, "mask": ["mask", 0]}}
        source = ["masked", 0]
    return _splam(model_name, prompt, nodes, source, sampling)


def stock(
    model_name: str,
    prompt: str,
    *,
    seed: int,
    steps: int,
    cfg: float,
    sampler: str = "ddim",
    scheduler: str = "simple",
    size: int = 128,
) -> dict:
    """The host's own KSampler on a model of SPLAM Loader, with an empty negative prompt."""
    nodes = _prompt(model_name, prompt)
    nodes["negative"] = {"class_type": "CLIPTextEncode", "inputs": {"text": "", "clip": ["model", 1]}}
    nodes["latent"] = {"class_type": "EmptyLatentImage", "inputs": {"width": size, "height": size, "batch_size": 1}}
    nodes["sampled"] = {
        "class_type": "KSampler",
        "inputs": {
            **{
                "model": ["model", 0],
                "positive": ["positive", 0],
                "negative": ["negative", 0],
                "latent_image": ["latent", 0],
            },
            **{
                "seed": seed,
                "steps": steps,
                "cfg": cfg,
                "sampler_name": sampler,
                "scheduler": scheduler,
                "denoise": 1.0,
            },
        },
    }
    return nodes


def custom(model_name: str, prompt: str, *, seed: int, steps: int, size: int = 128) -> dict:
    """SamplerCustom with SPLAM Sampler Select and SPLAM Scheduler."""
    nodes = stock(model_name, prompt, seed=seed, steps=steps, cfg=1.0, size=size)
    model = ["model", 0]
    inputs = nodes["sampled"]["inputs"]
    return nodes | {
        "sampler": {"class_type": "SPLAMSamplerSelect", "inputs": {}},
        "sigmas": {"class_type": "SPLAMScheduler", "inputs": {"model": model, "steps": steps, "denoise": 1.0}},
        "sampled": {
            "class_type": "SamplerCustom",
            "inputs": {
                **{name: inputs[name] for name in ("model", "positive", "negative", "latent_image", "cfg")},
                **{"add_noise": True, "noise_seed": seed, "sampler": ["sampler", 0], "sigmas": ["sigmas", 0]},
            },
        },
    }


def distil(model_name: str, **settings) -> dict:
    """SPLAM Distil, shortly, its LoRA saved and its losses drawn by the host's own nodes; None leaves an input out."""
    inputs = {
        **{"model": ["model", 0], "clip": ["model", 1], "vae": ["model", 2]},
        **{"prompts": "", "steps": 4, "rank": 4, "resolution": 128, "seed": 0, "guidance": 3.0},
        **{"batch_size": 2, "gradient_accumulation": 1, "learning_rate": 3e-4, "recipe": "default"},
        **{"existing_lora": "none", "pictures_per_prompt": 1, "gradient_checkpointing": False},
        **{"preview_every": 0, "autosave_every": 1},
        **settings,
    }
    saved = {"lora": ["distil", 1], "prefix": "loras/distilled", "steps": ["distil", 3]}
    return {
        "model": {"class_type": "SPLAMLoader", "inputs": {"model_name": model_name}},
        "distil": {
            "class_type": "SPLAMDistil",
            "inputs": {key: value for key, value in inputs.items() if value is not None},
        },
        "saved_lora": {"class_type": "SaveLoRA", "inputs": saved},
        "curve": {"class_type": "LossGraphNode", "inputs": {"loss": ["distil", 2], "filename_prefix": "loss"}},
    }


def save_image(graph: dict) -> dict:
    """The graph with its result decoded and saved as PNG."""
    return graph | {
        "decoded": {"class_type": "VAEDecode", "inputs": {"samples": ["sampled", 0], "vae": ["model", 2]}},
        "saved": {"class_type": "SaveImage", "inputs": {"images": ["decoded", 0], "filename_prefix": "splam"}},
    }


def save_latent(graph: dict) -> dict:
    """The graph with its result saved as a .latent file."""
    return graph | {
        "saved": {"class_type": "SaveLatent", "inputs": {"samples": ["sampled", 0], "filename_prefix": "splam"}}
    }


def _prompt(model_name: str, prompt: str) -> dict:
    return {
        "model": {"class_type": "SPLAMLoader", "inputs": {"model_name": model_name}},
        "positive": {"class_type": "CLIPTextEncode", "inputs": {"text": prompt, "clip": ["model", 1]}},
    }


def _splam(model_name: str, prompt: str, nodes: dict, source: list, sampling: dict) -> dict:
    inputs = {
        "model": ["model", 0],
        "positive": ["positive", 0],
        "latent_image": source,
        "seed": 0,
        "steps": 4,
        "denoise": 1.0,
    }
    return (
        _prompt(model_name, prompt) | nodes | {"sampled": {"class_type": "SPLAMSampler", "inputs": inputs | sampling}}
    )
