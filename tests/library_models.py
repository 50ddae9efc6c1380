"""Tiny models of transformers and diffusers whose parameters all have one value."""

import torch


def filled(model, value):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)
    return model


def tiny_gpt2(value, **settings):
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_layer=1, n_head=1, n_embd=4, vocab_size=8, n_positions=8, bos_token_id=1, eos_token_id=2, **settings
    )
    return filled(GPT2LMHeadModel(config), value)


def tiny_unet(value):
    from diffusers import UNet2DModel

    return filled(
        UNet2DModel(
            sample_size=4,
            block_out_channels=(4,),
            layers_per_block=1,
            norm_num_groups=2,
            attention_head_dim=2,
            down_block_types=("DownBlock2D",),
            up_block_types=("UpBlock2D",),
        ),
        value,
    )
