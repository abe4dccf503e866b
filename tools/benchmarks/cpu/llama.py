"""A part of the CPU benchmark: llama.cpp on the same shape, by its programs `llama-quantize` and `llama-bench`."""

from __future__ import annotations

import json
from pathlib import Path

from ..common import SHAPE, Facts, job_of_this_process, run_program


def main() -> None:
    job = job_of_this_process()
    bench, quantize = (Path(job["binaries"], name) for name in ("llama-bench", "llama-quantize"))
    if job["do"] == "make":
        make(quantize, Path(job["path"]), job["layers"], job["threads"])
        print(json.dumps({}))
        return
    print(json.dumps(measure(bench, job)))


def make(quantize: Path, path: Path, layers: int, threads: int) -> None:
    """Make ``TYPE.gguf`` beside ``f16.gguf``, and that one first, where they do not exist."""
    source = path.with_name("f16.gguf")
    if not source.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_f16(source.with_suffix(".part"), layers)
        source.with_suffix(".part").rename(source)
    if path.exists():
        return
    part = path.with_suffix(".part")
    run_program(quantize, source, part, path.stem, threads)
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


def measure(bench: Path, job: Facts) -> Facts:
    """The same work as that of ``model.py``: one file, one process."""
    options = {"-m": job["path"], "-t": job["threads"], "-p": job["prefill"], "-n": job["new"], "-r": job["inner"]}
    printed = run_program(bench, "-o", "json", *(word for option in options.items() for word in option))
    decode, prefill = (
        next(row["samples_ts"] for row in json.loads(printed) if row[key] > 0) for key in ("n_gen", "n_prompt")
    )
    return {
        "decode": decode,
        "prefill": prefill,
        "matrices": [],
        "bytes": Path(job["path"]).stat().st_size,
        "start": [],
        "imports": [],
        "load": [],
        "memory": {"imported": {}},
    }


if __name__ == "__main__":
    main()
