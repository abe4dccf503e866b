"""The format inside of transformers and PEFT: registration, loading, saving, model cards."""
