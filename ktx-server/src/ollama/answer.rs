//! Answers, whole or line by line.

use std::time::{Duration, Instant};

use axum::Json;
use axum::response::{IntoResponse, Response};
use ktx_core::serving::EndTokens;
use ktx_core::tokenizer::SpecialText;
use serde_json::{Map, Value, json};

use super::options::{Options, constraint};
use crate::app::App;
use crate::body::streamed;
use crate::error::ApiError;
use crate::generate::{Answers, ChatPrompt, Job, Totals, Update, finish_word, start};
use crate::output::{OutputParser, Part};
use crate::time::rfc3339_now;

/// Which of the two interfaces is spoken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Shape {
    /// `message: {role, content}`
    Chat,
    /// `response: text`
    Generate,
}

/// What is asked for, once it is tokens.
pub(super) struct Asked {
    pub(super) shape: Shape,
    pub(super) prompt: ChatPrompt,
    /// Whether the prompt is a text that goes on, and no conversation.
    pub(super) is_raw: bool,
    pub(super) tools: Vec<Value>,
    pub(super) options: Options,
    pub(super) format: Option<Value>,
    pub(super) stream: Option<bool>,
    pub(super) begin: Instant,
}

/// Has it answered; line by line unless that is not wanted.
pub(super) async fn respond(app: App, asked: Asked) -> Result<Response, ApiError> {
    let Asked {
        prompt, options, ..
    } = asked;
    let constraint = constraint(asked.format.as_ref())?;
    let job = Job {
        prompt: prompt.tokens,
        sampling: options.sampling(&app)?,
        max_new_tokens: options.max_new_tokens(&app),
        stop: options.stops(),
        end_tokens: EndTokens::Stop,
        log_probabilities: None,
        constraint: match prompt.opens_thought {
            true => constraint.map(|c| c.after("</think>")),
            false => constraint,
        },
        special_text: match asked.is_raw {
            true => SpecialText::Skip,
            false => app.format().special_text(!asked.tools.is_empty()),
        },
        continues_text: asked.is_raw,
        choices: 1,
    };
    let answers = start(&app, job)?;
    let form = Form {
        shape: asked.shape,
        parser: match asked.is_raw {
            true => OutputParser::plain(),
            false => OutputParser::new(app.format(), prompt.opens_thought, asked.tools),
        },
        begin: asked.begin,
    };
    match asked.stream {
        Some(false) => whole(&app, answers, form).await,
        _ => Ok(stream(app, answers, form)),
    }
}

/// How an answer is read and written.
struct Form {
    shape: Shape,
    parser: OutputParser,
    begin: Instant,
}

/// What is new of an answer.
#[derive(Debug, Default)]
struct News {
    content: String,
    thought: String,
    calls: Vec<Value>,
}

impl News {
    fn add(&mut self, parts: Vec<Part>) {
        for part in parts {
            match part {
                Part::Content(text) => self.content.push_str(&text),
                Part::Thought(text) => self.thought.push_str(&text),
                Part::Call(call) => {
                    let arguments: Value = serde_json::from_str(&call.arguments)
                        .unwrap_or(Value::String(call.arguments));
                    self.calls
                        .push(json!({"function": {"name": call.name, "arguments": arguments}}));
                }
            }
        }
    }

    fn is_empty(&self) -> bool {
        self.content.is_empty() && self.thought.is_empty() && self.calls.is_empty()
    }

    fn object(self, app: &App, shape: Shape) -> Map<String, Value> {
        let mut object = Map::new();
        object.insert("model".to_owned(), json!(app.settings().model_name));
        object.insert("created_at".to_owned(), json!(rfc3339_now()));
        match shape {
            Shape::Chat => {
                let mut message = json!({"role": "assistant", "content": self.content});
                if !self.thought.is_empty() {
                    message["thinking"] = json!(self.thought);
                }
                if !self.calls.is_empty() {
                    message["tool_calls"] = json!(self.calls);
                }
                object.insert("message".to_owned(), message);
            }
            Shape::Generate => {
                object.insert("response".to_owned(), json!(self.content));
                if !self.thought.is_empty() {
                    object.insert("thinking".to_owned(), json!(self.thought));
                }
            }
        }
        object.insert("done".to_owned(), json!(false));
        object
    }
}

/// Marks the last object of an answer, with counts and with times in nanoseconds.
fn end(object: &mut Map<String, Value>, reason: &str, totals: &Totals, begin: Instant) {
    let nanos = |time: Duration| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
    let fields = [
        ("done", json!(true)),
        ("done_reason", json!(reason)),
        ("total_duration", json!(nanos(begin.elapsed()))),
        ("load_duration", json!(nanos(totals.queue_time))),
        ("prompt_eval_count", json!(totals.prompt_tokens)),
        ("prompt_eval_duration", json!(nanos(totals.prompt_time))),
        ("eval_count", json!(totals.generated_tokens)),
        ("eval_duration", json!(nanos(totals.generate_time))),
    ];
    for (name, value) in fields {
        object.insert(name.to_owned(), value);
    }
}

/// Collects an answer.
async fn whole(app: &App, mut answers: Answers, form: Form) -> Result<Response, ApiError> {
    let (mut news, mut parser) = (News::default(), form.parser);
    let (mut totals, mut reason) = (Totals::default(), "stop");
    while let Some(update) = answers.next().await? {
        match update {
            Update::Token { token, .. } => news.add(parser.push(&token.text)),
            Update::Finished { end, .. } => {
                news.add(parser.push(&end.text));
                news.add(parser.finish());
                totals.add(&end.usage);
                reason = finish_word(end.reason);
            }
        }
    }
    let mut object = news.object(app, form.shape);
    end(&mut object, reason, &totals, form.begin);
    Ok(Json(Value::Object(object)).into_response())
}

/// Sends an answer line by line.
fn stream(app: App, mut answers: Answers, form: Form) -> Response {
    streamed("application/x-ndjson", async move |lines| {
        let mut parser = form.parser;
        let send = async |object: Map<String, Value>| {
            let _ = lines.send(format!("{}\n", Value::Object(object))).await;
        };
        loop {
            let mut news = News::default();
            match answers.next().await {
                Ok(Some(Update::Token { token, .. })) => {
                    news.add(parser.push(&token.text));
                    if !news.is_empty() {
                        send(news.object(&app, form.shape)).await;
                    }
                }
                Ok(Some(Update::Finished { end: last, .. })) => {
                    news.add(parser.push(&last.text));
                    news.add(parser.finish());
                    if !news.is_empty() {
                        send(news.object(&app, form.shape)).await;
                    }
                    let mut totals = Totals::default();
                    totals.add(&last.usage);
                    let mut object = News::default().object(&app, form.shape);
                    end(&mut object, finish_word(last.reason), &totals, form.begin);
                    send(object).await;
                }
                Ok(None) => return,
                Err(error) => {
                    let mut object = Map::new();
                    object.insert("error".to_owned(), json!(error.message()));
                    return send(object).await;
                }
            }
        }
    })
}

/// An answer without text: clients ask for it to have a model loaded.
pub(super) fn nothing(app: &App, shape: Shape, reason: &str) -> Response {
    let mut object = News::default().object(app, shape);
    object.insert("done".to_owned(), json!(true));
    object.insert("done_reason".to_owned(), json!(reason));
    Json(Value::Object(object)).into_response()
}
