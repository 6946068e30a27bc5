"""Generation is a matter of prompt and seed, can be stopped and shared, and scores are what they say."""

import json
import pickle
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, LCMScheduler, UNet2DConditionModel
from diffusers import UniPCMultistepScheduler as UniPC
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image
from safetensors.torch import save_file

from splam_core import guidance_embedding, lora_to_kohya, renoise_generator
from training.evaluate import evaluate, main
from training.models.load import load_pipeline
from training.models.sampling import generate
from training.pictures import to_tensor
from training.scenes.emoji import scene
from training.scoring import perceptual, report
from training.scoring.drawing import draw, load_model, settings
from training.scoring.embedded_scores import EmbeddedScores, drawn_captions, rendered
from training.scoring.pictures import read_picture
from training.scoring.request import Request
from training.scoring.variety import spread

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.train


@torch.no_grad()
def test_the_tiny_unet_sees_its_timestep(tiny_pipeline):
    """Without it the tests of samplers and curves would be blind to half of what can go wrong."""
    unet = load_pipeline(tiny_pipeline).unet
    x, embeds = torch.randn(1, 4, 16, 16), torch.zeros(1, 77, 32)
    early, late = (unet(x, t, embeds).sample for t in (19, 999))
    assert (early - late).abs().max() > 0.01 * early.std()


def command(*arguments):
    line = [sys.executable, str(ROOT / "training" / "evaluate.py"), "--protocol", "embedded", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, encoding="utf-8")


@torch.no_grad()
def test_a_picture_is_its_prompts_and_seeds_and_not_its_batchs(tiny_pipeline):
    pipeline = load_pipeline(tiny_pipeline)
    prompts = [
        "a doughnut on a red background",
        "a yellow star on a blue background",
        "a red heart on a green background",
    ]
    together = generate(pipeline, prompts, [3, 4, 5], steps=3)
    alone = generate(pipeline, prompts[1:2], [4], steps=3)
    assert (together[1:2] - alone).abs().max() < 1e-4
    assert (generate(pipeline, prompts, [3, 4, 5], steps=3, batch_size=2) - together).abs().max() < 1e-4


@torch.no_grad()
def test_splam_is_diffusers_lcm_scheduler(tiny_pipeline):
    pipeline = load_pipeline(tiny_pipeline)
    ours = generate(pipeline, ["a doughnut on a red background"], [7], steps=4)
    scheduler = LCMScheduler.from_config(DDIMScheduler.from_pretrained(tiny_pipeline, subfolder="scheduler").config)
    scheduler.set_timesteps(4)
    embeds, again = pipeline.encode(["a doughnut on a red background"]), renoise_generator(7)
    x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(7))
    for t in scheduler.timesteps:
        x = scheduler.step(pipeline.unet(x, t, **embeds).sample, t, x, generator=again).prev_sample
    assert (ours - x).abs().max() / x.std() < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_ddim_is_diffusers(tiny_pipeline, guidance_scale):
    pipeline = load_pipeline(tiny_pipeline)
    ours = generate(pipeline, ["a doughnut on a red background"], [7], "ddim", 10, guidance_scale)
    scheduler = DDIMScheduler.from_pretrained(tiny_pipeline, subfolder="scheduler")
    scheduler.set_timesteps(10)
    embeds, nothing = pipeline.encode(["a doughnut on a red background"]), pipeline.encode([""])
    x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(7))
    for t in scheduler.timesteps:
        cond, uncond = pipeline.unet(x, t, **embeds).sample, pipeline.unet(x, t, **nothing).sample
        x = scheduler.step(uncond + guidance_scale * (cond - uncond), t, x).prev_sample
    assert (ours - x).abs().max() / x.std() < 1e-4


@torch.no_grad()
@pytest.mark.parametrize(
    ("sampler", "scheduler"),
    [
        ("dpm-solver++", lambda config: DPMSolverMultistepScheduler.from_config(config, algorithm_type="dpmsolver++")),
        ("unipc", UniPC.from_config),
    ],
)
def test_fast_solvers_are_diffusers(tiny_pipeline, sampler, scheduler):
    pipeline = load_pipeline(tiny_pipeline)
    prompts = ["a doughnut on a red background", "a yellow star on a blue background"]
    ours = generate(pipeline, prompts, [7, 8], sampler, 6, 3.0, batch_size=1)
    scheduler = scheduler(DDIMScheduler.from_pretrained(tiny_pipeline, subfolder="scheduler").config)
    for index, prompt in enumerate(prompts):
        scheduler.set_timesteps(6)
        embeds, nothing = pipeline.encode([prompt]), pipeline.encode([""])
        x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(7 + index))
        for t in scheduler.timesteps:
            cond, uncond = pipeline.unet(x, t, **embeds).sample, pipeline.unet(x, t, **nothing).sample
            x = scheduler.step(uncond + 3 * (cond - uncond), t, x).prev_sample
        assert (ours[index : index + 1] - x).abs().max() / x.std() < 1e-4


def test_lcm_by_diffusers_is_the_few_step_sampler(tiny_pipeline):
    pipeline = load_pipeline(tiny_pipeline)
    arguments = (["a doughnut on a red background", "a yellow star on a blue background"], [7, 8])
    splam, lcm = generate(pipeline, *arguments, "splam", 3), generate(pipeline, *arguments, "lcm", 3)
    assert (splam - lcm).abs().max() / splam.std() < 1e-4


def test_every_sampler_draws_the_size_asked_for(tiny_pipeline):
    pipeline = load_pipeline(tiny_pipeline)
    for sampler in ("splam", "ddim", "dpm-solver++", "unipc", "lcm"):
        assert generate(pipeline, ["a star"], [1], sampler, 1, size=(64, 96)).shape == (1, 4, 8, 12)
    with pytest.raises(ValueError, match="multiples of 8 px, got 60 x 64"):
        generate(pipeline, ["a star"], [1], size=(60, 64))


# --- Pictures on disk ------------------------------------------------------------------------------------------------


def request(model, **fields):
    return Request(**{"model": str(model), "steps": 1, "num_images": 7, "batch_size": 3, "seed": 2, **fields})


def pictures(folder):
    return {file.name: file.read_bytes() for file in sorted(folder.glob("*.png"))}


@pytest.fixture(scope="module")
def whole(tiny_pipeline, tmp_path_factory):
    """An undisturbed run's folder."""
    folder = tmp_path_factory.mktemp("whole")
    drawn = draw(request(tiny_pipeline, output_dir=folder), drawn_captions(2, 7))
    assert drawn.complete and drawn.seconds_per_image > 0
    return folder


def test_pictures_in_memory_are_those_on_disk(tiny_pipeline, whole):
    assert list(pictures(whole)) == [f"{index:06d}.png" for index in range(7)]
    memory = draw(request(tiny_pipeline), drawn_captions(2, 7)).read()
    assert memory.dtype == torch.uint8 and memory.shape == (7, 3, 128, 128)
    assert all(torch.equal(memory[i], read_picture(whole / f"{i:06d}.png")) for i in range(7))
    # Each is what its own seed and caption give, wherever in a batch it was drawn.
    pipeline, captions = load_pipeline(tiny_pipeline), drawn_captions(2, 7)
    for i in (1, 4, 6):
        alone = pipeline.decode(generate(pipeline, [str(captions[i])], [2 * 1_000_003 + i], steps=1))[0]
        assert ((alone + 1) * 127.5 - memory[i]).abs().max() < 1.01


def test_a_stopped_run_goes_on_and_broken_pictures_are_made_again(tiny_pipeline, whole, tmp_path):
    from training.scoring.pictures import PictureFolder

    class Stopped(Exception):
        pass

    def stop(self, index, picture, save=PictureFolder.save):
        if index == 5:
            raise Stopped
        save(self, index, picture)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(PictureFolder, "save", stop)
        draw(request(tiny_pipeline, output_dir=tmp_path), drawn_captions(2, 7))
    assert len(pictures(tmp_path)) == 5
    (tmp_path / "000000.png").write_bytes((whole / "000000.png").read_bytes()[:-20])  # cut off
    spoilt = bytearray((whole / "000001.png").read_bytes())
    spoilt[len(spoilt) // 2] ^= 0xFF
    (tmp_path / "000001.png").write_bytes(spoilt)
    (tmp_path / "000002.png").write_bytes(b"")
    kept = (tmp_path / "000004.png").stat().st_mtime_ns
    draw(request(tiny_pipeline, output_dir=tmp_path), drawn_captions(2, 7))
    assert pictures(tmp_path) == pictures(whole)
    assert (tmp_path / "000004.png").stat().st_mtime_ns == kept
    assert not list(tmp_path.glob("*.tmp"))


def test_shares_of_two_processes_make_the_whole(tiny_pipeline, whole, tmp_path, monkeypatch):
    captions = drawn_captions(2, 7)
    assert not draw(request(tiny_pipeline, output_dir=tmp_path, shard=(1, 2)), captions).complete
    assert list(pictures(tmp_path)) == ["000003.png", "000004.png", "000005.png"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")  # which waits for rank 1, that is done
    drawn = draw(request(tiny_pipeline, output_dir=tmp_path), captions)
    assert drawn.complete and pictures(tmp_path) == pictures(whole) and len(drawn.files()) == 7
    with pytest.raises(ValueError, match="several processes need --output-dir"):
        draw(request(tiny_pipeline), captions)


def test_waiting_has_an_end(tmp_path):
    from training.scoring.pictures import PictureFolder

    folder = PictureFolder(tmp_path, {})
    folder.save(0, torch.zeros(3, 8, 8, dtype=torch.uint8))
    folder.path(2).write_bytes(b"half a picture")
    with pytest.raises(TimeoutError, match=r"2 of 3 pictures are missing, 000001\.png first"):
        folder.wait(3, patience=0.05, poll=0.01)


@pytest.mark.parametrize(
    "change", [{"steps": 2}, {"seed": 3}, {"guidance_scale": 2.0}, {"sampler": "lcm"}, {"model": ""}]
)
def test_a_folder_of_other_settings_is_refused(tiny_pipeline, whole, tmp_path_factory, change):
    before = pictures(whole)
    if "model" in change:  # another model under any name
        pipeline = load_pipeline(tiny_pipeline)
        pipeline.unet.conv_out.bias.data += 1
        folder = tmp_path_factory.mktemp("other") / "unet"
        pipeline.unet.save_pretrained(folder)
        change = {"model": str(folder)}
    with pytest.raises(ValueError, match="made with other settings"):
        draw(request(**{"model": tiny_pipeline, "output_dir": whole, **change}), drawn_captions(2, 7))
    assert pictures(whole) == before


def test_pictures_depend_on_the_second_text_encoder_too(tiny_xl):
    pipeline = load_pipeline(tiny_xl)
    before = settings(request(tiny_xl), pipeline)
    pipeline.text_encoder_2.text_projection.weight.data += 1
    assert settings(request(tiny_xl), pipeline) != before


def test_a_folder_of_strange_pictures_is_refused(tiny_pipeline, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "holiday.png")
    with pytest.raises(ValueError, match=r"holds pictures and no settings\.json"):
        draw(request(tiny_pipeline, output_dir=tmp_path), drawn_captions(2, 7))


# --- Kinds of model --------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("names", ["peft", "kohya", "ldm"])
def test_a_merged_lora_is_pefts(tiny_pipeline, tmp_path, names):
    adapted, base = load_pipeline(tiny_pipeline).unet, load_pipeline(tiny_pipeline)
    adapted.add_adapter(LoraConfig(r=3, lora_alpha=6, target_modules=["to_q", "conv1", "proj_in", "linear_1"]))
    generator = torch.Generator().manual_seed(0)
    for name, weight in adapted.named_parameters():
        if "lora_" in name:
            weight.data = 0.1 * torch.randn(weight.shape, generator=generator)
    lora = {key: weight.contiguous() for key, weight in get_peft_model_state_dict(adapted).items()}
    if names != "peft":
        lora = lora_to_kohya(lora, alpha=6)
        bias = 0.3 * torch.randn(adapted.time_embedding.linear_1.bias.shape, generator=generator)
        lora["lora_unet_time_embedding_linear_1.diff_b"] = bias
        adapted.time_embedding.linear_1.base_layer.bias += bias
        norm = 0.3 * torch.randn(adapted.conv_norm_out.weight.shape, generator=generator)
        lora["lora_unet_conv_norm_out.diff"] = norm
        adapted.conv_norm_out.weight += norm
    if names == "ldm":  # as SDXL's are named
        pairs = {"mid_block_resnets_0_conv1": "middle_block_0_in_layers_2", "time_embedding_linear_1": "time_embed_0"}
        lora = {next((k.replace(a, b) for a, b in pairs.items() if a in k), k): v for k, v in lora.items()}
        assert any("middle_block" in key for key in lora)
    file = tmp_path / "pytorch_lora_weights.safetensors"
    save_file(lora, file)
    # peft's names say no alpha: then it is the rank, half of ours.
    merged = load_model(request(tiny_pipeline, lora=tmp_path, lora_scale=2.0 if names == "peft" else 1.0)).unet
    x, t, embeds = torch.randn(2, 4, 16, 16, generator=generator), torch.tensor([999, 19]), base.encode(["a star", ""])
    expected, plain = adapted(x, t, **embeds).sample, base.unet(x, t, **embeds).sample
    assert (merged(x, t, **embeds).sample - expected).abs().max() < 1e-4 * expected.std()
    assert (plain - expected).abs().max() > 0.05 * expected.std()
    tau = torch.randn(2, 32, generator=generator)
    assert torch.allclose(merged.time_embedding(tau), adapted.time_embedding(tau), atol=1e-5)


def test_a_lora_that_does_not_fit_is_one_clear_error(tiny_pipeline, tmp_path):
    down, up, name = torch.zeros(2, 8), torch.zeros(8, 2), "lora_unet_time_embedding_linear_1"
    cases = {
        "no module 'nowhere'": {"lora_unet_nowhere.lora_down.weight": down, "lora_unet_nowhere.lora_up.weight": up},
        "belongs to another model": {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up},
        "incomplete": {f"{name}.lora_down.weight": down},
        "only low-rank changes of a UNet": {"lora_te_layer.lora_down.weight": down},
    }
    for message, lora in cases.items():
        save_file(lora, tmp_path / "bad.safetensors")
        with pytest.raises(ValueError, match=rf"bad\.safetensors: .*{message}"):
            load_model(request(tiny_pipeline, lora=tmp_path / "bad.safetensors"))
    with pytest.raises(FileNotFoundError, match="holds no LoRA"):
        load_model(request(tiny_pipeline, lora=tmp_path / "gone"))


@torch.no_grad()
def test_a_projection_in_the_checkpoint_is_told_its_constant(tiny_pipeline, tmp_path):
    plain = load_pipeline(tiny_pipeline)
    unet = UNet2DConditionModel.from_config({**plain.unet.config, "time_cond_proj_dim": 256})
    weights = plain.unet.state_dict()
    weights["time_embedding.cond_proj.weight"] = 0.2 * torch.randn(unet.time_embedding.cond_proj.weight.shape)
    unet.load_state_dict(weights)
    unet.save_pretrained(tmp_path)
    x, t, embeds = torch.randn(1, 4, 16, 16), torch.tensor([499]), plain.encode(["a star"])
    for gamma_embedding, w in (("splam", 0.0), ("8.5", 7.5)):  # LCM's w is guidance_scale - 1
        told = unet(x, t, **embeds, timestep_cond=guidance_embedding(torch.tensor([w]))).sample
        loaded = load_model(request(tmp_path, gamma_embedding=gamma_embedding)).unet
        assert (loaded(x, t, **embeds).sample - told).abs().max() < 1e-4 * told.std()
        assert (plain.unet(x, t, **embeds).sample - told).abs().max() > 0.01 * told.std()
    zero = load_model(request(tmp_path, gamma_embedding="zero")).unet
    assert torch.equal(zero(x, t, **embeds).sample, plain.unet(x, t, **embeds).sample)
    with pytest.raises(ValueError, match="splam, zero or a guidance_scale, got 'much'"):
        load_model(request(tmp_path, gamma_embedding="much"))


# --- The embedded protocol -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scores():
    return EmbeddedScores(drawn_captions(5, 96), training_scenes=160)


def as_uint8(images):
    return ((images + 1) * 127.5).round().byte()


def test_copies_of_training_scenes_are_found(scores):
    fresh = scores(as_uint8(rendered(scores.captions, 77)))
    assert 0.9 < fresh["nearest_training_ratio_features"] < 1.1 and 0.8 < fresh["nearest_training_ratio_pixels"] < 1.2
    assert fresh["nearest_training_copies_features"] < 0.08 and fresh["nearest_training_copies_pixels"] < 0.08
    scenes = torch.stack([to_tensor(scene(1, index)[0]) for index in range(96)])  # of distill.py's pool at --seed 0
    for copies in (scenes, torch.roll(scenes, 1, dims=3)):  # by a pixel: copies need not be exact
        found = scores(as_uint8(copies))
        for space in ("features", "pixels"):
            assert found[f"nearest_training_ratio_{space}"] < 0.5
            assert found[f"nearest_training_copies_{space}"] > 0.8


def test_scores_of_renders_and_of_what_is_none(scores):
    renders = as_uint8(rendered(scores.captions, 77))
    fresh = scores(renders)
    assert fresh["attribute_accuracy"] > 0.95 and fresh["attribute_accuracy_two_objects"] > 0.95
    assert 0.1 < fresh["frechet_distance"] / fresh["frechet_distance_floor"] < 10
    grey = renders.clone()
    grey[:48] = 128
    half = scores(grey)
    assert half["attribute_accuracy"] == pytest.approx(0.5, abs=0.03)
    assert half["frechet_distance"] > 10 * fresh["frechet_distance"]
    swapped = renders.roll(2, 0)  # pictures of other captions, of as many objects
    assert scores(swapped)["attribute_accuracy"] < 0.1


def test_the_command_scores_the_shipped_student(tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a yellow star on a red background\n\na doughnut to the left of a red heart\n", encoding="utf-8")
    result = command(
        "--model", "embedded-student", "--sampler", "splam", "--steps", 2, "--num-images", 6, "--seed", 3,
        "--prompts", prompts, "--output-dir", tmp_path / "pictures", "--json", tmp_path / "scores.json",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["images"] == 6 and scores["seed"] == 3 and scores["unet_evaluations_per_image"] == 2
    assert 0 <= scores["attribute_accuracy"] <= 1 and scores["frechet_distance"] > 0
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 6
    assert scores["frechet_distance_clipped"] > 0 and scores["seconds_per_image"] > 0


def test_curves_of_the_shipped_models(tmp_path):
    """The undistilled teacher is farther from its own paths than its student, at every timestep of sampling."""
    common = {"protocol": "embedded", "num_images": 0, "curves": 2}
    student = evaluate(Request("embedded-student", **common))
    teacher = evaluate(Request("embedded-teacher", guidance_scale=3.0, label="undistilled", **common))
    assert list(student["endpoint_error"]) == ["999", "759", "499", "259"] and "frechet_distance" not in student
    assert list(student["delta"]) == [str(t) for t in range(999, 100, -20)]
    assert all(student["endpoint_error"][t] < teacher["endpoint_error"][t] for t in ("999", "759", "499"))
    text = report.markdown([student, teacher])
    assert f"**{student['endpoint_error']['999']:.4f}** |" in text and "| undistilled |" in text
    assert [plot.name for plot in report.save_plots([student, teacher], tmp_path)] == ["curves.png"]


def test_spread_is_the_mean_distance_of_pairs_within_a_prompt():
    """By hand: grey pictures of the levels 0, 0.5 and 1; those of two prompts are not compared with one another."""
    levels = {"a": (0.0, 0.5, 1.0), "b": (-1.0, -1.0, -1.0)}

    def grey(prompts, seeds):
        return torch.stack(
            [torch.full((3, 64, 64), levels[one][seed]) for one, seed in zip(prompts, seeds, strict=True)]
        )

    assert spread(grey, ["a"], range(3)) == {"spread": pytest.approx((0.5 + 0.5 + 1.0) / 3)}
    assert spread(grey, ["a", "b"], range(3))["spread"] == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match="two seeds or more of each prompt, got 1"):
        spread(grey, ["a"], range(1))


def test_variety_stands_in_results_and_tables(tiny_pipeline, tmp_path):
    """In the embedded protocol with the judge's features; of any model in pixels, beside the teacher that was named."""
    common = {"num_images": 0, "variety": 2, "steps": 1}
    ours = evaluate(Request("embedded-student", **common))
    names = ("spread", "spread_features", "spread_teacher", "spread_features_teacher")
    assert all(ours[name] > 0 for name in names) and ours["variety_seeds"] == 2
    text = report.markdown([ours])
    assert all(f" {ours[name]:.3f} |" in text for name in names) and "spread over seeds, pixels" in text
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(f"a picture of {number}" for number in range(8)), encoding="utf-8")
    common |= {"protocol": "coco2017-5k", "prompts": prompts, "image_size": 64}
    tiny = evaluate(Request(str(tiny_pipeline), **common))
    assert tiny["spread"] > 0 and not {"spread_features", "spread_teacher"} & tiny.keys()
    tiny = evaluate(Request(str(tiny_pipeline), teacher=str(tiny_pipeline), **common))
    assert tiny["spread_teacher"] > 0 and "spread_features_teacher" not in tiny


def test_the_published_results_can_be_compared(tmp_path, capsys):
    published = ROOT / "docs" / "results" / "embedded.json"
    assert main(["--compare", str(published), "--plots", str(tmp_path)]) == 0
    text, results = capsys.readouterr().out, json.loads(published.read_text(encoding="utf-8"))
    for name, result in results.items():
        line = next(line for line in text.splitlines() if line.startswith(f"| {name} |"))
        assert f"{100 * result['attribute_accuracy']:.1f}" in line and f"{result['frechet_distance']:.3f}" in line
    (tmp_path / "bad.json").write_text('[{"fid": 3}]')
    assert main(["--compare", str(tmp_path / "bad.json")]) == 1
    assert "bad.json: expected scores" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "nowhere"], "holds no model"),
        (["--model", "embedded-student", "--steps", "51"], "do not fit"),
        (["--model", "embedded-student", "--prompts", __file__], "line 1: "),
        (["--model", "embedded-student", "--variety", "1"], "--variety must be 2 seeds or more, got 1"),
        (["--model", "renders", "--variety"], "without --curves and without --variety"),
    ],
)
def test_bad_input_is_one_clear_error(arguments, message, capsys):
    assert main(["--num-images", "2", *arguments]) == 1
    assert message in capsys.readouterr().err


def test_what_worker_processes_are_sent_can_be_pickled():
    """Where processes are spawned (Windows, macOS, Python 3.14), a local function cannot."""
    prepare = pickle.loads(pickle.dumps(partial(perceptual._pixels, size=4)))
    assert prepare(Image.new("RGB", (8, 6))).shape == (3, 4, 4)
