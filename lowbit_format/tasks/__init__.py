"""Tasks of one base: tuning its scales, keeping them as bundles, switching and mixing them, sharing them."""
