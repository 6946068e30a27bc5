import os
from types import SimpleNamespace

from .paths import models_path

model_path = os.path.join(models_path, "Stable-diffusion")
checkpoints_list = {}


def list_models():
    checkpoints_list.clear()
    for name in sorted(os.listdir(model_path)):
        checkpoints_list[name] = SimpleNamespace(filename=os.path.join(model_path, name))
