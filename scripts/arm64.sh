#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Makes a folder with an ARM64 system (Debian's Python, and the wheels of constraints.txt), whose programs run under qemu: the
# "Raspberry Pi" of the device tests. Needs apt-get, dpkg and pip, no root. Nothing is done if the folder is complete.
set -euo pipefail
cd "$(dirname "$0")/.."
FOLDER=${1:?usage: scripts/arm64.sh FOLDER}
PYTHON=${PYTHON:-.venv/bin/python}
VERSIONS=$(grep -E '^(ai-edge-litert|numpy|onnxruntime)==' constraints.txt)
STAMP=$(printf '%s' "$VERSIONS" "$(cat "$0")" | sha256sum | cut -c1-64)
if [ "$(cat "$FOLDER/.stamp" 2>/dev/null)" = "$STAMP" ]; then exit 0; fi

rm -rf "$FOLDER"
mkdir -p "$FOLDER/root" "$FOLDER/wheels" "$FOLDER/apt/lists/partial" "$FOLDER/apt/cache/archives/partial" "$FOLDER/apt/packages"
FOLDER=$(realpath "$FOLDER")
: >"$FOLDER/apt/status"
MIRROR=$({ cat /etc/apt/sources.list /etc/apt/sources.list.d/*.sources /etc/apt/sources.list.d/*.list 2>/dev/null || true; } |
    sed -nE 's/^(URIs:|deb( \[[^]]*\])?) +([^ ]+).*/\3/p' | grep -m1 .)
echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $MIRROR bookworm main" >"$FOLDER/apt/sources.list"
APT=(apt-get -qq -o APT::Architecture=arm64 -o APT::Architectures=arm64 -o Dir::State::lists="$FOLDER/apt/lists"
    -o Dir::State::status="$FOLDER/apt/status" -o Dir::Cache="$FOLDER/apt/cache" -o Dir::Etc::sourcelist="$FOLDER/apt/sources.list"
    -o Dir::Etc::sourceparts=/dev/null -o APT::Sandbox::User=root)
"${APT[@]}" update
packages=$("${APT[@]}" --yes --no-install-recommends --print-uris install \
    coreutils dash libatomic1 libgomp1 libpython3.11-stdlib libstdc++6 python3.11-minimal | sed -n "s/^'[^']*' \([^_]*\)_.*/\1/p")
# shellcheck disable=SC2086  # one package per word
(cd "$FOLDER/apt/packages" && "${APT[@]}" download $packages)
for package in "$FOLDER"/apt/packages/*.deb; do dpkg -x "$package" "$FOLDER/root"; done
ln -sf dash "$FOLDER/root/bin/sh"
ln -sf python3.11 "$FOLDER/root/usr/bin/python3"
mkdir -p "$FOLDER/root/tmp" "$FOLDER/root/home/pi"
# shellcheck disable=SC2086  # one version per word
"$PYTHON" -m pip download --quiet --quiet --no-deps --only-binary=:all: --implementation cp --python-version 3.11 --platform manylinux_2_28_aarch64 \
    --platform manylinux_2_27_aarch64 --platform manylinux2014_aarch64 --dest "$FOLDER/wheels" $VERSIONS
for wheel in "$FOLDER"/wheels/*.whl; do
    "$PYTHON" -m zipfile -e "$wheel" "$FOLDER/root/usr/local/lib/python3.11/dist-packages"
done
rm -rf "$FOLDER/apt" "$FOLDER/wheels"
echo "$STAMP" >"$FOLDER/.stamp"
