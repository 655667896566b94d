//! `/v1/completions`.

use axum::Json;
use axum::body::Body;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use ktx_core::tokenizer::{SpecialText, TokenId};
use serde::Deserialize;
use utoipa::ToSchema;

use super::events::{Ending, Events};
use super::fields::{Common, log_probabilities, max_new_tokens, refuse_unknown, request};
use super::response::{CompletionChoice, CompletionLogprobs, UsageField};
use super::{CompletionChunk, CompletionResponse};
use crate::app::{App, now};
use crate::body;
use crate::constraint::ResponseFormat;
use crate::error::{ApiError, ErrorBody};
use crate::generate::{Answers, Job, Totals, Update, finish_word, start, text_prompt};

/// Tokens that are generated if the request does not say, as in OpenAI's API.
const DEFAULT_TOKENS: u64 = 16;
/// Prompts of one request at most.
const MAX_PROMPTS: usize = 64;
/// Fields that change no answer here.
const HARMLESS: [&str; 4] = ["user", "cache_prompt", "request_id", "priority"];

/// A text, or its tokens; or several.
#[derive(Debug, Clone, Deserialize, ToSchema)]
#[serde(untagged)]
pub(crate) enum Prompt {
    /// A text.
    Text(String),
    /// Tokens.
    Tokens(Vec<u32>),
    /// Texts.
    Texts(Vec<String>),
    /// Tokens of several texts.
    TokenLists(Vec<Vec<u32>>),
}

request! {
/// A text that is to be continued.
struct CompletionRequest {
    /// The text.
    prompt: Prompt,
    /// Tokens of an answer at most; 16 if not set.
    #[serde(default)]
    max_tokens: Option<u64>,
    /// Of how many of the likeliest tokens probabilities are wanted.
    #[serde(default)]
    #[schema(maximum = 20)]
    logprobs: Option<u32>,
    /// Whether the answer begins with the prompt.
    #[serde(default)]
    echo: Option<bool>,
    /// As `n`, or not set.
    #[serde(default)]
    best_of: Option<u32>,
    /// The form of the answer.
    #[serde(default)]
    response_format: Option<ResponseFormat>,
}
}

/// Continues a text.
#[utoipa::path(post, path = "/v1/completions", tag = "openai", request_body = CompletionRequest,
    responses(
        (status = 200, description = "The answer; a stream of pieces if `stream` is set",
            content((CompletionResponse = "application/json"), (CompletionChunk = "text/event-stream"))),
        (status = 400, body = ErrorBody), (status = 401, body = ErrorBody), (status = 404, body = ErrorBody),
        (status = 408, body = ErrorBody), (status = 413, body = ErrorBody), (status = 429, body = ErrorBody),
        (status = 500, body = ErrorBody), (status = 503, body = ErrorBody), (status = 504, body = ErrorBody)))]
pub(crate) async fn complete(State(app): State<App>, body: Body) -> Result<Response, ApiError> {
    let mut request: CompletionRequest = body::parse(&body::read(&app, body).await?)?;
    refuse_unknown(&request.unknown, &HARMLESS)?;
    let common = request.common();
    common.check(&app)?;
    if request
        .best_of
        .is_some_and(|best| best as usize != common.choices())
    {
        return Err(ApiError::unsupported(
            "best_of",
            "best_of must be as n, or not set",
        ));
    }
    let echo = request.echo == Some(true);
    if echo && request.logprobs.is_some() {
        return Err(ApiError::unsupported(
            "echo",
            "a prompt's own logprobs are not computed here",
        ));
    }
    let prompts = prompts(&app, request.prompt.clone()).await?;
    let form = Form {
        echo: match echo {
            true => prompts.iter().map(|p| spelled(&app, p)).collect(),
            false => vec![String::new(); prompts.len()],
        },
        choices: common.choices(),
        ending: common.ending(),
        with_logprobs: request.logprobs.is_some(),
    };
    let mut all = Vec::new();
    for prompt in prompts {
        all.push(start(&app, job(&app, &common, &request, prompt)?)?);
    }
    match common.is_stream() {
        true => Ok(stream(app, all, form)),
        false => Ok(Json(whole(&app, all, form).await?).into_response()),
    }
}

fn job(
    app: &App,
    common: &Common,
    request: &CompletionRequest,
    prompt: Vec<TokenId>,
) -> Result<Job, ApiError> {
    let constraint = match &request.response_format {
        Some(format) => format.constraint()?,
        None => None,
    };
    Ok(Job {
        prompt,
        sampling: common.sampling(app)?,
        max_new_tokens: max_new_tokens(app, Some(request.max_tokens.unwrap_or(DEFAULT_TOKENS))),
        stop: common.stops()?,
        end_tokens: common.end_tokens(),
        log_probabilities: log_probabilities("logprobs", request.logprobs)?,
        constraint,
        special_text: SpecialText::Skip,
        continues_text: true,
        choices: common.choices(),
    })
}

async fn prompts(app: &App, prompt: Prompt) -> Result<Vec<Vec<TokenId>>, ApiError> {
    let ids = |ids: Vec<u32>| ids.into_iter().map(TokenId).collect();
    let texts = match prompt {
        Prompt::Text(text) => vec![text],
        Prompt::Texts(texts) => texts,
        Prompt::Tokens(tokens) => return Ok(vec![ids(tokens)]),
        Prompt::TokenLists(lists) => {
            let lists: Vec<Vec<TokenId>> = lists.into_iter().map(ids).collect();
            return some_prompts(lists);
        }
    };
    let mut prompts = Vec::new();
    for text in some_prompts(texts)? {
        prompts.push(text_prompt(app, text).await?);
    }
    Ok(prompts)
}

fn some_prompts<T>(prompts: Vec<T>) -> Result<Vec<T>, ApiError> {
    match prompts.len() {
        1..=MAX_PROMPTS => Ok(prompts),
        n => Err(ApiError::field(
            "prompt",
            format!("there are {n} prompts; 1 to {MAX_PROMPTS} are allowed"),
        )),
    }
}

fn spelled(app: &App, prompt: &[TokenId]) -> String {
    app.engine().tokenizer().decode(prompt, SpecialText::Skip)
}

/// How answers are written.
struct Form {
    /// What stands before the answers, for each prompt.
    echo: Vec<String>,
    choices: usize,
    ending: Ending,
    with_logprobs: bool,
}

async fn whole(app: &App, all: Vec<Answers>, form: Form) -> Result<CompletionResponse, ApiError> {
    let mut totals = Totals::default();
    let mut done = Vec::new();
    for (answers, echo) in all.into_iter().zip(&form.echo) {
        let (choices, usage) = collect(app, answers, echo, &form, done.len()).await?;
        done.extend(choices);
        totals.add_prompt(&usage);
    }
    Ok(CompletionResponse {
        id: app.new_id("cmpl-"),
        object: "text_completion",
        created: now(),
        model: app.settings().model_name.clone(),
        choices: done,
        usage: UsageField::new(&totals, form.ending.with_speed),
    })
}

/// All answers to one prompt.
async fn collect(
    app: &App,
    mut answers: Answers,
    echo: &str,
    form: &Form,
    first: usize,
) -> Result<(Vec<CompletionChoice>, Totals), ApiError> {
    let mut totals = Totals::default();
    let mut choices: Vec<CompletionChoice> = (0..form.choices)
        .map(|choice| CompletionChoice {
            index: first + choice,
            text: echo.to_owned(),
            logprobs: form.with_logprobs.then(CompletionLogprobs::default),
            finish_reason: None,
        })
        .collect();
    while let Some(update) = answers.next().await? {
        match update {
            Update::Token { choice, token } => {
                let choice = &mut choices[choice];
                if let (Some(all), Some(of)) = (&mut choice.logprobs, &token.log_probabilities) {
                    let offset = choice.text.chars().count();
                    all.add(app.engine().tokenizer(), token.token, of, offset);
                }
                choice.text.push_str(&token.text);
            }
            Update::Finished { choice, end } => {
                choices[choice].text.push_str(&end.text);
                choices[choice].finish_reason = Some(finish_word(end.reason));
                totals.add(&end.usage);
            }
        }
    }
    Ok((choices, totals))
}

fn stream(app: App, all: Vec<Answers>, form: Form) -> Response {
    Events::respond(app, "cmpl-", |events| ChunkWriter(events).run(all, form))
}

struct ChunkWriter(Events);

impl ChunkWriter {
    /// The answers to one prompt after those to the one before, as OpenAI's API does not say otherwise.
    async fn run(self, all: Vec<Answers>, form: Form) {
        let mut totals = Totals::default();
        for (number, answers) in all.into_iter().enumerate() {
            match self.prompt(answers, &form, number).await {
                Ok(usage) => totals.add_prompt(&usage),
                Err(error) => return self.0.fail(&error).await,
            }
        }
        let counts = |usage| self.chunk(Vec::new(), Some(usage));
        self.0.end(&totals, &form.ending, counts).await;
    }

    async fn prompt(
        &self,
        mut answers: Answers,
        form: &Form,
        number: usize,
    ) -> Result<Totals, ApiError> {
        let mut totals = Totals::default();
        let mut lengths = vec![0; form.choices];
        let echo = &form.echo[number];
        if !echo.is_empty() {
            for (choice, length) in lengths.iter_mut().enumerate() {
                let piece = piece(number * form.choices + choice, echo.clone());
                self.piece(piece).await;
                *length = echo.chars().count();
            }
        }
        while let Some(update) = answers.next().await? {
            match update {
                Update::Token { choice, token } => {
                    let mut piece = piece(number * form.choices + choice, token.text);
                    if let Some(of) = &token.log_probabilities {
                        let mut all = CompletionLogprobs::default();
                        let tokenizer = self.0.app.engine().tokenizer();
                        all.add(tokenizer, token.token, of, lengths[choice]);
                        piece.logprobs = Some(all);
                    }
                    lengths[choice] += piece.text.chars().count();
                    if !piece.text.is_empty() || piece.logprobs.is_some() {
                        self.piece(piece).await;
                    }
                }
                Update::Finished { choice, end } => {
                    let mut piece = piece(number * form.choices + choice, end.text);
                    piece.finish_reason = Some(finish_word(end.reason));
                    self.piece(piece).await;
                    totals.add(&end.usage);
                }
            }
        }
        Ok(totals)
    }

    async fn piece(&self, piece: CompletionChoice) {
        self.0.send(&self.chunk(vec![piece], None)).await;
    }

    fn chunk(&self, choices: Vec<CompletionChoice>, usage: Option<UsageField>) -> CompletionChunk {
        CompletionChunk {
            id: self.0.id.clone(),
            object: "text_completion",
            created: self.0.created,
            model: self.0.model(),
            choices,
            usage,
        }
    }
}

fn piece(index: usize, text: String) -> CompletionChoice {
    CompletionChoice {
        index,
        text,
        logprobs: None,
        finish_reason: None,
    }
}
