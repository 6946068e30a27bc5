"""SPLAM Distil: the checkpoint on the canvas becomes a LoRA of two to four steps."""

import functools
from typing import Any

import comfy.sd
import torch
from comfy_api.latest import io

from ..splam_core.finish import LORA_FINISH, Finish
from ..splam_core.recipe import LORA_LEARNING_RATE, RECIPES, Recipe
from .announce import warn
from .catalogue import host_names
from .distilling.files import Autosave, as_lora, existing_loras, locate, metadata, read_lora
from .distilling.host import NAME, HostUNet, Told
from .distilling.pictures import to_tensor
from .distilling.prompts import prompt_file, read_prompts
from .distilling.run import Run, Settings
from .distilling.samples import Samples
from .distilling.style import HOLDS, check_style, with_style
from .distilling.work import Work
from .host import Clip, Conditioning, Latent, Model, Vae
from .options import advanced, check_choice, search_aliases
from .parametrisation import as_consistency_model
from .sockets import connected

NONE = "none"
# Of a conditioning: what the host does around the UNet.
SAMPLINGS_OWN = ("control", "gligen", "hooks", "area", "mask")


class SPLAMDistil(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SPLAMDistil",
            display_name="SPLAM Distil",
            category="training/SPLAM",
            description=(
                "Makes a four-step LoRA of the checkpoint on the canvas, with the LoRAs that are on it. Needs no data: "
                "the teacher draws its own pictures of the prompts. Cancel keeps what was learned; queueing the same "
                "graph goes on."
            ),
            **search_aliases("distill", "distillation", "train LoRA", "LCM LoRA", "few steps"),
            is_input_list=True,
            inputs=[
                io.Model.Input("model", tooltip="The teacher: any Stable Diffusion 1.x, 2.x or XL, LoRAs and all."),
                io.String.Input(
                    "prompts",
                    default="",
                    multiline=True,
                    tooltip=(
                        "What to learn, one prompt a line, or the name of a .txt file in the input folder. Empty: the "
                        "4250 varied prompts that come with this pack."
                    ),
                ),
                io.Int.Input(
                    "steps",
                    default=1000,
                    min=0,
                    max=100000,
                    tooltip="Optimizer steps; a few hundred show. 0: finish_steps alone, on existing_lora.",
                ),
                io.Int.Input("rank", default=64, min=1, max=512, tooltip="Of the LoRA. Lower needs less memory."),
                io.Int.Input(
                    "resolution",
                    default=512,
                    min=64,
                    max=2048,
                    step=8,
                    tooltip="Pixels of the square pictures that the teacher draws: 512 for SD1.x, 1024 for SDXL.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=False,  # the same graph queued again goes on
                    tooltip="Every random number of the run is a function of it.",
                ),
                advanced(
                    io.Float.Input(
                        "guidance",
                        default=3.0,
                        min=1.0,
                        max=30.0,
                        step=0.1,
                        tooltip="What the LoRA bakes in: as KSampler's cfg. Higher is more vivid and less varied.",
                    )
                ),
                advanced(io.Int.Input("batch_size", default=4, min=1, max=1024, tooltip="Pictures at once.")),
                advanced(
                    io.Int.Input(
                        "gradient_accumulation",
                        default=4,
                        min=1,
                        max=1024,
                        tooltip="Batches a step: as a larger batch, with the memory of one.",
                    )
                ),
                advanced(
                    io.Float.Input(
                        "learning_rate",
                        default=LORA_LEARNING_RATE,
                        min=1e-7,
                        max=1.0,
                        step=1e-7,
                        round=False,
                        tooltip="Of AdamW; it rises over the first steps and falls to zero at the end.",
                    )
                ),
                advanced(
                    io.Combo.Input(
                        "recipe",
                        options=list(RECIPES),
                        default="default",
                        tooltip="default: what we found best. paper: Algorithm 1 with the paper's settings.",
                    )
                ),
                advanced(
                    io.Combo.Input(
                        "existing_lora",
                        options=[NONE, *existing_loras()],
                        default=NONE,
                        tooltip="A LoRA of SPLAM Distil or distill.py to begin with, of the same rank.",
                    )
                ),
                advanced(
                    io.Int.Input(
                        "pictures_per_prompt",
                        default=1,
                        min=1,
                        max=1000,
                        tooltip="How many the teacher draws of each prompt: more for a short list.",
                    )
                ),
                advanced(
                    io.Boolean.Input(
                        "gradient_checkpointing",
                        default=True,
                        tooltip="Much less memory, a third slower.",
                    )
                ),
                advanced(
                    io.Int.Input(
                        "preview_every",
                        default=50,
                        min=0,
                        max=100000,
                        tooltip="Steps between two pictures of teacher and student on the node; 0 for none.",
                    )
                ),
                advanced(
                    io.Int.Input(
                        "autosave_every",
                        default=50,
                        min=1,
                        max=100000,
                        tooltip="Steps between two autosaves in output/splam.",
                    )
                ),
                io.Clip.Input("clip", optional=True, tooltip="Reads the prompts; from the checkpoint's loader."),
                io.Vae.Input("vae", optional=True, tooltip="For the pictures on the node; without it rough colours."),
                io.Conditioning.Input(
                    "positive", optional=True, tooltip="A prepared set instead of prompts, as for Train LoRA."
                ),
                io.Latent.Input(
                    "latents",
                    optional=True,
                    tooltip="Encoded pictures to learn from, one for each conditioning; none: the teacher draws.",
                ),
                advanced(
                    io.Int.Input(
                        "finish_steps",
                        default=0,
                        min=0,
                        max=100000,
                        optional=True,
                        tooltip=(
                            "Steps of distribution matching after the others, which lead the student's pictures to the "
                            "teacher's; about a tenth of steps. 0: none."
                        ),
                    )
                ),
                advanced(
                    io.Combo.Input(
                        "lora_holds",
                        options=list(HOLDS),
                        default="speed",
                        optional=True,
                        tooltip=(
                            "speed: the output lora is used beside the LoRAs of the MODEL. both: it holds those of "
                            "MODEL and CLIP too, one file for the plain checkpoint."
                        ),
                    )
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="The model with its new LoRA, ready for SPLAM Sampler at 2 to 4 steps."),
                io.Custom("LORA_MODEL").Output(
                    display_name="lora", tooltip="For Save LoRA Weights and Load LoRA Model."
                ),
                io.Custom("LOSS_MAP").Output(display_name="loss_map", tooltip="For Plot Loss Graph."),
                io.Int.Output(display_name="steps", tooltip="Steps that were made, for Save LoRA Weights."),
                io.Image.Output(display_name="report", tooltip="Teacher beside student, and the loss curve."),
            ],
            hidden=[io.Hidden.prompt],
        )

    @classmethod
    def fingerprint_inputs(cls, prompts: list[str | None], existing_lora: list[str | None], **_: Any) -> list[int]:
        text, begun = prompts[0], existing_lora[0]  # None: by a link, of which the host does not tell the value
        with host_names():
            files = [prompt_file(text) if text else None, locate(begun) if begun and begun != NONE else None]
        return [file.stat().st_mtime_ns for file in files if file is not None]

    @classmethod
    @connected
    def execute(
        cls,
        model: list[Model],
        prompts: list[str],
        steps: list[int],
        rank: list[int],
        resolution: list[int],
        seed: list[int],
        guidance: list[float],
        batch_size: list[int],
        gradient_accumulation: list[int],
        learning_rate: list[float],
        recipe: list[str],
        existing_lora: list[str],
        pictures_per_prompt: list[int],
        gradient_checkpointing: list[bool],
        preview_every: list[int],
        autosave_every: list[int],
        clip: list[Clip] | None = None,
        vae: list[Vae] | None = None,
        positive: list[Conditioning] | None = None,
        latents: list[Latent] | None = None,
        finish_steps: list[int] | None = None,
        lora_holds: list[str] | None = None,
    ) -> io.NodeOutput:
        check_choice(NAME, "recipe", recipe[0], RECIPES)
        both = (lora_holds or ["speed"])[0] == "both"
        check_choice(NAME, "lora_holds", (lora_holds or ["speed"])[0], HOLDS)
        # The paper's way of telling gamma needs a weight that no host's UNet has; the other one needs none.
        chosen = {**RECIPES[recipe[0]], "gamma_conditioning": "noise-level", "guidance_scale": guidance[0]}
        settings = Settings(
            recipe=Recipe(**chosen),
            finish=_finish(finish_steps[0] if finish_steps else 0, learning_rate[0]),
            steps=steps[0],
            rank=rank[0],
            batch_size=batch_size[0],
            accumulation=gradient_accumulation[0],
            learning_rate=learning_rate[0],
            seed=seed[0],
        )
        if resolution[0] % 8:
            below = resolution[0] // 8 * 8
            raise ValueError(
                f"{NAME}: resolution must be a multiple of 8, got {resolution[0]}. Use {below} or {below + 8}."
            )
        if not steps[0] and not settings.finish:
            raise ValueError(f"{NAME}: steps and finish_steps are both 0. Set one of them.")
        reader, decoder = (one[0] if one else None for one in (clip, vae))
        # The host runs nodes in inference mode, whose tensors cannot be differentiated.
        with host_names(), torch.inference_mode(False), torch.no_grad():
            if both:
                check_style(model[0], reader)
            host = HostUNet(model[0], gradient_checkpointing[0])
            try:
                samples = _samples(
                    host, settings, prompts[0], resolution[0], pictures_per_prompt[0], reader, positive, latents
                )
                run = Run(host, samples, settings)
                begun = read_lora(locate(existing_lora[0]), run.adapters) if existing_lora[0] != NONE else {}
                for role in ("target", "release") if begun else ():
                    run.adapters.load(role, begun)
                start = [float(one.sum()) for one in begun.values()]
                said = None if positive else read_prompts(prompts[0])
                identity = run.identity(said, resolution[0], existing_lora[0], start, samples.identity())

                def autosave(one: str) -> Autosave:
                    return Autosave(one, metadata(run, f"SPLAM LoRA, {one}", _family(host), cls.hidden.prompt))

                finish = run.finish_identity(identity)
                work = Work(
                    run,
                    autosave(identity),
                    autosave(finish) if finish else None,
                    decoder,
                    samples.shape,
                    preview_every[0],
                    autosave_every[0],
                )
                work.go_on()
                role = work.all_steps()
                lora = as_lora(run.adapters, role)
                picture = to_tensor(work.picture(role))
                losses = {"loss": list(run.losses)}
            finally:
                host.release()
            made = with_style(lora, model[0], reader) if both else lora
        patched, _ = comfy.sd.load_lora_for_models(model[0], None, lora, 1.0, 0.0)
        return io.NodeOutput(as_consistency_model(patched), made, losses, run.step, picture)


def _samples(
    host: HostUNet,
    settings: Settings,
    text: str,
    resolution: int,
    again: int,
    clip: Clip | None,
    positive: list[Conditioning] | None,
    latents: list[Latent] | None,
) -> Samples:
    """The samples that the inputs name. Raises ValueError, in their words, where something is missing."""
    shape = (host.channels, resolution // 8, resolution // 8)
    given = None
    if latents:
        given = [host.base.process_latent_in(row.clone().float()) for one in latents for row in one["samples"].clone()]
        _check_latents(host, given)
    if positive:
        entries = [entry for one in positive for entry in one]
        unheard = sorted({name for _, options in entries for name in SAMPLINGS_OWN if options.get(name) is not None})
        if unheard:
            warn(f"{NAME}: {', '.join(unheard)} of positive acts on sampling and is left out: prompts alone are told.")
    elif clip is None:
        raise ValueError(
            f"{NAME}: no CLIP is connected, which reads the prompts. Connect the checkpoint's (or, for a prepared set, "
            "conditionings to positive)."
        )
    else:
        entries = read_prompts(text)
    count = len(given) if given else len(entries) * again
    if given and len(entries) not in (1, len(given)):
        what = "conditionings" if positive else "prompts"
        raise ValueError(
            f"{NAME}: {len(given)} latents and {len(entries)} {what} do not go together. Give one {what[:-1]} for each "
            "latent, or one for all."
        )
    blank = torch.zeros(1, *(given[0].shape if given else shape))

    def encode(prompt: str) -> Conditioning:
        assert clip is not None  # where there is none, the conditionings were given
        with torch.no_grad():
            return clip.encode_from_tokens_scheduled(clip.tokenize(prompt))

    @functools.cache  # of many pictures a prompt each, or of many latents one
    def read(entry: int, size: tuple[int, ...]) -> Told:
        one = entries[entry]
        return host.told([one] if positive else encode(one), torch.zeros(1, *size))[0]

    def tell(number: int) -> Told:
        return read(number % len(entries), tuple(given[number].shape) if given else shape)

    if clip is not None:
        nothing = host.nothing(host.told(encode(""), blank, torch.float32)[0])
    else:
        nothing = host.nothing(tell(0))
        # As ConditioningZeroOut: without a CLIP there is no empty prompt.
        name = "c_crossattn"
        nothing = {**nothing, name: nothing[name]._copy_with(torch.zeros_like(nothing[name].cond))}
    return Samples(host, count, tell, nothing, shape, given, settings.batch_size, settings.seed)


def _check_latents(host: HostUNet, latents: list[torch.Tensor]) -> None:
    for number, one in enumerate(latents, 1):
        if one.ndim != 3 or one.shape[0] != host.channels or not torch.isfinite(one).all():
            raise ValueError(
                f"{NAME}: latent {number} of {len(latents)}, of shape {tuple(one.shape)}, does not fit, or is not "
                f"finite; this MODEL's are [{host.channels}, h, w]. Encode pictures with the VAE of this checkpoint."
            )
        value = one.flatten()[0]
        if (one == value).all():
            raise ValueError(
                f"{NAME}: latent {number} of {len(latents)} is {value:g} everywhere, which no picture's is. It is an "
                "empty latent, or its VAE failed: encode a picture with VAE Encode, or leave latents open, and the "
                "teacher draws pictures of its own."
            )


def _finish(steps: int, learning_rate: float) -> Finish | None:
    """As of training/distill.py --lora; its rates in proportion to the method's."""
    if not steps:
        return None
    rates: dict[str, Any] = {name: rate * learning_rate / LORA_LEARNING_RATE for name, rate in LORA_FINISH.items()}
    return Finish(finish="distribution-matching", finish_steps=steps, **rates)


def _family(host: HostUNet) -> str:
    config = host.base.model_config.unet_config
    if config.get("adm_in_channels"):
        return "sdxl"
    return "sd2" if config.get("context_dim") == 1024 else "sd1"
