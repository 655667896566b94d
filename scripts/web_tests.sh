#!/usr/bin/env bash
# Uses the web page of `ktx serve` as a person does: Playwright drives Chromium through the chat and the plan, by
# pointer and by keyboard, wide and narrow, light and dark, and axe-core looks for what would keep people out.
# Chromium comes from Debian (apt-get install chromium), the packages from their registries, into a folder that stays
# between calls.
#
# usage: scripts/web_tests.sh [KTX] [SHOTS]   KTX: the program, by default target/release/ktx
#                                             SHOTS: folder for screenshots, by default target/web_tests/shots
#        CLIENTS=folder                       where packages are kept, by default target/web_tests
#        CHROMIUM=program                     the browser, by default chromium
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

ktx=$(realpath "${1:-target/release/ktx}")
clients=${CLIENTS:-target/web_tests}
shots=${2:-$clients/shots}
port=${PORT:-10487}
chromium=$(command -v "${CHROMIUM:-chromium}") || {
    echo 'chromium is missing: apt-get install chromium' >&2
    exit 1
}

mkdir -p "$clients" "$shots"
[[ -x $clients/venv/bin/python ]] || python3 -m venv "$clients/venv"
"$clients/venv/bin/pip" install --quiet --disable-pip-version-check 'playwright>=1.40' 'pytest>=8'
if command -v npm >/dev/null && [[ ! -d $clients/node_modules/axe-core ]]; then
    npm install --silent --no-fund --no-audit --prefix "$clients" axe-core ||
        echo 'axe-core cannot be had: its check is skipped' >&2
fi

servers=()
trap 'kill "${servers[@]}" 2>/dev/null; wait "${servers[@]}" 2>/dev/null || true' EXIT
serve() {
    "$ktx" serve --port "$1" --model-name pip --temperature 0 "${@:2}" &
    servers+=($!)
    for _ in $(seq 100); do
        curl --silent --fail "http://127.0.0.1:$1/health" >/dev/null && return
        sleep 0.1
    done
}
serve "$port"
KTX_API_KEY=sk-page serve $((port + 1))

export CHROMIUM=$chromium SHOTS=$(realpath "$shots")
export AXE=$(realpath "$clients")/node_modules/axe-core/axe.min.js
export PAGE_URL=http://127.0.0.1:$port/ LOCKED_URL=http://127.0.0.1:$((port + 1))/ PAGE_KEY=sk-page
"$clients/venv/bin/python" -m pytest -p no:cacheprovider --quiet scripts/web_tests
