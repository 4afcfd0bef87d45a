#!/usr/bin/env bash
# Several nodes by ssh, from a file as DeepSpeed reads it (a line a node: `name slots=8`):
#   scripts/hostfile.sh HOSTFILE [--dry-run] ppo --config llava-next-34b full --data … --out …
# The same folder, environment and --out must be on all nodes (a shared file system), and ssh must
# ask no password. The nodes meet at the first one.
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$(dirname "$0")/common.sh"

HOSTS=()
read_hosts() { # FILE
  local host slots rest
  [ -f "$1" ] || stop "$1: no such file; give a line a node: name slots=8"
  while read -r host slots rest; do
    case "$host" in '' | \#*) continue ;; esac
    case "$slots" in slots=*) ;; *) stop "$1: $host: give its GPUs, such as slots=8" ;; esac
    if [ "${#HOSTS[@]}" -gt 0 ] && [ "${slots#slots=}" != "$GPUS" ]; then
      stop "$1: $host: $slots, and the first node has $GPUS; all must have as many"
    fi
    GPUS="${slots#slots=}"
    HOSTS+=("$host")
  done <"$1"
  [ "${#HOSTS[@]}" -gt 0 ] || stop "$1: no node in it; give a line a node: name slots=8"
}

[ $# -gt 0 ] || stop "give a hostfile, then a verb of vlmrlhf and its options"
read_hosts "$1"
shift
read_words "$@"
across_nodes
torchrun_with --nnodes "${#HOSTS[@]}" --rdzv-backend c10d --rdzv-endpoint "${HOSTS[0]}:$PORT" \
  --rdzv-id "vlmrlhf-$PORT"
# A shell by ssh has read no profile: it is told where programs are, and what may be set at all.
for name in PATH PYTHONPATH HF_HOME HF_HUB_OFFLINE CUDA_VISIBLE_DEVICES VLMRLHF_TIMEOUT; do
  if [ -n "${!name:-}" ]; then SETTINGS+=("$name"); fi
done
remote="cd $(quoted "$PWD") && exec env $(settings)$(quoted "${TORCHRUN[@]}")"
if [ "$DRY_RUN" = yes ]; then
  for host in "${HOSTS[@]}"; do printf 'ssh -tt %s %q\n' "$host" "$remote"; done
  exit 0
fi
started=()
end_all() { kill "${started[@]}" 2>/dev/null || true; }
trap end_all EXIT
for host in "${HOSTS[@]}"; do
  # -tt: where this script ends, so does what it has started there
  ssh -tt -o BatchMode=yes "$host" "$remote" </dev/null &
  started+=("$!")
done
for _ in "${started[@]}"; do
  wait -n || exit $? # one node that fails ends all; the same command continues
done
