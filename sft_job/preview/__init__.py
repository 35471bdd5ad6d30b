"""``sft-job preview``: the training batch, token by token, before a GPU is booked."""
