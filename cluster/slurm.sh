#!/usr/bin/env bash
# One run under Slurm: a Ray over the nodes of the allocation, the run on it, and both gone at the end.
#
#   sbatch cluster/slurm.sh recipe.yaml [section.key=value ...]
#
# Submitted again, it continues the run of the recipe's name from its newest commit. Change the SBATCH lines to your site.
#SBATCH --job-name=lepton-launch
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
set -euo pipefail

if [ $# -lt 1 ]; then
  echo "usage: sbatch cluster/slurm.sh recipe.yaml [section.key=value ...]" >&2
  exit 2
fi

# A folder that all nodes share: run folders, and the token of this Ray.
storage=${LEPTON_STORAGE:-$SLURM_SUBMIT_DIR/runs}
mkdir -p "$storage"

# Other users are on this network: only who has the token may send jobs. It is in a file that only you can read.
RAY_AUTH_TOKEN_PATH=$(mktemp "$storage/.token-XXXXXXXX")
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH
trap 'rm -f "$RAY_AUTH_TOKEN_PATH"' EXIT
python -c 'import secrets; print(secrets.token_hex(32), end="")' > "$RAY_AUTH_TOKEN_PATH"

read -r head < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
# As Ray finds it: a host's own name may stand for 127.0.1.1, which leads other nodes nowhere.
head_address=$(srun --nodes=1 --ntasks=1 --nodelist="$head" python -c 'import ray; print(ray.util.get_node_ip_address())')
port=$((20000 + SLURM_JOB_ID % 20000)) # two jobs on one node must not meet

# symmetric-run starts Ray on every node, runs what is after -- on the head, and stops Ray at its end.
srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" \
  ray symmetric-run --address "$head_address:$port" --min-nodes "$SLURM_JOB_NUM_NODES" \
  --num-cpus="${SLURM_CPUS_PER_TASK:-1}" --disable-usage-stats -- \
  lepton-launch "$@" --nodes "$SLURM_JOB_NUM_NODES" --cluster "$head_address:$port" --storage "$storage"
