"""Products and decoding of quantized matrices, without ``nn.Module``: the operators, and a backend for each device."""
