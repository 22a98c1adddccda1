"""Decoding, scaling and cropping by NVIDIA DALI, on a GPU (`mixed`: nvJPEG and its hardware decoder) or on a CPU.

Files are handed to it group by group, so that order and crops are the caller's.
"""

from collections.abc import Iterable, Sequence
from threading import Lock

import numpy as np
import torch
from nvidia.dali import Pipeline, fn, types

from vavae.decoders.decoder import Crop
from vavae.decoders.jpeg_decoder import Jpeg, JpegDecoder
from vavae.decoders.torchvision_decoder import scaled_square

#: Share of a group that a GPU's hardware decoder takes, where there is one; its cores take the rest beside it. DALI's
#: authors measured (pull request 6366) that 0.9 trains 1.8 % faster, and its slowest groups take twice the time.
HARDWARE_SHARE = 0.65
MOST_FILES = 256  # of a group, which a pipeline must know


class DaliDecoder(JpegDecoder):
    """See `Decoder`. A pipeline is built when it is first needed; one group is in a pipeline at a time.

    What the centre crop halves first leaves DALI whole and is scaled by torch: DALI has no such filter for odd sizes.
    """

    name = "dali"

    def __init__(self, crop: Crop, *, threads: int, device: torch.device | str = "cpu"):
        super().__init__(crop, threads=threads, device=device)
        self._pipelines: dict[bool, Pipeline] = {}
        self._lock = Lock()

    def _decode(self, group: Sequence[Jpeg]) -> Sequence[torch.Tensor]:
        squares: dict[int, torch.Tensor] = {}
        for whole in (False, True):
            places = [place for place, jpeg in enumerate(group) if bool(jpeg.plan.halved) == whole]
            for first in range(0, len(places), MOST_FILES):
                some = places[first : first + MOST_FILES]
                squares |= zip(some, self._run([group[place] for place in some], whole), strict=True)
        return [squares[place] for place in range(len(group))]

    def _run(self, jpegs: Sequence[Jpeg], whole: bool) -> list[torch.Tensor]:
        inputs = {"files": [np.frombuffer(jpeg.content, np.uint8) for jpeg in jpegs]}
        if not whole:
            inputs["start"] = [_corner(jpeg, 0) for jpeg in jpegs]
            inputs["end"] = [_corner(jpeg, self._crop.size) for jpeg in jpegs]
        with self._lock:
            pipeline = self._pipelines.get(whole) or self._build(whole)
            try:
                (output,) = pipeline.run(**inputs)
            except Exception as error:  # DALI raises errors of many types for damaged files; its pipeline is then lost
                del self._pipelines[whole]
                kind = torch.OutOfMemoryError if "out of memory" in str(error).lower() else RuntimeError
                raise kind(str(error)) from error
            if whole:
                squares = self._scaled(output, jpegs)
            else:
                squares = list(torch.from_dlpack(output.as_tensor()).permute(0, 3, 1, 2).clone())  # [3, S, S] each
            if self.device.type == "cuda":  # the next run writes to the memory that this one's copy is of
                torch.cuda.current_stream(self.device).synchronize()
        return squares if whole else [jpeg.plan.upright(s) for s, jpeg in zip(squares, jpegs, strict=True)]

    def _scaled(self, images: Iterable, jpegs: Sequence[Jpeg]) -> list[torch.Tensor]:
        """Squares [3, S, S] of whole images [H, W, 3]."""
        pixels = (torch.from_dlpack(image).permute(2, 0, 1) for image in images)
        return [scaled_square(image, jpeg.plan, "bicubic") for image, jpeg in zip(pixels, jpegs, strict=True)]

    def _build(self, whole: bool) -> Pipeline:
        """A pipeline that decodes, and scales a part of each image to the square unless it is to give it `whole`."""
        gpu = self.device.type == "cuda"
        size = (self._crop.size, self._crop.size)
        kernel = types.INTERP_CUBIC if self._crop.kind == "center" else types.INTERP_TRIANGULAR
        pipeline = Pipeline(
            MOST_FILES, max(self._threads, 1), (self.device.index or 0) if gpu else None, prefetch_queue_depth=1
        )
        with pipeline:
            images = fn.decoders.image(
                fn.external_source(name="files", dtype=types.UINT8, ndim=1),
                device="mixed" if gpu else "cpu",
                output_type=types.RGB,
                adjust_orientation=False,
                jpeg_fancy_upsampling=True,
                hw_decoder_load=HARDWARE_SHARE,
            )
            if not whole:
                start, end = (fn.external_source(name=name, dtype=types.FLOAT, ndim=1) for name in ("start", "end"))
                place = {"roi_start": start, "roi_end": end, "roi_relative": True}
                images = fn.resize(images, size=size, interp_type=kernel, antialias=True, **place)
            pipeline.set_outputs(images)
        pipeline.build()
        self._pipelines[whole] = pipeline
        return pipeline


def _corner(jpeg: Jpeg, offset: int) -> np.ndarray:
    """A corner of the square in the scaled image, float32 [2]: parts of its height and width."""
    height, width = jpeg.plan.scaled
    return np.array([(jpeg.plan.top + offset) / height, (jpeg.plan.left + offset) / width], np.float32)
