#!/usr/bin/env bash
# Speaks to `ktx serve` with clients that were written elsewhere: OpenAI's Python and npm packages, Ollama's Python
# package, and schemathesis against /openapi.json. Packages come from their registries, into a folder that
# stays between calls.
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

mkdir -p "$clients"
[[ -x $clients/venv/bin/python ]] || python3 -m venv "$clients/venv"
"$clients/venv/bin/pip" install --quiet --disable-pip-version-check 'openai>=1' 'ollama>=0.4' 'schemathesis>=4'
if command -v npm >/dev/null; then
    (cd "$clients" && [[ -d node_modules/openai ]] || npm install --silent --no-fund --no-audit openai)
fi

"$ktx" serve --port "$port" --model-name pip --max-new-tokens 64 &
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
if command -v node >/dev/null; then
    cp scripts/api_clients/openai_client.mjs "$clients/"
    check 'openai, npm' node "$clients/openai_client.mjs"
else
    echo '=== openai, npm: skipped, node is missing'
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
