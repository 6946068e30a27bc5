"""What a signature means by each of the host's objects. ComfyUI's modules are not there to be checked against."""

from typing import Any, TypeAlias

Model: TypeAlias = Any  # comfy.model_patcher.ModelPatcher
Clip: TypeAlias = Any  # comfy.sd.CLIP
Vae: TypeAlias = Any  # comfy.sd.VAE
Conditioning: TypeAlias = Any  # list of [context, options]
Latent: TypeAlias = Any  # dict of samples, and noise_mask and batch_index where there are any
ModelSampling: TypeAlias = Any  # of comfy.model_sampling: a MODEL's noise levels and what its output means
Cond: TypeAlias = Any  # of comfy.conds: one of the things that a UNet is told
UNet: TypeAlias = Any  # comfy.ldm.modules.diffusionmodules.openaimodel.UNetModel
CrossAttention: TypeAlias = Any  # comfy.ldm.modules.attention.CrossAttention
Sampler: TypeAlias = Any  # comfy.samplers.KSAMPLER
WrappedModel: TypeAlias = Any  # of comfy.samplers, KSamplerX0Inpaint: a MODEL as k-diffusion samplers call it
ClipTarget: TypeAlias = Any  # comfy.supported_models_base.ClipTarget: a tokenizer and a text encoder to build
WrapperExecutor: TypeAlias = Any  # comfy.patcher_extension.WrapperExecutor: what a wrapper calls on
ProgressBar: TypeAlias = Any  # comfy.utils.ProgressBar
ModelConfig: TypeAlias = Any  # of comfy.supported_models: a family's UNet and latents
