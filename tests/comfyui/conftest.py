"""One real ComfyUI for the whole session: the one at COMFYUI_PATH, which `python dev.py test` sets."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from harness.reference import Reference, write_pipeline
from harness.server import ComfyServer

# Name -> how the random pipeline of that name differs from the embedded one.
PIPELINES = {
    "plain": {},
    "gamma": {"cond_proj": True, "seed": 1},
    "v": {"prediction_type": "v_prediction", "seed": 2},
    "sd15-like": {
        "seed": 4,
        "block_out_channels": (64, 128, 192),
        "layers_per_block": 2,
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    },
    "deep": {
        "seed": 3,
        "block_out_channels": (32, 64, 96, 96),
        "layers_per_block": 1,
        "attention_head_dim": 4,
        "down_block_types": ("CrossAttnDownBlock2D",) * 4,
        "up_block_types": ("CrossAttnUpBlock2D",) * 4,
    },
}


@pytest.fixture(scope="session")
def comfyui() -> Path:
    if not os.environ.get("COMFYUI_PATH"):
        pytest.skip("COMFYUI_PATH names no ComfyUI; `python dev.py test` sets it")
    return Path(os.environ["COMFYUI_PATH"])


@pytest.fixture(scope="session")
def pipelines(tmp_path_factory) -> SimpleNamespace:
    """`folder`: a `models/diffusers` full of random pipelines; `reference(name)`: diffusers' classes on one of them."""
    folder = tmp_path_factory.mktemp("diffusers")
    for name, options in PIPELINES.items():
        write_pipeline(folder / name, **options)
    loaded = {}

    def reference(name: str) -> Reference:
        if name not in loaded:
            loaded[name] = Reference(folder / name)
        return loaded[name]

    return SimpleNamespace(folder=folder, reference=reference)


@pytest.fixture(scope="session")
def server(comfyui, pipelines, tmp_path_factory) -> ComfyServer:
    folder = tmp_path_factory.mktemp("comfyui")
    (folder / "models").mkdir()
    (folder / "models" / "diffusers").symlink_to(pipelines.folder, target_is_directory=True)
    (folder / "custom_nodes").mkdir()
    helpers = Path(__file__).with_name("helper_nodes")
    (folder / "custom_nodes" / "helper_nodes").symlink_to(helpers, target_is_directory=True)
    with ComfyServer(comfyui, folder) as running:
        yield running
