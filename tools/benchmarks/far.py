"""Checkpoints on the Hub: streamed, downloaded first, and from a directory; and one precision of a model beside all.

    python -m tools.benchmarks.far [--latency 0.1] [--checkpoint DIR] [--scratch DIR]

The Hub is the one of the tests, on 127.0.0.1, and waits `--latency` seconds before each answer about a weight file; a
range from a store of another address, as on the Hub itself, would be two answers. The checkpoint has the shapes of
SmolLM2-135M, at random, unless one is given. Each job runs in a process of its own; its peak is VmHWM, imports
included. In the last row of streaming, some answers are cut, refused for being too many (429), or fail (500); the
weights have to be the same bytes in all rows. Disk is what the Hub's cache and the output take together, looked at
every 50 ms.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from .common import Facts, job_of_this_process, memory, run_part, table

REPO = "owner/model"
FAULTS: list[dict[str, Any]] = [  # after every nine requests one of them
    {"cut": 100_000}, {"status": 429, "headers": {"Retry-After": "1"}}, {"status": 500},
]  # fmt: skip


def make_checkpoint(directory: Path) -> Path:
    """A llama of the shapes of SmolLM2-135M, in bfloat16."""
    import torch
    import transformers as hf

    torch.manual_seed(0)
    config = hf.LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
        vocab_size=49152, tie_word_embeddings=True,
    )  # fmt: skip
    hf.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
    return directory


def weights(directory: Path) -> list[str]:
    """SHA-256 of the weight files."""
    files = sorted(directory.glob("*.safetensors"))
    return [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]


def work(do: str, source: str, out: str) -> Facts:
    """Convert `source`, or fetch it at 2 bits, or as a whole."""
    began = time.perf_counter()
    if do in ("fetch", "all"):
        import huggingface_hub

        from lowbit_format import fetch_precision

        _ = fetch_precision(source, 2) if do == "fetch" else huggingface_hub.snapshot_download(source)
    else:
        from lowbit_format.converters import Recipe, convert_hf_to_lowbit
        from lowbit_format.quantize import Target

        stream = None if do == "here" else do == "stream"
        recipe = Recipe(Target(bits=4, nested=(2,)), embeddings=True, lm_head=True)
        convert_hf_to_lowbit(source, out, recipe, stream=stream)
    return {"seconds": time.perf_counter() - began, "peak": memory()["VmHWM"]}


class Disk:
    """What directories take at most, while the block runs."""

    def __init__(self, *places: Path) -> None:
        self._places, self.most, self._end = places, 0, threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> Disk:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._end.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._end.wait(0.05):
            total = 0
            for path in (p for place in self._places for p in place.rglob("*")):
                with suppress(OSError):
                    total += 0 if path.is_symlink() or not path.is_file() else path.stat().st_size
            self.most = max(self.most, total)


def main() -> None:
    """Print two tables in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latency", type=float, default=0.1)
    parser.add_argument("--checkpoint", type=Path, help="a directory, instead of random weights")
    parser.add_argument("--scratch", type=Path, help="a place with room, instead of the temporary one")
    args = parser.parse_args()
    sys.path.append(str(Path(__file__).parents[2] / "tests"))
    from support.hub_server import OWNER_TOKEN, HubServer, serving

    with tempfile.TemporaryDirectory(dir=args.scratch) as temporary:
        root = Path(temporary)
        hub, source = HubServer(root / "hub"), args.checkpoint or make_checkpoint(root / "source")
        with serving(hub) as address:
            os.environ |= {
                "HF_ENDPOINT": address, "HF_TOKEN": OWNER_TOKEN, "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1",
                "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            }  # fmt: skip

            def publish(directory: Path) -> None:
                hub.create(REPO) if not hub.exists(REPO) else None
                files = {p.relative_to(directory).as_posix(): p for p in directory.rglob("*") if p.is_file()}
                hub.commit(REPO, {name: path.read_bytes() for name, path in files.items()})

            def measured(name: str, do: str, place: str, faults: int = 0) -> list[Any]:
                cache, out = root / f"cache-{do}-{faults}", root / f"out-{do}-{faults}"
                os.environ["HF_HUB_CACHE"] = str(cache)
                for i in range(faults):
                    hub.fail("GET", r"safetensors$", times=9, call=lambda: time.sleep(args.latency))
                    hub.fail("GET", r"safetensors$", **FAULTS[i % len(FAULTS)])
                hub.fail("GET", r"safetensors$", times=1 << 30, call=lambda: time.sleep(args.latency))
                hub.log.clear()
                hub.sent = 0
                with Disk(cache, out.with_name(f".{out.name}.lowbit-partial"), out) as disk:
                    facts = run_part("far", {"do": do, "source": place, "out": str(out)}, threads=2, HF_HUB_OFFLINE="0")
                if "failed" in facts:
                    sys.exit(facts["failed"])
                left = sum(fault.times for fault in hub.faults[:-1])
                hub.faults.clear()
                if left or (place == REPO and out.exists() and weights(out) != weights(root / "out-here-0")):
                    sys.exit(f"{name}: {left} faults did not happen, or the weights are not the same")
                requests = sum(r.method == "GET" and r.path.endswith("safetensors") for r in hub.log)
                sizes = [f"{n / 1e6:,.1f}" for n in (hub.sent, disk.most, facts["peak"])]
                return [name, sizes[0], requests, *sizes[1:], f"{facts['seconds']:.1f}"]

            publish(source)
            rows = [
                measured("a directory here", "here", str(source)),
                measured("the Hub, downloaded first", "download", REPO),
                measured("the Hub, `--stream`", "stream", REPO),
                measured("the same, with 9 faults", "stream", REPO, 9),
            ]
            head = ["", "fetched MB", "requests", "peak of disk MB", "peak of memory MB", "s"]
            print(table(["converted from", *head[1:]], rows))
            publish(root / "out-here-0")
            rows = [measured("all", "all", REPO), measured("2 of 4 bits", "fetch", REPO)]
            print()
            print(table(["fetched", *head[1:]], rows))


if __name__ == "__main__":
    if len(sys.argv) == 2 and sys.argv[1].startswith("{"):
        given = job_of_this_process()
        print(json.dumps(work(given["do"], given["source"], given["out"])))
    else:
        main()
