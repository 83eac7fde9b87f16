#!/usr/bin/env bash
# Installs the Debian packages that the demo or the tests use beyond Python, where that is possible.
# Usage: system-packages.sh demo|test
set -euo pipefail

rtsp=(gir1.2-gst-rtsp-server-1.0 gstreamer1.0-rtsp python3-gi gstreamer1.0-plugins-base
      gstreamer1.0-plugins-good gstreamer1.0-plugins-bad)
case "${1:-}" in
  demo) wanted=("${rtsp[@]}") ;;
  test) wanted=("${rtsp[@]}" gstreamer1.0-plugins-ugly gstreamer1.0-libav ffmpeg prometheus chromium) ;;
  *) echo "usage: $0 demo|test" >&2; exit 2 ;;
esac

if ! command -v apt-get >/dev/null || ! command -v dpkg-query >/dev/null; then
  echo "no apt here; going on without: ${wanted[*]}"
  exit 0
fi
missing=()
for package in "${wanted[@]}"; do
  dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$package")
done
if [ ${#missing[@]} -eq 0 ]; then
  exit 0
fi
run=()
if [ "$(id -u)" -ne 0 ]; then
  if ! sudo -n true 2>/dev/null; then
    echo "not root; going on without. To install them: sudo apt-get install ${missing[*]}"
    exit 0
  fi
  run=(sudo -n)
fi
echo "installing ${missing[*]}"
"${run[@]}" apt-get update -qq
# A Prometheus that the package starts by itself is not wanted: the tests start their own.
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
  printf '#!/bin/sh\nexit 101\n' | "${run[@]}" tee "$policy" >/dev/null
  "${run[@]}" chmod +x "$policy"
  trap '"${run[@]}" rm -f "$policy"' EXIT
fi
"${run[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
