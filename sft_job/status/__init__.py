"""``sft-job status``: how a run stands, from its folder alone (place, life, read, show, command). Torch-free."""
