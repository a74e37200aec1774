"""DALI's graph: encoded images and what was drawn for them in, one batch of crops a view out.

An image is decoded once; a view is one resize of a region of it (which mirrors, too), one colour matrix, a blur, a solarization and
the normalisation. Nothing in the graph is random and nothing in it is remembered: what comes out depends on what is fed alone.
"""

from collections.abc import Callable, Sequence

from nvidia.dali import fn, math, pipeline_def, types
from nvidia.dali.pipeline import Pipeline

from massl_fast.data.crops import View
from massl_fast.data.dali.draws import Draws

INTERPOLATIONS = {"bicubic": types.INTERP_CUBIC, "bilinear": types.INTERP_LINEAR}


def drawn_inputs(views: Sequence[View]) -> list[str]:
    """The fields of Draws that the graph of these views takes."""
    names = ["start", "end"]
    if any(map(_colours, views)):
        names += ["matrix", "mean_matrix"]
    if any(view.blur_probability for view in views):
        names.append("sigma")
    if any(view.solarize_probability for view in views):
        names.append("threshold")
    assert set(names) <= set(Draws.__dataclass_fields__)
    return names


def build_graph(
    views: Sequence[View],
    source: Callable[[], list],
    *,
    batch_size: int,
    num_threads: int,
    device_id: int | None,
    decode: str,
    augment: str,
    half: bool,
    prefetch: int,
) -> Pipeline:
    """The pipeline, built. ``source`` gives a list of N encoded images, uint8 [bytes], and the arrays of ``drawn_inputs``, N rows each.

    Outputs are [N, H, W, 3], one a view, normalised, on the GPU where there is a ``device_id``; float16 if ``half``, else float32.
    """
    pipeline = _graph(
        tuple(views),
        source,
        drawn_inputs(views),
        decode,
        augment,
        device_id is not None,
        types.FLOAT16 if half else types.FLOAT,
        batch_size=batch_size,
        num_threads=num_threads,
        device_id=device_id,
        prefetch_queue_depth=prefetch,
    )
    pipeline.build()
    return pipeline


def _decoded(source: Callable[[], list], names: list[str], decode: str, augment: str):
    encoded, *drawn = fn.external_source(source=source, num_outputs=1 + len(names), batch=True)
    # Fancy upsampling is what Pillow's decoder does.
    images = fn.decoders.image(encoded, device=decode, output_type=types.RGB, jpeg_fancy_upsampling=True)
    if augment == "gpu" and decode == "cpu":
        images = images.gpu()
    return images, dict(zip(names, drawn))


def _resized(images, drawn: dict, n: int, view: View):
    return fn.resize(
        images,
        size=[view.size, view.size],
        roi_start=drawn["start"][n],
        roi_end=drawn["end"][n],
        interp_type=INTERPOLATIONS[view.interpolation],
        antialias=True,
    )


def _coloured(crops, drawn: dict, n: int, augment: str):
    mean = fn.reductions.mean(crops, axes=[0, 1], keep_dims=True)
    shift = fn.coord_transform(mean, M=drawn["mean_matrix"][n])
    if augment == "cpu":
        return fn.coord_transform(crops, M=drawn["matrix"][n], T=fn.reshape(shift, shape=[3]), dtype=types.UINT8)
    # An operator's arguments live on the host; the mean would have to come back from the GPU for it.
    return fn.cast(fn.coord_transform(crops, M=drawn["matrix"][n]) + shift, dtype=types.UINT8)


def _blurred(crops, sigma, augment: str):
    if augment == "gpu":
        # Splitting a batch would cost more launches than it saves; a window of one pixel leaves a crop as it is.
        blurred = fn.gaussian_blur(crops, sigma=sigma, window_size=fn.cast(2 * math.ceil(3 * sigma) + 1, dtype=types.INT32))
    elif sigma > 0:
        blurred = fn.gaussian_blur(crops, sigma=sigma)
    else:
        blurred = crops
    return blurred


def _solarized(crops, threshold):
    return crops ^ fn.cast((crops >= threshold) * 255, dtype=types.UINT8)


def _normalized(crops, view: View, to_gpu: bool, dtype):
    # Whatever the crops were made on, uint8 is the smallest form in which to move them.
    return fn.crop_mirror_normalize(
        crops.gpu() if to_gpu else crops,
        mean=[255 * m for m in view.mean],
        std=[255 * s for s in view.std],
        dtype=dtype,
        output_layout="HWC",
    )


@pipeline_def(enable_conditionals=True)
def _graph(views, source, names, decode, augment, to_gpu, dtype):
    images, drawn = _decoded(source, names, decode, augment)
    outputs = []
    for n, view in enumerate(views):
        crops = _resized(images, drawn, n, view)
        if _colours(view):
            crops = _coloured(crops, drawn, n, augment)
        if view.blur_probability > 0:
            crops = _blurred(crops, drawn["sigma"][n], augment)
        if view.solarize_probability > 0:
            threshold = drawn["threshold"][n]
            crops = _solarized(crops, threshold.gpu() if augment == "gpu" else threshold)
        outputs.append(_normalized(crops, view, to_gpu, dtype))
    return tuple(outputs)


def _colours(view: View) -> bool:
    return bool(view.grayscale_probability or (view.jitter_probability and any(view.jitter)))
