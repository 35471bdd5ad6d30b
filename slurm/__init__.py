"""``sft-job submit slurm``: a job file becomes an sbatch script, through submitit; and what runs on each node."""
