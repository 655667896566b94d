#!/usr/bin/env bash
# Puts what docs/deploy.md describes in front of two servers with the built-in model, with the files of deploy/:
# nginx, LiteLLM and SMG. Through each, answers come whole and token by token, and a client that goes away
# ends its answer. systemd reads the unit. What is missing on the machine is skipped; LiteLLM and SMG come from PyPI,
# into a folder that stays between calls.
#
# usage: scripts/deploy_tests.sh [KTX]    KTX: the program, by default target/release/ktx
#        ROUTERS=folder                   where packages are kept, by default target/deploy_tests
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

ktx=$(realpath "${1:-target/release/ktx}")
routers=${ROUTERS:-target/deploy_tests}
first=10702 second=10703 front=10704
KTX_API_KEY=sk-$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')
export KTX_API_KEY LITELLM_MASTER_KEY=$KTX_API_KEY
mkdir -p "$routers"
work=$(mktemp -d)

started=()
stop() {
    local process
    for process in "$@"; do
        kill "$process" 2>/dev/null && wait "$process" 2>/dev/null || true
    done
}
trap 'stop "${started[@]}"; rm -rf "$work"' EXIT

answers() { curl --silent --fail --insecure --output /dev/null -H "Authorization: Bearer $KTX_API_KEY" "$1"; }
# Waits until an address answers, or the process that should has ended.
wait_for() {
    local _
    for _ in $(seq 600); do
        answers "$1" && return
        kill -0 "$2" 2>/dev/null || break
        sleep 0.1
    done
    echo "nothing answers at $1"
    return 1
}

for port in "$first" "$second"; do
    "$ktx" serve --port "$port" --model-name model --temperature 0 2>"$work/$port.log" &
    started+=($!)
    wait_for "http://127.0.0.1:$port/health" $!
done

# A file of deploy/ with this machine's ports and paths.
here() {
    sed -e "s/127.0.0.1:10002/127.0.0.1:$first/; s/127.0.0.1:10003/127.0.0.1:$second/; s/listen 443/listen 127.0.0.1:$front/" \
        -e "s|/etc/ktx/|$work/|; s|/usr/local/bin/ktx|$ktx|" "deploy/$1"
}

failed=0
# Starts a router, sends requests through it, and stops it. The name of the model is what it calls ours.
through() {
    local name=$1 url=$2 ready=$3 model=$4 router
    shift 4
    echo "=== $name"
    "$@" >"$work/$name.log" 2>&1 &
    router=$!
    if wait_for "$ready" "$router" && python3 scripts/deploy_tests/through.py "$url" "$model" "http://127.0.0.1:$first" "http://127.0.0.1:$second"; then
        echo "--- $name: ok"
    else
        echo "--- $name: FAILED; its log ends with"
        tail -n 20 "$work/$name.log"
        failed=1
    fi
    stop "$router"
}

if command -v systemd-analyze >/dev/null; then
    here ktx.service >"$work/ktx.service"
    systemd-analyze verify "$work/ktx.service" && echo '--- systemd: ok' || {
        echo '--- systemd: FAILED'
        failed=1
    }
else
    echo '--- systemd: skipped, systemd-analyze is missing'
fi

if command -v nginx >/dev/null && command -v openssl >/dev/null; then
    openssl req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=127.0.0.1 -keyout "$work/tls.key" -out "$work/tls.crt" 2>/dev/null
    {
        echo "daemon off; pid $work/nginx.pid; error_log $work/nginx-errors.log; events {} http { access_log off;"
        for kind in client_body proxy fastcgi uwsgi scgi; do
            echo "${kind}_temp_path $work/$kind;"
        done
        here nginx.conf
        echo '}'
    } >"$work/nginx.conf"
    through nginx "https://127.0.0.1:$front" "https://127.0.0.1:$front/health" model nginx -c "$work/nginx.conf"
else
    echo '--- nginx: skipped, it or openssl is missing'
fi

if { [[ -x $routers/venv/bin/python ]] || python3 -m venv "$routers/venv"; } &&
    "$routers/venv/bin/pip" install --quiet --disable-pip-version-check --retries 1 smg 'litellm[proxy]'; then
    here litellm.yaml >"$work/litellm.yaml"
    through litellm "http://127.0.0.1:$front" "http://127.0.0.1:$front/health/liveliness" my-model \
        "$routers/venv/bin/litellm" --config "$work/litellm.yaml" --host 127.0.0.1 --port "$front" --telemetry False
    through smg "http://127.0.0.1:$front" "http://127.0.0.1:$front/readiness" model \
        "$routers/venv/bin/smg" launch --host 127.0.0.1 --port "$front" --prometheus-port "$((front + 1))" \
        --worker-urls "http://127.0.0.1:$first" "http://127.0.0.1:$second" --policy cache_aware --api-key "$KTX_API_KEY"
else
    echo '--- LiteLLM, SMG: skipped, their packages cannot be had'
fi
exit "$failed"
