"""Settings, command line, the state of the run, the loaded model."""

from types import SimpleNamespace

import torch


class Options:
    """Settings by name: `data` holds what was set, `data_labels` what there is, with its default."""

    def __init__(self, defaults):
        self.data_labels = defaults
        self.data = {}

    def __getattr__(self, name):
        if name in self.data:
            return self.data[name]
        try:
            return self.data_labels[name]
        except KeyError:
            raise AttributeError(name) from None


opts = Options(
    {
        "skip_early_cond": 0.0,
        "s_min_uncond": 0.0,
        "sgm_noise_multiplier": False,
        "img2img_fix_steps": False,
        "img2img_extra_noise": 0.0,
        "always_discard_next_to_last_sigma": False,
        "eta_ancestral": 1.0,
        "hide_samplers": [],
        "enable_quantization": False,
    }
)
cmd_opts = SimpleNamespace(disable_extension_access=False)
state = SimpleNamespace(
    interrupted=False, skipped=False, sampling_step=0, sampling_steps=0, current_latent=None, latents=[]
)
total_tqdm = SimpleNamespace(update=lambda: None)
device = torch.device("cpu")
sd_model = None


def refresh_checkpoints():
    from . import sd_models

    sd_models.list_models()
