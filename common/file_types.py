"""File types told by the first bytes: a name may say something else, and a download may be a web page."""

import codecs

#: The number that a file of torch.save begins with in its format of before version 1.6, as it is pickled.
LEGACY_TORCH = b"l\xfc\x9cF\xf9 j\xa8P\x19."
_ENCODINGS = {codecs.BOM_UTF8: "utf-8", codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be"}
_SIGNATURES = {
    b"\x1f\x8b": "is compressed by gzip: unpack it first",
    b"BZh": "is compressed by bzip2: unpack it first",
    b"\xfd7zXZ": "is compressed by xz: unpack it first",
    b"\x28\xb5\x2f\xfd": "is compressed by zstd: unpack it first",
    b"7z\xbc\xaf": "is a 7z archive: unpack it first",
    b"\x89HDF": "is an HDF5 file, as Keras writes; that format is not read",
    b"GGUF": "is a GGUF file; that format is not read",
    b"\x93NUMPY": "is an array of NumPy; that format is not read",
    b"PK\x03\x04": "is a damaged ZIP archive, or one that torch.save did not write",
    b"\x80": "is damaged, or a pickle that torch.save did not write",
}


def as_text(begin: bytes) -> str | None:
    """The first bytes of a file as text, without byte order mark; None where they are none. They may end anywhere."""
    encoding = next((encoding for mark, encoding in _ENCODINGS.items() if begin.startswith(mark)), "utf-8")
    text = codecs.getincrementaldecoder(encoding)("replace").decode(begin).removeprefix("\ufeff")
    return text if text and all(c.isspace() or (c.isprintable() and c != "\ufffd") for c in text) else None


def is_safetensors(begin: bytes) -> bool:
    """Whether a file that begins so is a safetensors file: the length of a header, which is JSON."""
    return begin[4:8] == bytes(4) and begin[8:9] == b"{"


def describe_content(begin: bytes) -> str | None:
    """The end of a sentence on why no tensors are read from a file with these first bytes; None for unknown ones."""
    if not begin:
        return "is empty"
    if (text := as_text(begin)) is not None:
        return f"is text, no file of tensors: it begins with {text[:30]!r}"
    return next((what for signature, what in _SIGNATURES.items() if begin.startswith(signature)), None)
