//! `/v1/chat/completions`.

use axum::Json;
use axum::body::Body;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use ktx_core::chat::RenderOptions;
use serde_json::{Map, Value};

use super::chat_answer::{Form, Whole, stream, whole};
use super::fields::{log_probabilities, max_new_tokens, refuse_unknown, request};
use super::tools::{ToolChoice, Tools, describe};
use super::{ChatChunk, ChatCompletion, MessageField, chat_messages};
use crate::app::App;
use crate::body;
use crate::constraint::{ConstraintSpec, ResponseFormat};
use crate::error::{ApiError, ErrorBody};
use crate::generate::{Job, chat_prompt, start};
use crate::output::OutputParser;

/// Fields of OpenAI's API that change no answer here.
const HARMLESS: [&str; 12] = [
    "user",
    "metadata",
    "store",
    "service_tier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "safety_identifier",
    "prediction",
    "cache_prompt",
    "add_generation_prompt",
    "request_id",
    "priority",
];

request! {
/// A conversation that is to be continued.
struct ChatRequest {
    /// The conversation.
    messages: Vec<MessageField>,
    /// Tokens of an answer at most. It goes before `max_completion_tokens`.
    #[serde(default)]
    max_tokens: Option<u64>,
    /// Tokens of an answer at most.
    #[serde(default)]
    max_completion_tokens: Option<u64>,
    /// Whether the probabilities of the tokens are wanted.
    #[serde(default)]
    logprobs: Option<bool>,
    /// Of how many of the likeliest tokens.
    #[serde(default)]
    #[schema(maximum = 20)]
    top_logprobs: Option<u32>,
    /// The form of the answer.
    #[serde(default)]
    response_format: Option<ResponseFormat>,
    /// Functions that the model may call.
    #[serde(default)]
    tools: Option<Vec<Value>>,
    /// Whether it does.
    #[serde(default)]
    tool_choice: Option<ToolChoice>,
    /// Whether it may call several at once.
    #[serde(default)]
    parallel_tool_calls: Option<bool>,
    /// Variables for the chat template.
    #[serde(default)]
    chat_template_kwargs: Option<Map<String, Value>>,
    /// How long the model thinks; for templates that read it.
    #[serde(default)]
    reasoning_effort: Option<String>,
    /// What is answered with; only `text`.
    #[serde(default)]
    modalities: Option<Vec<String>>,
}
}

/// Continues a conversation.
#[utoipa::path(post, path = "/v1/chat/completions", tag = "openai", request_body = ChatRequest,
    responses(
        (status = 200, description = "The answer; a stream of `chat.completion.chunk`s if `stream` is set",
            content((ChatCompletion = "application/json"), (ChatChunk = "text/event-stream"))),
        (status = 400, body = ErrorBody), (status = 401, body = ErrorBody), (status = 404, body = ErrorBody),
        (status = 408, body = ErrorBody), (status = 413, body = ErrorBody), (status = 429, body = ErrorBody),
        (status = 500, body = ErrorBody), (status = 503, body = ErrorBody), (status = 504, body = ErrorBody)))]
pub(crate) async fn chat(State(app): State<App>, body: Body) -> Result<Response, ApiError> {
    let mut request: ChatRequest = body::parse(&body::read(&app, body).await?)?;
    refuse_unknown(&request.unknown, &HARMLESS)?;
    if request.modalities.iter().flatten().any(|m| m != "text") {
        return Err(ApiError::unsupported(
            "modalities",
            "this model answers with text alone",
        ));
    }
    let common = request.common();
    common.check(&app)?;
    let tools = Tools::new(request.tools.take(), request.tool_choice.take())?;
    let constraint = constraint(&request, &tools)?;
    let log_probabilities = match (request.logprobs, request.top_logprobs) {
        (Some(true), top) => log_probabilities("top_logprobs", Some(top.unwrap_or(0)))?,
        (_, Some(_)) => {
            return Err(ApiError::field(
                "top_logprobs",
                "top_logprobs needs `logprobs` to be true",
            ));
        }
        _ => None,
    };
    let max_tokens = request.max_tokens.or(request.max_completion_tokens);
    let one_call = request.parallel_tool_calls == Some(false);
    let mut messages = chat_messages(std::mem::take(&mut request.messages))?;
    let options = render_options(&app, &mut request, &tools);
    if !tools.shown.is_empty() && !app.format().template_knows_tools {
        describe(&mut messages, &tools.shown);
    }
    let prompt = chat_prompt(&app, messages, options).await?;
    let constraint = match prompt.opens_thought {
        true => constraint.map(|c| c.after("</think>")),
        false => constraint,
    };
    let job = Job {
        prompt: prompt.tokens,
        sampling: common.sampling(&app)?,
        max_new_tokens: max_new_tokens(&app, max_tokens),
        stop: common.stops()?,
        end_tokens: common.end_tokens(),
        log_probabilities,
        constraint,
        special_text: app.format().special_text(!tools.shown.is_empty()),
        continues_text: false,
        choices: common.choices(),
    };
    let form = Form {
        parser: match tools.forced.is_empty() {
            true => OutputParser::new(app.format(), prompt.opens_thought, tools.shown),
            false => OutputParser::forced(app.format(), prompt.opens_thought, tools.shown),
        },
        choices: job.choices,
        ending: common.ending(),
        one_call,
        with_logprobs: job.log_probabilities.is_some(),
    };
    let answers = start(&app, job)?;
    match common.is_stream() {
        true => Ok(stream(app, answers, form)),
        false => {
            let Whole(answer) = whole(&app, answers, form).await?;
            Ok(Json(answer).into_response())
        }
    }
}

/// The form that the answer must have.
fn constraint(request: &ChatRequest, tools: &Tools) -> Result<Option<ConstraintSpec>, ApiError> {
    let format = match &request.response_format {
        Some(format) => format.constraint()?,
        None => None,
    };
    match (format, tools.forced_schema()) {
        (Some(_), Some(_)) => Err(ApiError::field(
            "response_format",
            "a call of a function is demanded by tool_choice, and a form of the answer as well",
        )),
        (None, Some(schema)) => Ok(Some(ConstraintSpec::schema(&schema, "tools")?)),
        (format, None) => Ok(format),
    }
}

fn render_options(app: &App, request: &mut ChatRequest, tools: &Tools) -> RenderOptions {
    let mut variables = request.chat_template_kwargs.take().unwrap_or_default();
    let enable_thinking = variables
        .remove("enable_thinking")
        .and_then(|v| v.as_bool());
    if let Some(effort) = request.reasoning_effort.take() {
        variables.insert("reasoning_effort".to_owned(), Value::String(effort));
    }
    // What the server decides is not the request's to change.
    for name in [
        "messages",
        "tools",
        "add_generation_prompt",
        "bos_token",
        "eos_token",
    ] {
        variables.remove(name);
    }
    RenderOptions {
        enable_thinking,
        tools: match app.format().template_knows_tools {
            true => tools.shown.clone(),
            false => Vec::new(),
        },
        variables,
        ..RenderOptions::for_answer()
    }
}
