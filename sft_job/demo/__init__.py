"""``sft-job demo``: graph problems, a tokenizer and a small model, trained by the real job and scored."""
