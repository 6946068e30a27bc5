"""SPLAM Sampler: noise, grid, few-step sampling and re-noising in one node."""

import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
import torch
from comfy_api.latest import io

from .few_step import check_steps, sample_splam, splam_sigmas
from .parametrisation import as_consistency_model


class SPLAMSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SPLAMSampler",
            display_name="SPLAM Sampler",
            category="sampling/SPLAM",
            description=(
                "Samples a SPLAM (or LCM) model in 1 to 8 steps, as the authors' pipeline does. "
                "One model evaluation a step, no guidance pass; works with a MODEL from any loader."
            ),
            inputs=[
                io.Model.Input(
                    "model", tooltip="A SPLAM or LCM model of Stable Diffusion 1.x, 2.x or XL, with or without LoRAs."
                ),
                io.Conditioning.Input("positive", tooltip="What the picture should show."),
                io.Latent.Input(
                    "latent_image",
                    tooltip=(
                        "An Empty Latent Image for text-to-image, an encoded picture for image-to-image. "
                        "A noise mask restricts the change to the mask."
                    ),
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="The same seed gives the same picture on every ComfyUI version.",
                ),
                io.Int.Input(
                    "steps", default=4, min=1, max=8, tooltip="Model evaluations. 2 to 4 is what SPLAM is made for."
                ),
                io.Float.Input(
                    "denoise",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="1 makes a new picture; less keeps more of latent_image. At least steps/50.",
                ),
                io.Conditioning.Input(
                    "negative",
                    optional=True,
                    tooltip="Has no effect: the guidance is inside the model. Here so that KSampler's graphs fit.",
                ),
            ],
            outputs=[io.Latent.Output(tooltip="The denoised latents.")],
        )

    @classmethod
    def execute(cls, model, positive, latent_image, seed, steps, denoise, negative=None) -> io.NodeOutput:
        check_steps("SPLAM Sampler", steps, denoise)
        model = as_consistency_model(model)
        samples = comfy.sample.fix_empty_latent_channels(model, latent_image["samples"])
        check_latent(samples, model.get_model_object("latent_format").latent_channels)
        noise = comfy.sample.prepare_noise(samples, seed, latent_image.get("batch_index"))
        # No negative conditioning at all, rather than guidance 1: nothing then has to be skipped.
        guider = comfy.samplers.CFGGuider(model)
        guider.inner_set_conds({"positive": positive})
        guider.set_cfg(1.0)
        result = guider.sample(
            noise,
            samples,
            comfy.samplers.KSAMPLER(sample_splam),
            splam_sigmas(model.get_model_object("model_sampling"), steps, denoise),
            denoise_mask=latent_image.get("noise_mask"),
            callback=latent_preview.prepare_callback(model, steps),
            disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
            seed=seed,
        )
        return io.NodeOutput({**latent_image, "samples": result.to(comfy.model_management.intermediate_device())})


def check_latent(samples, channels: int) -> None:
    """Raises ValueError for latents that this model cannot take."""
    if samples.numel() == 0:
        raise ValueError(
            f"SPLAM Sampler: latent_image is empty, shape {tuple(samples.shape)}. Give at least one latent."
        )
    if samples.shape[1] != channels:
        raise ValueError(
            f"SPLAM Sampler: this model's latents have {channels} channels, latent_image has {samples.shape[1]}. "
            "Encode the picture with the VAE of the SPLAM Loader."
        )
    if not torch.isfinite(samples).all():
        raise ValueError(
            "SPLAM Sampler: latent_image holds NaN or infinite values. The node that made it failed; "
            "a VAE in half precision may need ComfyUI's --fp32-vae."
        )
