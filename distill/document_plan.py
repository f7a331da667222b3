"""What a run over text would do: its files, and rough bounds on time, memory and disk. Nothing is run or written.

The rate is a measurement of one machine (tools/bench/importance.py on a 2.5 GHz Xeon): it tells minutes from hours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from distill.contracts import DocumentSelector
from distill.document_run import open_corpora
from distill.recipe import Recipe
from distill.report.quantities import long_seconds, size
from distill.report.tables import counted
from distill.run_folder import RunFolder, State, state_lines
from distill.text import Corpus, Piece
from distill.training.engine import worker_count

# Bytes on disk that one core reads, parses, hashes and scores in a second, in one of two passes.
BYTES_A_SECOND = {"fast": 4.5e7, "sha256": 3e6}
START_SECONDS = 4.0
PROCESS_BYTES = 400_000_000  # of a process that reads, more where a row group is larger
_PASSES = 2
_DOCUMENT_BYTES = 3500  # on disk, of a usual document
_PIECE_BYTES = 100_000  # that counting leaves of a large piece


def plan_documents(recipe: Recipe, step: DocumentSelector, folder: RunFolder, *, state: State) -> str:
    """The plan of a run as text.

    Args:
        recipe, step, folder: of the run.
        state: how the run would begin in the folder.

    Raises:
        InputError: what the run itself would refuse, as far as the first rows show.
    """
    corpus, targets = open_corpora(recipe)
    workers = worker_count()
    where = "the Ray cluster" if recipe.engine == "ray" else counted(workers, "process")
    lines = [
        f"would run 1 step in {where}; nothing was run",
        *state_lines(state, folder),
        "",
        f"data     text: {_told(corpus)}",
        *(f"target   {name}: {_told(target)}" for name, target in targets.items()),
        f"step 0   {step.kind} {step.name}: {_budget(step)}",
        "",
        *_costs(step, corpus, targets, workers),
        "",
        "would write",
        *(f"  {path}" for path in folder.outputs),
    ]
    return "\n".join(lines)


def _told(corpus: Corpus) -> str:
    return f"{counted(len(corpus.files), 'file')}, {size(_bytes(corpus))} on disk"


def _bytes(corpus: Corpus) -> int:
    return sum(file.size for file in corpus.files)


def _budget(step: DocumentSelector) -> str:
    config = step.config
    count, fraction = getattr(config, "count", None), getattr(config, "fraction", None)
    if count is not None:
        return counted(count, "document")
    return "" if fraction is None else f"{fraction:g} of the documents"


def _costs(
    step: DocumentSelector, corpus: Corpus, targets: Mapping[str, Corpus], workers: int
) -> Sequence[str]:
    rate = BYTES_A_SECOND[getattr(step.config, "hash", "fast")]
    pieces = corpus.pieces()
    own = _bytes(corpus) + sum(map(_bytes, targets.values()))
    seconds = START_SECONDS + _PASSES * own / (rate * min(workers, max(len(pieces), 1)))
    rows = _bytes(corpus) / _DOCUMENT_BYTES
    lines = [
        f"time     about {long_seconds(seconds)} (by files on disk; compressed ones take longer)",
        f"memory   about {size(PROCESS_BYTES * (1 + workers))}",
        f"disk     cache about {size(round(rows * (8 * len(targets) + 4)) + _PIECE_BYTES * len(pieces))}; "
        f"set at most {size(round(rows * 36))}",
    ]
    slowest = _largest(pieces)
    if slowest is not None and workers > 1 and slowest.file.size * workers > _bytes(corpus):
        lines.append(
            f"         {slowest.file.name} is read by one process alone: compressed files are not cut"
        )
    return lines


def _largest(pieces: Sequence[Piece]) -> Piece | None:
    """The largest compressed file."""
    packed = [piece for piece in pieces if piece.file.compression is not None]
    return max(packed, key=lambda piece: piece.file.size, default=None)
