"""Ground of all compiled code: vector code in LLVM, and threads."""
