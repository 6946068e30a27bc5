"""SPLAM LoRA Loader: a LoRA under anyone's names is what diffusers and peft make of it; every key is used or named."""

import copy
import json
import os

import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from diffusers.utils.state_dict_utils import convert_all_state_dict_to_peft, convert_state_dict_to_kohya
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from safetensors.torch import load, load_file, save_file
from transformers import CLIPTokenizer

from harness.graphs import save_latent, text_to_image
from harness.reference import few_step, node_noises, relative_error
from harness.server import ServerError
from splam_core import authors_embedding, fold

pytestmark = pytest.mark.comfyui
PROMPT, SEED, RANK, ALPHA = "a yellow star above a doughnut", 21, 4, 6
LAYERS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"]
CONVOLUTIONS = ["conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "conv_in"]
EMBEDDINGS = ["time_emb_proj", "time_embedding.linear_1"]
TEXT_LAYERS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]


def with_adapter(model, layers: list[str], alpha: float, dora: bool = False):
    """(a copy of the model with a random LoRA by peft, the LoRA under peft's names)."""
    torch.manual_seed(3)
    config = LoraConfig(r=RANK, lora_alpha=alpha, target_modules=layers, init_lora_weights=False, use_dora=dora)
    model = inject_adapter_in_model(config, copy.deepcopy(model)).eval()
    for name, magnitude in model.named_parameters():
        if "lora_magnitude_vector" in name:  # as if they had been trained
            magnitude.data *= 1 + 0.3 * torch.randn(magnitude.shape)
    return model, {key: weight.clone() for key, weight in get_peft_model_state_dict(model).items()}


@pytest.fixture(scope="module")
def trained(pipelines, comfyui):
    """alpha -> (latents that diffusers and peft compute, the UNet's LoRA, the text encoder's)."""
    reference = pipelines.reference("plain")
    tokens = CLIPTokenizer.from_pretrained(comfyui / "comfy" / "sd1_tokenizer")(PROMPT)["input_ids"]
    made = {}

    @torch.no_grad()
    def make(alpha: float, dora: bool = False):
        if (alpha, dora) not in made:
            unet, unet_lora = with_adapter(reference.unet, LAYERS + CONVOLUTIONS + EMBEDDINGS, alpha, dora)
            encoder, text_lora = with_adapter(reference.text_encoder, TEXT_LAYERS, alpha, dora)
            for layer in encoder.modules():
                if hasattr(layer, "merge"):  # the host keeps its text encoder's weights in half precision
                    layer.merge()
                    layer.base_layer.weight.data = layer.base_layer.weight.half().float()
            embeds = encoder(torch.tensor([tokens + [49407] * (77 - len(tokens))]))[0]
            noise, fresh = node_noises((1, 4, 16, 16), SEED)
            latents = few_step(unet, reference.scheduler_config, embeds, noise, fresh, 3)
            made[alpha, dora] = latents, unet_lora, text_lora
        return made[alpha, dora]

    return make


@pytest.fixture
def sample(server):
    def run(lora_name: str, model="diffusers/plain", clip=True, after=None, **strengths):
        graph = save_latent(text_to_image(model, PROMPT, seed=SEED, steps=3))
        inputs = {"model": ["model", 0], "lora_name": lora_name, "strength_model": 1.0, "strength_clip": 1.0}
        graph["lora"] = {"class_type": "SPLAMLoraLoader", "inputs": inputs | strengths}
        graph["after"] = {"class_type": after, "inputs": {"model": ["lora", 0]}}
        graph["sampled"]["inputs"]["model"] = ["after" if after else "lora", 0]
        if not after:
            del graph["after"]
        if clip:
            graph["lora"]["inputs"]["clip"] = ["model", 1]
            graph["positive"]["inputs"]["clip"] = ["lora", 1]
        (file,) = server.files(server.run(graph))
        return load(file)["latent_tensor"] * 0.31

    return run


def put(server, name: str, weights: dict, metadata: dict | None = None) -> str:
    folder = server.folder / "models" / "loras"
    folder.mkdir(exist_ok=True)
    save_file({key: weight.contiguous() for key, weight in weights.items()}, folder / name, metadata)
    return name


def log_of(server, run):
    """(what run() gives, what the log gained)."""
    logged = server.listen()
    return run(), logged()


def kohya(unet_lora: dict, text_lora: dict, alpha: float) -> dict:
    """By diffusers' own writer; it leaves alpha at the rank, and "text_model" out where transformers does."""
    prefixed = {f"unet.{k}": w for k, w in unet_lora.items()} | {f"text_encoder.{k}": w for k, w in text_lora.items()}
    named = convert_state_dict_to_kohya(prefixed)
    return {key: torch.tensor(float(alpha)) if key.endswith(".alpha") else weight for key, weight in named.items()}


@pytest.mark.parametrize("naming", ["peft", "diffusers", "old-diffusers", "kohya"])
def test_every_naming_is_diffusers_and_peft(naming, server, trained, sample):
    """Linear layers, convolutions, time embedding and text encoder; alpha = rank, as diffusers reads a file without."""
    expected, unet_lora, text_lora = trained(RANK)
    if naming == "kohya":
        weights = kohya(unet_lora, text_lora, RANK)
    elif naming == "old-diffusers":
        weights = {f"unet.{key}": weight for key, weight in convert_state_dict_to_diffusers(unet_lora).items()}
        weights |= {f"text_encoder.{key}": weight for key, weight in convert_state_dict_to_diffusers(text_lora).items()}
        assert any(".lora.down" in key or "lora_linear_layer" in key for key in weights)
    else:
        middle = "base_model.model." if naming == "peft" else ""
        weights = {f"unet.{middle}{key}": weight for key, weight in unet_lora.items()}
        weights |= {f"text_encoder.{middle}{key}": weight for key, weight in text_lora.items()}
    found, log = log_of(server, lambda: sample(put(server, f"{naming}.safetensors", weights)))
    assert relative_error(found, expected) < 1e-5
    assert "have no place" not in log and "lora key not loaded" not in log


def test_dora_is_pefts(server, trained, sample):
    """With its magnitudes, on linear layers, convolutions and the text encoder."""
    expected, unet_lora, text_lora = trained(ALPHA, dora=True)
    assert sum("magnitude" in key for key in (*unet_lora, *text_lora)) > 40
    weights = {f"unet.{key}": weight for key, weight in unet_lora.items()}
    text = {f"text_encoder.{key}": weight for key, weight in text_lora.items()}
    adapter = {f"{part}.lora_alpha": ALPHA for part in ("unet", "text_encoder")}
    metadata = {"lora_adapter_metadata": json.dumps(adapter)}
    name = put(server, "dora.safetensors", weights | text, metadata)
    found, log = log_of(server, lambda: sample(name))
    assert relative_error(found, expected) < 1e-5
    assert "have no place" not in log
    assert relative_error(trained(ALPHA)[0], expected) > 1e-2
    assert not sample(name, strength_model=0.5).equal(found)
    assert sample(name, after="TestAdaptersAnew").equal(found)
    name = put(server, "dora-unet.safetensors", weights, metadata)
    _, log = log_of(server, lambda: sample(name, clip=False))
    assert "no CLIP is connected" not in log


def lycoris(kind: str, shape: torch.Size) -> dict:
    """A random change of a weight of this shape by LyCORIS' methods, in the names that the host reads."""
    rows, columns = shape[0], shape[1:].numel()

    def random(*size):
        return torch.randn(size) * 0.2

    if kind == "loha":
        halves = {f"hada_w{n}_a": random(rows, RANK) for n in (1, 2)}
        return halves | {f"hada_w{n}_b": random(RANK, columns) for n in (1, 2)} | {"alpha": torch.tensor(2.0)}
    if kind == "lokr":
        first, second = random(4, 4), random(rows // 4, columns // 4)
        return {"lokr_w1": first, "lokr_w2_a": second[:, :RANK].clone(), "lokr_w2_b": random(RANK, columns // 4)}
    if kind == "glora":
        sizes = {"a1": (shape[1], RANK), "a2": (RANK, shape[1]), "b1": (rows, RANK), "b2": (RANK, columns)}
        return {f"{name}.weight": random(*size) for name, size in sizes.items()}
    return {"oft_blocks": random(rows // 8, 8, 8) * 0.3, "alpha": torch.tensor(1.0)}


@pytest.mark.parametrize("prefix", ["lora_unet_", "lycoris_"])
@pytest.mark.parametrize("kind", ["loha", "lokr", "glora", "oft"])
def test_lycoris_is_as_the_host_loads_it(kind, prefix, server, pipelines, sample):
    torch.manual_seed(5)
    unet, lora = pipelines.reference("plain").unet.state_dict(), {}
    for key, weight in unet.items():
        module = key.removesuffix(".weight")
        if key.endswith(("to_q.weight", "to_v.weight", "ff.net.2.weight", "to_out.0.weight")):
            parts = lycoris(kind, weight.shape)
            lora |= {f"{prefix}{module.replace('.', '_')}.{role}": part for role, part in parts.items()}
    name = put(server, f"{prefix}{kind}.safetensors", lora)
    found, log = log_of(server, lambda: sample(name))
    assert "have no place" not in log and "ERROR" not in log
    graph = save_latent(text_to_image("diffusers/plain", PROMPT, seed=SEED, steps=3))
    inputs = {"model": ["model", 0], "lora_name": name, "strength_model": 1.0}
    graph["lora"] = {"class_type": "LoraLoaderModelOnly", "inputs": inputs}
    graph["sampled"]["inputs"]["model"] = ["lora", 0]
    (file,) = server.files(server.run(graph))
    assert found.equal(load(file)["latent_tensor"] * 0.31)
    assert relative_error(found, sample(name, strength_model=0.0)) > 1e-2


@pytest.mark.parametrize("kind", ["loha", "lokr", "oft"])
def test_lycoris_of_another_family_is_refused(kind, server, sample):
    """The host logs an error for each weight and draws without."""
    parts = lycoris(kind, torch.Size((640, 2048)))
    module = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
    put(server, f"wide-{kind}.safetensors", {f"{module}.{role}": part for role, part in parts.items()})
    with pytest.raises(ServerError, match=rf"loras.wide-{kind}\.safetensors: this LoRA does not fit the model"):
        sample(f"wide-{kind}.safetensors")


def test_a_half_lora_is_one_clear_error(server, sample):
    module = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
    put(
        server,
        "half.safetensors",
        {f"{module}.hada_w1_a": torch.ones(128, 4), f"{module}.hada_w1_b": torch.ones(4, 64)},
    )
    with pytest.raises(ServerError, match=r"loras.half\.safetensors: its weights do not fit together \(KeyError"):
        sample("half.safetensors")


@pytest.mark.parametrize("name", ["other.sft", "other.SAFETENSORS"])
def test_loras_under_the_other_names_of_safetensors(name, server, trained, sample):
    expected, unet_lora, text_lora = trained(RANK)
    weights = {f"unet.{k}": w for k, w in unet_lora.items()} | {f"text_encoder.{k}": w for k, w in text_lora.items()}
    assert relative_error(sample(put(server, name, weights)), expected) < 1e-5


def test_diffusers_reads_the_same_file_alike(server, trained, pipelines, tmp_path):
    """The premise of the tests above: bare keys mean alpha = rank to diffusers' own loader."""
    _, unet_lora, _ = trained(RANK)
    restored = convert_all_state_dict_to_peft({f"unet.{key}": weight for key, weight in unet_lora.items()})
    assert set(restored) == {f"unet.{key}" for key in unet_lora}


@pytest.mark.parametrize("where", ["metadata", "adapter_config", "kohya"])
def test_alpha_is_read_where_the_file_says_it(where, server, trained, sample):
    expected, unet_lora, text_lora = trained(ALPHA)
    weights = {f"unet.{k}": w for k, w in unet_lora.items()} | {f"text_encoder.{k}": w for k, w in text_lora.items()}
    if where == "metadata":
        StableDiffusionPipeline.save_lora_weights(
            server.folder / "models" / "loras",
            unet_lora_layers=unet_lora,
            text_encoder_lora_layers=text_lora,
            weight_name="metadata.safetensors",
            unet_lora_adapter_metadata={"r": RANK, "lora_alpha": ALPHA},
            text_encoder_lora_adapter_metadata={"r": RANK, "lora_alpha": ALPHA},
        )
        name = "metadata.safetensors"
    elif where == "kohya":
        name = put(server, "kohya-alpha.safetensors", kohya(unet_lora, text_lora, ALPHA))
    else:
        # peft's own folder holds one model: the UNet's. The text encoder's strength is set by hand instead.
        (server.folder / "models" / "loras" / "trained").mkdir(parents=True, exist_ok=True)
        name = put(server, "trained/adapter_model.safetensors", weights)
        config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA}
        (server.folder / "models" / "loras" / "trained" / "adapter_config.json").write_text(json.dumps(config))
    strengths = {"strength_clip": ALPHA / RANK} if where == "adapter_config" else {}
    assert relative_error(sample(name, **strengths), expected) < 1e-5


def test_settings_that_come_later_are_read(server, trained, sample):
    _, unet_lora, _ = trained(ALPHA)
    (server.folder / "models" / "loras" / "late").mkdir(parents=True, exist_ok=True)
    name = put(server, "late/adapter_model.safetensors", {f"unet.{key}": weight for key, weight in unet_lora.items()})
    before = sample(name, clip=False)
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA}
    (server.folder / "models" / "loras" / "late" / "adapter_config.json").write_text(json.dumps(config))
    assert relative_error(sample(name, clip=False), before) > 1e-2


def test_a_folded_gamma_travels_as_diff_b(server, pipelines, sample):
    """The LoRA that turns the plain UNet's bias into the folded one of a UNet told the authors' gamma = 1."""
    weights = load_file(pipelines.folder / "gamma" / "unet" / "diffusion_pytorch_model.safetensors")
    delta = fold(
        weights["time_embedding.linear_1.weight"],
        weights["time_embedding.cond_proj.weight"],
        authors_embedding(torch.ones(1))[0],
    )
    folder = server.folder / "models" / "diffusion_models"
    folder.mkdir(exist_ok=True)
    plain = {key: weight for key, weight in weights.items() if "cond_proj" not in key}
    save_file(plain, folder / "gamma-without.safetensors")
    save_file(weights, folder / "gamma-with.safetensors")
    name = put(server, "fold.safetensors", {"lora_unet_time_embedding_linear_1.diff_b": delta.float()})

    def run(unet: str, lora: str | None):
        graph = save_latent(text_to_image("diffusers/plain", PROMPT, seed=SEED, steps=3))
        graph["unet"] = {"class_type": "SPLAMLoader", "inputs": {"model_name": f"diffusion_models/{unet}.safetensors"}}
        inputs = {"model": ["unet", 0], "lora_name": lora, "strength_model": 1.0, "strength_clip": 1.0}
        graph["lora"] = {"class_type": "SPLAMLoraLoader", "inputs": inputs}
        graph["sampled"]["inputs"]["model"] = ["lora" if lora else "unet", 0]
        (file,) = server.files(server.run(graph))
        return load(file)["latent_tensor"]

    assert relative_error(run("gamma-without", name), run("gamma-with", None)) < 1e-5
    assert relative_error(run("gamma-without", None), run("gamma-with", None)) > 1e-2


def test_keys_without_a_place_are_named_in_one_warning(server, trained, sample):
    _, unet_lora, text_lora = trained(RANK)
    stray = {"unet.no.such.module.lora_A.weight": torch.ones(RANK, 8), "mystery": torch.ones(3)}
    known = {f"unet.{key}": weight for key, weight in unet_lora.items()}
    with_text = {f"text_encoder.{key}": weight for key, weight in text_lora.items()}
    name = put(server, "stray.safetensors", known | stray)
    found, log = log_of(server, lambda: sample(name))
    assert log.count("have no place in this model") == 1 and "mystery" in log and "lora_unet_no_such_module" in log
    assert "lora key not loaded" not in log
    clean = put(server, "clean.safetensors", known)
    assert sample(clean).equal(found)
    # Without a CLIP the text encoder's part goes unused, and that is said.
    name = put(server, "text-too.safetensors", known | with_text)
    found, log = log_of(server, lambda: sample(name, clip=False))
    assert log.count("no CLIP is connected, so the text encoder's part goes unused") == 1
    assert sample(clean, clip=False).equal(found)


def test_a_lora_of_another_family_is_one_clear_error(server, trained, sample):
    _, unet_lora, _ = trained(RANK)
    other = {
        key: torch.randn(RANK, 2048) if "attn2.to_k.lora_A" in key or "attn2.to_v.lora_A" in key else weight
        for key, weight in unet_lora.items()
    }
    put(server, "xl.safetensors", other)
    with pytest.raises(
        ServerError,
        match=r"xl\.safetensors: this LoRA does not fit the model\. Expected one for a model with prompts 64 wide, "
        r"found one for Stable Diffusion XL",
    ):
        sample("xl.safetensors")
    deeper = {key.replace("transformer_blocks.0", "transformer_blocks.7"): w for key, w in other.items()}
    put(server, "deeper.safetensors", {k: w for k, w in deeper.items() if "blocks.7" in k})
    with pytest.raises(ServerError, match=r"deeper\.safetensors: .* have no place in this model.*Stable Diffusion XL"):
        sample("deeper.safetensors")


def test_names_that_come_by_a_link_are_read_once(server, trained, sample):
    """As from another pack's selector; the host tells a node's fingerprint nothing of such a name."""
    lora = put(server, "linked.safetensors", {f"unet.{key}": weight for key, weight in trained(RANK)[1].items()})
    expected = sample(lora, clip=False)
    graph = save_latent(text_to_image("", PROMPT, seed=SEED, steps=3))
    for node, name in (("model", "diffusers/plain"), ("lora", lora)):
        graph[f"name of {node}"] = {"class_type": "TestChoice", "inputs": {"name": name}}
    graph["model"]["inputs"]["model_name"] = ["name of model", 0]
    inputs = {"model": ["model", 0], "lora_name": ["name of lora", 0], "strength_model": 1.0, "strength_clip": 1.0}
    graph["lora"] = {"class_type": "SPLAMLoraLoader", "inputs": inputs}
    graph["sampled"]["inputs"]["model"] = ["lora", 0]
    (file,) = server.files(server.run(graph))
    assert (load(file)["latent_tensor"] * 0.31).equal(expected)
    messages = server.run(graph)["status"]["messages"]
    (cached,) = [details["nodes"] for kind, details in messages if kind == "execution_cached"]
    assert {"model", "lora", "sampled"} <= set(cached)


@pytest.mark.skipif(os.sep == "\\", reason="makes a file's name of a slash")
def test_a_graph_from_windows_names_folders_by_the_other_slash(server, trained, sample):
    (server.folder / "models" / "loras" / "few").mkdir(parents=True, exist_ok=True)
    weights = {f"unet.{key}": weight for key, weight in trained(RANK)[1].items()}
    expected = sample(put(server, "few/steps.safetensors", weights), clip=False)
    assert sample("few\\steps.safetensors", model="diffusers\\plain", clip=False).equal(expected)


@pytest.mark.parametrize(
    "name", ["absent.safetensors", "../loras/clean.safetensors", "..\\loras\\clean.safetensors", "/etc/passwd"]
)
def test_a_lora_that_is_not_listed_is_refused(name, sample):
    with pytest.raises(ServerError, match=r"there is no LoRA .*models.loras"):
        sample(name)
