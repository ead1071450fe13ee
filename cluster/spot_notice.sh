#!/usr/bin/env bash
# On a spot machine, next to `ray start`: this script polls until the cloud announces that it reclaims this machine. Then
# it lets Ray drain the node. A run that is on the node writes a checkpoint and ends with exit code 75.
#     nohup cluster/spot_notice.sh aws|gcp &
set -euo pipefail

LOOK_EVERY_S=${LOOK_EVERY_S:-2}
METADATA=${METADATA:-http://169.254.169.254} # of AWS and of Google Cloud alike

aws() { # gives notice two minutes before
  local token
  token=$(curl --silent --fail --max-time 5 --request PUT --header 'X-aws-ec2-metadata-token-ttl-seconds: 60' \
    "$METADATA/latest/api/token") &&
    curl --silent --fail --max-time 5 --header "X-aws-ec2-metadata-token: $token" --output /dev/null \
      "$METADATA/latest/meta-data/spot/instance-action"
}
gcp() { # gives notice 30 seconds before
  [ "$(curl --silent --fail --max-time 5 --header 'Metadata-Flavor: Google' \
    "$METADATA/computeMetadata/v1/instance/preempted")" = TRUE ]
}

case ${1:-} in
  aws) left_s=110 ;;
  gcp) left_s=25 ;;
  *)
    echo "spot_notice.sh: needs aws or gcp" >&2
    exit 2
    ;;
esac
until "$1"; do
  sleep "$LOOK_EVERY_S"
done
echo "spot_notice.sh: the cloud reclaims this machine; draining its node"
RAY_ADDRESS=auto exec ray drain-node --reason DRAIN_NODE_REASON_PREEMPTION \
  --reason-message "the cloud reclaims this spot machine" --deadline-remaining-seconds "$left_s"
