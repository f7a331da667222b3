"""Digests of documents, by which an export knows those that were chosen."""

from __future__ import annotations

from hashlib import blake2b


def digest(text: str) -> int:
    """BLAKE2b of the text's UTF-8, 64 bits, little-endian."""
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")
