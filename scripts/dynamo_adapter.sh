#!/usr/bin/env bash
# Builds and tests adapters/dynamo, the worker for NVIDIA Dynamo: a workspace of its own, whose some 900 packages
# take half an hour on two cores. Nothing else of this repository needs it.
#
# Needs protoc and libclang (Debian: protobuf-compiler, libclang-dev), and the registry.
#
# usage: scripts/dynamo_adapter.sh [--release]     --release: build the program instead of testing it
#        CARGO_TARGET_DIR=folder                   by default adapters/dynamo/target
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../adapters/dynamo"

command -v protoc >/dev/null || {
    echo 'protoc is missing: install protobuf-compiler'
    exit 1
}
case ${1:-} in
--release) cargo build --release --locked ;;
'') cargo fmt --check && cargo clippy --locked --all-targets -- -D warnings && cargo test --locked ;;
*)
    sed -n '2,/^set/p' "$0" | grep '^#'
    exit 1
    ;;
esac
