"""Ways of tuning that PEFT lacks, each in a file of its own, in plain torch: none of them knows of low-bit models."""
