"""``python -m tools.sweep``: try every model class, one line of JSON for each, and print the counts. See README.md."""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import re
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from .worker import Worker

_QUIET = {
    "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TOKENIZERS_PARALLELISM": "false",
}  # fmt: skip
_LARGEST_FIRST = ("ForConditionalGeneration", "ForCausalLM", "LMHeadModel", "ForCTC", "ForMaskedLM", "Model")


def model_classes() -> list[str]:
    """Names of all model classes of transformers, without importing them; one of each architecture comes first."""
    import transformers

    by_module: dict[str, list[str]] = defaultdict(list)
    for name, module in transformers._class_to_module.items():
        abstract = "pretrainedmodel" in name.lower() or name[0].islower()
        if ".modeling_" in str(module) and ".auto." not in str(module) and not abstract:
            by_module[str(module)].append(name)

    def rank(name: str) -> tuple[int, str]:
        return next((i for i, end in enumerate(_LARGEST_FIRST) if name.endswith(end)), len(_LARGEST_FIRST)), name

    places = [(i, m, n) for m, names in by_module.items() for i, n in enumerate(sorted(names, key=rank))]
    return [name for _, _, name in sorted(places)]


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("sweep.jsonl"), help="results; what it has is not run again")
    parser.add_argument("--only", default="*", help="classes to try, with * and ?")
    parser.add_argument("--again", action="store_true", help="run the classes of --only again")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--limit", type=float, default=60, help="seconds of the processor for one class")
    parser.add_argument("--minutes", type=float, default=1e6, help="begin no class after this time")
    parser.add_argument("--report", action="store_true", help="only print what the file has")
    options = parser.parse_args()
    os.environ.update(_QUIET)
    names = [n for n in model_classes() if fnmatch.fnmatchcase(n, options.only)]
    results = {r["class"]: r for r in _read(options.out)}
    todo = [n for n in names if options.again or n not in results]
    if not options.report:
        deadline = time.monotonic() + 60 * options.minutes
        queue, lines = iter(todo), options.out.open("a")

        def work(_: int) -> None:
            worker = Worker(options.limit)
            for name in queue:
                if time.monotonic() > deadline:
                    break
                results[name] = worker(name)
                lines.write(json.dumps(results[name]) + "\n")
                lines.flush()
                print(len(results), name, results[name]["status"], *results[name].get("faults", ())[:1], flush=True)
            worker.stop()

        with ThreadPoolExecutor(options.jobs) as pool:
            list(pool.map(work, range(options.jobs)))
    print(report(names, results))


def _read(file: Path) -> Iterator[dict[str, Any]]:
    if file.exists():
        for line in file.read_text().splitlines():
            yield json.loads(line)


def report(names: list[str], results: dict[str, dict[str, Any]]) -> str:
    """Counts, and what is not as it should be, by message."""
    found = [results[n] for n in names if n in results]
    converted = [r for r in found if r["status"] == "converted"]
    rows = {
        "classes": len(names),
        "tried": len(found),
        **dict(sorted(Counter(r["status"] for r in found).items())),
        "... with a forward": sum(r["ran"] for r in converted),
        "... coverage of 90% or more": sum(r["coverage"] >= 0.9 for r in converted),
        "... with stacks of experts": sum(r["experts"] > 0 for r in converted),
        "... all agrees": sum(not r["faults"] for r in converted),
    }
    lines = [f"{n:6d}  {what}" for what, n in rows.items()]
    for status in ("refused", "not built", "error of the sweep", "crashed", "too slow"):
        lines += _groups(status, [(r["class"], r.get("message", "")) for r in found if r["status"] == status])
    lines += _groups(
        "coverage below 90%", [(r["class"], "; ".join(r["kept"])) for r in converted if r["coverage"] < 0.9]
    )
    partial = [(r["class"], message) for r in converted for message in r["refused"]]
    lines += _groups("not loaded by an auto class that would give the float directory random tensors", partial)
    lines += _groups("disagrees", [(r["class"], fault) for r in converted for fault in r["faults"]])
    return "\n".join(lines)


def _groups(title: str, found: list[tuple[str, str]]) -> list[str]:
    """Classes by message; names and numbers in messages do not tell them apart."""
    groups: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for name, message in found:
        groups[re.sub(r"'[^']*'|\b\w+(Model|For\w+)\b|\d+(\.\d+)?", "_", message)[:160]].append((name, message))
    lines = [f"\n{title}: {len({name for name, _ in found})}"] if found else []
    for members in sorted(groups.values(), key=len, reverse=True):
        lines.append(f"  {len(members)} x {members[0][1][:300]}")
        lines.append("      " + ", ".join(name for name, _ in members[:12]) + (" …" if len(members) > 12 else ""))
    return lines


if __name__ == "__main__":
    main()
