//! `/api/chat`.

use std::time::Instant;

use axum::body::Body;
use axum::extract::State;
use axum::response::Response;
use ktx_core::chat::{Message, RenderOptions};
use serde::Deserialize;
use serde_json::{Value, json};
use utoipa::ToSchema;

use super::answer::{Asked, Shape, nothing, respond};
use super::options::Options;
use crate::app::App;
use crate::body;
use crate::error::ApiError;
use crate::generate::chat_prompt;

/// A message.
#[derive(Debug, Clone, Deserialize, ToSchema)]
pub(crate) struct OllamaMessage {
    /// `system`, `user`, `assistant` or `tool`.
    role: String,
    /// What is said.
    #[serde(default)]
    content: String,
    /// What the assistant thought.
    #[serde(default)]
    thinking: Option<String>,
    /// Functions that the assistant called.
    #[serde(default)]
    tool_calls: Option<Vec<Value>>,
    /// The function whose result this is.
    #[serde(default)]
    tool_name: Option<String>,
    /// Not supported.
    #[serde(default)]
    images: Option<Vec<String>>,
}

/// A conversation that is to be continued.
#[derive(Debug, Deserialize, ToSchema)]
pub(crate) struct OllamaChat {
    /// The model's name.
    model: String,
    /// The conversation.
    #[serde(default)]
    messages: Vec<OllamaMessage>,
    /// Whether the answer comes line by line; it does if this is not set.
    #[serde(default)]
    stream: Option<bool>,
    /// How it is generated.
    #[serde(default)]
    options: Option<Options>,
    /// `json`, or a schema.
    #[serde(default)]
    format: Option<Value>,
    /// Functions that the model may call.
    #[serde(default)]
    tools: Option<Vec<Value>>,
    /// Whether the model thinks first.
    #[serde(default)]
    think: Option<Value>,
}

/// Continues a conversation.
#[utoipa::path(post, path = "/api/chat", tag = "ollama", request_body = OllamaChat,
    responses((status = 200, description = "Lines; one object if `stream` is false or there is nothing to answer",
            content((Value = "application/x-ndjson"), (Value = "application/json"))), (status = 400, body = Value),
        (status = 404, body = Value), (status = 413, body = Value), (status = 429, body = Value)))]
pub(crate) async fn chat(State(app): State<App>, body: Body) -> Response {
    let begin = Instant::now();
    match answer(app, body, begin).await {
        Ok(response) => response,
        Err(error) => error.into_ollama(),
    }
}

async fn answer(app: App, body: Body, begin: Instant) -> Result<Response, ApiError> {
    let request: OllamaChat = body::parse(&body::read(&app, body).await?)?;
    app.check_model(&request.model)?;
    if request.messages.is_empty() {
        return Ok(nothing(&app, Shape::Chat, "load"));
    }
    let options = request.options.unwrap_or_default();
    let tools = request.tools.unwrap_or_default();
    let messages = messages(request.messages)?;
    let render = RenderOptions {
        enable_thinking: thinking(request.think.as_ref()),
        tools: match app.format().template_knows_tools {
            true => tools.clone(),
            false => Vec::new(),
        },
        ..RenderOptions::for_answer()
    };
    let prompt = chat_prompt(&app, messages, render).await?;
    let asked = Asked {
        shape: Shape::Chat,
        prompt,
        is_raw: false,
        tools,
        options,
        format: request.format,
        stream: request.stream,
        begin,
    };
    respond(app, asked).await
}

/// True, false, or a level: any level is true.
pub(super) fn thinking(think: Option<&Value>) -> Option<bool> {
    match think {
        Some(Value::Bool(think)) => Some(*think),
        Some(Value::String(_)) => Some(true),
        _ => None,
    }
}

fn messages(messages: Vec<OllamaMessage>) -> Result<Vec<Message>, ApiError> {
    messages
        .into_iter()
        .map(|m| {
            if m.images.is_some_and(|images| !images.is_empty()) {
                return Err(ApiError::unsupported("images", "this model reads text"));
            }
            let mut message = Message::new(m.role, m.content);
            if let Some(thought) = m.thinking {
                message = message.with("reasoning_content", json!(thought));
            }
            if let Some(calls) = m.tool_calls {
                message = message.with("tool_calls", json!(calls));
            }
            if let Some(name) = m.tool_name {
                message = message.with("name", json!(name));
            }
            Ok(message)
        })
        .collect()
}
