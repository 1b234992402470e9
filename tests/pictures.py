"""Tiny models and pipelines of diffusers, made from configs; for tests, and for processes without gralora."""

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

FILE = "pytorch_lora_weights.safetensors"  # that diffusers writes
TEXT_IDS = torch.arange(3, 9)[None]
MODELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "unet": (
        UNet2DConditionModel,
        {
            "block_out_channels": (16, 32),
            "layers_per_block": 1,
            "sample_size": 8,
            "in_channels": 4,
            "out_channels": 4,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "cross_attention_dim": 16,
            "attention_head_dim": 4,
            "norm_num_groups": 4,
        },
    ),
    "flux": (
        FluxTransformer2DModel,
        {
            "patch_size": 1,
            "in_channels": 4,
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 32,
            "pooled_projection_dim": 32,
            "axes_dims_rope": [4, 4, 8],
        },
    ),
    "sd3": (
        SD3Transformer2DModel,
        {
            "sample_size": 8,
            "patch_size": 1,
            "in_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 4,
            "joint_attention_dim": 32,
            "caption_projection_dim": 32,
            "pooled_projection_dim": 64,
            "out_channels": 4,
        },
    ),
}


def make(name: str) -> Any:
    """The model, the same at every call."""
    cls, config = MODELS[name]
    torch.manual_seed(0)
    return cls(**config).eval()


def text_encoder(cls: Any = CLIPTextModel) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    tokens = {"vocab_size": 100, "max_position_embeddings": 16, "bos_token_id": 0, "eos_token_id": 2}
    return cls(CLIPTextConfig(**sizes, **tokens, projection_dim=16)).eval()


def output(name: str, model: Any) -> Tensor:
    """What the model makes of the same noise and text at every call."""
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    if name == "unet":
        return model(noise(1, 4, 8, 8), 3, noise(1, 5, 16)).sample
    text = {"encoder_hidden_states": noise(1, 5, 32), "timestep": torch.tensor([1.0])}
    if name == "sd3":
        return model(noise(1, 4, 8, 8), pooled_projections=noise(1, 64), **text).sample
    ids = {"img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(5, 3)}
    return model(noise(1, 16, 4), pooled_projections=noise(1, 32), **text, **ids).sample


def autoencoder() -> AutoencoderKL:
    torch.manual_seed(0)
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    return AutoencoderKL(block_out_channels=[8, 16], latent_channels=4, norm_num_groups=4, **blocks)


def pipeline_of(name: str) -> Any:
    """A pipeline around the model, with what loading of adapters looks at."""
    if name == "unet":
        scheduler = DDIMScheduler(steps_offset=1, clip_sample=False)
        parts = {"vae": autoencoder(), "text_encoder": text_encoder(), "tokenizer": None, "scheduler": scheduler}
        return StableDiffusionPipeline(
            unet=make(name), safety_checker=None, feature_extractor=None, requires_safety_checker=False, **parts
        )
    cls = {"flux": FluxPipeline, "sd3": StableDiffusion3Pipeline}[name]
    others = ["scheduler", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"]
    others += ["text_encoder_3", "tokenizer_3"] if name == "sd3" else []
    return cls(transformer=make(name), **dict.fromkeys(others))


def sdxl() -> StableDiffusionXLPipeline:
    """Of two text encoders, and a UNet whose attention blocks have several layers and get more than the text."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        **MODELS["unet"][1] | {"layers_per_block": 2, "transformer_layers_per_block": (1, 2)},
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=64,
    )
    encoders = {"text_encoder": text_encoder(), "text_encoder_2": text_encoder(CLIPTextModelWithProjection)}
    others = {"scheduler": EulerDiscreteScheduler(), "tokenizer": None, "tokenizer_2": None}
    return StableDiffusionXLPipeline(unet=unet.eval(), vae=autoencoder(), **encoders, **others)


@torch.no_grad()
def outputs_of_sdxl(pipeline: Any) -> list[Tensor]:
    """What the UNet and both text encoders make of the same inputs at every call."""
    generator = torch.Generator().manual_seed(0)
    x, text, pooled, ids = (torch.randn(s, generator=generator) for s in ((1, 4, 8, 8), (1, 5, 16), (1, 16), (1, 6)))
    picture = pipeline.unet(x, 3, text, added_cond_kwargs={"text_embeds": pooled, "time_ids": ids}).sample
    texts = [encoder.eval()(TEXT_IDS)[0] for encoder in (pipeline.text_encoder, pipeline.text_encoder_2)]
    return [picture, *texts]
