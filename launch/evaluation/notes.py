"""What the reader of a figure has to know: few images, images there twice, files that were stored with loss."""

from launch.evaluation.features import Extractor, facts_of
from launch.evaluation.one_pass import ImageFeatures

PROTOCOL = 50_000  # images of the published figures
_FEW = 10_000


def count_notes(count: int) -> list[str]:
    """Of the number of samples."""
    if count < _FEW:
        return [
            f"{count:,} samples: Fréchet distances fall as N grows (arXiv 1911.07023), so this compares with figures "
            f"of the same N alone; the published ones are of {PROTOCOL:,}"
        ]
    return [f"{count:,} samples; the published figures are of {PROTOCOL:,}"] if count != PROTOCOL else []


def image_notes(samples: ImageFeatures, reference: ImageFeatures | None) -> list[str]:
    """Of equal images, and of what the samples' files were."""
    found, once = [], samples.hash_set
    if twice := samples.count - len(once):
        found.append(f"{twice:,} of {samples.count:,} samples have the pixels of an earlier one")
    if reference is not None and (known := len(once & reference.hash_set)):
        found.append(f"{known:,} samples have the pixels of a reference image")
    if lossy := samples.seen.get("lossy"):
        found.append(f"{lossy:,} samples were stored with loss (JPEG, WebP): their artefacts are measured with them")
    if resized := samples.seen.get("resized"):
        found.append(f"{resized:,} samples had another size before they were scaled and cropped")
    return found


def network_notes(extractor: Extractor) -> list[str]:
    """Of weights that are not those of the published figures, as far as their hash is known."""
    return [
        f"the weights of {facts['name']} are not the published file, or in another form: their SHA-256 is "
        f"{facts.get('sha256')}"
        for facts in facts_of(extractor)
        if facts.get("published") is False
    ]


def check_count(measured: ImageFeatures, allowed: bool, what: str = "samples") -> list[str]:
    """A note where there are no more images than features; raises ValueError there unless `allowed`."""
    if measured.count < 2:
        raise ValueError(f"{measured.description} holds {measured.count} image; a distance needs at least 2")
    width = max(len(moments.mean) for name, moments in measured.moments.items() if name != "spatial")
    if measured.count > width:
        return []
    problem = f"{measured.count} {what} for {width} features: the covariance is singular and the distance far too large"
    if not allowed:
        raise ValueError(f"{measured.description}: {problem} (--allow-few measures all the same)")
    return [problem]
