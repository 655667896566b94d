//! `/api/generate`.

use std::time::Instant;

use axum::body::Body;
use axum::extract::State;
use axum::response::Response;
use ktx_core::chat::{Message, RenderOptions};
use serde::Deserialize;
use serde_json::Value;
use utoipa::ToSchema;

use super::answer::{Asked, Shape, nothing, respond};
use super::chat::thinking;
use super::options::Options;
use crate::app::App;
use crate::body;
use crate::error::ApiError;
use crate::generate::{ChatPrompt, chat_prompt, text_prompt};

/// A prompt that is to be answered.
#[derive(Debug, Deserialize, ToSchema)]
pub(crate) struct OllamaGenerate {
    /// The model's name.
    model: String,
    /// The prompt.
    #[serde(default)]
    prompt: String,
    /// What the model is told before it.
    #[serde(default)]
    system: Option<String>,
    /// Whether the prompt is continued as it is, without the chat template.
    #[serde(default)]
    raw: bool,
    /// Whether the answer comes line by line; it does if this is not set.
    #[serde(default)]
    stream: Option<bool>,
    /// How it is generated.
    #[serde(default)]
    options: Option<Options>,
    /// `json`, or a schema.
    #[serde(default)]
    format: Option<Value>,
    /// Whether the model thinks first.
    #[serde(default)]
    think: Option<Value>,
    /// Not supported: another template than the model's.
    #[serde(default)]
    template: Option<String>,
    /// Not supported: a text that follows the answer.
    #[serde(default)]
    suffix: Option<String>,
    /// Not supported.
    #[serde(default)]
    images: Option<Vec<String>>,
}

/// Answers a prompt.
#[utoipa::path(post, path = "/api/generate", tag = "ollama", request_body = OllamaGenerate,
    responses((status = 200, description = "Lines; one object if `stream` is false or there is nothing to answer",
            content((Value = "application/x-ndjson"), (Value = "application/json"))), (status = 400, body = Value),
        (status = 404, body = Value), (status = 413, body = Value), (status = 429, body = Value)))]
pub(crate) async fn generate(State(app): State<App>, body: Body) -> Response {
    let begin = Instant::now();
    match answer(app, body, begin).await {
        Ok(response) => response,
        Err(error) => error.into_ollama(),
    }
}

async fn answer(app: App, body: Body, begin: Instant) -> Result<Response, ApiError> {
    let request: OllamaGenerate = body::parse(&body::read(&app, body).await?)?;
    app.check_model(&request.model)?;
    let set = |text: &Option<String>| text.as_ref().is_some_and(|text| !text.is_empty());
    for (name, is_set) in [
        ("template", set(&request.template)),
        ("suffix", set(&request.suffix)),
        (
            "images",
            request.images.as_ref().is_some_and(|i| !i.is_empty()),
        ),
    ] {
        if is_set {
            return Err(ApiError::unsupported(
                name,
                format!("`{name}` is not supported here"),
            ));
        }
    }
    if request.prompt.is_empty() {
        return Ok(nothing(&app, Shape::Generate, "load"));
    }
    let options = request.options.unwrap_or_default();
    let prompt = match request.raw {
        true => ChatPrompt {
            tokens: text_prompt(&app, request.prompt).await?,
            opens_thought: false,
        },
        false => {
            let system = request.system.map(Message::system);
            let messages = system.into_iter().chain([Message::user(request.prompt)]);
            let render = RenderOptions {
                enable_thinking: thinking(request.think.as_ref()),
                ..RenderOptions::for_answer()
            };
            chat_prompt(&app, messages.collect(), render).await?
        }
    };
    let asked = Asked {
        shape: Shape::Generate,
        prompt,
        is_raw: request.raw,
        tools: Vec::new(),
        options,
        format: request.format,
        stream: request.stream,
        begin,
    };
    respond(app, asked).await
}
