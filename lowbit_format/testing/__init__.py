"""For who writes another reader or backend: ``pip install lowbit-format[testing]``, and our tests run on it.

A backend of kernels, in a test file of yours::

    from lowbit_format.testing.operators import OperatorConformance
    import my_backend

    class TestMine(OperatorConformance):
        backend, device = my_backend, "cuda"

A reader, in Python or any other language, against the golden files (a checkout's spec/vectors, or LOWBIT_VECTORS)::

    from lowbit_format.testing.vectors import check_reader, command
    check_reader(command("./my-reader --decode"))  # runs ./my-reader --decode MODEL OUT.safetensors

:mod:`.decoding` has tests of decoders and a scalar one, :mod:`.layouts` of tiled layouts, :mod:`.strategies` and
:mod:`.matrices` anything that the format allows.
"""
