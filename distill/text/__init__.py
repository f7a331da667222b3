"""Corpora of text, far larger than memory: which files, how they are cut into pieces, and the documents of a piece.

A document is known by its file and its row there. Rows are numbered as they stand, also those that hold no document:
empty lines, and lines that cannot be read.
"""

from distill.text.corpus import Corpus, CorpusConfig, Piece, find_files, would_be_read
from distill.text.digests import digest
from distill.text.documents import Block, Unreadable, read_blocks

__all__ = [
    "Block",
    "Corpus",
    "CorpusConfig",
    "Piece",
    "Unreadable",
    "digest",
    "find_files",
    "read_blocks",
    "would_be_read",
]
