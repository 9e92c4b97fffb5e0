#!/usr/bin/env bash
# Debian's SLURM, munge and shellcheck, where they are missing: for `make test-slurm`.
set -euo pipefail

packages=(slurmctld slurmd slurm-client munge shellcheck)
if ((EUID != 0)); then
    echo "test-slurm: SLURM's daemons are started as root only; run it as root, best in a container" >&2
    exit 2
fi
for command in slurmctld slurmd sbatch srun munged shellcheck ip; do
    command -v "$command" >/dev/null || missing+=" $command"
done
[[ -n ${missing:-} ]] || exit 0
if ! command -v apt-get >/dev/null; then
    echo "test-slurm:$missing not installed, and there is no apt-get; install SLURM, munge, shellcheck and iproute2" >&2
    exit 2
fi
echo "test-slurm: installing ${packages[*]} iproute2"
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -y -qq --no-install-recommends "${packages[@]}" iproute2 >/dev/null
