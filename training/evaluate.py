"""Score a model: pictures from its prompts, judged; or set results side by side.

    python training/evaluate.py --protocol embedded --model embedded-student --steps 4 --json scores.json
    python training/evaluate.py --protocol coco2014-30k --model FOLDER --captions captions.txt --reference val2014 \\
        --output-dir pictures --json scores.json
    python training/evaluate.py --compare a.json b.json --markdown table.md --plots plots

The `embedded` protocol draws captions of the procedural scenes (half of one object, half of two), or takes those of
--captions; a small detector says which pictures show exactly their caption. The other protocols take captions and
reference pictures by path and give FID, KID, precision, recall and the CLIP score. With --output-dir the pictures are
kept, and a run that was stopped goes on. --curves adds endpoint error and delta(t, k), --variety the spread over seeds.
docs/evaluation.md explains all.
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


from .flags import add_flags, given_flags
from .models.sampling import unet_evaluations
from .scoring import report
from .scoring.drawing import Drawn, draw, load_model, measure_curves, measure_variety
from .scoring.embedded_scores import scores_of
from .scoring.perceptual import (
    ReferenceSet,
    clip_score,
    image_files,
    inception_features,
    inception_scores,
    load_clip,
    load_inception,
)
from .scoring.protocols import PROTOCOLS
from .scoring.request import GROUPS, SCORES, Request, check, protocol_captions_of, size_of


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
    if request.curves or request.variety:
        pipeline = drawn.pipeline if drawn else load_model(request)
        for asked, measure in ((request.curves, measure_curves), (request.variety, measure_variety)):
            if asked:
                result |= measure(request, pipeline)
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for title, names in GROUPS.items():
        add_flags(parser.add_argument_group(title), Request, names)
    out = parser.add_argument_group("results")
    out.add_argument("--json", type=Path, help="where the scores go; they are printed in any case")
    out.add_argument("--compare", type=Path, nargs="+", metavar="JSON", help="set results side by side; draws nothing")
    out.add_argument("--markdown", type=Path, help="the comparison as tables; printed in any case")
    out.add_argument("--plots", type=Path, metavar="DIR", help="the comparison as plots")
    return parser


def main(arguments: list[str] | None = None) -> int:
    command = parser()
    options = given_flags(command, arguments)
    file, compared, markdown, plots = (options.pop(name) for name in ("json", "compare", "markdown", "plots"))
    try:
        if compared:
            results = report.read_results(compared)
        elif "model" not in options:
            command.error("--model says what to score; --compare sets results side by side")
        else:
            result = evaluate(Request(**{**options, "scores": tuple(options.get("scores", SCORES))}))
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
    except OSError as error:
        print(
            f"error: {error}. What is drawn is kept: make room, and run the same command again.",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        print("interrupted. What is drawn is kept: run the same command again.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
