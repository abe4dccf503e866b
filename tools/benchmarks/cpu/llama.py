"""A part of the CPU benchmark: llama.cpp on the same shape, through the Python package ``llama_cpp``.

It runs in the interpreter that has the package (``--llama-python``); making the files needs ``gguf`` there too.
"""

from __future__ import annotations

import ctypes
import json
import time
from pathlib import Path
from typing import Any

from ..common import SHAPE, Facts, job_of_this_process, memory, seconds

TYPES = {"f16": None, "Q4_0": "Q4_0", "Q4_K_M": "Q4_K_M", "Q3_K_M": "Q3_K_M", "Q2_K": "Q2_K"}  # name of the file type


def main() -> None:
    job = job_of_this_process()
    try:
        import llama_cpp
    except ImportError:
        print(json.dumps({"failed": "llama_cpp is not installed", "missing": True}))
        return
    quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(quiet, ctypes.c_void_p(0))
    if job["do"] == "make":
        make(Path(job["path"]), job["layers"], job["threads"])
        print(json.dumps({"package": f"llama_cpp {llama_cpp.__version__}"}))
        return
    print(json.dumps(measure(job)))


def make(path: Path, layers: int, threads: int) -> None:
    """Make ``NAME.gguf`` beside ``f16.gguf``, and that one first, where they do not exist."""
    import llama_cpp

    source = path.with_name("f16.gguf")
    if not source.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_f16(source.with_suffix(".part"), layers)
        source.with_suffix(".part").rename(source)
    if path.exists():
        return
    params = llama_cpp.llama_model_quantize_default_params()
    params.nthread = threads
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{TYPES[path.stem]}")
    part = path.with_suffix(".part")
    if llama_cpp.llama_model_quantize(str(source).encode(), str(part).encode(), ctypes.byref(params)):
        raise RuntimeError(f"llama.cpp could not make {path.name}")
    part.rename(path)


def write_f16(path: Path, layers: int) -> None:
    """A llama of random weights, and a tokenizer of the right size that no text needs."""
    import gguf
    import numpy as np

    hidden, inner, vocabulary = SHAPE["hidden"], SHAPE["inner"], SHAPE["vocabulary"]
    kv = hidden // SHAPE["heads"] * SHAPE["kv_heads"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("random weights")
    writer.add_context_length(2048)
    writer.add_embedding_length(hidden)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(SHAPE["heads"])
    writer.add_head_count_kv(SHAPE["kv_heads"])
    writer.add_rope_dimension_count(hidden // SHAPE["heads"])
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(vocabulary)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    kinds = gguf.TokenType
    tokens = [("<unk>", kinds.UNKNOWN), ("<s>", kinds.CONTROL), ("</s>", kinds.CONTROL)]
    tokens += [(f"<0x{b:02X}>", kinds.BYTE) for b in range(256)]
    tokens += [(f"\u2581word{i}", kinds.NORMAL) for i in range(len(tokens), vocabulary)]
    writer.add_tokenizer_model("llama")
    writer.add_token_list([text for text, _ in tokens])
    writer.add_token_scores([-float(i) for i in range(vocabulary)])
    writer.add_token_types([int(kind) for _, kind in tokens])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)

    rng = np.random.default_rng(0)

    def matrix(name: str, rows: int, cols: int) -> None:
        values = rng.standard_normal((rows, cols), dtype=np.float32)
        values *= np.float32(0.02)
        writer.add_tensor(f"{name}.weight", values.astype(np.float16))

    def norm(name: str) -> None:
        writer.add_tensor(f"{name}.weight", np.ones(hidden, np.float32))

    matrix("token_embd", vocabulary, hidden)
    for i in range(layers):
        norm(f"blk.{i}.attn_norm")
        matrix(f"blk.{i}.attn_q", hidden, hidden)
        matrix(f"blk.{i}.attn_k", kv, hidden)
        matrix(f"blk.{i}.attn_v", kv, hidden)
        matrix(f"blk.{i}.attn_output", hidden, hidden)
        norm(f"blk.{i}.ffn_norm")
        matrix(f"blk.{i}.ffn_gate", inner, hidden)
        matrix(f"blk.{i}.ffn_up", inner, hidden)
        matrix(f"blk.{i}.ffn_down", hidden, inner)
    norm("output_norm")
    matrix("output", vocabulary, hidden)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def measure(job: Facts) -> Facts:
    """The same work as that of ``model.py``: one file, one process."""
    import llama_cpp
    import numpy as np

    imported, import_end = memory(), time.time()
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(job["path"].encode(), llama_cpp.llama_model_default_params())
    if not model:
        raise RuntimeError(f"llama.cpp could not load {job['path']}")
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = 512
    params.n_threads = params.n_threads_batch = job["threads"]
    context = llama_cpp.llama_init_from_model(model, params)
    vocabulary = SHAPE["vocabulary"]

    def evaluate(tokens: Any) -> int:
        """Append tokens; the most likely next one."""
        array = (llama_cpp.llama_token * len(tokens))(*tokens)
        if llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(array, len(tokens))):
            raise RuntimeError("llama.cpp could not evaluate")
        logits = llama_cpp.llama_get_logits_ith(context, -1)  # waits for the result
        return int(np.ctypeslib.as_array(logits, shape=(vocabulary,)).argmax())

    def clear() -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)

    def generate(new: int) -> list[float]:
        """When each token came out."""
        clear()
        token, times = evaluate(range(3, 3 + job["prompt"])), [time.perf_counter()]
        for _ in range(new - 1):
            token = evaluate([token])
            times.append(time.perf_counter())
        return times

    def prefill() -> None:
        evaluate(range(3, 3 + job["prefill"]))

    loaded = time.time()
    generate(1)
    first_token, after = time.time(), memory()
    generate(4)
    decode, filled = [], []
    for _ in range(job["inner"]):
        times = generate(job["new"])
        decode.append((job["new"] - 1) / (times[-1] - times[0]))
    clear()
    prefill()
    for _ in range(job["inner"]):
        clear()
        filled.append(job["prefill"] / seconds(prefill))
    return {
        "start": [first_token - job["began"]],
        "imports": [import_end - job["began"]],
        "load": [loaded - import_end],
        "decode": decode,
        "matrices": [],
        "prefill": filled,
        "bytes": Path(job["path"]).stat().st_size,
        "memory": {"imported": imported, "after": after, "end": memory()},
    }


if __name__ == "__main__":
    main()
