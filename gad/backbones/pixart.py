"""PixArt-α: a diffusion transformer that predicts ε (and a learned sigma, cut here), conditioned by T5."""

import torch
from diffusers import DDIMScheduler, PixArtAlphaPipeline, PixArtTransformer2DModel
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from .base import Backbone, Condition


class PixArt(Backbone):
    part = "transformer"
    pipeline_class = PixArtAlphaPipeline
    call_hint = ", use_resolution_binning=False"
    max_tokens = 120

    def scheduler(self, steps):
        config = dict(self.pipeline.scheduler.config)
        return DDIMScheduler.from_config(
            config,
            prediction_type=config.get("prediction_type", "epsilon"),
            timestep_spacing="trailing",
            set_alpha_to_one=True,
            clip_sample=False,
            thresholding=False,
            steps_offset=0,
        )

    def encode_text(self, prompts):
        tokens = self.pipeline.tokenizer(
            [p.lower().strip() for p in prompts],
            padding="max_length",
            max_length=min(self.max_tokens, self.pipeline.tokenizer.model_max_length),
            truncation=True,
            return_tensors="pt",
        ).to(self.device)
        embeds = self.pipeline.text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask)[0]
        return embeds, tokens.attention_mask

    def raw(self, network, x_t, timestep, cond: Condition):
        dtype, size = network.dtype, {"resolution": None, "aspect_ratio": None}
        if network.config.sample_size == 128:  # the 1024-px models are told the image's size
            pixels = x_t.shape[-2] * self.pipeline.vae_scale_factor, x_t.shape[-1] * self.pipeline.vae_scale_factor
            size = {
                "resolution": torch.tensor([pixels], dtype=dtype, device=x_t.device).expand(len(x_t), -1),
                "aspect_ratio": torch.tensor([[pixels[0] / pixels[1]]], dtype=dtype, device=x_t.device).expand(
                    len(x_t), -1
                ),
            }
        out = network(
            x_t.to(dtype),
            encoder_hidden_states=cond.embeds.to(dtype),
            encoder_attention_mask=cond.mask,
            timestep=timestep,
            added_cond_kwargs=size,
            return_dict=False,
        )[0]
        return out[:, : x_t.shape[1]]


def miniature(vae, words) -> PixArtAlphaPipeline:
    """A random-weight pipeline at the world's size. `words`: the vocabulary."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0), (",", -2.0)]
    pieces += [("▁" + w, -2.0) for w in words if w != ","]
    tokenizer = T5Tokenizer(pieces, extra_ids=0, model_max_length=24)
    text_encoder = T5EncoderModel(
        T5Config(vocab_size=len(tokenizer), d_model=96, d_kv=24, d_ff=256, num_layers=3, num_heads=4, dropout_rate=0.0)
    )
    _read_neighbours(text_encoder)
    transformer = PixArtTransformer2DModel(
        sample_size=16,
        num_layers=5,
        num_attention_heads=4,
        attention_head_dim=32,
        cross_attention_dim=128,
        caption_channels=96,
        in_channels=4,
        out_channels=8,
        patch_size=2,
        interpolation_scale=1,
        use_additional_conditions=False,
    )
    _start_as_identity(transformer)
    scheduler = DDIMScheduler(
        beta_start=0.0001, beta_end=0.02, beta_schedule="linear", timestep_spacing="trailing", clip_sample=False
    )
    return PixArtAlphaPipeline(tokenizer, text_encoder, vae, transformer, scheduler)


@torch.no_grad()
def _read_neighbours(text_encoder):
    """One of T5's heads begins with the word before in view, one with the word after. Only relative biases tell T5
    where words stand, and beside what words say they scarcely learn to: objects then take each other's shapes.
    Pretrained, T5 knows."""
    bias = text_encoder.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
    before, after = 1, bias.shape[0] // 2 + 1  # buckets of distance one
    bias[before, 0] += 5
    bias[after, 1] += 5


@torch.no_grad()
def _start_as_identity(network):
    """Weights for which ε̂ ≈ x_t, with small residual branches. At high noise ε is x_t but for a hundredth, which a
    transformer with a normalised output is slow to find by itself, and whose error x̂0 sees times `1/α`."""
    width, channels, patch = network.inner_dim, network.config.in_channels, network.config.patch_size
    n = channels * patch**2
    # Orthonormal and free of a mean, which the last norm takes out.
    basis = torch.linalg.qr(torch.cat([torch.ones(width, 1), torch.randn(width, n)], 1))[0][:, 1:]
    basis = basis.reshape(width, channels, patch, patch)
    network.pos_embed.proj.weight.copy_(basis)
    network.pos_embed.proj.bias.zero_()
    for block in network.transformer_blocks:
        for last in (block.attn1.to_out[0], block.attn2.to_out[0], block.ff.net[2]):
            last.weight.mul_(0.1)
            last.bias.zero_()
    network.scale_shift_table.zero_()
    network.proj_out.weight.zero_()
    network.proj_out.bias.zero_()
    scale = (0.5 + n / width) ** 0.5  # RMS of the tokens: a sine's half, and the patch's share
    out = network.proj_out.weight.view(patch, patch, network.config.out_channels, width)
    out[:, :, :channels] = scale * basis.permute(2, 3, 1, 0)
