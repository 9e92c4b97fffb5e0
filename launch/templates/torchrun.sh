#!/bin/bash
# {{ title }}
# Written by `hlat launch torchrun`. Start it on each node, with the node's own number:
#     bash FILE NODE_RANK [MASTER_ADDR [MASTER_PORT]]
# MASTER_ADDR is the name or address of node 0, the same everywhere. The exit code is that of `hlat supervise`:
# 75 and 76 ask to be started again (76: without the nodes in logs/supervisor/bad-nodes.txt); never after 77, when
# another process trains in the run folder.
# shellcheck disable=SC2016 # quoted on purpose
set -euo pipefail

work_dir={{ work_dir }}
nodes={{ node_count }}
interface={{ interface }} # of the network between the nodes; empty: the one their names lead to
command=(
    {{ command }}
)

if (($# < (nodes > 1 ? 2 : 0) || $# > 3)) || [[ ! ${1:-0} =~ ^[0-9]{1,6}$ ]] || ((10#${1:-0} >= nodes)); then
    echo "usage: bash ${BASH_SOURCE[0]} NODE_RANK MASTER_ADDR [MASTER_PORT]; NODE_RANK is 0 to $((nodes - 1))" >&2
    exit 2
fi
cd -- "$work_dir"

{{ environment }}
ulimit -S -n 65535 2>/dev/null || ulimit -S -n "$(ulimit -H -n)"
ulimit -l unlimited 2>/dev/null || echo "locked memory is limited; EFA and InfiniBand need more" >&2
if [[ -n $interface ]]; then
    export GLOO_SOCKET_IFNAME=$interface NCCL_SOCKET_IFNAME=$interface CCOM_SOCKET_IFNAME=$interface
fi
command+=({{ options }})
if ((nodes > 1)); then
    command+=(--nnodes "$nodes" --node-rank "$1" --master-addr "$2" --master-port "${3:-{{ port }}}")
fi
exec "${command[@]}"
