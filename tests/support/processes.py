"""Programs in processes of their own."""

from __future__ import annotations

# Last lines of a program: it ends at once. To take down torch and transformers takes Python as long as a third of their
# import; programs whose end is tested do not have these lines.
END = "\nimport os, sys; sys.stdout.flush(); sys.stderr.flush(); os._exit(0)\n"
