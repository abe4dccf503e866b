"""What all compiled code shares: SIMD code written in LLVM, and threads."""
