"""The DALI path: threads in C++ decode and augment, on the CPU or on the GPU.

DALI's own readers and random operators are not used: the loader feeds it bytes in the order of ``order.Order`` and with the draws of
``crops.draw``. So both loaders show an image the same crops, the pipeline has no state that a checkpoint would have to hold, and resuming
is seeking, at any world size.
"""

from collections import deque
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def, types

from massl_fast.config import Config
from massl_fast.data.crops import View
from massl_fast.data.dali.feed import Feed, Prepared
from massl_fast.data.dali.graph import build_graph, drawn_inputs
from massl_fast.data.loader import Loader
from massl_fast.data.order import Batch
from massl_fast.data.sources import Source

LEAST_FEEDERS, MOST_FEEDERS = 2, 8  # threads that read and draw, a micro-batch each: they mostly wait for storage


class DaliLoader(Loader):
    """Interchangeable with ``torchvision_loader.TorchvisionLoader``.

    A file that DALI cannot decode is decoded by Pillow; one that neither can is named and replaced as ``Loader`` says. If a decoder of DALI
    fails, which ends a pipeline, the loader finds the file, builds the pipeline anew and continues at the same micro-batch.

    Args: those of ``Loader``, and
        num_workers: DALI's threads, at least 1. prefetch: micro-batches that the pipeline works ahead.
        device: where the crops go; normalisation happens there.
        decode: ``cpu``, or ``mixed`` for the GPU with its share of hardware decoding. augment: ``cpu`` or ``gpu``.
            Without a GPU both are ``cpu``, and ``notes`` says so.
        dtype: of the crops; None is float16 on a GPU (half the traffic of twelve crops) and float32 on the CPU.

    Raises ValueError as ``Loader`` does, and for mixed decoding of crops made on the CPU.
    """

    name = "dali"

    def __init__(
        self,
        source: Source,
        views: Sequence[View],
        *,
        num_workers: int = 1,
        decode: str = "cpu",
        augment: str = "cpu",
        dtype: torch.dtype | None = None,
        **shared: Any,
    ) -> None:
        super().__init__(source, views, num_workers=max(1, num_workers), **shared)
        self.num_on_host = 0  # images that Pillow decoded instead of DALI
        on_gpu = self.device.type == "cuda"
        if not on_gpu and (decode, augment) != ("cpu", "cpu"):
            self.notes = (f"Without a GPU, DALI decodes and augments on the CPU (the settings say: decode {decode}, augment {augment}).",)
            decode = augment = "cpu"
        if decode == "mixed" and augment == "cpu":
            raise ValueError(
                "data.decode mixed decodes on the GPU, data.augment cpu augments on the CPU: every image would travel back. "
                "Set data.decode cpu, or data.augment gpu."
            )
        self.decode, self.augment = decode, augment
        self.dtype = dtype or (torch.float16 if on_gpu else torch.float32)
        if self.dtype not in (torch.float16, torch.float32):
            raise ValueError(f"DALI makes crops of float16 or float32, not of {self.dtype}.")
        self._device_id = (torch.cuda.current_device() if self.device.index is None else self.device.index) if on_gpu else None
        self._feed = Feed(self.source, self.views, self.seed)
        self._inputs = drawn_inputs(self.views)

    @classmethod
    def own_arguments(cls, config: Config, device: torch.device) -> dict[str, Any]:
        # Without autocast half-precision crops would meet float32 weights.
        wide = torch.float32 if config.train.precision == "fp32" else None
        return {"decode": config.data.decode, "augment": config.data.augment, "dtype": wide}

    def _batches(self, start_step: int) -> Iterator[Batch]:
        keys = self.order.micro_batches(start_step)
        feeders = min(max(LEAST_FEEDERS, self.num_workers // 2), MOST_FEEDERS)
        with ThreadPoolExecutor(feeders, "massl-fast-feed") as executor:
            ahead: deque[Future[Prepared]] = deque()
            running: deque[Prepared] = deque()  # in the pipeline, the next one to come out first

            def feed() -> list:
                while len(ahead) <= feeders:
                    ahead.append(executor.submit(self._feed.prepare, *next(keys)))
                prepared = ahead.popleft().result()
                if prepared.failure:
                    self.bad.count(len(prepared.wanted), prepared.bad)
                    raise ValueError(prepared.failure)
                running.append(prepared)
                return [prepared.encoded, *(getattr(prepared.draws, name) for name in self._inputs)]

            pipeline = self._build(feed)
            try:
                while True:
                    try:
                        outputs = pipeline.run(torch.cuda.current_stream(self.device) if self._device_id is not None else None)
                    except RuntimeError as error:
                        self._find_culprits(running, error)
                        again = [executor.submit(self._feed.prepare, p.epoch, p.wanted) for p in running]
                        ahead.extendleft(reversed(again))
                        running.clear()
                        pipeline = self._build(feed)
                        continue
                    prepared = running.popleft()
                    self.bad.count(len(prepared.wanted) + len(prepared.bad), prepared.bad)
                    self.num_on_host += prepared.on_host
                    yield Batch([_as_torch(crops) for crops in outputs], torch.from_numpy(prepared.indices))
            finally:
                executor.shutdown(wait=False, cancel_futures=True)

    def _build(self, feed):
        return build_graph(
            self.views,
            feed,
            batch_size=self.order.device_batch,
            num_threads=self.num_workers,
            device_id=self._device_id,
            decode=self.decode,
            augment=self.augment,
            half=self.dtype == torch.float16,
            prefetch=self.prefetch,
        )

    def _find_culprits(self, running: Collection[Prepared], error: RuntimeError) -> None:
        """Has images that DALI cannot decode decoded by Pillow from now on. Raises ``error`` where there are none."""
        images = [image for prepared in running for image in zip(prepared.indices.tolist(), prepared.encoded)]
        culprits = {images[n][0] for n in _refused([data for _, data in images], self.decode, self._device_id)}
        if culprits <= self._feed.not_for_dali:
            raise error
        self._feed.not_for_dali.update(culprits)


def _as_torch(crops) -> torch.Tensor:
    """DALI's [N, H, W, 3] as [N, 3, H, W], channels-last, the same memory: kept alive by the tensor, given back when that is freed."""
    return torch.from_dlpack(crops.as_tensor()).permute(0, 3, 1, 2)


def _refused(images: Sequence[np.ndarray], device: str, device_id: int | None) -> Iterator[int]:
    """Which of the images DALI does not decode, tried one by one; a failure ends a pipeline, and another takes over."""

    @pipeline_def
    def graph():
        encoded = fn.external_source(source=lambda: [images[at]], batch=True)
        return fn.decoders.image(encoded, device=device, output_type=types.RGB)

    at = 0
    while at < len(images):
        pipeline = graph(batch_size=1, num_threads=1, device_id=device_id, prefetch_queue_depth=1)
        try:
            while at < len(images):
                pipeline.run()
                at += 1
        except RuntimeError:
            yield at
            at += 1
