#!/usr/bin/env bash
# One node's part in a run on several machines, for schedulers that start the same command on each node:
#     RLHF_RANK=0 RLHF_NODES=2 RLHF_HEAD=10.0.0.1 RAY_AUTH_TOKEN=... cluster/node.sh configs/run.yaml run.dir=/shared/runs
# The node of rank 0 starts Ray's head and the run. The others join, and leave when the head is gone. RLHF_HEAD is the
# address of the node of rank 0, and the token is the same on all nodes. docs/cluster.md explains.
set -euo pipefail

RLHF_PORT=${RLHF_PORT:-6390} # and the two ports above it, not Ray's usual ports: SkyPilot has a Ray of its own
READY_WITHIN_S=${READY_WITHIN_S:-1800}
export RLHF_HEAD RLHF_PORT RLHF_NODES RAY_AUTH_TOKEN RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0

fail() {
  echo "node.sh: $1" >&2
  exit "${2:-1}"
}
[ $# -gt 0 ] || fail "needs a CONFIG, and key=value after it" 2
for name in RLHF_RANK RLHF_NODES RLHF_HEAD RAY_AUTH_TOKEN; do
  [ -n "${!name:-}" ] || fail "the variable $name is not set" 2
done

ray=''
ready() { # WHAT COMMAND...
  local what=$1 give_up=$((SECONDS + READY_WITHIN_S))
  shift
  until "$@" > /dev/null 2>&1; do
    [ -z "$ray" ] || kill -0 "$ray" 2> /dev/null || fail "$what: Ray has ended; its output is above"
    [ "$SECONDS" -lt "$give_up" ] || fail "$what: not within $READY_WITHIN_S s"
    sleep 1
  done
}
# shellcheck disable=SC2329 # ready calls it
all_nodes() {
  timeout 60 python - <<'PYTHON'
import os, sys, ray
ray.init(f"{os.environ['RLHF_HEAD']}:{os.environ['RLHF_PORT']}", log_to_driver=False)
sys.exit(sum(node["Alive"] for node in ray.nodes()) < int(os.environ["RLHF_NODES"]))
PYTHON
}

ports=(--min-worker-port=0 --max-worker-port=0 "--dashboard-agent-listen-port=$((RLHF_PORT + 1))")
if [ "$RLHF_RANK" -ne 0 ]; then
  ready "the head on $RLHF_HEAD" ray health-check --address "$RLHF_HEAD:$RLHF_PORT"
  ray start --block "--address=$RLHF_HEAD:$RLHF_PORT" "${ports[@]}" || echo "node.sh: this node has left the cluster"
  exit 0
fi

ray start --block --head "--node-ip-address=$RLHF_HEAD" "--port=$RLHF_PORT" --include-dashboard=false \
  --temp-dir=/tmp/ray-rlhf "--ray-client-server-port=$((RLHF_PORT + 2))" "${ports[@]}" &
ray=$!
run=''
trap '[ -z "$run" ] || kill -TERM "$run" 2> /dev/null || true' TERM
trap 'kill "$ray" 2> /dev/null || true; wait "$ray" || true' EXIT
ready "the head on $RLHF_HEAD" ray health-check --address "$RLHF_HEAD:$RLHF_PORT"
ready "all $RLHF_NODES nodes" all_nodes
rlhf train "$@" "cluster.address=$RLHF_HEAD:$RLHF_PORT" --resume auto --supervise &
run=$!
while :; do # a trapped signal ends `wait` early
  wait "$run" && code=0 || code=$?
  kill -0 "$run" 2> /dev/null || break
done
exit "$code"
