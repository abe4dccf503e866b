"""The operators on a GPU, in Triton. README.md beside this explains the data layout and the arithmetic."""
