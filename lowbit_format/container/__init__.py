"""Files on disk: safetensors headers, model directories, atomic writing, digests, the fingerprint."""
