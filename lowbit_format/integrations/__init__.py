"""The format in transformers and PEFT: registration, loading, saving, model cards."""
