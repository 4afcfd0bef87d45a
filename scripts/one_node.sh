#!/usr/bin/env bash
# One node, 8×A100-80GB unless GPUS says otherwise:
#   scripts/one_node.sh [--dry-run] ppo --config llava-1.5-7b lora --data pairs.jsonl --out runs/mine
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$(dirname "$0")/common.sh"

read_words "$@"
torchrun_with --standalone
start "${TORCHRUN[@]}"
