"""``sft-job submit kubernetes``: PyTorchJob, TrainJob and Job."""
