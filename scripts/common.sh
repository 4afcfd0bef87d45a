# shellcheck shell=bash
# What the three launchers share: settings of the environment, and torchrun's command line. Sourced.
set -euo pipefail

GPUS="${GPUS:-8}"         # processes on each node, one a GPU
RESTARTS="${RESTARTS:-3}" # how often all processes are started again after one has failed
PORT="${PORT:-29500}"     # where nodes meet
DRY_RUN=no

# --- settings, each with its reason; what you have set yourself stays ----------------------------
setting() { # NAME VALUE
  export "$1=${!1:-$2}"
  SETTINGS+=("$1")
}
SETTINGS=()
# A line where a link fails; INFO writes thousands and is for the hour after that line.
setting NCCL_DEBUG WARN
# A process that waits in vain for others ends, so that torchrun can start all of them again.
setting TORCH_NCCL_ASYNC_ERROR_HANDLING 1
# torchrun keeps one store for all attempts, in which a process that is started again finds what the
# one before has said; with this each attempt has a store of its own. vlmrlhf insists on it.
setting TORCH_DISABLE_SHARE_RDZV_TCP_STORE 1
# Answers have all lengths: without it the allocator keeps gaps that fit nothing.
setting PYTORCH_CUDA_ALLOC_CONF expandable_segments:True
# One process a GPU already fills the cores; more threads each would fight for them.
setting OMP_NUM_THREADS 1
# Tokenizers fork after threads were started, and warn at each batch.
setting TOKENIZERS_PARALLELISM false

# For several nodes; called by their launchers.
across_nodes() {
  # A switch that finds a new way takes seconds; the default gives up sooner.
  setting NCCL_IB_TIMEOUT 22
  # Nodes do not start together, and the first import from a shared disk takes minutes.
  setting VLMRLHF_MEETING 300
  # Only your network's people know which interface is the fast one: export NCCL_SOCKET_IFNAME.
  if [ -n "${NCCL_SOCKET_IFNAME:-}" ]; then SETTINGS+=(NCCL_SOCKET_IFNAME); fi
}

# --- words ---------------------------------------------------------------------------------------
stop() { # LINE
  printf '%s: %s\n' "${0##*/}" "$1" >&2
  exit 2
}

# COMMAND: the words of `vlmrlhf`; `--dry-run` in front of them is ours.
COMMAND=()
read_words() {
  if [ "${1:-}" = --dry-run ]; then
    DRY_RUN=yes
    shift
  fi
  if [ $# -eq 0 ] || [ "${1#-}" != "$1" ]; then
    stop "give a verb of vlmrlhf and its options, such as: ppo --config llava-1.5-7b lora --data pairs.jsonl --out runs/mine"
  fi
  COMMAND=("$@")
  if [ "$1" = doctor ]; then RESTARTS=0; fi # a fault that it finds is there the next time, too
}

whole_number() { # NAME LEAST
  case "${!1}" in
    '' | *[!0-9]*) stop "$1=${!1}: give a whole number" ;;
  esac
  if [ "${!1}" -lt "$2" ]; then stop "$1=${!1}: give at least $2"; fi
}

# TORCHRUN: the whole command. The same words again continue from the same --out, so a restart
# needs no more than starting all processes anew.
TORCHRUN=()
torchrun_with() { # torchrun's options for this kind of launch
  whole_number GPUS 1
  whole_number RESTARTS 0
  whole_number PORT 1
  # shellcheck disable=SC2034 # the launchers read it
  TORCHRUN=(torchrun "$@" --nproc-per-node "$GPUS" --max-restarts "$RESTARTS"
    --no-python vlmrlhf "${COMMAND[@]}")
}

quoted() { # WORDS… as a line for a shell
  local line
  printf -v line '%q ' "$@"
  printf '%s' "${line% }"
}

settings() { # NAME=VALUE … for a shell elsewhere
  local name
  for name in "${SETTINGS[@]}"; do printf '%s=%q ' "$name" "${!name}"; done
}

start() { # WORDS… or, with --dry-run, show them
  if [ "$DRY_RUN" = yes ]; then
    printf '%s%s\n' "$(settings)" "$(quoted "$@")"
    exit 0
  fi
  exec "$@"
}
