"""Automatic1111, Forge and reForge load this file, at start and on "Reload UI": it offers the sampler and the tab.

ComfyUI does not read it. Extensions are imported with their folder on sys.path, hence the absolute imports.
"""

import gradio as gr
from modules import script_callbacks, scripts

from splam_webui import hosts, sampler, tab

sampler.register()
script_callbacks.on_ui_tabs(tab.on_ui_tabs)


class SplamScript(scripts.Script):
    """Sets guidance to 1 before the prompts are encoded, for requests that sample with SPLAM."""

    def title(self):
        return "SPLAM"

    def show(self, is_img2img):
        return scripts.AlwaysVisible

    def ui(self, is_img2img):
        with gr.Accordion("SPLAM", open=False, elem_id=self.elem_id("accordion")):
            forced = gr.Checkbox(
                value=True,
                label="Guidance 1 with the sampler SPLAM: one evaluation a step; CFG scale and negative prompt unused",
                elem_id=self.elem_id("guidance_one"),
            )
        self.infotext_fields = [(forced, was_forced)]
        return [forced]

    def before_process(self, p, forced=True, *_):
        # A cell of the X/Y/Z plot shares this dictionary with the cell before, which may have been of SPLAM.
        p.extra_generation_params.pop(hosts.INFOTEXT, None)
        p.splam_keeps_guidance = not forced
        if forced:
            hosts.request_guidance_one(p, sampler.NAME)


def was_forced(infotext: dict) -> bool | None:
    """The checkbox as it was for a picture; None, which leaves it alone, for pictures of other samplers."""
    return {hosts.FORCED: True, hosts.AS_SET: False}.get(infotext.get(hosts.INFOTEXT))
