"""What a server says beside transformers, how fast it is, and what it survives: the numbers of docs/vllm.md.

    python tools/vllm/serving.py answers [--bits N] BASE TASK [TASK ...]
    python tools/vllm/serving.py churn BASE OTHER TASK [TASK ...]
    python tools/vllm/serving.py killed BASE [TASK ...]
    python tools/vllm/serving.py speed [--lora] [--rounds N] MODEL [TASK ...]

``answers`` asks a server of BASE 64 mixed questions at once, and compares each answer with the one of transformers for
its task alone, token by token; BASE may be read at fewer bits than it has. ``churn`` asks 200 while tasks are loaded
and unloaded, some of which cannot be served: OTHER is a task of another base. ``killed`` kills the worker while it
answers, and starts again. ``speed`` times the same questions for the base, for one task, and for all of them mixed, and
reads the memory of the worker. ``three_tasks.py`` beside it tunes tasks.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

PORT = int(os.environ.get("PORT", "8017"))
URL = f"http://127.0.0.1:{PORT}"
SUBJECTS = ["France", "the moon", "honey", "a spider", "ice", "Jupiter", "gravity", "a haiku", "tea", "the sea"]
QUESTIONS = [f"{ask} {s}?" for s in SUBJECTS for ask in ("What is", "Tell me one fact about", "Why do people like")]


@contextlib.contextmanager
def server(model: str, tasks: Sequence[str], *more: str) -> Iterator[subprocess.Popen[bytes]]:
    """``vllm serve`` with the given tasks, until the block ends."""
    command = [str(Path(sys.executable).with_name("vllm")), "serve", model, "--host", "127.0.0.1", "--port", str(PORT)]
    command += ["--served-model-name", "base", "--max-model-len", "512", "--max-num-seqs", "32", *more]
    if tasks:
        command += ["--enable-lora", "--max-loras", str(len(tasks)), "--lora-modules"]
        command += [f"{Path(task).name}={task}" for task in tasks]
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", **os.environ}
    print("+", " ".join(command), flush=True)
    with open(os.environ.get("SERVER_LOG", os.devnull), "ab") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            for _ in range(600):
                with contextlib.suppress(OSError), urllib.request.urlopen(f"{URL}/health", timeout=5):
                    break
                if process.poll() is not None:
                    raise SystemExit(f"the server ended with {process.returncode}: see its log, SERVER_LOG=file")
                time.sleep(1)
            yield process
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(30)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, 9)  # the group that this program started


def client() -> Any:
    from openai import OpenAI

    return OpenAI(base_url=f"{URL}/v1", api_key="none", max_retries=0, timeout=600)


def ask(api: Any, model: str, question: str, tokens: int) -> Any:
    """A greedy answer, with the ids of its tokens."""
    message = [{"role": "user", "content": question}]
    extra = {"return_token_ids": True}
    return api.chat.completions.create(
        model=model, messages=message, temperature=0, max_tokens=tokens, extra_body=extra
    ).choices[0]


def post(path: str, **body: Any) -> tuple[int, str]:
    """Status and text of the answer."""
    data = json.dumps(body).encode()
    request = urllib.request.Request(f"{URL}{path}", data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=300) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as e:
        return e.code, e.read().decode()


class Transformers:
    """Answers of the same base and tasks, one at a time."""

    def __init__(self, base: str, tasks: Sequence[str], bits: int | None) -> None:
        import torch
        from transformers import AutoTokenizer

        import lowbit_format as lb

        self.torch, self.lb = torch, lb
        self.tokenizer = AutoTokenizer.from_pretrained(base)
        self.model = lb.from_pretrained(base, dtype=torch.float32, bits=bits).eval()
        for task in tasks:
            lb.load_task(self.model, task, name=Path(task).name)

    def prompt(self, question: str) -> list[int]:
        ids: list[int] = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=True
        )["input_ids"]
        return ids

    def answer(self, task: str, question: str, tokens: int) -> list[int]:
        """Ids of the greedy answer."""
        self.lb.set_task(self.model, None if task == "base" else task)
        ids = self.torch.tensor([self.prompt(question)])
        with self.torch.inference_mode():
            out = self.model.generate(
                ids, attention_mask=self.torch.ones_like(ids), max_new_tokens=tokens, do_sample=False
            )
        found: list[int] = out[0, ids.shape[1] :].tolist()
        return found

    def gap(self, task: str, question: str, ids: Sequence[int], one: int, other: int) -> float:
        """By how much the logit of token `one` is above that of `other`, behind an answer that begins with `ids`."""
        self.lb.set_task(self.model, None if task == "base" else task)
        with self.torch.inference_mode():
            logits = self.model(self.torch.tensor([[*self.prompt(question), *ids]])).logits[0, -1]
        return float(logits[one] - logits[other])


def answers(base: str, tasks: Sequence[str], bits: int | None, requests: int = 64, tokens: int = 24) -> None:
    """The server's answers to mixed requests beside those of transformers."""
    names = ["base", *(Path(task).name for task in tasks)]
    jobs = [(names[n % len(names)], QUESTIONS[n // len(names) % len(QUESTIONS)]) for n in range(requests)]
    precision = [] if bits is None else ["--hf-overrides", json.dumps({"lowbit_bits": bits})]
    serving = server(base, tasks, "--dtype", "float32", *precision)
    with serving, concurrent.futures.ThreadPoolExecutor(requests) as pool:
        api = client()
        for name in names:
            print(f"{name}: {ask(api, name, 'What is the capital of Spain?', tokens).message.content!r}")
        found = list(pool.map(lambda job: ask(api, *job, tokens), jobs))
    ours, equal, gaps = Transformers(base, tasks, bits), 0, []
    for (task, question), choice in zip(jobs, found, strict=True):
        got, expected = list(choice.token_ids), ours.answer(task, question, tokens)
        if got == expected:
            equal += 1
            continue
        n = next((i for i, (a, b) in enumerate(zip(got, expected, strict=False)) if a != b), None)
        if n is None:
            print(f"{task}, {question}: one is the beginning of the other: {got} {expected}")
            continue
        gaps.append(ours.gap(task, question, expected[:n], expected[n], got[n]))
        print(f"{task}, {question}: token {n} differs, its logit by {gaps[-1]:.2e}")
    print(f"{equal} of {requests} answers are equal token by token; {len(gaps)} differ first at a tie of", gaps)


def churn(base: str, other: str, tasks: Sequence[str], requests: int = 200, tokens: int = 12) -> None:
    """Requests while tasks come and go."""
    with tempfile.TemporaryDirectory() as folder, server(base, tasks, "--dtype", "float32") as process:
        api = client()
        names = ["base", *(Path(task).name for task in tasks)]
        jobs = [(names[n % len(names)], QUESTIONS[n % 5]) for n in range(requests)]
        expected = {job: ask(api, *job, tokens).token_ids for job in dict.fromkeys(jobs)}
        bad, gone = shutil.copytree(tasks[0], Path(folder, "bad")), shutil.copytree(tasks[0], Path(folder, "gone"))
        (bad / "task_scales.safetensors").write_bytes(b"\0" * 64)
        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            running = [pool.submit(ask, api, *job, tokens) for job in jobs]
            for what, path in {"bad": bad, "wrong": other, "nowhere": f"{folder}/none", "gone": gone}.items():
                status, text = post("/v1/load_lora_adapter", lora_name=what, lora_path=str(path))
                print(f"load {what}: {status} {text[:400]}", flush=True)
            shutil.rmtree(gone)
            print("a task of which the files are gone:", repr(ask(api, "gone", QUESTIONS[0], tokens).message.content))
            status, text = post(
                "/v1/chat/completions", model="unknown", messages=[{"role": "user", "content": "hello"}]
            )
            print(f"an unknown name: {status} {text[:200]}", flush=True)
            before = memory(process.pid)
            for n in range(50):
                loaded = post("/v1/load_lora_adapter", lora_name=f"round-{n}", lora_path=tasks[0])
                unloaded = post("/v1/unload_lora_adapter", lora_name=f"round-{n}")
                if (loaded[0], unloaded[0]) != (200, 200):
                    print("round", n, loaded, unloaded)
            print(f"memory before and after 50 rounds: {before / 1e6:.0f} and {memory(process.pid) / 1e6:.0f} MB")
            wrong = sum(run.result().token_ids != expected[job] for run, job in zip(running, jobs, strict=True))
        print(f"{wrong} of {requests} answers differ from those before; the server's health:", end=" ")
        print(urllib.request.urlopen(f"{URL}/health", timeout=30).status)


def killed(base: str, tasks: Sequence[str], requests: int = 8, tokens: int = 200) -> None:
    """What clients see when the worker is killed; a new server answers as before."""
    with server(base, tasks) as process:
        api = client()
        before = ask(api, "base", QUESTIONS[0], 12).message.content
        with concurrent.futures.ThreadPoolExecutor(requests) as pool:
            running = [pool.submit(ask, api, "base", question, tokens) for question in QUESTIONS[:requests]]
            time.sleep(3)
            worker(process.pid).kill()
            errors = [run.exception(120) for run in running]
        print({type(e).__name__: sum(type(o) is type(e) for o in errors) for e in errors})
        print("the server ended with", process.wait(120))
    with server(base, tasks):
        print("a new server answers as before:", ask(client(), "base", QUESTIONS[0], 12).message.content == before)


def speed(model: str, tasks: Sequence[str], lora: bool, rounds: int, requests: int = 32, tokens: int = 32) -> None:
    """Tokens per second and latency; medians, and in brackets the least and the most."""
    copies = [tasks[n % len(tasks)] for n in range(8)] if tasks else []
    with tempfile.TemporaryDirectory() as folder:
        named = [str(shutil.copytree(task, Path(folder, f"t{n}"))) for n, task in enumerate(copies)]
        with server(model, named, "--max-lora-rank", "8") as process:
            api = client()
            names = [Path(task).name for task in named]
            mixes = {"base": ["base"]}
            mixes |= {"one task": names[:1], f"{len(names)} tasks": names} if names else {}
            found: dict[str, list[tuple[float, ...]]] = {mix: [] for mix in mixes}
            for given in mixes.values():
                measure(api, process.pid, given, 16, 8)
            for _ in range(rounds):  # in turns, since other programs may need the processor too
                for mix, given in mixes.items():
                    found[mix].append(measure(api, process.pid, given, requests, tokens))
            for mix, values in found.items():
                rate, seconds, cpu = (spread(one) for one in zip(*values, strict=True))
                print(f"{mix}: {rate} tokens/s, {seconds} s for an answer, {cpu} ms of the worker a token")
                ratios = [base[0] / own[0] for base, own in zip(found["base"], values, strict=True)]
                print(f"  beside the base of its round: {spread(ratios)} times the time")
            print(f"memory of the worker: {memory(process.pid) / 1e6:.0f} MB", "with PEFT LoRA" if lora else "")


def spread(values: Sequence[float]) -> str:
    """The median, the least and the most."""
    return f"{statistics.median(values):.3g} ({min(values):.3g} to {max(values):.3g})"


def measure(api: Any, server: int, names: Sequence[str], requests: int, tokens: int) -> tuple[float, float, float]:
    """Tokens per second of 16 clients, median seconds for an answer, and the worker's time of the processor a token."""

    def one(n: int) -> float:
        start = time.perf_counter()
        api.chat.completions.create(
            model=names[n % len(names)],
            messages=[{"role": "user", "content": QUESTIONS[n % len(QUESTIONS)]}],
            temperature=0,
            max_tokens=tokens,
            extra_body={"ignore_eos": True, "cache_salt": str(time.time_ns())},  # no prompt is known already
        )
        return time.perf_counter() - start

    used, start = worker(server).cpu_times().user, time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        seconds = list(pool.map(one, range(requests)))
    total, used = requests * tokens, worker(server).cpu_times().user - used
    return total / (time.perf_counter() - start), statistics.median(seconds), 1e3 * used / total


def worker(server: int) -> Any:
    """That descendant of a process which has the most memory."""
    import psutil

    return max(psutil.Process(server).children(recursive=True), key=lambda p: p.memory_info().rss)


def memory(pid: int) -> int:
    """Resident bytes of the worker of a server."""
    size: int = worker(pid).memory_info().rss
    return size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, given in {"answers": ["base"], "churn": ["base", "other"], "killed": ["base"], "speed": ["base"]}.items():
        command = commands.add_parser(name)
        for argument in given:
            command.add_argument(argument)
        command.add_argument("tasks", nargs="*")
        if name == "answers":
            command.add_argument("--bits", type=int, help="precision at which the base is read")
        if name == "speed":
            command.add_argument("--lora", action="store_true", help="the tasks are adapters of PEFT")
            command.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    if options.command == "answers":
        answers(options.base, options.tasks, options.bits)
    elif options.command == "churn":
        churn(options.base, options.other, options.tasks)
    elif options.command == "killed":
        killed(options.base, options.tasks)
    else:
        speed(options.base, options.tasks, options.lora, options.rounds)


if __name__ == "__main__":
    main()
