"""Pictures as they stand in the page: WebP in `data:` addresses, bounded one by one and together."""

import base64
import io

from PIL import Image

LONGEST_SIDE = 1280  # pixels; larger pictures are made smaller
LOSSLESS_PIXELS = 2**17  # up to so many pixels are kept exactly: small images are enlarged whole pixel by whole pixel
QUALITY = 85  # of WebP, for larger ones
MOST_BYTES = 40 * 10**6  # of all pictures of a page

#: What a page says of its pictures.
REMARK = (
    f"Pictures are WebP: lossless up to {LOSSLESS_PIXELS:,} pixels, quality {QUALITY} above, at most "
    f"{LONGEST_SIDE:,} pixels along a side; all together at most {MOST_BYTES / 1e6:.0f} MB."
)


class PageFull(ValueError):
    """The page holds as many bytes of pictures as it may."""


class Embedder:
    """Makes `data:` addresses of pictures until they are `most_bytes` together."""

    def __init__(self, most_bytes: int = MOST_BYTES):
        self._left = most_bytes

    def embed(self, picture: Image.Image) -> dict[str, str | int]:
        """`src`, `width` and `height` of a picture in RGB; raises PageFull where there is no more room."""
        picture = picture.convert("RGB")
        picture.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.LANCZOS)
        file = io.BytesIO()
        if picture.width * picture.height <= LOSSLESS_PIXELS:
            picture.save(file, "webp", lossless=True, quality=60)  # here the effort of the search, not of the picture
        else:
            picture.save(file, "webp", quality=QUALITY)
        text = "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()
        if len(text) > self._left:
            raise PageFull("the page has no more room for pictures")
        self._left -= len(text)
        return {"src": text, "width": picture.width, "height": picture.height}
