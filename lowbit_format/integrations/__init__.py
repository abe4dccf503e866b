"""The format in transformers: registration, loading, saving, model cards."""
