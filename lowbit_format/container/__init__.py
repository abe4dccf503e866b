"""Files on disk: safetensors headers, model directories, writing, digests, the fingerprint."""
