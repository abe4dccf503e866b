"""For whoever writes another reader or backend: the scalar decoder, conformance tests, golden files, strategies."""
