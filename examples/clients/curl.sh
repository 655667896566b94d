#!/bin/sh
# What the server answers, as it goes over the wire: ktx serve; sh examples/clients/curl.sh
url=${KTX_URL:-http://127.0.0.1:10002}
key="Authorization: Bearer ${KTX_API_KEY:-none}"
json='Content-Type: application/json'

curl -s "$url/v1/models" -H "$key"
echo
curl -s "$url/v1/chat/completions" -H "$key" -H "$json" \
    -d '{"messages": [{"role": "user", "content": "What is 7 + 5?"}], "temperature": 0}'
echo
curl -sN "$url/v1/chat/completions" -H "$key" -H "$json" \
    -d '{"messages": [{"role": "user", "content": "What is 7 + 5?"}], "stream": true}'
curl -sN "$url/api/chat" -H "$key" -H "$json" \
    -d "{\"model\": \"${KTX_MODEL:-pip-17m}\", \"messages\": [{\"role\": \"user\", \"content\": \"Hello!\"}]}"
