"""``sft-job submit docker``: one container on this machine."""
