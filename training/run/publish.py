"""The finished student on disk: pipeline folder, single file or LoRA, model card and workflow."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..files import WRITE_ERRORS, shipped
from ..models.files import ModelFiles, write_folder, write_single_file
from ..models.load import read_teacher
from ..models.lora import file_and_weight, joined, merged, named_with_weight, save_lora, with_loras
from ..models.pipeline import DTYPES, weights_hash
from ..models.teachers import resolve, without_folders
from ..scoring.variety import TEACHER_STEPS
from .checkpoints import explain_write_error
from .config import Config
from .distillation import Distillation
from .report import SPREAD_SEEDS, sample_prompts, save_curves

SPREAD = f"""
Spread over seeds is how far {SPREAD_SEEDS} pictures of one prompt lie apart: the RMS distance of pairs in pixels
averaged to 32x32, in [-1, 1], of the student with 4 steps and of its teacher with {TEACHER_STEPS}. Less than the
teacher's is less variety.
"""
WORKFLOW = shipped("workflows") / "splam_txt2img.json"


def finish(
    run: Distillation, role: str, losses: dict[str, float], spread: dict[str, float], sheet: Path | None
) -> None:
    """The student on disk in every form, with its card and workflow.

    losses: by role; spread: that of `Sheets.spread`, or nothing.

    Raises CheckpointError, after removing all of them, where one cannot be written; the checkpoints stay.
    """
    config, out, dtype = run.config, run.config.output_dir, DTYPES[run.config.export_dtype]
    lora = run.networks.lora(role) if config.lora else None
    scale = (config.lora_alpha or config.lora_rank) / config.lora_rank
    state = None if lora else run.networks.export(role)
    step, samples, best = run.step, run.samples, run.best
    described, skipped = run.data.describe(_published), run.data.skipped
    run.free()
    # The teacher once more, as its files have it: in memory it may have been rounded.
    teacher = read_teacher(resolve(config.teacher, config.revision))
    both = joined(lora, scale, config.teacher_lora, teacher) if config.lora_holds == "both" else None
    teacher = with_loras(teacher, config.teacher_lora)
    whole = {key: weight.float() for key, weight in teacher.unet.items()}
    digest = weights_hash(whole)
    model = replace(teacher, unet=merged(whole, lora, scale) if lora else state).few_step().cast(dtype)
    del teacher, whole, state  # SDXL's are 10 GB each
    metadata = {
        "splam.method": config.method,
        "splam.skip": str(config.skip),
        "splam.solver": config.solver,
        "splam.solver_skip": str(config.solver_skip),
        "splam.guidance_scale": str(config.guidance_scale),
        "splam.teacher": without_folders(config.teacher),
        "splam.teacher_hash": digest,
    }
    if config.finish != "none":
        metadata["splam.finish"] = config.finish
    if config.clip_skip != 1:
        metadata["splam.clip_skip"] = str(config.clip_skip)
    if config.teacher_lora:
        metadata["splam.teacher_lora"] = ", ".join(map(named_with_weight, config.teacher_lora))
        if lora:
            metadata["splam.lora_holds"] = config.lora_holds
    result = {
        "steps": step,
        "samples": samples,
        "exported": role,
        **{f"validation loss, {name}": f"{loss:.4f}" for name, loss in losses.items()},
        "best validation": f"{best['loss']:.4f} at step {best['step']} (best/)" if best else None,
        **{
            f"spread over seeds, {what}": f"{spread[key]:.3f} (the teacher's {spread[f'{key}_teacher']:.3f})"
            for key, what in (("spread", "pixels"), ("spread_features", "features of the detector"))
            if key in spread
        },
        "LoRAs on the teacher": metadata.get("splam.teacher_lora"),
        "Clip skip, to be set where it is used": metadata.get("splam.clip_skip"),
        "the LoRA holds": {None: None, "speed": "speed alone", "both": "speed and the teacher's LoRAs"}[
            metadata.get("splam.lora_holds")
        ],
        "begun from": None if config.student is None else without_folders(config.student),
        "finish": _finish(config),
        "k, k_phi, w": f"{config.skip}, {config.solver_skip} ({config.solver}), {config.guidance_scale:g}",
        "teacher (SHA-256 of its weights)": digest,
        "samples skipped": len(skipped),
    }
    folder, file = out / "pipeline", out / f"{config.name}.{'splam-lora' if lora else 'splam'}.safetensors"
    try:
        write_folder(model, folder)
        if lora:
            held, scale = (lora, scale) if both is None else (both, 1.0)
            save_lora(held, file, model, scale, dtype, config.name, metadata)
            base = "embedded-teacher" if config.teacher == "embedded" else metadata["splam.teacher"]
            workflow = save_workflow(config, model, out, base, file.name)
        else:
            write_single_file(model, file, config.name, metadata)
            workflow = save_workflow(config, model, out, file.name, None)
        save_curves(out, out / "curves.png")
        save_card(config, out, result, described, sheet, ["pipeline/", file.name, workflow.name])
    except WRITE_ERRORS as error:
        shutil.rmtree(folder, ignore_errors=True)
        for made in (file, *(out / name for name in (f"{config.name}.workflow.json", "curves.png", "README.md"))):
            made.unlink(missing_ok=True)
        raise explain_write_error(error, folder) from error
    print(f"exported: {role}\nstudent: {folder}\nsingle file: {file}\nworkflow: {workflow}")


def save_card(
    config: Config, folder: Path, result: Mapping[str, Any], data: str, sheet: Path | None, files: list[str]
) -> None:
    """README.md with the command, the data, the curves and the sheet."""
    shown = [f"| {key} | {value} |" for key, value in result.items() if value is not None]
    command = "python training/distill.py " + shlex.join(map(_published, sys.argv[1:]))
    base = re.sub(r".*[/\\]", "", config.teacher) if Path(config.teacher).expanduser().exists() else config.teacher
    base = " with ".join(f"`{one}`" for one in (base, *map(named_with_weight, config.teacher_lora)))
    text = f"""# {config.name}

A few-step model distilled from {base} with {_how(config)} ({"LoRA" if config.lora else "full weights"}).
Sample it with 2 to 4 steps of `LCMScheduler` (diffusers) or SPLAM Sampler (ComfyUI), guidance scale 1, no negative
prompt.

{chr(10).join(f"- `{name}`" for name in files)}

## How it was made

```sh
{command}
```

Data: {data}

| | |
| --- | --- |
{chr(10).join(shown)}

Validation loss is the RMS distance, in latents of unit scale, between the student's prediction and the end of the
teacher's own guided path from the same noise, at the timesteps of four-step sampling, on samples that were not trained
on. All settings are in `config.json`.
{SPREAD if any("spread" in key for key in result) else ""}
![curves](curves.png)
"""
    if sheet is not None:
        text += f"\n![the teacher's pictures with 50 steps and the student's with 1, 2, 4 and 8]({sheet.name})\n"
    (folder / "README.md").write_text(text, encoding="utf-8")


def save_workflow(config: Config, model: ModelFiles, folder: Path, model_name: str, lora_name: str | None) -> Path:
    """The pack's text-to-image workflow with this model, its picture size and a prompt set."""
    graph = json.loads(WORKFLOW.read_text(encoding="utf-8"))
    by_type = {node["type"]: node for node in graph["nodes"]}
    by_type["SPLAMLoader"]["widgets_values"][0] = model_name
    by_type["CLIPTextEncode"]["widgets_values"] = [sample_prompts(config)[0]]
    by_type["EmptyLatentImage"]["widgets_values"][:2] = [config.data_options.resolution or model.resolution] * 2
    for note in (node for node in graph["nodes"] if node["type"] in ("MarkdownNote", "Note")):
        where = "`models/loras/`" if lora_name else "`models/checkpoints/`"
        note["widgets_values"] = [f"## {config.name}\n\nPut `{lora_name or model_name}` into {where}, refresh, run."]
    if lora_name:
        both = config.lora_holds == "both"
        _insert_lora(graph, by_type["SPLAMLoader"], lora_name, 1.0, text_encoder=both)
        for file, weight in map(file_and_weight, () if both else config.teacher_lora):
            _insert_lora(graph, by_type["SPLAMLoader"], file.name, weight, text_encoder=True)
    if config.clip_skip != 1:
        _insert(graph, by_type["SPLAMLoader"], "CLIPSetLastLayer", ("CLIP",), [-config.clip_skip])
    file = folder / f"{config.name}.workflow.json"
    file.write_text(json.dumps(graph, indent=2) + "\n", encoding="utf-8")
    return file


def _insert_lora(graph: dict, loader: dict, lora_name: str, weight: float, text_encoder: bool) -> None:
    """Core's LoRA loader right behind the loader; text_encoder: on its CLIP, too."""
    kinds = ("MODEL", "CLIP") if text_encoder else ("MODEL",)
    node_type = "LoraLoader" if text_encoder else "LoraLoaderModelOnly"
    _insert(graph, loader, node_type, kinds, [lora_name, *[weight] * len(kinds)])


def _insert(graph: dict, loader: dict, node_type: str, kinds: tuple[str, ...], settings: list) -> None:
    """A node of core's right behind the loader, which what is of these kinds goes through."""
    node_id = graph["last_node_id"] + 1
    node: dict = {
        "id": node_id,
        "type": node_type,
        "pos": [loader["pos"][0], loader["pos"][1] + 160 * (node_id - len(graph["nodes"]))],
        "size": [320, 126],
        "flags": {},
        "order": 1,
        "mode": 0,
        "inputs": [],
        "outputs": [],
        "properties": {"Node name for S&R": node_type},
        "widgets_values": settings,
    }
    for slot, kind in enumerate(kinds):
        output = next(one for one in loader["outputs"] if one["name"] == kind)
        for link in graph["links"]:
            if link[0] in output["links"]:
                link[1], link[2] = node_id, slot
        graph["last_link_id"] += 1
        link_id = graph["last_link_id"]
        node["inputs"].append({"name": kind.lower(), "type": kind, "link": link_id})
        node["outputs"].append({"name": kind, "type": kind, "slot_index": slot, "links": output["links"]})
        graph["links"].append([link_id, loader["id"], output["slot_index"], node_id, slot, kind])
        output["links"] = [link_id]
    graph["nodes"].append(node)
    graph["last_node_id"] = node_id


def _how(config: Config) -> str:
    stages = [config.method.upper()] if config.max_train_steps else []
    if config.finish != "none":
        stages.append(config.finish.replace("-", " "))
    return ", then ".join(stages)


def _finish(config: Config) -> str | None:
    if config.finish == "none":
        return None
    return (
        f"{config.finish}: {config.finish_steps} steps, rates {config.finish_learning_rate:g} and "
        f"{config.fake_learning_rate:g}, w {config.finish_guidance:g}, anchor {config.finish_anchor:g}"
    )


def _published(word: object) -> str:
    """An absolute path, also one after --flag=, as its last part: where a file lay is nobody's business."""
    flag, equals, place = str(word).partition("=") if str(word).startswith("--") else ("", "", str(word))
    return flag + equals + (Path(place).name if Path(place).is_absolute() else place)
