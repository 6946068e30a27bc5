import os

models_path = os.environ["STAND_IN_MODELS"]
