"""kill -9 at twenty random moments: at most one finished shard is lost each time, and the bytes are the same."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.skipif(os.name == "nt", reason="needs SIGKILL")]

SHARDS, KILLS = 60, 20

WORKER = textwrap.dedent(
    """
    # Run as: worker CACHE LOG SHARDS. Notes every shard in LOG as soon as its values are computed.
    import sys
    from pathlib import Path
    import torch
    from distill import cache as cache_module
    from distill.cache import Cache, Features, Logits, Network, Statistics, forward, rows, shards
    from distill.contracts import Preprocessing, Split
    from distill.models import build, model_config
    from distill.progress import NullProgress

    torch.set_num_threads(1)
    for module in (shards, rows, cache_module):
        module.SHARD_ROWS = 64
    over = forward.Forward.over

    def noting(self, split, span, **options):
        parts = over(self, split, span, **options)
        with open(sys.argv[2], "a") as log:
            log.write(f"{span.start}\\n")
        return parts

    forward.Forward.over = noting
    generator = torch.Generator().manual_seed(0)
    rows = 64 * int(sys.argv[3])
    images = torch.randint(0, 256, (rows, 3, 32, 32), generator=generator, dtype=torch.uint8)
    split = Split(images, torch.arange(rows) % 10, "fingerprint")
    config = model_config({"name": "convnet", "width": 16, "norm": "batch"})
    state = build(config, image_shape=(3, 32, 32), classes=10, seed=0).state_dict()
    network = Network(config, (3, 32, 32), 10, Preprocessing((0.5,) * 3, (0.25,) * 3), state, {})
    cache = Cache(Path(sys.argv[1]), device=torch.device("cpu"), progress=NullProgress())
    cache.request(split, network, [Features(), Logits(), Statistics(per_class=True)])
    print(cache.images_forwarded)
    """
)


def start(cache: Path, log: Path) -> subprocess.Popen[str]:
    code = f"import sys; sys.path[:] = {sys.path!r}; exec({WORKER!r})"
    return subprocess.Popen(
        [sys.executable, "-c", code, cache, log, str(SHARDS)], stdout=subprocess.PIPE, text=True
    )


def whole_shards(cache: Path) -> int:
    """Ranges of which every quantity is on disk."""
    found: dict[str, int] = {}
    summed = 0
    for path in cache.rglob("*.npy"):
        if path.name.startswith("rows-"):
            found[path.name[:26]] = found.get(path.name[:26], 0) + 1
        elif path.name.startswith("sums-"):
            summed = max(summed, int(path.name[16:26]) // 64)
    return min(summed, sum(count == 2 for count in found.values()))


def contents(cache: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(cache)): path.read_bytes()
        for path in cache.rglob("*")
        if path.is_file() and not path.name.startswith(".")
    }


def test_kills(tmp_path: Path) -> None:
    plain, killed, log = tmp_path / "plain", tmp_path / "killed", tmp_path / "log"
    whole = start(plain, log)
    begun = time.monotonic()
    assert whole.communicate(timeout=300)[0].strip() == str(64 * SHARDS)
    seconds = time.monotonic() - begun
    log.unlink()

    draws = random.Random(0)
    kills = computed = 0
    while kills < KILLS:
        log.write_text("")
        before = whole_shards(killed) if killed.exists() else 0
        if before == SHARDS:  # everything was computed before the last kill came: begin anew
            for path in killed.rglob("*.npy"):
                path.unlink()
            before = 0
        process = start(killed, log)
        while not log.stat().st_size and process.poll() is None:
            time.sleep(0.005)
        time.sleep(draws.uniform(0, seconds / 8))
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=60)
        if process.returncode != -signal.SIGKILL:
            continue  # it had ended by itself
        kills += 1
        done = len(log.read_text().splitlines())
        computed += done
        assert whole_shards(killed) >= before + done - 1, "at most one finished shard is lost"
    assert computed > 0
    last = start(killed, log)
    last.communicate(timeout=300)
    assert last.returncode == 0
    assert contents(killed) == contents(plain)
