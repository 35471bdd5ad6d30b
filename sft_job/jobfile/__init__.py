"""``job.yaml``: where and how a run is started. What every launcher shares; torch-free, and knows none of them."""
