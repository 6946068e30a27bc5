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
                label="Guidance 1 with the sampler SPLAM: one evaluation a step; CFG scale unused",
                elem_id=self.elem_id("guidance_one"),
            )
            negative = gr.Checkbox(
                value=False,
                label="Use the negative prompt at guidance 1: normalised attention guidance (NAG)",
                elem_id=self.elem_id("nag"),
            )
            scale = gr.Slider(
                minimum=1,
                maximum=20,
                step=0.1,
                value=5.0,
                label="NAG scale: 1 is off, 3 to 8 is usual",
                elem_id=self.elem_id("nag_scale"),
            )
        self.infotext_fields = [(forced, was_forced), (negative, used_negative), (scale, hosts.NAG_INFOTEXT)]
        return [forced, negative, scale]

    def before_process(self, p, forced=True, negative=False, scale=5.0, *_):
        # A cell of the X/Y/Z plot shares this dictionary with the cell before, which may have been of SPLAM.
        for note in (hosts.INFOTEXT, hosts.NAG_INFOTEXT):
            p.extra_generation_params.pop(note, None)
        p.splam_nag_scale = scale if negative else 1.0
        p.splam_keeps_guidance = not forced
        if forced:
            hosts.request_guidance_one(p, sampler.NAME)


def was_forced(infotext: dict) -> bool | None:
    """The checkbox as it was for a picture; None, which leaves it alone, for pictures of other samplers."""
    return {hosts.FORCED: True, hosts.AS_SET: False}.get(infotext.get(hosts.INFOTEXT))


def used_negative(infotext: dict) -> bool | None:
    """The second checkbox, likewise."""
    return hosts.NAG_INFOTEXT in infotext if hosts.INFOTEXT in infotext else None
