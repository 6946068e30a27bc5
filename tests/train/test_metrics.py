"""Scores against closed forms, torch-fidelity's own command, and open_clip called by hand."""

import json
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from training.evaluate import evaluate, main
from training.scoring.metrics import frechet_distance, frechet_distance_clipped, frechet_of_gaussians, nearest_distances
from training.scoring.perceptual import (
    ReferenceSet,
    clip_score,
    image_files,
    inception_features,
    inception_scores,
    load_clip,
    load_inception,
    square,
)
from training.scoring.protocols import protocol_captions, read_captions
from training.scoring.request import Request

pytestmark = pytest.mark.train


def gaussian(count, dimensions=6, seed=0, scale=1.0, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, dimensions, generator=generator, dtype=torch.float64) * scale + shift


# --- Frechet ---------------------------------------------------------------------------------------------------------


def test_frechet_distance_of_given_gaussians_is_the_closed_form():
    rotation = torch.linalg.qr(gaussian(6, seed=1))[0]
    a, b = torch.tensor([1.0, 2, 3, 4, 5, 6]).double(), torch.tensor([6.0, 1, 1, 2, 0.5, 9]).double()
    means = gaussian(2, seed=2)
    covariances = [rotation @ torch.diag(stds**2) @ rotation.T for stds in (a, b)]
    found = frechet_of_gaussians(means[0], covariances[0], means[1], covariances[1])
    assert found == pytest.approx(((means[0] - means[1]).square().sum() + (a - b).square().sum()).item(), rel=1e-9)


def test_frechet_distance_of_gaussians_that_do_not_commute():
    """tr (S_a S_b)^1/2 of 2x2 matrices: its square is tr(S_a S_b) + 2 sqrt(det S_a det S_b)."""
    a, b = (torch.cov(gaussian(9, 2, seed).T) for seed in (3, 4))
    cross = ((a @ b).trace() + 2 * (a.det() * b.det()).sqrt()).sqrt()
    expected = (a.trace() + b.trace() - 2 * cross).item()
    assert frechet_of_gaussians(torch.zeros(2), a, torch.zeros(2), b) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_of_samples():
    a, b = (
        gaussian(200_000, 3, 0, torch.tensor([1.0, 2.0, 0.5])),
        gaussian(200_000, 3, 1, torch.tensor([1.0, 1.0, 1.5])),
    )
    b = b + torch.tensor([2.0, 0.0, 1.0])
    assert frechet_distance(a, b) == pytest.approx((4 + 1) + (1 + 1), rel=0.02)
    rotation = torch.linalg.qr(gaussian(3, 3))[0]
    assert frechet_distance(a @ rotation, b @ rotation) == pytest.approx(frechet_distance(a, b), rel=1e-8)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)
    with pytest.raises(ValueError, match="two pictures or more"):
        frechet_distance(a[:1], b)


def test_outliers_do_not_rule_the_clipped_distance():
    reference, a = gaussian(20_000), gaussian(4000, seed=1, scale=1.3, shift=0.5)
    rotation = torch.linalg.qr(gaussian(6, seed=5))[0] @ torch.diag(torch.arange(1.0, 7).double())
    reference, a = reference @ rotation, a @ rotation
    plain, clipped = frechet_distance(a, reference), frechet_distance_clipped(a, reference)
    assert clipped == pytest.approx(plain, rel=0.25)  # of what is no outlier the tails alone are lost
    spoilt = a.clone()
    spoilt[:20] *= 1000
    assert frechet_distance(spoilt, reference) > 100 * plain
    assert frechet_distance_clipped(spoilt, reference) == pytest.approx(clipped, rel=0.1)
    floor = frechet_distance_clipped(gaussian(4000, seed=2) @ rotation, reference)
    assert floor < 0.02 * clipped
    # Off the line on which two features agree, though each of them is in its range.
    line = gaussian(20_000, 1) * torch.ones(2) + 0.01 * gaussian(20_000, 2)
    astray = line[:4000].clone()
    astray[:400, 1] *= -1
    assert frechet_distance_clipped(astray, line) < 0.01 < 0.1 < frechet_distance(astray, line)


def test_nearest_distances():
    candidates = gaussian(500, 12)
    queries = torch.cat([candidates[7:8] + 0.1, candidates[3:4]])
    assert nearest_distances(queries, candidates, chunk=1).tolist() == pytest.approx([0.1, 0.0], abs=1e-6)
    by_hand = (gaussian(40, 12, 1)[:, None] - candidates[None]).square().mean(-1).sqrt().amin(1)
    assert torch.allclose(nearest_distances(gaussian(40, 12, 1), candidates), by_hand)


# --- Inception -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory):
    """torch-fidelity's network with random weights, whose features neither vanish nor explode."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Unloaded(FeatureExtractorInceptionV3):
        def load_state_dict(self, *_, **__):
            pass

    torch.manual_seed(0)
    empty = tmp_path_factory.mktemp("inception") / "empty.pth"
    torch.save({}, empty)
    network = Unloaded("inception-v3-compat", ["2048"], feature_extractor_weights_path=str(empty))
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
    file = empty.with_name("weights.pth")
    torch.save(network.state_dict(), file)
    return file


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two folders of 24 pictures of 96 px, the second of more contrast."""
    root = tmp_path_factory.mktemp("sets")
    rng = np.random.default_rng(0)
    for name, contrast in (("generated", 60), ("real", 90)):
        (root / name).mkdir()
        for index in range(24):
            coarse = Image.fromarray(np.clip(rng.normal(128, contrast, (6, 6, 3)), 0, 255).astype(np.uint8))
            coarse.resize((96, 96), Image.Resampling.BICUBIC).save(root / name / f"{index:03d}.png")
    return root / "generated", root / "real"


def torch_fidelity_command(generated, real, weights, layer):
    layers = [part for metric in ("fid", "kid", "prc") for part in (f"--feature-layer-{metric}", layer)]
    command = [
        sys.executable, "-m", "torch_fidelity.fidelity", "--cpu", "--json", "--silent", "--fid", "--kid", "--prc",
        "--input1", generated, "--input2", real, "--feature-extractor-weights-path", weights,
        "--kid-subset-size", "24", "--no-cache", "--save-cpu-ram",
        "--feature-extractor", "inception-v3-compat", *layers,
    ]  # fmt: skip
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout[result.stdout.index("{") :])


@pytest.mark.parametrize("layer", ["192", pytest.param("2048", marks=pytest.mark.slow)])
def test_scores_are_those_of_torch_fidelitys_command(folders, inception_file, layer):
    expected = torch_fidelity_command(*folders, inception_file, layer)
    network = load_inception(inception_file, layer=layer)
    generated, real = (inception_features(image_files(folder), network) for folder in folders)
    scores = inception_scores(generated, ReferenceSet.of(real))
    names = {
        "fid": "frechet_inception_distance",
        "kid": "kernel_inception_distance_mean",
        "kid_std": "kernel_inception_distance_std",
        "precision": "precision",
        "recall": "recall",
    }
    assert expected["frechet_inception_distance"] > 0
    for ours, theirs in names.items():
        assert scores[ours] == pytest.approx(expected[theirs], rel=1e-3, abs=1e-6), ours


def test_a_statistics_file_gives_the_same_scores(folders, inception_file, tmp_path):
    network = load_inception(inception_file, layer="64")
    generated, real = (inception_features(image_files(folder), network, 64) for folder in folders)
    reference = ReferenceSet.of(real)
    reference.save(tmp_path / "mine.npz")
    assert inception_scores(generated, ReferenceSet.read(tmp_path / "mine.npz")) == inception_scores(
        generated, reference
    )
    covariance = np.cov(real.numpy(), rowvar=False)
    np.savez(tmp_path / "theirs.npz", mu=real.double().mean(0).numpy(), sigma=covariance)
    scores = inception_scores(generated, ReferenceSet.read(tmp_path / "theirs.npz"))
    assert scores.keys() == {"fid"}
    assert scores["fid"] == pytest.approx(frechet_distance(generated, real), rel=1e-3)
    with pytest.raises(ValueError, match=r"wrong\.npz: expected an \.npz file with the arrays mu and sigma"):
        np.savez(tmp_path / "wrong.npz", mean=real.numpy())
        ReferenceSet.read(tmp_path / "wrong.npz")
    with pytest.raises(ValueError, match="as the reference has"):
        inception_scores(generated[:, :32], reference)


def test_pictures_are_cropped_to_the_centre_and_resized_by_lanczos():
    rng = np.random.default_rng(1)
    wide = Image.fromarray(rng.integers(0, 255, (64, 100, 3), dtype=np.uint8))
    expected = wide.crop((18, 0, 82, 64)).resize((32, 32), Image.LANCZOS)
    assert np.array_equal(np.array(square(wide, 32)), np.array(expected))
    assert np.array_equal(
        np.array(square(wide.rotate(90, expand=True), 64)), np.array(wide.rotate(90, expand=True))[18:82]
    )


class Evil:
    def __reduce__(self):
        return print, ("code ran",)


def test_inception_weights_that_are_none_are_one_clear_error(tmp_path, capsys):
    with pytest.raises(FileNotFoundError, match=r"(?s)gone\.pth is not there.*curl -L .*weights-inception"):
        load_inception(tmp_path / "gone.pth")
    (tmp_path / "evil.pth").write_bytes(pickle.dumps(Evil(), protocol=2))
    (tmp_path / "short.pth").write_bytes(b"PK\x03\x04 and no more")
    torch.save({"conv.weight": torch.zeros(3)}, tmp_path / "other.pth")
    for name in ("evil", "short", "other"):
        with pytest.raises(ValueError, match=rf"{name}\.pth: expected the state dict of torch-fidelity"):
            load_inception(tmp_path / f"{name}.pth")
    assert "code ran" not in capsys.readouterr().out


# --- CLIP ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A tiny CLIP of random weights, as a folder that open_clip reads."""
    import open_clip

    folder = tmp_path_factory.mktemp("clip")
    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
    }
    preprocess = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.25]}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    torch.manual_seed(0)
    model = open_clip.CLIP(config["embed_dim"], config["vision_cfg"], config["text_cfg"])
    torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")
    return folder


CAPTIONS = [f"a {size} {colour} ring" for size in ("small", "large", "blue") for colour in "abcdefgh"]


def test_clip_score_is_open_clips(folders, clip_folder):
    import open_clip

    name = f"local-dir:{clip_folder}"
    files = image_files(folders[0])
    found = clip_score(files, CAPTIONS, load_clip(name), batch_size=7)
    model, _, preprocess = open_clip.create_model_and_transforms(name)
    tokenizer, total = open_clip.get_tokenizer(name), 0.0
    with torch.no_grad():
        for file, caption in zip(files, CAPTIONS, strict=True):
            image = model.eval().encode_image(preprocess(Image.open(file).convert("RGB"))[None])
            total += 100 * torch.cosine_similarity(image, model.encode_text(tokenizer([caption]))).item()
    assert found == pytest.approx(total / len(files), rel=1e-4)
    assert found != pytest.approx(clip_score(files, CAPTIONS[::-1], load_clip(name)), rel=1e-4)


def test_clip_weights_that_are_missing_are_one_clear_error(clip_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        FileNotFoundError, match=r"(?s)not in the cache.*download_pretrained.*'ViT-g-14'.*--clip-weights"
    ):
        load_clip()
    with pytest.raises(ValueError, match="knows no weights 'nonsense' of ViT-B-32; it knows openai"):
        load_clip("ViT-B-32", "nonsense")
    with pytest.raises(ValueError, match="nothing is downloaded here"):
        load_clip("hf-hub:laion/CLIP-ViT-g-14-laion2B-s12B-b42K")
    with pytest.raises(ValueError, match="expected weights of open_clip's RN50, found"):
        load_clip("RN50", "openai", clip_folder / "open_clip_pytorch_model.bin")
    (clip_folder.parent / "empty").mkdir()
    with pytest.raises((ValueError, FileNotFoundError), match="empty"):
        load_clip(f"local-dir:{clip_folder.parent / 'empty'}")


# --- The protocols ---------------------------------------------------------------------------------------------------


def test_a_protocol_from_captions_to_tables(tiny_pipeline, folders, inception_file, clip_folder, tmp_path, capsys):
    def evaluate(*arguments):
        assert main([str(argument) for argument in arguments]) == 0, capsys.readouterr().err

    (tmp_path / "captions.txt").write_text("\n".join(CAPTIONS), encoding="utf-8")
    common = [
        "--protocol", "coco2017-5k", "--model", tiny_pipeline, "--captions", tmp_path / "captions.txt",
        "--num-images", 6, "--image-size", 64, "--batch-size", 2, "--inception-weights", inception_file,
        "--clip-model", f"local-dir:{clip_folder}", "--device", "cpu", "--sampler", "unipc", "--guidance-scale", 3,
    ]  # fmt: skip
    evaluate(
        *common, "--steps", 2, "--reference", folders[1], "--save-reference", tmp_path / "real.npz",
        "--output-dir", tmp_path / "two", "--json", tmp_path / "two.json",
    )  # fmt: skip
    scores = json.loads((tmp_path / "two.json").read_text())
    capsys.readouterr()
    evaluate(*common, "--steps", 2, "--reference", tmp_path / "real.npz", "--output-dir", tmp_path / "two")
    assert json.loads(capsys.readouterr().out) == scores
    assert scores["fid"] > 0 and 0 <= scores["precision"] <= 1 and -100 < scores["clip_score"] < 100
    assert (scores["images"], scores["reference_images"], scores["unet_evaluations_per_image"]) == (6, 24, 4)
    assert scores["image_size"] == [64, 64] and scores["seconds_per_image"] > 0
    # As the two libraries score the same pictures.
    files = image_files(tmp_path / "two")
    assert len(files) == 6 and all(Image.open(file).size == (64, 64) for file in files)
    network = load_inception(inception_file)
    features = [inception_features(some, network, 256) for some in (files, image_files(folders[1]))]
    assert scores["fid"] == pytest.approx(frechet_distance(*features), rel=1e-2)
    clip = load_clip(f"local-dir:{clip_folder}")
    assert scores["clip_score"] == pytest.approx(clip_score(files, CAPTIONS[:6], clip), rel=1e-5)

    (tmp_path / "three.json").write_text(json.dumps({**scores, "steps": 3, "fid": scores["fid"] / 2}))
    evaluate(
        "--compare", tmp_path / "two.json", tmp_path / "three.json",
        "--markdown", tmp_path / "table.md", "--plots", tmp_path / "plots",
    )  # fmt: skip
    text = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert f"**{scores['fid'] / 2:.2f}**" in text and f" {scores['fid']:.2f} " in text
    assert "FID (↓), 2 steps" in text and "CLIP score (↑), 3 steps" in text and "noisy" in text
    assert (tmp_path / "plots" / "steps.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("request_fields", "message"),
    [
        ({"protocol": "coco2014-30k"}, "zips/val2014.zip"),
        ({"protocol": "coco2017-5k"}, "zips/val2017.zip"),
        ({"protocol": "laion-10k"}, "LAION-Aesthetics 6"),
        ({"prompts": "captions.txt", "reference": "gone", "output_dir": "out"}, "gone is not there.*val2017.zip"),
        ({"prompts": "captions.txt", "reference": ".", "output_dir": "out"}, "holds 24 captions.*takes 5000"),
        ({"prompts": "captions.txt", "reference": "."}, "needs --output-dir"),
        (
            {"prompts": "captions.txt", "reference": ".", "output_dir": "out", "model": "renders"},
            "of --protocol embedded",
        ),
        ({"num_images": 1}, "must be 2 or more"),
        ({"sampler": "lcm", "steps": 51}, "do not fit"),
    ],
)
def test_what_a_protocol_lacks_is_one_clear_error(tiny_pipeline, inception_file, tmp_path, request_fields, message):
    (tmp_path / "captions.txt").write_text("\n".join(CAPTIONS), encoding="utf-8")
    paths = {
        key: tmp_path / request_fields[key] for key in ("prompts", "reference", "output_dir") if key in request_fields
    }
    fields = {"protocol": "coco2017-5k", "model": str(tiny_pipeline), "scores": ("inception",)}
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        evaluate(Request(**{**fields, "inception_weights": inception_file, **request_fields, **paths}))
    assert not (tmp_path / "out").exists()


def test_captions_of_coco_are_one_a_picture_and_always_the_same(tmp_path):
    file = tmp_path / "captions.json"
    entries = [{"id": 100 - i, "image_id": i // 2, "caption": f" picture {i // 2}\n text {i % 2}"} for i in range(40)]
    file.write_text(json.dumps({"annotations": entries}))
    captions = read_captions(file)
    assert sorted(captions) == sorted(f"picture {i} text 1" for i in range(20))  # the lower id is the second's
    file.write_text(json.dumps({"annotations": entries[::-1]}))
    assert read_captions(file) == captions != sorted(captions)
    trial = protocol_captions("coco2014-30k", file, 12)
    assert trial == captions[:12]
    with pytest.raises(ValueError, match="holds 20 captions, and --protocol laion-10k takes 10000 for 30000"):
        protocol_captions("laion-10k", file, None)
    file.write_text('{"annotations": [{"id": 1}]}')
    with pytest.raises(ValueError, match=r"captions\.json: expected a JSON list of captions, or COCO"):
        read_captions(file)


def test_laion_draws_each_caption_three_times(tmp_path):
    file = tmp_path / "captions.txt"
    file.write_text("\n".join(f"caption {i}" for i in range(10_500)))
    captions = protocol_captions("laion-10k", file, None)
    assert len(captions) == 30_000 and captions[:10_000] == captions[20_000:] and len(set(captions)) == 10_000
