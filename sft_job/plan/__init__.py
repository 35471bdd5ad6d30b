"""``sft-job plan``: what a run will take in memory and time, what each setting costs, and what would fit. No torch."""
