"""What a file says of itself reaches the sampler, and the host's own savers and loaders; fp8 with factors; names."""

import json
import shutil

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load, load_file, save_file
from transformers import CLIPTokenizer

from harness.graphs import save_latent, text_to_image
from harness.reference import SCHEDULER, few_step, node_noises, relative_error
from harness.server import ServerError
from splam_core import diffusers_to_ldm
from splam_core.quantization import dequantized
from splam_core.text_encoders import text_encoders_to_ldm

pytestmark = pytest.mark.comfyui
PROMPT, SEED = "a yellow star above a doughnut", 31
UNET_FILE = "diffusion_pytorch_model.safetensors"
E4M3 = torch.float8_e4m3fn
V = {"prediction_type": "v_prediction"}


@pytest.fixture
def sample(server):
    def run(model_name: str, **sampling) -> torch.Tensor:
        graph = save_latent(text_to_image(model_name, PROMPT, **{"seed": SEED, "steps": 3} | sampling))
        (file,) = server.files(server.run(graph))
        return load(file)["latent_tensor"] * 0.31

    return run


@pytest.fixture(scope="module")
def tokens(comfyui):
    return CLIPTokenizer.from_pretrained(comfyui / "comfy" / "sd1_tokenizer")(PROMPT)["input_ids"]


def put(server, kind: str, name: str, weights: dict, metadata: dict | None = None) -> str:
    folder = server.folder / "models" / kind
    folder.mkdir(exist_ok=True)
    save_file({key: weight.contiguous() for key, weight in weights.items()}, folder / name, metadata)
    return name if kind == "checkpoints" else f"{kind}/{name}"


def single_file(pipelines, name: str) -> tuple[dict, dict]:
    """(weights of a narrow pipeline under LDM names, its configurations as metadata but for the scheduler's)."""
    folder = pipelines.folder / name
    unet, vae = (load_file(folder / part / UNET_FILE) for part in ("unet", "vae"))
    text = load_file(folder / "text_encoder" / "model.safetensors")
    parts = ("unet", "vae", "text_encoder")
    metadata = {f"splam.{part}": (folder / part / "config.json").read_text() for part in parts}
    return diffusers_to_ldm(unet, vae) | text_encoders_to_ldm([text], "sd1"), metadata


def expected_latents(reference, tokens, **scheduler):
    noise, fresh = node_noises((1, 4, 16, 16), SEED)
    return few_step(reference.unet, SCHEDULER | scheduler, reference.embed(tokens), noise, fresh, 3)


# ---- prediction type and zero terminal SNR -------------------------------------------------------------------------


@pytest.mark.parametrize("named", ["key", "key against metadata", "predict_key"])
def test_a_v_model_by_every_name(named, server, pipelines, tokens, sample):
    weights, metadata = single_file(pipelines, "v")
    if named.startswith("key"):
        weights["v_pred"] = torch.zeros(0)
    if named == "key against metadata":
        metadata |= {"modelspec.prediction_type": "epsilon"}
    if named == "predict_key":
        metadata |= {"modelspec.predict_key": "v"}
    logged = server.listen()
    found = sample(put(server, "checkpoints", f"v {named}.safetensors", weights, metadata))
    assert relative_error(found, expected_latents(pipelines.reference("v"), tokens, **V)) < 1e-4
    log = logged()
    said = "the key 'v_pred' says v_prediction, its metadata 'modelspec.prediction_type' epsilon; the first is believed"
    assert log.count(said) == (named == "key against metadata")


@pytest.mark.parametrize("where", ["folder", "file", "unet"])
def test_zero_terminal_snr_is_diffusers(where, server, pipelines, tokens, sample):
    """diffusers' last alpha is 0, the host's 2.2e-4: so far apart may they be."""
    zero = V | {"rescale_betas_zero_snr": True}
    if where == "folder":
        folder = pipelines.folder / "v-zero"
        shutil.copytree(pipelines.folder / "v", folder, dirs_exist_ok=True)
        (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER | zero))
        name = "diffusers/v-zero"
    weights, metadata = single_file(pipelines, "v")
    weights |= {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}
    if where == "file":
        name = put(server, "checkpoints", "v-zero.safetensors", weights, metadata)
    if where == "unet":
        prefix = "model.diffusion_model."
        unet = {k.removeprefix(prefix): w for k, w in weights.items() if k.startswith(prefix) or "." not in k}
        unet_name = put(server, "diffusion_models", "v-zero-unet.safetensors", unet, metadata)
        graph = save_latent(text_to_image("diffusers/v", PROMPT, seed=SEED, steps=3))
        graph["unet"] = {"class_type": "SPLAMLoader", "inputs": {"model_name": unet_name}}
        graph["sampled"]["inputs"]["model"] = ["unet", 0]
        (file,) = server.files(server.run(graph))
        found = load(file)["latent_tensor"] * 0.31
    else:
        found = sample(name)
    expected = expected_latents(pipelines.reference("v"), tokens, **zero)
    assert relative_error(found, expected) < 1e-3
    assert relative_error(expected_latents(pipelines.reference("v"), tokens, **V), expected) > 1e-2


@pytest.mark.parametrize("key", ["edm_mean", "edm_vpred.sigma_max"])
def test_models_of_continuous_noise_levels_are_refused(key, server, pipelines, sample):
    weights, metadata = single_file(pipelines, "plain")
    weights |= {key: torch.ones(1), "edm_std": torch.ones(1)}
    name = put(server, "checkpoints", f"{key}.safetensors", weights, metadata)
    with pytest.raises(ServerError, match=r"checkpoints.edm_.*: the key 'edm_\w+.*continuous noise levels"):
        sample(name)


def test_a_vae_whose_latents_have_a_mean_is_refused(server, pipelines, sample):
    folder = server.folder / "models" / "diffusers" / "edm"
    shutil.copytree(pipelines.folder / "plain", folder)
    file = folder / "vae" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "latents_mean": [0.1] * 4}))
    with pytest.raises(ServerError, match=r"diffusers.edm: the VAE's config.json has latents_mean"):
        sample("diffusers/edm")


@pytest.fixture(scope="module")
def xl_weights():
    """A UNet that the host takes for an SDXL (Segmind's Vega), at 320 channels throughout; under LDM names."""
    torch.manual_seed(4)
    unet = UNet2DConditionModel(
        block_out_channels=(320, 320, 320),
        layers_per_block=2,
        cross_attention_dim=2048,
        attention_head_dim=5,
        transformer_layers_per_block=(1, 1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    )
    return diffusers_to_ldm({key: weight.half() for key, weight in unet.state_dict().items()})


@pytest.fixture
def sample_xl(server):
    def run(model_name: str) -> torch.Tensor:
        inputs = {"model": ["model", 0], "positive": ["prompt", 0], "latent_image": ["latent", 0]}
        graph = {
            "model": {"class_type": "SPLAMLoader", "inputs": {"model_name": model_name}},
            "prompt": {"class_type": "TestConditioning", "inputs": {"width": 2048, "seed": 4, "pooled": 1280}},
            "latent": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}},
            "sampled": {"class_type": "SPLAMSampler", "inputs": inputs | {"seed": SEED, "steps": 1, "denoise": 1.0}},
        }
        (file,) = server.files(server.run(save_latent(graph)))
        return load(file)["latent_tensor"]

    return run


def test_a_scale_of_latents_that_the_host_does_not_know(server, xl_weights, sample_xl):
    """It took its own for shapes that it knows, whatever the file said."""
    said = put(server, "checkpoints", "said.safetensors", xl_weights, {"splam.vae": '{"scaling_factor": 0.31}'})
    found = sample_xl(said) * 0.31
    open_ = put(server, "checkpoints", "open.safetensors", xl_weights)
    assert relative_error(found, sample_xl(open_) * 0.13025) < 1e-5
    for name in (said, open_):
        (server.folder / "models" / "checkpoints" / name).unlink()


@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize("zero", [False, True])
def test_what_the_host_saves_of_a_v_model_is_one(zero, patched, server, xl_weights):
    """Said in metadata alone, which the host does not read; saved by ModelSave, loaded by both loaders."""
    folder = server.folder / "models" / "checkpoints"
    scheduler = json.dumps(SCHEDULER | V | {"rescale_betas_zero_snr": zero})
    name = put(server, "checkpoints", "said.safetensors", xl_weights, {"splam.scheduler": scheduler})

    def latents(loader: str, name: str, save: bool = False) -> torch.Tensor:
        inputs = {"model_name": name} if loader == "SPLAMLoader" else {"ckpt_name": name}
        prompt = {"class_type": "TestConditioning", "inputs": {"width": 2048, "seed": 4, "pooled": 1280}}
        wires = {key: [node, 0] for key, node in (("model", "model"), ("positive", "prompt"), ("negative", "prompt"))}
        numbers = {"seed": SEED, "steps": 2, "cfg": 1.0, "denoise": 1.0}
        names = {"sampler_name": "euler", "scheduler": "normal", "latent_image": ["latent", 0]}
        graph = {
            "model": {"class_type": loader, "inputs": inputs},
            "prompt": prompt,
            "latent": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}},
            "sampled": {"class_type": "KSampler", "inputs": wires | numbers | names},
        }
        if save:
            patch = {"model": ["model", 0], "gamma_conditioning": "none"}
            graph["patch"] = {"class_type": "SPLAMModelPatch", "inputs": patch}
            saved = {"model": ["patch" if patched else "model", 0], "filename_prefix": "saved"}
            graph["save"] = {"class_type": "ModelSave", "inputs": saved}
        (file,) = server.files(server.run(save_latent(graph)))
        return load(file)["latent_tensor"]

    before, expected = latents("SPLAMLoader", name, save=True), {"v_pred", "ztsnr"} if zero else {"v_pred"}
    for loader in ("SPLAMLoader", "CheckpointLoaderSimple"):  # the second saves again what it loads
        (saved,) = (server.folder / "output").rglob("saved_*.safetensors")
        shutil.move(saved, folder / "saved.safetensors")
        assert {"v_pred", "ztsnr"} & load_file(folder / "saved.safetensors").keys() == expected
        assert relative_error(latents(loader, "saved.safetensors", save=True), before) < 1e-4
    next((server.folder / "output").rglob("saved_*.safetensors")).unlink()
    (folder / "saved.safetensors").unlink()


# ---- fp8 with factors ----------------------------------------------------------------------------------------------


def scaled_fp8(weights: dict, naming: str) -> tuple[dict, dict]:
    """(the weights with every UNet matrix as fp8 codes and a factor, metadata), in ComfyUI's old or later naming."""
    scaled, layers = {}, {}
    for key, weight in weights.items():
        layer = key.removesuffix(".weight")
        if weight.ndim != 2 or layer == key or "cond_stage_model" in key or "first_stage_model" in key:
            scaled[key] = weight
            continue
        factor = weight.float().abs().max() / 400
        scaled[key] = (weight.float() / factor).to(E4M3)
        scaled[f"{layer}.{'scale_weight' if naming == 'scale_weight' else 'weight_scale'}"] = factor
        description = {"format": "float8_e4m3fn"}
        layers[layer.removeprefix("model.diffusion_model.")] = description
        if naming == "comfy_quant":
            scaled[f"{layer}.comfy_quant"] = torch.tensor(list(json.dumps(description).encode()), dtype=torch.uint8)
    if naming == "scale_weight":
        scaled["model.diffusion_model.scaled_fp8"] = torch.zeros(2, dtype=E4M3)
    metadata = {"_quantization_metadata": json.dumps({"layers": layers})} if naming == "metadata" else {}
    return scaled, metadata


@pytest.mark.parametrize("naming", ["scale_weight", "comfy_quant", "metadata"])
def test_scaled_fp8_is_its_weights(naming, server, pipelines, sample):
    """With a cond_proj to fold; against the same weights written out."""
    weights, configs = single_file(pipelines, "gamma")
    scaled, metadata = scaled_fp8(weights, naming)
    assert sum(weight.dtype == E4M3 for weight in scaled.values()) > 20
    found = sample(put(server, "checkpoints", f"{naming}.safetensors", scaled, configs | metadata))
    plain = put(server, "checkpoints", "written-out.safetensors", dequantized(scaled, metadata), configs)
    assert found.equal(sample(plain))
    # As far from the unquantised weights as fp8 is, and no more.
    assert relative_error(found, sample("diffusers/gamma")) < 0.5


@pytest.mark.parametrize("naming", ["scale_weight", "comfy_quant", "metadata"])
def test_scaled_fp8_of_a_width_that_the_host_knows(naming, server, xl_weights, sample_xl):
    scaled, metadata = scaled_fp8(xl_weights, naming)
    found = sample_xl(put(server, "checkpoints", "scaled.safetensors", scaled, metadata))
    plain = dequantized(scaled, metadata)
    assert found.equal(sample_xl(put(server, "checkpoints", "unscaled.safetensors", plain)))
    for name in ("scaled", "unscaled"):
        (server.folder / "models" / "checkpoints" / f"{name}.safetensors").unlink()


# ---- names ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["other.sft", "other.SAFETENSORS"])
def test_safetensors_under_their_other_names(name, server, pipelines, sample):
    weights, metadata = single_file(pipelines, "plain")
    put(server, "checkpoints", name, weights, metadata)
    shutil.copy(pipelines.folder / "plain" / "unet" / UNET_FILE, pipelines.folder / f"unet-{name}")
    names = server.get("/object_info/SPLAMLoader")["SPLAMLoader"]["input"]["required"]["model_name"]
    options = names[1].get("options") or names[0]
    assert name in options and f"diffusers/unet-{name}" in options
    assert sample(name).equal(sample("diffusers/plain"))


def test_the_fp16_variants_shards(pipelines, sample):
    """As diffusers writes them: the index is diffusion_pytorch_model.safetensors.index.fp16.json."""
    folder, unet = pipelines.folder / "fp16-shards", pipelines.reference("plain").unet
    shutil.copytree(pipelines.folder / "plain", folder, dirs_exist_ok=True)
    (folder / "unet" / UNET_FILE).unlink()
    unet.half().save_pretrained(folder / "unet", max_shard_size="2MB", variant="fp16")
    unet.float()
    assert (folder / "unet" / f"{UNET_FILE}.index.fp16.json").is_file()
    assert sample("diffusers/fp16-shards").equal(sample("diffusers/plain"))
