#!/bin/sh
# Writes deploy/.env with a random value for every secret that compose.yaml needs. What is there stays.
set -eu
cd "$(dirname "$0")"
umask 077
touch .env
for name in SIGHTWIRE_TOKEN REDIS_PASSWORD GRAFANA_PASSWORD MEDIAMTX_PUBLISH_PASSWORD MEDIAMTX_READ_PASSWORD; do
  if ! grep -q "^$name=." .env; then
    printf '%s=%s\n' "$name" "$(od -An -N24 -tx1 /dev/urandom | tr -d ' \n')" >> .env
  fi
done
echo "secrets are in $(pwd)/.env"
