"""SPLAM: the algorithm, on tensors. Knows no host, no pipeline and no command line."""

from .checkpoint import (
    diffusers_to_ldm,
    fold_gamma,
    json_object,
    ldm_to_diffusers,
    load_file,
    load_files,
    lora_adapters,
    lora_magnitudes,
    lora_to_kohya,
    not_finite,
    read_json,
    read_metadata,
    reading,
    save_file,
    shortened,
    weight_files,
)
from .denoiser import Denoiser, boundary_scalings, predict_epsilon, predict_x0
from .descent import LossWatch, ema_update, learning_rate_share, release_decay_at
from .draws import decisions, draw_timesteps, draws, sample_gamma
from .finish import Finish
from .gamma import (
    authors_embedding,
    fold,
    gamma_embedding,
    guidance_embedding,
    patch_time_embedding,
    sinusoid,
    sinusoid_frequencies,
)
from .matching import DistributionMatching, MatchingDraws, draw_places, matching_draws, simulate
from .objective import Objective, l2, pseudo_huber, subpath_for
from .parametrisation import Parametrisation, latent_scale, parametrisation_of
from .paths import PathObjective, solve_paths
from .recipe import Recipe
from .sampler import add_noise, fresh_noise, renoise_generator, sample
from .schedule import NoiseSchedule, broadcast_to, few_step_timesteps
from .solver import SOLVERS, ddim_step, guided, multiple_estimation, solve, solver_path
from .subpath import DirectLinking, SubPath, SubPathLinear

__all__ = [
    "SOLVERS",
    "Denoiser",
    "DirectLinking",
    "DistributionMatching",
    "Finish",
    "LossWatch",
    "MatchingDraws",
    "NoiseSchedule",
    "Objective",
    "Parametrisation",
    "PathObjective",
    "Recipe",
    "SubPath",
    "SubPathLinear",
    "add_noise",
    "authors_embedding",
    "boundary_scalings",
    "broadcast_to",
    "ddim_step",
    "decisions",
    "diffusers_to_ldm",
    "draw_places",
    "draw_timesteps",
    "draws",
    "ema_update",
    "few_step_timesteps",
    "fold",
    "fold_gamma",
    "fresh_noise",
    "gamma_embedding",
    "guidance_embedding",
    "guided",
    "json_object",
    "l2",
    "latent_scale",
    "ldm_to_diffusers",
    "learning_rate_share",
    "load_file",
    "load_files",
    "lora_adapters",
    "lora_magnitudes",
    "lora_to_kohya",
    "matching_draws",
    "multiple_estimation",
    "not_finite",
    "parametrisation_of",
    "patch_time_embedding",
    "predict_epsilon",
    "predict_x0",
    "pseudo_huber",
    "read_json",
    "read_metadata",
    "reading",
    "release_decay_at",
    "renoise_generator",
    "sample",
    "sample_gamma",
    "save_file",
    "shortened",
    "simulate",
    "sinusoid",
    "sinusoid_frequencies",
    "solve",
    "solve_paths",
    "solver_path",
    "subpath_for",
    "weight_files",
]
