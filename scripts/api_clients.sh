#!/usr/bin/env bash
# Speaks to `ktx serve` with clients that were written elsewhere: OpenAI's Python and npm packages, Ollama's Python
# package, and schemathesis against /openapi.json; and with the programs in examples/clients. Packages come from
# their registries, into a folder that stays between calls; if they cannot be had it says so and ends with 75.
#
# usage: scripts/api_clients.sh [KTX]     KTX: the program, by default target/release/ktx
#        CLIENTS=folder                   where packages are kept, by default target/api_clients
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

ktx=$(realpath "${1:-target/release/ktx}")
clients=${CLIENTS:-target/api_clients}
port=${PORT:-10477}
export KTX_API_KEY=sk-clients
export KTX_URL=http://127.0.0.1:$port

skip() {
    echo "skipped: $1"
    exit 75
}

mkdir -p "$clients"
command -v python3 >/dev/null || skip 'python3 is missing'
[[ -x $clients/venv/bin/python ]] || python3 -m venv "$clients/venv" ||
    skip 'python3 makes no virtual environments (python3-venv)'
"$clients/venv/bin/pip" install --quiet --disable-pip-version-check --retries 1 \
    'openai>=1' 'ollama>=0.4' 'schemathesis>=4' || skip 'the Python packages cannot be had'
with_npm=''
if ! command -v node >/dev/null || ! command -v npm >/dev/null; then
    echo "=== openai, npm: skipped, node or npm is missing"
elif (cd "$clients" && { [[ -d node_modules/openai ]] || npm install --silent --no-fund --no-audit openai; }); then
    with_npm=yes
else
    echo "=== openai, npm: skipped, the package cannot be had"
fi

# Greedy where a client says nothing, so that answers are known.
"$ktx" serve --port "$port" --model-name pip --max-new-tokens 300 --temperature 0 &
server=$!
trap 'kill "$server" 2>/dev/null; wait "$server" 2>/dev/null || true' EXIT
for _ in $(seq 100); do
    curl --silent --fail "$KTX_URL/health" >/dev/null && break
    sleep 0.1
done

failed=0
check() {
    local name=$1
    shift
    echo "=== $name"
    "$@" && echo "--- $name: ok" || {
        echo "--- $name: FAILED"
        failed=1
    }
}

check 'openai, Python' "$clients/venv/bin/python" scripts/api_clients/openai_client.py
check 'ollama, Python' "$clients/venv/bin/python" scripts/api_clients/ollama_client.py
if [[ $with_npm ]]; then
    cp scripts/api_clients/openai_client.mjs "$clients/"
    check 'openai, npm' node "$clients/openai_client.mjs"
fi

# Runs an example whose output must hold a text.
example() {
    local wanted=$1 output
    shift
    output=$("$@") || return 1
    echo "$output"
    grep -qF "$wanted" <<<"$output"
}

answer='7 + 5 = 12.'
check 'examples/clients/chat.py' example "$answer" \
    "$clients/venv/bin/python" examples/clients/chat.py <<<$'What is 7 + 5?\n'
check 'examples/clients/extract.py' example 'name=' "$clients/venv/bin/python" examples/clients/extract.py
check 'examples/clients/curl.sh' example "$answer" env KTX_MODEL=pip sh examples/clients/curl.sh
if command -v node >/dev/null; then
    check 'examples/clients/chat.mjs' example "$answer" node examples/clients/chat.mjs
fi

# No unexpected status, no answer outside of its schema, no crash. Values that OpenAPI cannot express (a model's
# name, tokens of the vocabulary) make requests invalid that its document allows: these may be refused.
# It keeps what it found in the folder that it is called in.
clients=$(realpath "$clients")
cd "$clients"
check 'schemathesis' "$clients/venv/bin/schemathesis" run "$KTX_URL/openapi.json" \
    --header "Authorization: Bearer $KTX_API_KEY" --max-examples "${EXAMPLES:-40}" --request-timeout 60 \
    --checks not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance \
    --exclude-path /v1/embeddings
exit "$failed"
