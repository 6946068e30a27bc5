"""SPLAM Sampler: noise, grid, few-step sampling and re-noising in one node."""

from inspect import signature

import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
from comfy_api.latest import io

from ..splam_core.nag import Nag
from .families import family_of, family_sigmas, sampler_of
from .few_step import check_latent, check_steps
from .host import Conditioning, Latent, Model
from .nag import patch_negative
from .options import (
    denoise_input,
    eta_input,
    family_input,
    nag_scale_input,
    refinements_input,
    search_aliases,
    steps_input,
)
from .parametrisation import as_consistency_model
from .sockets import connected


class SPLAMSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SPLAMSampler",
            display_name="SPLAM Sampler",
            category="sampling/SPLAM",
            description=(
                "Samples a SPLAM (or LCM) model in 1 to 8 steps, as the authors' pipeline does. "
                "One model evaluation a step, no guidance pass unless asked; works with a MODEL from any loader."
            ),
            **search_aliases("LCM", "DMD2", "TCD", "Hyper-SD", "Lightning", "PCM", "few steps", "turbo", "KSampler"),
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
                steps_input(),
                denoise_input(),
                io.Conditioning.Input(
                    "negative",
                    optional=True,
                    tooltip=(
                        "What the picture should not show. Read where nag_scale or guidance is above 1, and by patches "
                        "that ask for it, such as Self-Attention Guidance."
                    ),
                ),
                io.Float.Input(
                    "guidance",
                    default=1.0,
                    min=1.0,
                    max=30.0,
                    step=0.1,
                    optional=True,
                    tooltip=(
                        "Leave at 1: the guidance is inside the model, and a step is one evaluation. Above 1, as "
                        "KSampler's cfg: w in w*positive + (1-w)*negative: two evaluations a step."
                    ),
                ),
                refinements_input(),
                nag_scale_input(1.0, optional=True),
                family_input(),
                eta_input(),
            ],
            outputs=[io.Latent.Output(tooltip="The denoised latents.")],
        )

    @classmethod
    @connected
    def execute(
        cls,
        model: Model,
        positive: Conditioning,
        latent_image: Latent,
        seed: int,
        steps: int,
        denoise: float,
        negative: Conditioning | None = None,
        guidance: float = 1.0,
        refinements: int = 0,
        nag_scale: float = 1.0,
        family: str = "splam",
        eta: float = 0.3,
    ) -> io.NodeOutput:
        chosen = family_of("SPLAM Sampler", model, family)
        if refinements > 0 and chosen.name != "splam":
            raise ValueError(
                f"SPLAM Sampler: refinements are SPLAM's, and the family is '{chosen.name}'. Set refinements to 0."
            )
        if not chosen.trailing:
            check_steps("SPLAM Sampler", steps, denoise)
        for name, value in (("guidance", guidance), ("nag_scale", nag_scale)):
            if value > 1 and negative is None:
                raise ValueError(
                    f"SPLAM Sampler: {name} {value:g} needs a negative conditioning, and none is connected. Connect "
                    f"one (an empty prompt will do), or set {name} to 1."
                )
        if negative is None and model.model_options.get("disable_cfg1_optimization"):
            raise ValueError(
                "SPLAM Sampler: a patch of this MODEL (Self-Attention Guidance, NAGuidance or the like) reads the "
                "negative conditioning also at guidance 1, and none is connected. Connect one (an empty prompt will "
                "do)."
            )
        # Where attention guidance alone reads the negative, the host is not told of it: an area of it would make the
        # host evaluate the positive in that area too.
        evaluated = guidance > 1 or nag_scale <= 1 or model.model_options.get("disable_cfg1_optimization")
        model = as_consistency_model(model)
        model = patch_negative(model, negative, Nag(nag_scale), "SPLAM Sampler")
        # ComfyUI 0.33: an empty latent names the ratios of the model that it was made for.
        ratios = signature(comfy.sample.fix_empty_latent_channels).parameters.keys() & latent_image.keys()
        samples = comfy.sample.fix_empty_latent_channels(
            model, latent_image["samples"], **{name: latent_image[name] for name in ratios}
        )
        check_latent("SPLAM Sampler", samples, model.get_model_object("latent_format").latent_channels)
        noise = comfy.sample.prepare_noise(samples, seed, latent_image.get("batch_index"))
        # At guidance 1 the host evaluates a negative only where a patch of the MODEL asks for it.
        guider = comfy.samplers.CFGGuider(model)
        guider.inner_set_conds(
            {"positive": positive} | ({"negative": negative} if negative is not None and evaluated else {})
        )
        guider.set_cfg(guidance)
        result = guider.sample(
            noise,
            samples,
            sampler_of(chosen.name, refinements, eta),
            family_sigmas("SPLAM Sampler", model.get_model_object("model_sampling"), chosen, steps, denoise),
            denoise_mask=latent_image.get("noise_mask"),
            callback=latent_preview.prepare_callback(model, steps),
            disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
            seed=seed,
        )
        kept = {name: value for name, value in latent_image.items() if name not in ratios}
        return io.NodeOutput({**kept, "samples": result.to(comfy.model_management.intermediate_device())})
