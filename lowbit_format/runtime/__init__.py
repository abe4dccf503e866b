"""The torch runtime: decoding, operators, modules, and loading through transformers."""
