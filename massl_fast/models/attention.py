"""Where a network looks: attention of the [CLS] token, or similarity of places to the whole image."""

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


@torch.no_grad()
def similarity_to_mean(network: nn.Module, images: Tensor) -> Tensor:
    """Cosine of each place of the last feature map with the mean of all places, for networks without a [CLS] token.

    Args:
        images [N, 3, H, W], normalised, of a size that the network takes.

    Returns:
        [N, 1, h, w], float32, on the CPU, from -1 to 1.

    Raises:
        ValueError: the network keeps no map, or one that is too small to show anything (fewer than 3 × 3 places).
    """
    kind = type(network).__name__
    if not hasattr(network, "forward_features"):
        raise ValueError(f"{kind} gives no features per place of an image.")
    features = network.forward_features(images).float()
    if features.dim() == 3 and hasattr(network, "patch_embed"):
        grid = network.patch_embed.dynamic_feat_size(images.shape[-2:])
        features = features[:, getattr(network, "num_prefix_tokens", 0) :].transpose(1, 2).unflatten(2, grid)
    if features.dim() != 4:
        raise ValueError(f"{kind} gives features of shape {tuple(features.shape)}, which are no map of places.")
    if min(features.shape[-2:]) < 3:
        raise ValueError(
            f"The last feature map of {kind} has {features.shape[-2]} × {features.shape[-1]} places for images of {images.shape[-1]} "
            f"pixels, too few to show where it looks."
        )
    mean = features.mean((2, 3), keepdim=True)
    return torch.cosine_similarity(features, mean, dim=1)[:, None].cpu()
