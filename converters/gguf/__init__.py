"""GGUF files: the container (:mod:`.container`), the types of blocks (:mod:`.blocks`), names and orders of a model's
tensors (:mod:`.names`), and all of it as a checkpoint to convert (:mod:`.checkpoint`)."""
