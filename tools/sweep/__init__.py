"""A sweep over all model classes of the installed transformers: ``python -m tools.sweep``; see README.md beside it."""
