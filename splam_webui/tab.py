"""The tab "SPLAM": conversion of diffusers folders, UNets and LoRAs into files for the host's lists."""

from __future__ import annotations

from pathlib import Path

import gradio as gr
from modules import sd_models, shared
from modules.paths import models_path
from modules.ui_common import create_refresh_button

from splam_core.checkpoint import shortened, with_names

from .convert import EMBEDDED, PRECISIONS, convert

NO_BASE = "None: the source has all parts"
ABOUT = (
    "Checkpoints of SPLAM and LCM come as diffusers folders or bare UNets, often with a weight `cond_proj` for which "
    "this program has no place. Here they become one file, with that weight folded in exactly. LoRAs in peft's or "
    "diffusers' naming become ones that the Lora tab loads."
)


def on_ui_tabs() -> list[tuple[gr.Blocks, str, str]]:
    """What `script_callbacks.on_ui_tabs` expects: the tab, its title, its element id."""
    with gr.Blocks(analytics_enabled=False) as tab:
        gr.Markdown(ABOUT)
        source = gr.Textbox(
            label="Source",
            placeholder="path of a diffusers folder, a UNet folder, or a .safetensors file",
            elem_id="splam_source",
        )
        with gr.Row():
            base = gr.Dropdown(
                label="Base checkpoint (for a UNet alone: VAE and text encoder come from it)",
                choices=base_choices(),
                value=NO_BASE,
                elem_id="splam_base",
            )
            create_refresh_button(
                base, shared.refresh_checkpoints, lambda: {"choices": base_choices()}, "splam_refresh"
            )
        with gr.Row():
            precision = gr.Radio(label="Precision", choices=list(PRECISIONS), value="fp16", elem_id="splam_precision")
            embedded = gr.Radio(
                label="If the source has cond_proj, it is of", choices=list(EMBEDDED), value=next(iter(EMBEDDED))
            )
        with gr.Row():
            name = gr.Textbox(label="Target name", placeholder="slam-sd1.5", elem_id="splam_name")
            overwrite = gr.Checkbox(label="Overwrite a file of this name", value=False, elem_id="splam_overwrite")
        button = gr.Button("Convert", variant="primary", elem_id="splam_convert")
        result = gr.Textbox(label="Result", interactive=False, lines=3, elem_id="splam_result")
        button.click(run, inputs=[source, base, precision, embedded, name, overwrite], outputs=[result])
    return [(tab, "SPLAM", "splam")]


def base_choices() -> list[str]:
    """The host's checkpoints, after the choice of none."""
    return [NO_BASE, *sd_models.checkpoints_list]


def run(
    source: str,
    base: str | None,
    precision: str,
    embedded: str,
    name: str,
    overwrite: bool,
    progress: gr.Progress = gr.Progress(),  # noqa: B008 (gradio's way)
) -> str:
    """The button: converts and says what came of it, in one sentence, whatever happens to the files."""
    if base not in (None, NO_BASE, *sd_models.checkpoints_list):
        return f"Not converted. There is no checkpoint {shortened(str(base))!r}: refresh the list and choose one of it."
    try:
        made = convert(
            readable(source),
            name,
            checkpoints=Path(sd_models.model_path),
            loras=lora_folder(),
            base=None if base in (None, NO_BASE) else Path(sd_models.checkpoints_list[base].filename),
            precision=precision,
            embedded=EMBEDDED[embedded],
            overwrite=overwrite,
            progress=lambda fraction, text: progress(fraction, desc=text),
        )
    except (ValueError, OSError) as error:
        return in_host_names(f"Not converted. {error}")
    shared.refresh_checkpoints()
    where = "checkpoints" if made.path.parent == Path(sd_models.model_path) else "LoRAs"
    wrote = f"Wrote {made.path}. It is among the {where}; press the refresh button of that list to see it."
    return in_host_names(" ".join([wrote, *(f"Of the source: {note}" for note in made.notes)]))


def lora_folder() -> Path:
    return Path(getattr(shared.cmd_opts, "lora_dir", None) or Path(models_path) / "Lora")


def in_host_names(text: str) -> str:
    """The text with the program's folders in place of their paths, and no longer than a screen."""
    folders = {Path(models_path): "models", Path(sd_models.model_path): "models/Stable-diffusion"}
    folders[lora_folder()] = "models/Lora"
    if elsewhere := getattr(shared.cmd_opts, "ckpt_dir", None):
        folders[Path(elsewhere)] = "models/Stable-diffusion"
    return with_names(text, folders)


def readable(source: str) -> Path:
    """The source as a path. A page that others can reach reads only inside the host's models folder.

    The measure of "others can reach" is the host's own, by which it refuses to install extensions from the page.
    """
    if not source or not source.strip():
        raise ValueError("Source is empty: give the path of a diffusers folder or of a .safetensors file.")
    path = Path(source.strip().strip('"')).expanduser().resolve()
    models = Path(models_path).resolve()
    if getattr(shared.cmd_opts, "disable_extension_access", False) and models not in path.parents:
        raise ValueError(
            f"{source.strip()!r} is outside the folder models, and this page can be reached from other machines: put "
            "the source there, or start with --enable-insecure-extension-access."
        )
    return path
