"""Score a model: pictures from its prompts, judged; or set results side by side.

    python training/evaluate.py --protocol embedded --model embedded-student --steps 4 --json scores.json
    python training/evaluate.py --protocol coco2014-30k --model FOLDER --captions captions.txt --reference val2014 \\
        --output-dir pictures --json scores.json
    python training/evaluate.py --compare a.json b.json --markdown table.md --plots plots

The `embedded` protocol draws captions of the procedural scenes (half of one object, half of two), or takes those of
--captions; a small detector says which pictures show exactly their caption. The other protocols take captions and
reference pictures by path and give FID, KID, precision, recall and the CLIP score. With --output-dir the pictures are
kept, and a run that was stopped goes on. --curves adds endpoint error and delta(t, k). docs/evaluation.md explains all.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

if __package__ in (None, ""):  # run by path
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    __package__ = "training"
    # Before the libraries that would: scoring downloads nothing.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from training.models.pipeline import DTYPES
from training.models.sampling import SAMPLERS, unet_evaluations
from training.models.teachers import NAMED
from training.scoring import report
from training.scoring.drawing import Drawn, draw, load_model, measure_curves
from training.scoring.embedded_scores import scores_of
from training.scoring.perceptual import (
    ReferenceSet,
    clip_score,
    image_files,
    inception_features,
    inception_scores,
    load_clip,
    load_inception,
)
from training.scoring.protocols import PROTOCOLS
from training.scoring.request import SCORES, Request, check, protocol_captions_of, size_of


def evaluate(request: Request) -> dict | None:
    """The scores of a request, or None from a process that only draws its share of the pictures.

    Raises ValueError, FileNotFoundError or TimeoutError for a request that cannot be met.
    """
    check(request)
    scored = request.num_images != 0
    result: dict = {}
    drawn = None
    if scored:
        captions = protocol_captions_of(request)
        drawn = draw(request, captions)
        if not drawn.complete:
            return None
        score = embedded_scores if request.protocol == "embedded" else full_scores
        result |= score(request, drawn, captions)
        result |= {
            "images": len(captions),
            "unet_evaluations_per_image": drawn.evaluations,
            "seconds_per_image": drawn.seconds_per_image,
        }
    if request.curves:
        pipeline = drawn.pipeline if drawn else load_model(request)
        result |= measure_curves(request, pipeline)
    described = ("seed", "model", "sampler", "steps", "guidance_scale", "protocol", "batch_size", "device", "dtype")
    result |= {name: getattr(request, name) for name in described}
    result |= {"image_size": size_of(request), "lora": str(request.lora) if request.lora else None}
    result.setdefault("unet_evaluations_per_image", unet_evaluations(request.steps, request.guidance_scale))
    return result | ({"label": request.label} if request.label else {})


def embedded_scores(request: Request, drawn: Drawn, captions: list) -> dict:
    return scores_of(tuple(captions))(drawn.read())


def full_scores(request: Request, drawn: Drawn, captions: list[str]) -> dict:
    """FID and its kin, and the CLIP score, of the pictures of a folder."""
    files, scores = drawn.files(), {}
    if "inception" in request.scores:
        network = load_inception(request.inception_weights, request.device)
        size = PROTOCOLS[request.protocol].score_size
        if request.reference.is_dir():
            reference = ReferenceSet.of(inception_features(image_files(request.reference), network, size))
        else:
            reference = ReferenceSet.read(request.reference)
        if request.save_reference:
            reference.save(request.save_reference)
        scores |= inception_scores(inception_features(files, network, size), reference)
        scores["reference_images"] = None if reference.features is None else len(reference.features)
    if "clip" in request.scores:
        clip = load_clip(request.clip_model, request.clip_pretrained, request.clip_weights, request.device)
        scores |= {"clip_score": clip_score(files, captions, clip), "clip_model": clip.name}
    return scores


def parser() -> argparse.ArgumentParser:
    defaults = Request("")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def flag(group, name: str, help: str, *also: str, **options) -> None:
        destination = name.replace("-", "_")
        default = getattr(defaults, destination, None)
        shown = "" if default is None else f" (default: {default})"
        group.add_argument(f"--{name}", *also, dest=destination, default=default, help=help + shown, **options)

    model = parser.add_argument_group("the model and how it is sampled")
    named = f"{', '.join(NAMED)}, a diffusers or UNet folder, a single file, a Hub id in the cache, "
    flag(model, "model", named + "or 'renders' or 'reconstructions' (the embedded protocol's ceilings)")
    flag(model, "lora", "merged into the model: a .safetensors file, or a folder", type=Path)
    flag(model, "lora-scale", "its strength", type=float)
    flag(model, "gamma-embedding", "what a cond_proj of the checkpoint is told: splam, zero, or LCM's guidance_scale")
    flag(model, "sampler", "dpm-solver++, unipc and lcm are diffusers' schedulers", choices=SAMPLERS)
    flag(model, "steps", "of the sampler", type=int)
    flag(model, "guidance-scale", "w; 1 is none, anything else costs two evaluations a step", type=float)
    flag(model, "dtype", "of the weights", choices=DTYPES)
    flag(model, "label", "the method's name in tables")

    what = parser.add_argument_group("what is drawn")
    flag(what, "protocol", "presets of the numbers of pictures, sizes and scores", choices=PROTOCOLS)
    flag(what, "num-images", "the protocol's when left out; another number is a trial", type=int)
    flag(what, "image-size", "px; the protocol's when left out", type=int)
    flag(what, "prompts", "captions, one a line, or COCO's annotations (.json)", "--captions", type=Path)
    flag(what, "seed", "of captions and noise", type=int)
    flag(what, "batch-size", "pictures at a time; latencies are of this batch", type=int)
    flag(what, "output-dir", "keep the pictures here; a run that was stopped goes on", type=Path)
    flag(what, "shard", "I/N: draw the I-th (from 0) of N shares and do not score", type=_shard, metavar="I/N")
    what.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")

    how = parser.add_argument_group("scores")
    flag(how, "scores", "of the full-size protocols", nargs="+", choices=SCORES)
    flag(how, "reference", "folder of real pictures, or an .npz file with mu and sigma", type=Path)
    flag(how, "save-reference", "write the reference's statistics and features to this .npz file", type=Path)
    flag(how, "inception-weights", "torch-fidelity's; found in the cache when left out", type=Path)
    flag(how, "clip-model", "open_clip's name, or local-dir:FOLDER")
    flag(how, "clip-pretrained", "open_clip's tag of the weights")
    flag(how, "clip-weights", "their file; found in the cache when left out", type=Path)
    how.add_argument(
        "--curves", type=int, nargs="?", const=128, default=0, metavar="N",
        help="endpoint error and delta(t, 20) on N pictures (128); --num-images 0 leaves the other scores out",
    )  # fmt: skip
    flag(how, "teacher", "whose guided paths the endpoint error follows")
    flag(how, "teacher-guidance-scale", "w of those paths", type=float)

    out = parser.add_argument_group("results")
    out.add_argument("--json", type=Path, help="where the scores go; they are printed in any case")
    out.add_argument("--compare", type=Path, nargs="+", metavar="JSON", help="set results side by side; draws nothing")
    out.add_argument("--markdown", type=Path, help="the comparison as tables; printed in any case")
    out.add_argument("--plots", type=Path, metavar="DIR", help="the comparison as plots")
    return parser


def _shard(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    if not (index.isdigit() and count.isdigit() and int(index) < int(count)):
        raise argparse.ArgumentTypeError(f"expected I/N with I from 0 to N-1, got {text!r}")
    return int(index), int(count)


def main(arguments: list[str] | None = None) -> int:
    command = parser()
    options = vars(command.parse_args(arguments))
    file, compared, markdown, plots = (options.pop(name) for name in ("json", "compare", "markdown", "plots"))
    try:
        if compared:
            results = report.read_results(compared)
        elif options["model"] is None:
            command.error("--model says what to score; --compare sets results side by side")
        else:
            options["scores"] = tuple(options["scores"])
            result = evaluate(Request(**options))
            if result is None:
                print("this share is drawn; run without --shard to score")
                return 0
            text = json.dumps(result, indent=2)
            if file:
                report.write(file, text + "\n")
            print(text)
            results = [result]
        if compared or markdown:
            tables = report.markdown(results)
            if markdown:
                report.write(markdown, tables)
            if compared:
                print(tables)
        if plots:
            for plot in report.save_plots(results, plots):
                print(plot)
    except (ValueError, FileNotFoundError, TimeoutError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
