"""SANA: a linear-attention transformer that predicts a flow, over a deep-compression autoencoder and Gemma-2."""

import inspect
from functools import cached_property

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    SanaPipeline,
    SanaSprintPipeline,
    SanaTransformer2DModel,
    SCMScheduler,
)
from transformers import Gemma2Config, Gemma2Model, GemmaTokenizer

from .base import Backbone, Condition
from .tokens import merge_words

SPRINT = inspect.signature(SanaSprintPipeline.__call__).parameters["guidance_scale"].default


class Sana(Backbone):
    """SANA-Sprint's network is a flow's too: what its pipeline adds turns TrigFlow's state and time into a flow's and
    the answer back. It is told the time itself, and a guidance scale, that pipeline's default."""

    part = "transformer"
    pipeline_class = SanaPipeline
    others = (SanaSprintPipeline,)
    call_hint = ",\n             height=64, width=64, use_resolution_binning=False, complex_human_instruction=None"
    max_tokens = 300

    def scheduler(self, steps):
        config = self.pipeline.scheduler.config
        shift = config.get("flow_shift") or config.get("shift", 3.0)
        # End where trailing spacing would: Euler's own spacing wastes its last step next to clean.
        last = shift / steps / (1 + (shift - 1) / steps)
        return FlowMatchEulerDiscreteScheduler(
            config.num_train_timesteps, shift=shift, shift_terminal=last if steps > 1 else None
        )

    @cached_property
    def instruction(self) -> str:
        """What the pipeline says to Gemma before a prompt; nothing where its text encoder has no room for it, as a
        miniature's."""
        lines = inspect.signature(self.pipeline_class.__call__).parameters["complex_human_instruction"].default
        text, room = "\n".join(lines), self.pipeline.text_encoder.config.max_position_embeddings
        return text if len(self.pipeline.tokenizer.encode(text, verbose=False)) + self.max_tokens <= room else ""

    @cached_property
    def skipped(self):
        return len(self.pipeline.tokenizer.encode(self.instruction, verbose=False)) - 2 if self.instruction else 0

    def encode_text(self, prompts):
        prompts, parts, order = [p.lower().strip() for p in prompts], [], []
        for said in (False, True):  # the empty prompt has no instruction
            if own := [i for i, p in enumerate(prompts) if bool(p) == said]:
                parts.append(self._encode([self.instruction * said + prompts[i] for i in own], self.skipped * said))
                order += own
        if len(parts) == 1:
            return parts[0]
        places = torch.tensor(order, device=self.device).argsort()
        embeds, mask = (torch.cat(x)[places] for x in zip(*parts, strict=True))
        return embeds, mask

    def _encode(self, texts, skipped):
        """As the pipeline: of what it reads, the first token's embedding and those after the instruction."""
        self.pipeline.tokenizer.padding_side = "right"
        length = min(self.max_tokens, self.pipeline.tokenizer.model_max_length)
        tokens = self.pipeline.tokenizer(
            texts, padding="max_length", max_length=length + skipped, truncation=True, return_tensors="pt"
        ).to(self.device)
        embeds = self.pipeline.text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask)[0]
        kept = [0, *range(skipped + 1, skipped + length)]
        return embeds[:, kept], tokens.attention_mask[:, kept]

    def raw(self, network, x_t, timestep, cond: Condition):
        dtype, config, guidance = network.dtype, network.config, None
        scale = config.timestep_scale
        if config.guidance_embeds:
            scale = 1 / self.levels.train_steps
            guidance = torch.full_like(timestep, SPRINT * config.guidance_embeds_scale)
        out = network(
            x_t.to(dtype),
            encoder_hidden_states=cond.embeds.to(dtype),
            encoder_attention_mask=cond.mask,
            timestep=timestep * scale,
            guidance=guidance,
            return_dict=False,
        )[0]
        return out[:, : x_t.shape[1]]

    def as_saved(self, network, steps):
        if not network.config.guidance_embeds:
            return super().as_saved(network, steps)
        pipeline = SanaSprintPipeline(**self.pipeline.components | {"scheduler": SCMScheduler()})
        call = {"num_inference_steps": steps, "guidance_scale": SPRINT}
        return pipeline, call | ({} if steps == 2 else {"intermediate_timesteps": None})


def miniature(vae, words) -> SanaPipeline:
    """A random-weight pipeline at the world's size. `words`: the vocabulary."""
    tokenizer = _tokenizer(words)
    text_encoder = Gemma2Model(
        Gemma2Config(
            vocab_size=len(tokenizer),
            hidden_size=96,
            intermediate_size=256,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=24,
            query_pre_attn_scalar=24,
            sliding_window=64,
            max_position_embeddings=512,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    transformer = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=8,
        attention_head_dim=16,
        num_layers=5,
        num_cross_attention_heads=4,
        cross_attention_head_dim=32,
        cross_attention_dim=128,
        caption_channels=96,
        mlp_ratio=2.5,
        sample_size=16,
        patch_size=2,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return SanaPipeline(tokenizer, text_encoder, vae, transformer, scheduler)


def _tokenizer(words) -> GemmaTokenizer:
    """Gemma's BPE over the world's words; other text falls back to letters."""
    symbols, merges = merge_words([["▁", *w] if w != "," else [w] for w in words])
    vocab = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *symbols]
    return GemmaTokenizer(
        {w: i for i, w in enumerate(vocab)}, merges, model_max_length=24, add_bos_token=True, padding_side="right"
    )
