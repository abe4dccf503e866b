"""Products and decoding of quantized matrices, without ``nn.Module``: the operators, and one backend per device."""
