"""Where the [CLS] token of the last block looks."""

from __future__ import annotations

import torch
from torch import Tensor, nn


@torch.no_grad()
def class_token_attention(network: nn.Module, images: Tensor) -> Tensor:
    """Attention of the [CLS] token over the patches in the last block of a timm vision transformer.

    Fused attention never forms its weights, so queries and keys are read where the last block computes them, and the one row of the softmax
    is computed explicitly.

    Args:
        images [N, 3, H, W], normalised, of a size that the network takes.

    Returns:
        [N, heads, H / patch, W / patch], float32, on the CPU. A map sums to one minus the attention to [CLS] and registers.

    Raises:
        ValueError: the network has no [CLS] token, or attention of another kind; the sentence says which.
    """
    kind = type(network).__name__
    blocks = getattr(network, "blocks", None)
    attention = getattr(blocks[-1], "attn", None) if blocks is not None and len(blocks) else None
    if attention is None or not hasattr(network, "patch_embed"):
        raise ValueError(f"{kind} does not end in a transformer block: it has no attention from a [CLS] token to patches.")
    if getattr(network, "cls_token", None) is None:
        raise ValueError(f"This {kind} pools its patches and has no [CLS] token whose attention could be shown.")
    if not all(hasattr(attention, part) for part in ("qkv", "q_norm", "k_norm", "num_heads", "scale")):
        raise ValueError(f"The attention of this {kind}, {type(attention).__name__}, keeps its queries and keys to itself.")
    if getattr(attention, "rope", None) is not None or getattr(network, "rope", None) is not None:
        raise ValueError(f"This {kind} rotates queries and keys by position (RoPE); its attention maps are not drawn.")

    seen: list[Tensor] = []
    hook = attention.qkv.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    try:
        network.forward_features(images)
    finally:
        hook.remove()
    qkv = seen[-1]
    num_images, num_tokens, _ = qkv.shape
    queries, keys, _ = qkv.reshape(num_images, num_tokens, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
    query = attention.q_norm(queries[:, :, :1]).float()
    keys = attention.k_norm(keys).float()
    weights = (query * attention.scale @ keys.transpose(-2, -1)).softmax(-1)[:, :, 0]  # [N, heads, tokens]
    patches = weights[..., network.num_prefix_tokens :]
    grid = network.patch_embed.dynamic_feat_size(images.shape[-2:])
    return patches.reshape(num_images, attention.num_heads, *grid).cpu()
