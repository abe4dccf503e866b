"""What the layers of a model see: text, the blocks that it flows through, and the errors that quantization makes."""
