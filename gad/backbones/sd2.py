"""Stable Diffusion 2: a UNet that predicts ε (or v), conditioned by CLIP."""

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from .base import Backbone, Condition
from .tokens import merge_words


class SD2(Backbone):
    part = "unet"
    pipeline_class = StableDiffusionPipeline

    def scheduler(self, steps):
        return DDIMScheduler.from_config(
            self.pipeline.scheduler.config,
            timestep_spacing="trailing",
            set_alpha_to_one=True,
            clip_sample=False,
            thresholding=False,
            steps_offset=1,
        )

    def encode_text(self, prompts):
        tokenizer = self.pipeline.tokenizer
        tokens = tokenizer(
            prompts,
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).to(self.device)
        # As the pipeline: SD2's text encoder takes a mask only where its config says so.
        masked = getattr(self.pipeline.text_encoder.config, "use_attention_mask", False)
        embeds = self.pipeline.text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask if masked else None)
        return embeds[0], torch.ones_like(tokens.input_ids)

    def raw(self, network, x_t, timestep, cond: Condition):
        dtype = network.dtype
        return network(x_t.to(dtype), timestep, encoder_hidden_states=cond.embeds.to(dtype), return_dict=False)[0]

    def blocks(self, network):
        return [*network.down_blocks, network.mid_block, *network.up_blocks]

    def cross_attentions(self, network):
        """Those of the mid block and of the first up block that has any, as Chen et al. (2024) guide Stable
        Diffusion."""
        up = next(b for b in network.up_blocks if getattr(b, "has_cross_attention", False))
        return [m for block in (network.mid_block, up) for n, m in block.named_modules() if n.endswith("attn2")]


def miniature(vae, words) -> StableDiffusionPipeline:
    """A random-weight pipeline at the world's size. `words`: the vocabulary."""
    tokenizer = _tokenizer(words)
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=96,
            intermediate_size=256,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            projection_dim=96,
        )
    )
    unet = UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(40, 80),
        layers_per_block=1,
        cross_attention_dim=96,
        attention_head_dim=(2, 4),  # SD2 names the number of heads so
        norm_num_groups=8,
        use_linear_projection=True,
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        timestep_spacing="trailing",
        clip_sample=False,
        steps_offset=1,
    )
    return StableDiffusionPipeline(
        vae, text_encoder, tokenizer, unet, scheduler, None, None, requires_safety_checker=False
    )


def _tokenizer(words) -> CLIPTokenizer:
    """CLIP's BPE over the world's words; other text falls back to letters."""
    symbols, merges = merge_words([[*w[:-1], w[-1] + "</w>"] for w in words])
    vocab = ["<|startoftext|>", "<|endoftext|>", *symbols]
    return CLIPTokenizer({w: i for i, w in enumerate(vocab)}, merges, model_max_length=24)
