"""Gradients of equal replicas averaged as one flat buffer, after the backward pass and in one exchange.

DistributedDataParallel exchanges buckets while the backward pass computes, from hooks that no CUDA graph records. Here the exchange lies
between two recordings, and what ranks vote on rides along. Gradients are multiplied by 1 / ranks before they are summed, as
DistributedDataParallel does; of two ranks the averages are therefore the same to the last bit. From three on they may differ in it,
because what a ring adds first depends on a number's place in the buffer.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from massl_fast.distributed.world import World


class FlatGradients:
    """The buffer of ``module``'s gradients, with room for ``votes`` numbers behind them. Building it is a collective call: every rank takes
    rank 0's weights, as DistributedDataParallel has it.

    After ``average_`` gradients are views of the buffer. Until the next step they are there twice only while they are copied in.
    """

    @torch.no_grad()
    def __init__(self, module: nn.Module, world: World, votes: int):
        self.world = world
        for tensor in (*module.parameters(), *module.buffers()):
            dist.broadcast(tensor, src=0)
        named = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
        self.names, self.parameters = list(named), list(named.values())
        formats = {parameter.dtype for parameter in self.parameters}
        assert len(formats) == 1, f"one buffer holds one format, not {formats}"
        sizes = [parameter.numel() for parameter in self.parameters]
        self.buffer = torch.zeros(sum(sizes) + votes, dtype=formats.pop(), device=world.device)
        self.gradients, self.votes = self.buffer.split([sum(sizes), votes])
        # Laid out as the weights, so that optimizers walk through both alike.
        self.views = [
            piece.as_strided(parameter.shape, parameter.stride()) for piece, parameter in zip(self.gradients.split(sizes), self.parameters)
        ]

    def exchange_over(self, world: World) -> None:
        """Exchange by ``world`` from now on."""
        self.world = world

    @torch.no_grad()
    def average_(self, votes: Tensor, first: Callable[[], None] = lambda: None) -> Tensor:
        """Put averages in place of the gradients; returns the sum of ``votes`` over ranks. ``first`` is called just before the exchange."""
        gradients: list[Tensor] = []
        for name, parameter in zip(self.names, self.parameters):
            assert parameter.grad is not None, f"{name} took no part in the loss"
            gradients.append(parameter.grad)
        torch._foreach_copy_(self.views, gradients)
        self.gradients.mul_(1 / self.world.size)
        self.votes.copy_(votes)

        def exchange() -> None:
            first()
            dist.all_reduce(self.buffer)

        self.world.exchange(exchange)
        for parameter, view in zip(self.parameters, self.views):
            parameter.grad = view
        return self.votes
