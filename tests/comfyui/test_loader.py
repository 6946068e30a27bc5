"""SPLAM Loader: every kind of file gives diffusers' latents, and what a file lacks or hides is said."""

import copy
import io
import json
import shutil

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load, load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from harness.graphs import distil, save_image, save_latent, text_to_image
from harness.reference import SCHEDULER, few_step, node_noises, relative_error
from harness.server import ServerError
from splam_core import authors_embedding
from splam_core.checkpoint import UNET_PREFIX, diffusers_to_ldm
from splam_core.text_encoders import text_encoders_to_ldm

pytestmark = pytest.mark.comfyui
PROMPT = "a yellow star above a doughnut"
SEED = 11
UNET_FILE = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def tokens(comfyui):
    tokenizer = CLIPTokenizer.from_pretrained(comfyui / "comfy" / "sd1_tokenizer")
    return tokenizer(PROMPT)["input_ids"]


@pytest.fixture
def sample(server):
    def run(model_name: str, loader: dict | None = None, **sampling):
        graph = save_latent(text_to_image(model_name, PROMPT, **{"seed": SEED, "steps": 3} | sampling))
        graph["model"]["inputs"] |= loader or {}
        (file,) = server.files(server.run(graph))
        return load(file)["latent_tensor"] * 0.31

    return run


@pytest.fixture
def sample_unet(server):
    """Latents of a UNet alone, with the text encoder of another model."""

    def run(model_name: str, encoder: str, **loader):
        graph = save_latent(text_to_image(encoder, PROMPT, seed=SEED, steps=3))
        graph["unet"] = {"class_type": "SPLAMLoader", "inputs": {"model_name": model_name, **loader}}
        graph["sampled"]["inputs"]["model"] = ["unet", 0]
        (file,) = server.files(server.run(graph))
        return load(file)["latent_tensor"]

    return run


def expected_latents(reference, tokens, **options):
    noise, fresh = node_noises((1, 4, 16, 16), SEED)
    return reference.few_step(reference.embed(tokens), noise, fresh, 3, **options)


def put(server, kind: str, name: str, weights: dict, metadata: dict | None = None) -> str:
    """A file in the server's model folder of this kind; its name in the loader."""
    file = server.folder / "models" / kind / name
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(weights, file, metadata)
    return name if kind == "checkpoints" else f"{kind}/{name}"


def unet_weights(pipelines, name: str, dtype=None) -> dict:
    weights = load_file(pipelines.folder / name / "unet" / UNET_FILE)
    return {key: weight.to(dtype or weight.dtype) for key, weight in weights.items()}


# ---- UNets on their own --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plain", "gamma"])
@pytest.mark.parametrize("naming", ["diffusers", "ldm", "ldm-prefixed"])
def test_a_unet_file_in_diffusion_models(naming, name, server, pipelines, tokens, sample_unet):
    """With and without cond_proj; neither scheduler nor VAE is beside it, so SD's scale and schedule hold."""
    weights = unet_weights(pipelines, name)
    if naming != "diffusers":
        ldm = diffusers_to_ldm(weights)
        weights = ldm if naming == "ldm-prefixed" else {k.removeprefix(UNET_PREFIX): w for k, w in ldm.items()}
    found = sample_unet(put(server, "diffusion_models", f"{naming}-{name}.safetensors", weights), "diffusers/plain")
    reference = pipelines.reference(name)
    noise, fresh = node_noises((1, 4, 16, 16), SEED)
    embeds = pipelines.reference("plain").embed(tokens)
    expected = few_step(reference.unet, SCHEDULER, embeds, noise, fresh, 3)
    assert relative_error(found * 0.18215, expected) < 1e-4
    # UNets of another number of heads, or a dropped cond_proj, would be off by far more.
    assert relative_error(found * 0.18215, expected.roll(1, -1)) > 0.1


def test_a_unet_folder_brings_its_config(server, pipelines, tokens, sample_unet):
    """`deep` has 4 attention heads, which only config.json says: in `diffusers` and in `diffusion_models`."""
    reference = pipelines.reference("deep")
    noise, fresh = node_noises((1, 4, 16, 16), SEED)
    expected = few_step(reference.unet, SCHEDULER, pipelines.reference("plain").embed(tokens), noise, fresh, 3)
    for base, name in ((pipelines.folder, "unet-only"), (server.folder / "models/diffusion_models", "unet-beside")):
        shutil.copytree(pipelines.folder / "deep" / "unet", base / name, dirs_exist_ok=True)
    for name in ("diffusers/unet-only", f"diffusion_models/unet-beside/{UNET_FILE}"):
        assert relative_error(sample_unet(name, "diffusers/plain") * 0.18215, expected) < 1e-4


def test_a_unet_alone_has_no_clip_and_no_vae_and_says_so(server, pipelines):
    name = put(server, "diffusion_models", "alone.safetensors", unet_weights(pipelines, "plain"))
    logged = server.listen()
    with pytest.raises(ServerError, match=r"CLIPTextEncode: .*clip input is invalid: None"):
        server.run(save_latent(text_to_image(name, PROMPT)))
    log = logged()
    assert log.count("alone.safetensors has no CLIP (text encoder) and no VAE; take them from") == 1


# ---- precisions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_precisions(dtype, server, pipelines, tokens, sample_unet):
    """The reference computes on the rounded weights, its guidance embedding in float32: the fold rounds nothing."""
    weights = unet_weights(pipelines, "gamma", dtype)
    name = put(server, "diffusion_models", f"gamma-{str(dtype)[6:]}.safetensors", weights)
    unet = UNet2DConditionModel.from_config(pipelines.reference("gamma").unet.config).eval()
    unet.load_state_dict({key: weight.float() for key, weight in weights.items()})
    noise, fresh = node_noises((1, 4, 16, 16), SEED)
    expected = few_step(unet, SCHEDULER, pipelines.reference("plain").embed(tokens), noise, fresh, 3)
    assert relative_error(sample_unet(name, "diffusers/plain") * 0.18215, expected) < 1e-4


# ---- gamma and guidance in cond_proj -------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [1.0, 2.0, 8.5])
def test_embedded_guidance_is_the_lcm_pipelines_guidance_scale(guidance, pipelines, tokens, sample):
    expected = expected_latents(pipelines.reference("gamma"), tokens, guidance_scale=guidance)
    found = sample("diffusers/gamma", loader={"embedded_guidance": guidance})
    assert relative_error(found, expected) < 1e-4


def test_guidance_one_is_the_authors_gamma_one(pipelines, tokens, sample):
    """Not diffusers' formula but splam_core's phi(1), fed to diffusers' own timestep_cond."""
    reference = pipelines.reference("gamma")
    noise, fresh = node_noises((1, 4, 16, 16), SEED)
    phi, unet, embeds = authors_embedding(torch.ones(1)), reference.unet, reference.embed(tokens)

    class Told(torch.nn.Module):
        config = unet.config

        def forward(self, x, t, embeds, timestep_cond=None, **_):
            return unet(x, t, embeds, timestep_cond=phi)

    expected = few_step(Told(), reference.scheduler_config, embeds, noise, fresh, 3)
    assert relative_error(sample("diffusers/gamma"), expected) < 1e-4


def test_an_embedding_of_ours_is_zero_at_gamma_one(server, pipelines, tokens, sample_unet):
    """An unfinished checkpoint of this repository's trainer: cond_proj has nothing to add."""
    weights = unet_weights(pipelines, "gamma")
    name = put(server, "diffusion_models", "ours.safetensors", weights, {"splam.method": "splam"})
    unet = UNet2DConditionModel.from_config({**pipelines.reference("gamma").unet.config, "time_cond_proj_dim": None})
    unet.load_state_dict({key: weight.float() for key, weight in weights.items() if "cond_proj" not in key})
    noise, fresh = node_noises((1, 4, 16, 16), SEED)
    expected = few_step(unet.eval(), SCHEDULER, pipelines.reference("plain").embed(tokens), noise, fresh, 3)
    assert relative_error(sample_unet(name, "diffusers/plain") * 0.18215, expected) < 1e-4


def test_embedded_guidance_does_nothing_without_the_key(sample):
    assert sample("diffusers/plain", loader={"embedded_guidance": 8.5}).equal(sample("diffusers/plain"))


# ---- other families ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_stable_diffusion_2_shape(prediction_type, pipelines, tokens, sample):
    """Linear projections, heads that grow with the width, a GELU text encoder padded with token 0."""
    folder = pipelines.folder / f"sd2-{prediction_type}"
    shutil.copytree(pipelines.folder / "plain", folder, dirs_exist_ok=True)
    torch.manual_seed(5)
    plain = pipelines.reference("plain").unet.config
    unet = UNet2DConditionModel.from_config({**plain, "use_linear_projection": True, "attention_head_dim": [2, 4, 4]})
    unet.half().save_pretrained(folder / "unet")
    config = CLIPTextConfig.from_pretrained(folder / "text_encoder")
    config.hidden_act = "gelu"
    encoder = CLIPTextModel(config).half()
    encoder.save_pretrained(folder / "text_encoder")
    (folder / "tokenizer").mkdir(exist_ok=True)
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps({"pad_token": "!"}))
    scheduler = SCHEDULER | {"prediction_type": prediction_type}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    noise, fresh = node_noises((1, 4, 16, 16), SEED)
    with torch.no_grad():
        embeds = encoder.float().eval()(torch.tensor([tokens + [0] * (77 - len(tokens))]))[0]
    expected = few_step(unet.float().eval(), scheduler, embeds, noise, fresh, 3)
    assert relative_error(sample(f"diffusers/{folder.name}"), expected) < 1e-4


@pytest.fixture(scope="module")
def xl(pipelines, tokens):
    """A narrow SDXL pipeline folder; (its name, its UNet, prompt embeddings, added_cond_kwargs)."""
    torch.manual_seed(6)
    folder = pipelines.folder / "xl"
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64, 64),
        layers_per_block=1,
        cross_attention_dim=96,
        attention_head_dim=(2, 4, 4),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=32,
        projection_class_embeddings_input_dim=6 * 32 + 48,
    )
    sizes = {"vocab_size": 49408, "num_hidden_layers": 3, "max_position_embeddings": 77, "num_attention_heads": 2}
    first = CLIPTextModel(CLIPTextConfig(hidden_size=32, intermediate_size=64, hidden_act="quick_gelu", **sizes))
    second = CLIPTextModelWithProjection(
        CLIPTextConfig(hidden_size=64, intermediate_size=96, hidden_act="gelu", projection_dim=48, **sizes)
    )
    vae = AutoencoderKL.from_pretrained(pipelines.folder / "plain" / "vae")
    for part, model in {"unet": unet, "vae": vae, "text_encoder": first, "text_encoder_2": second}.items():
        model.half().save_pretrained(folder / part)
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER))
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionXLPipeline"}))

    def hidden(model, pad):
        ids = torch.tensor([tokens + [pad] * (77 - len(tokens))])
        return model.float().eval()(ids, output_hidden_states=True)

    with torch.no_grad():
        one, two = hidden(first, 49407), hidden(second, 0)
    embeds = torch.cat([one.hidden_states[-2], two.hidden_states[-2]], dim=-1)
    added = {"text_embeds": two.text_embeds, "time_ids": torch.tensor([[128.0, 128, 0, 0, 128, 128]])}
    return "diffusers/xl", unet.float().eval(), embeds, added


def test_stable_diffusion_xl_shape(xl, sample):
    name, unet, embeds, added = xl
    noise, fresh = node_noises((1, 4, 16, 16), SEED)
    expected = few_step(unet, SCHEDULER, embeds, noise, fresh, 3, added_cond_kwargs=added)
    assert relative_error(sample(name), expected) < 1e-4


def test_distilling_the_xl_shape(xl, server):
    """Pooled text and sizes reach the UNet in training, and the LoRA has a place in it."""
    graph = distil(
        xl[0],
        prompts="a doughnut on a red background\na yellow star on a blue background",
        steps=2,
        vae=None,
        gradient_checkpointing=True,
    )
    graph |= {"text": {"class_type": "CLIPTextEncode", "inputs": {"text": "x", "clip": ["model", 1]}}}
    logged = server.listen()
    server.run(graph)
    assert "lora key not loaded" not in logged()


def test_a_single_file_of_the_xl_shape(xl, pipelines, server, sample):
    """Under LDM names, its second text encoder under OpenCLIP's, the parts' configurations in the metadata."""
    folder, texts = pipelines.folder / "xl", ("text_encoder", "text_encoder_2")
    unet, vae = (load_file(folder / part / UNET_FILE) for part in ("unet", "vae"))
    encoders = [load_file(folder / part / "model.safetensors") for part in texts]
    files = dict.fromkeys(("unet", "vae", *texts), "config.json") | {"scheduler": "scheduler_config.json"}
    metadata = {f"splam.{part}": (folder / part / file).read_text() for part, file in files.items()}
    single = diffusers_to_ldm(unet, vae) | text_encoders_to_ldm(encoders, "sdxl")
    assert sample(put(server, "checkpoints", "xl.safetensors", single, metadata)).equal(sample("diffusers/xl"))


def test_weights_in_several_files(pipelines, tokens, sample):
    folder = pipelines.folder / "sharded"
    shutil.copytree(pipelines.folder / "plain", folder, dirs_exist_ok=True)
    (folder / "unet" / UNET_FILE).unlink()
    pipelines.reference("plain").unet.half().save_pretrained(folder / "unet", max_shard_size="2MB")
    pipelines.reference("plain").unet.float()
    assert len(list((folder / "unet").glob("*.safetensors"))) > 1
    assert relative_error(sample("diffusers/sharded"), expected_latents(pipelines.reference("plain"), tokens)) < 1e-4


@pytest.mark.parametrize(
    "width, heads, linear, metadata",
    [
        (768, 8, False, {}),
        (1024, 5, True, {"modelspec.prediction_type": "epsilon"}),
        (1024, 5, True, {"modelspec.prediction_type": "v"}),
    ],
    ids=["SD1", "SD2", "SD2-v"],
)
@pytest.mark.parametrize("where", ["checkpoints", "diffusion_models"])
def test_a_width_that_the_host_knows_goes_through_the_host(where, width, heads, linear, metadata, server):
    """As wide as the real ones at the first level, which is what ComfyUI looks at; with cond_proj."""
    torch.manual_seed(8)
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(320, 320),
        layers_per_block=1,
        cross_attention_dim=width,
        attention_head_dim=heads,
        use_linear_projection=linear,
        time_cond_proj_dim=256,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()
    weights = {key: weight.half() for key, weight in unet.state_dict().items()}
    unet.load_state_dict({key: weight.float() for key, weight in weights.items()})
    single = diffusers_to_ldm(weights)
    name = put(server, where, f"wide-{width}-{metadata.get('modelspec.prediction_type')}.safetensors", single, metadata)
    inputs = {"model": ["model", 0], "positive": ["positive", 0], "latent_image": ["latent", 0]}
    graph = {
        "model": {"class_type": "SPLAMLoader", "inputs": {"model_name": name}},
        "positive": {"class_type": "TestConditioning", "inputs": {"width": width, "seed": 4}},
        "latent": {"class_type": "EmptyLatentImage", "inputs": {"width": 128, "height": 128, "batch_size": 1}},
        "sampled": {"class_type": "SPLAMSampler", "inputs": inputs | {"seed": SEED, "steps": 2, "denoise": 1.0}},
    }
    (file,) = server.files(server.run(save_latent(graph)))
    noise, fresh = node_noises((1, 4, 16, 16), SEED)
    embeds = torch.randn((1, 77, width), generator=torch.Generator().manual_seed(4))
    v = metadata.get("modelspec.prediction_type") == "v"
    scheduler = SCHEDULER | {"prediction_type": "v_prediction" if v else "epsilon"}
    expected = few_step(unet, scheduler, embeds, noise, fresh, 2)
    assert relative_error(load(file)["latent_tensor"] * 0.18215, expected) < 1e-4


def test_a_configuration_that_is_mended_is_read_again(pipelines, tokens, sample):
    """By the same graph, in the same server."""
    folder = pipelines.folder / "mended"
    shutil.copytree(pipelines.folder / "v", folder)
    file = folder / "scheduler" / "scheduler_config.json"
    right = json.loads(file.read_text())
    file.write_text(json.dumps(right | {"prediction_type": "epsilon"}))
    expected = expected_latents(pipelines.reference("v"), tokens)
    assert relative_error(sample("diffusers/mended"), expected) > 1e-2
    file.write_text(json.dumps(right))
    assert relative_error(sample("diffusers/mended"), expected) < 1e-4


@pytest.mark.parametrize("name", ["plain", "gamma"])
def test_the_host_may_copy_it_with_weights_of_its_own(name, server):
    """As ComfyUI 0.33 does for hooks, for torch.compile, for Train LoRA: by loading it once more."""
    graph = save_image(text_to_image(f"diffusers/{name}", PROMPT, seed=SEED, steps=2))
    parts = {part: ["model", number] for number, part in enumerate(("model", "clip", "vae"))}
    copied = copy.deepcopy(graph) | {"copy": {"class_type": "TestFreshWeights", "inputs": parts}}
    for number, (node, part) in enumerate((("sampled", "model"), ("positive", "clip"), ("decoded", "vae"))):
        copied[node]["inputs"][part] = ["copy", number]
    pictures = [Image.open(io.BytesIO(server.files(server.run(one))[0])) for one in (graph, copied)]
    assert pictures[0].tobytes() == pictures[1].tobytes()


def test_a_saved_picture_does_not_tell_where_models_lie(pipelines, server):
    """The host writes the graph into it, and beside each node what it is told apart by."""
    (file,) = server.files(server.run(save_image(text_to_image("diffusers/gamma", PROMPT, seed=SEED, steps=1))))
    written = Image.open(io.BytesIO(file)).text["prompt"]
    assert "is_changed" in json.loads(written)["model"]
    for folder in (server.folder, pipelines.folder):
        assert str(folder) not in written and str(folder.resolve()) not in written


# ---- names and marks -----------------------------------------------------------------------------------------------


def test_published_releases_stand_out_and_keep_their_place_as_an_alias(server, pipelines, sample):
    shutil.copytree(pipelines.folder / "gamma", pipelines.folder / "slam-sd1.5", dirs_exist_ok=True)
    names = server.get("/object_info/SPLAMLoader")["SPLAMLoader"]["input"]["required"]["model_name"]
    options = names[1].get("options") or names[0]
    assert "alimama-creative/slam-sd1.5" in options and "diffusers/slam-sd1.5" not in options
    assert sample("alimama-creative/slam-sd1.5").equal(sample("diffusers/gamma"))
    assert sample("diffusers/slam-sd1.5").equal(sample("diffusers/gamma"))


def test_a_model_that_is_no_consistency_model_loads_and_says_so_once(server, pipelines, sample):
    shutil.copytree(pipelines.folder / "plain", pipelines.folder / "ordinary", dirs_exist_ok=True)
    logged = server.listen()
    sample("diffusers/ordinary")
    sample("diffusers/gamma", steps=2)
    log = logged()
    assert log.count("as a SPLAM or LCM model (no LCMScheduler, no cond_proj, no splam metadata)") == 1


@pytest.mark.parametrize(
    "name",
    [
        "diffusion_models/../checkpoints/x.safetensors",
        "../x.safetensors",
        "diffusers/slam-sd1.5/../../x",
        "/etc/passwd",
    ],
)
def test_no_name_leads_out_of_the_hosts_folders(name, server):
    with pytest.raises(ServerError, match=r"there is no model .*Put diffusers folders into .*models.diffusers"):
        server.run(save_latent(text_to_image(name, PROMPT)))
