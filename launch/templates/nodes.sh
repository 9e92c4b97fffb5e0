say() { echo "hlat launch: $*" >&2; }

await() { # PID: wait for a child through all signals; sets `code`
    code=0
    wait "$1" || code=$?
    while ((code > 128)) && kill -0 "$1" 2>/dev/null; do # a signal to this shell ended the wait
        code=0
        wait "$1" || code=$?
    done
    code=0
    wait "$1" || code=$? # the child's own, also if it ended just after such a signal
}

on_node() { # LOGS COMMAND...: what each node runs; keeps output and exit code (srun tells only the highest of all)
    local logs=$1 code=0
    shift
    exec >>"$logs/node-$SLURM_NODEID-$SLURMD_NODENAME.txt" 2>&1
    node_command "$@" &
    # SLURM may signal this shell alone (proctrack/cgroup does): pass it on.
    trap 'kill -TERM $! 2>/dev/null || true' TERM USR1
    await $!
    echo "$code" >"$logs/exit-code-$SLURM_NODEID"
    exit "$code"
}

on_all_nodes() { # COMMAND...: run it once on each node; sets `code`
    # When one node has ended, the others get this many seconds to notice and to save.
    srun --ntasks-per-node=1 --kill-on-bad-exit=0 --wait=$((grace + 60)) --cpu-bind=none \
        bash -c "$(declare -f await node_command on_node); on_node \"\$@\"" on_node "$logs" "$@" &
    await $!
}

job=$SLURM_JOB_ID
if [[ -n ${SLURM_ARRAY_JOB_ID:-} ]]; then # the SLURM_JOB_ID of one task means the whole array
    job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
fi
attempt=${SLURM_RESTART_COUNT:-0}
logs=$run_dir/logs/slurm/job-$job/attempt-$attempt
mkdir -p -- "$logs"
cd -- "$work_dir"

{{ environment }}
ulimit -S -n 65535 2>/dev/null || ulimit -S -n "$(ulimit -H -n)"
ulimit -l unlimited 2>/dev/null || say "locked memory is limited to $(ulimit -l) KiB; EFA and InfiniBand need more"

# The nodes meet at the first one, on a port of the job's own and the next: 10000 to 29999, below those of outgoing
# connections.
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
address=${hosts%%$'\n'*}
port=$((10000 + SLURM_JOB_ID % 10000 * 2))
if [[ -n $interface ]]; then # its address here: this script runs on the first node
    found=$(ip -oneline -4 address show dev "$interface")
    [[ -n $found ]] || found=$(ip -oneline -6 address show dev "$interface")
    read -r _ _ _ address _ <<<"$found"
    address=${address%%/*}
    export GLOO_SOCKET_IFNAME=$interface NCCL_SOCKET_IFNAME=$interface CCOM_SOCKET_IFNAME=$interface
fi
say "job $job, attempt $attempt, $SLURM_NNODES nodes; they meet at $address:$port; logs: $logs"
