"""One request in the graphs of all routes on which a MODEL can be sampled with SPLAM's sampler and schedule."""

PROMPT, OTHER, SEED, STEPS = "a yellow star above a doughnut", "a wrapped gift on a green background", 41, 3
ROUTES = ["splam", "ksampler", "custom", "advanced"]


def node(kind: str, **inputs) -> dict:
    return {"class_type": kind, "inputs": inputs}


def route(name: str, model: str, extra: dict | None = None, batch: int = 1) -> dict:
    """A graph that samples `model` on this route; `extra` replaces or adds nodes (model, positive, latent, ...).

    The last word on MODEL, CONDITIONING and LATENT have the nodes "patched", "conditioned" and "latent".
    """
    nodes = {
        "model": node("SPLAMLoader", model_name=f"diffusers/{model}"),
        "positive": node("CLIPTextEncode", text=PROMPT, clip=["model", 1]),
        "other": node("CLIPTextEncode", text=OTHER, clip=["model", 1]),
        "latent": node("EmptyLatentImage", width=128, height=128, batch_size=batch),
    } | (extra or {})
    used = ["patched" if "patched" in nodes else "model", 0]
    positive = ["conditioned" if "conditioned" in nodes else "positive", 0]
    if name == "splam":
        nodes["sampled"] = node(
            "SPLAMSampler",
            **{"model": used, "positive": positive, "latent_image": ["latent", 0]},
            **{"seed": SEED, "steps": STEPS, "denoise": 1.0},
        )
    elif name == "ksampler":
        nodes["sampled"] = node(
            "KSampler",
            **{"model": used, "positive": positive, "negative": ["other", 0], "latent_image": ["latent", 0]},
            **{"seed": SEED, "steps": STEPS, "cfg": 1.0, "denoise": 1.0},
            **{"sampler_name": "splam", "scheduler": "splam"},
        )
    else:
        nodes["sampler"] = node("SPLAMSamplerSelect")
        nodes["sigmas"] = node("SPLAMScheduler", model=used, steps=STEPS, denoise=1.0)
        common = {"sampler": ["sampler", 0], "sigmas": ["sigmas", 0], "latent_image": ["latent", 0]}
        if name == "custom":
            inputs = {"model": used, "positive": positive, "negative": ["other", 0], "cfg": 1.0}
            nodes["sampled"] = node("SamplerCustom", add_noise=True, noise_seed=SEED, **inputs, **common)
        else:
            nodes["noise"] = node("RandomNoise", noise_seed=SEED)
            nodes["guider"] = node("BasicGuider", model=used, conditioning=positive)
            nodes["sampled"] = node("SamplerCustomAdvanced", noise=["noise", 0], guider=["guider", 0], **common)
    return nodes
