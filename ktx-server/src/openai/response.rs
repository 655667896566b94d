//! What is answered.

use std::collections::BTreeMap;

use ktx_core::Tokenizer;
use ktx_core::sampling::LogProbabilities;
use ktx_core::tokenizer::TokenId;
use serde::Serialize;
use utoipa::ToSchema;

use crate::generate::Totals;
use crate::output::ToolCall;

/// An answer to a conversation.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct ChatCompletion {
    pub(super) id: String,
    /// `chat.completion`
    pub(super) object: &'static str,
    /// When it was made, in seconds since 1970.
    pub(super) created: u64,
    pub(super) model: String,
    pub(super) choices: Vec<ChatChoice>,
    pub(super) usage: UsageField,
}

/// One of the answers.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct ChatChoice {
    pub(super) index: usize,
    pub(super) message: AnswerMessage,
    pub(super) logprobs: Option<ChatLogprobs>,
    /// `stop`, `length` or `tool_calls`.
    pub(super) finish_reason: &'static str,
}

/// What the assistant says.
#[derive(Debug, Default, Serialize, ToSchema)]
pub(crate) struct AnswerMessage {
    /// `assistant`
    pub(super) role: &'static str,
    /// The text; none if there are only calls of functions.
    pub(super) content: Option<String>,
    /// What the model thought before.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) reasoning_content: Option<String>,
    /// Always none.
    pub(super) refusal: Option<String>,
    /// Functions to be called.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(super) tool_calls: Vec<ToolCallField>,
}

/// A function to be called.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct ToolCallField {
    /// Its number among the calls; in streams.
    #[serde(skip_serializing_if = "Option::is_none")]
    index: Option<usize>,
    id: String,
    /// `function`
    r#type: &'static str,
    function: FunctionField,
}

/// A function's name and arguments.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct FunctionField {
    name: String,
    /// As JSON.
    arguments: String,
}

impl ToolCallField {
    pub(super) fn new(call: ToolCall, id: String, index: Option<usize>) -> Self {
        Self {
            index,
            id,
            r#type: "function",
            function: FunctionField {
                name: call.name,
                arguments: call.arguments,
            },
        }
    }
}

/// A piece of a streamed answer to a conversation.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct ChatChunk {
    pub(super) id: String,
    /// `chat.completion.chunk`
    pub(super) object: &'static str,
    pub(super) created: u64,
    pub(super) model: String,
    pub(super) choices: Vec<ChatDelta>,
    /// In the last piece, if it was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) usage: Option<UsageField>,
}

/// What is new of one of the answers.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct ChatDelta {
    pub(super) index: usize,
    pub(super) delta: Delta,
    pub(super) logprobs: Option<ChatLogprobs>,
    pub(super) finish_reason: Option<&'static str>,
}

/// What is new of a message.
#[derive(Debug, Default, Serialize, ToSchema)]
pub(crate) struct Delta {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) content: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) reasoning_content: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(super) tool_calls: Vec<ToolCallField>,
}

/// Probabilities of an answer's tokens.
#[derive(Debug, Default, Serialize, ToSchema)]
pub(crate) struct ChatLogprobs {
    pub(super) content: Vec<TokenLogprob>,
    /// Always none.
    pub(super) refusal: Option<Vec<TokenLogprob>>,
}

/// A token's probability, and those of the likeliest ones in its place.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct TokenLogprob {
    token: String,
    logprob: f32,
    bytes: Vec<u8>,
    top_logprobs: Vec<TopLogprob>,
}

/// A token's probability.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct TopLogprob {
    token: String,
    logprob: f32,
    bytes: Vec<u8>,
}

fn token_text(tokenizer: &Tokenizer, token: TokenId) -> (String, Vec<u8>) {
    let bytes = tokenizer.token_bytes(token).to_vec();
    (String::from_utf8_lossy(&bytes).into_owned(), bytes)
}

impl TokenLogprob {
    pub(super) fn new(tokenizer: &Tokenizer, token: TokenId, of: &LogProbabilities) -> Self {
        let (text, bytes) = token_text(tokenizer, token);
        let top = of.top.iter().map(|(token, logprob)| {
            let (text, bytes) = token_text(tokenizer, *token);
            TopLogprob {
                token: text,
                logprob: *logprob,
                bytes,
            }
        });
        Self {
            token: text,
            logprob: of.chosen,
            bytes,
            top_logprobs: top.collect(),
        }
    }
}

/// A text's continuation.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct CompletionResponse {
    pub(super) id: String,
    /// `text_completion`
    pub(super) object: &'static str,
    pub(super) created: u64,
    pub(super) model: String,
    pub(super) choices: Vec<CompletionChoice>,
    pub(super) usage: UsageField,
}

/// A piece of a text's streamed continuation.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct CompletionChunk {
    pub(super) id: String,
    /// `text_completion`
    pub(super) object: &'static str,
    pub(super) created: u64,
    pub(super) model: String,
    pub(super) choices: Vec<CompletionChoice>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) usage: Option<UsageField>,
}

/// One of the continuations.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct CompletionChoice {
    pub(super) index: usize,
    pub(super) text: String,
    pub(super) logprobs: Option<CompletionLogprobs>,
    /// `stop` or `length`; none while it goes on.
    pub(super) finish_reason: Option<&'static str>,
}

/// Probabilities of a continuation's tokens.
#[derive(Debug, Default, Serialize, ToSchema)]
pub(crate) struct CompletionLogprobs {
    tokens: Vec<String>,
    token_logprobs: Vec<f32>,
    top_logprobs: Vec<BTreeMap<String, f32>>,
    text_offset: Vec<usize>,
}

impl CompletionLogprobs {
    /// Adds a token whose text begins at `offset`.
    pub(super) fn add(
        &mut self,
        tokenizer: &Tokenizer,
        token: TokenId,
        of: &LogProbabilities,
        offset: usize,
    ) {
        self.tokens.push(token_text(tokenizer, token).0);
        self.token_logprobs.push(of.chosen);
        let top = of.top.iter();
        self.top_logprobs.push(
            top.map(|(t, p)| (token_text(tokenizer, *t).0, *p))
                .collect(),
        );
        self.text_offset.push(offset);
    }
}

/// Counts of tokens.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct UsageField {
    prompt_tokens: usize,
    completion_tokens: usize,
    total_tokens: usize,
    prompt_tokens_details: PromptDetails,
    /// Seconds that the prompt took; if `return_speed` was set.
    #[serde(skip_serializing_if = "Option::is_none")]
    prefill_time: Option<f64>,
    /// Seconds from the first token to the last; if `return_speed` was set.
    #[serde(skip_serializing_if = "Option::is_none")]
    decode_time: Option<f64>,
}

/// What the prompt's tokens were.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct PromptDetails {
    /// Those that the prefix cache had.
    cached_tokens: usize,
}

impl UsageField {
    pub(super) fn new(totals: &Totals, with_speed: bool) -> Self {
        let time = |time: std::time::Duration| with_speed.then_some(time.as_secs_f64());
        Self {
            prompt_tokens: totals.prompt_tokens,
            completion_tokens: totals.generated_tokens,
            total_tokens: totals.prompt_tokens + totals.generated_tokens,
            prompt_tokens_details: PromptDetails {
                cached_tokens: totals.cached_tokens,
            },
            prefill_time: time(totals.prompt_time),
            decode_time: time(totals.generate_time),
        }
    }
}
