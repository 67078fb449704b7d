#!/usr/bin/env bash
# A Ray over hosts that you reach by ssh, with a token and no more open than it must be.
#
#   cluster/bare-hosts.sh up HEAD WORKER...      cluster/bare-hosts.sh down HEAD WORKER...
#
# HEAD and WORKER are addresses by which the hosts reach each other, and by which ssh reaches them from here. Each has the
# same environment, its bin folder on the PATH of a login shell, and the shared storage mounted. Then, from here:
#
#   ssh -N -L 8265:localhost:8265 HEAD &
#   RAY_AUTH_TOKEN="$(cat ~/.ray/lepton-token)" lepton-launch recipe.yaml --nodes N --cluster http://localhost:8265 --storage /mnt/shared/runs
set -euo pipefail

usage() {
  echo "usage: $0 up|down HEAD [WORKER ...]" >&2
  exit 2
}

[ $# -ge 2 ] || usage
action=$1
head=$2
shift 2

ssh=${LEPTON_SSH:-ssh -o BatchMode=yes}
port=${LEPTON_RAY_PORT:-6379}
token=${LEPTON_TOKEN_FILE:-$HOME/.ray/lepton-token}
options="--disable-usage-stats ${LEPTON_RAY_OPTIONS:-}"

on() { # on HOST COMMAND: run it there in a login shell, which has the PATH
  local host=$1
  shift
  # shellcheck disable=SC2086  # ssh and its options are words
  $ssh "$host" "bash -lc $(printf '%q' "$*")"
}

give_token() { # the token goes through ssh's input: a command line can be read by anybody on the host
  on "$1" 'umask 077; mkdir -p ~/.ray; cat > ~/.ray/auth_token' < "$token"
}

case $action in
  up)
    if [ ! -s "$token" ]; then
      mkdir -p "$(dirname "$token")"
      (umask 077 && python3 -c 'import secrets; print(secrets.token_hex(32), end="")' > "$token")
    fi
    give_token "$head"
    on "$head" "RAY_AUTH_MODE=token ray start --head --node-ip-address=$head --port=$port --dashboard-host=127.0.0.1 $options" < /dev/null
    for host in "$@"; do
      give_token "$host"
      on "$host" "RAY_AUTH_MODE=token ray start --address=$head:$port --node-ip-address=$host $options" < /dev/null
    done
    echo "up: $head $*"
    ;;
  down)
    for host in "$@" "$head"; do
      on "$host" 'ray stop --grace-period 30; rm -f ~/.ray/auth_token' < /dev/null
    done
    ;;
  *) usage ;;
esac
