#!/usr/bin/env bash
# Starts SFT training on this node, as the SFT configuration guide says.
#
#   NPROC_PER_NODE   ranks on this node (default: all GPUs, or 1)
#   CHECKPOINT_DIR   the run's files go to $CHECKPOINT_DIR/sft
#   CONFIG_PATH      folder of the YAML file, or the file itself
#   CONFIG_NAME      its name in that folder (default: sft_trainer.yaml)
#
# Arguments are passed on: bash run_sft.sh optim.lr=2e-5 trainer.total_epochs=1
set -euo pipefail

here="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"

if command -v sft-job >/dev/null 2>&1; then
  exec sft-job train "$@"
elif [[ -x "$here/.venv/bin/sft-job" ]]; then
  exec "$here/.venv/bin/sft-job" train "$@"
fi

echo "run_sft.sh: sft-job is neither on PATH nor in $here/.venv; install it with: pip install -e '$here'" >&2
exit 2
