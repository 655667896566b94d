//! Answers to conversations: whole, and piece by piece.

use axum::response::Response;
use ktx_core::serving::TokenEvent;

use super::events::{Ending, Events};
use super::response::{
    AnswerMessage, ChatChoice, ChatDelta, ChatLogprobs, Delta, TokenLogprob, ToolCallField,
    UsageField,
};
use super::{ChatChunk, ChatCompletion};
use crate::app::{App, now};
use crate::error::ApiError;
use crate::generate::{Answers, Totals, Update, finish_word};
use crate::output::{OutputParser, Part};

/// How answers are read and written.
pub(super) struct Form {
    /// A parser of one answer, at its beginning.
    pub(super) parser: OutputParser,
    pub(super) choices: usize,
    pub(super) ending: Ending,
    /// Whether only the first call of a function counts.
    pub(super) one_call: bool,
    pub(super) with_logprobs: bool,
}

/// One of the answers, as it is read.
struct Choice {
    parser: OutputParser,
    calls: usize,
    one_call: bool,
}

impl Choice {
    fn all(form: &Form) -> Vec<Self> {
        (0..form.choices)
            .map(|_| Self {
                parser: form.parser.clone(),
                calls: 0,
                one_call: form.one_call,
            })
            .collect()
    }

    fn push(&mut self, text: &str) -> Vec<Part> {
        let parts = self.parser.push(text);
        self.counted(parts)
    }

    fn finish(&mut self, text: &str) -> Vec<Part> {
        let mut parts = self.parser.push(text);
        parts.extend(self.parser.finish());
        self.counted(parts)
    }

    fn counted(&mut self, mut parts: Vec<Part>) -> Vec<Part> {
        parts.retain(|part| {
            if matches!(part, Part::Call(_)) {
                self.calls += 1;
                return !self.one_call || self.calls == 1;
            }
            true
        });
        parts
    }

    fn finish_reason(&self, end: &ktx_core::serving::Finished) -> &'static str {
        match self.calls {
            0 => finish_word(end.reason),
            _ => "tool_calls",
        }
    }
}

fn logprob(app: &App, token: &TokenEvent) -> Option<TokenLogprob> {
    let of = token.log_probabilities.as_ref()?;
    Some(TokenLogprob::new(app.engine().tokenizer(), token.token, of))
}

/// A whole answer.
pub(super) struct Whole(pub(super) ChatCompletion);

/// Collects the answers.
pub(super) async fn whole(app: &App, mut answers: Answers, form: Form) -> Result<Whole, ApiError> {
    let mut choices = Choice::all(&form);
    let mut totals = Totals::default();
    let mut done: Vec<ChatChoice> = (0..form.choices)
        .map(|index| ChatChoice {
            index,
            message: AnswerMessage {
                role: "assistant",
                ..AnswerMessage::default()
            },
            logprobs: form.with_logprobs.then(ChatLogprobs::default),
            finish_reason: "stop",
        })
        .collect();
    while let Some(update) = answers.next().await? {
        let (index, parts) = match update {
            Update::Token { choice, token } => {
                if let Some(all) = &mut done[choice].logprobs {
                    all.content.extend(logprob(app, &token));
                }
                (choice, choices[choice].push(&token.text))
            }
            Update::Finished { choice, end } => {
                let parts = choices[choice].finish(&end.text);
                done[choice].finish_reason = choices[choice].finish_reason(&end);
                totals.add(&end.usage);
                (choice, parts)
            }
        };
        let message = &mut done[index].message;
        for part in parts {
            add(app, message, part);
        }
    }
    for choice in &mut done {
        if choice.message.tool_calls.is_empty() {
            choice.message.content.get_or_insert_default();
        }
    }
    Ok(Whole(ChatCompletion {
        id: app.new_id("chatcmpl-"),
        object: "chat.completion",
        created: now(),
        model: app.settings().model_name.clone(),
        choices: done,
        usage: UsageField::new(&totals, form.ending.with_speed),
    }))
}

fn add(app: &App, message: &mut AnswerMessage, part: Part) {
    match part {
        Part::Content(text) => message.content.get_or_insert_default().push_str(&text),
        Part::Thought(text) => message
            .reasoning_content
            .get_or_insert_default()
            .push_str(&text),
        Part::Call(call) => {
            let call = ToolCallField::new(call, app.new_id("call_"), None);
            message.tool_calls.push(call);
        }
    }
}

/// Sends the answers piece by piece.
pub(super) fn stream(app: App, answers: Answers, form: Form) -> Response {
    Events::respond(app, "chatcmpl-", |events| {
        ChunkWriter(events).run(answers, form)
    })
}

/// Writes pieces.
struct ChunkWriter(Events);

impl ChunkWriter {
    async fn run(self, mut answers: Answers, form: Form) {
        let mut choices = Choice::all(&form);
        let mut totals = Totals::default();
        for index in 0..form.choices {
            let role = Delta {
                role: Some("assistant"),
                content: Some(String::new()),
                ..Delta::default()
            };
            self.delta(index, role, None, None).await;
        }
        loop {
            match answers.next().await {
                Ok(Some(Update::Token { choice, token })) => {
                    let logprobs = logprob(&self.0.app, &token).map(|one| ChatLogprobs {
                        content: vec![one],
                        refusal: None,
                    });
                    let parts = choices[choice].push(&token.text);
                    let calls = choices[choice].calls;
                    self.parts(choice, parts, calls, logprobs).await;
                }
                Ok(Some(Update::Finished { choice, end })) => {
                    let parts = choices[choice].finish(&end.text);
                    let calls = choices[choice].calls;
                    self.parts(choice, parts, calls, None).await;
                    let reason = choices[choice].finish_reason(&end);
                    self.delta(choice, Delta::default(), None, Some(reason))
                        .await;
                    totals.add(&end.usage);
                }
                Ok(None) => break,
                Err(error) => return self.0.fail(&error).await,
            }
        }
        let counts = |usage| self.chunk(Vec::new(), Some(usage));
        self.0.end(&totals, &form.ending, counts).await;
    }

    /// `calls` counts those of the answer so far, these parts' included.
    async fn parts(
        &self,
        choice: usize,
        parts: Vec<Part>,
        calls: usize,
        mut logprobs: Option<ChatLogprobs>,
    ) {
        let new_calls = parts.iter().filter(|p| matches!(p, Part::Call(_))).count();
        let mut number = calls.min(calls.wrapping_sub(new_calls));
        if parts.is_empty() && logprobs.is_some() {
            let empty = Delta {
                content: Some(String::new()),
                ..Delta::default()
            };
            return self.delta(choice, empty, logprobs, None).await;
        }
        for part in parts {
            let mut delta = Delta::default();
            match part {
                Part::Content(text) => delta.content = Some(text),
                Part::Thought(text) => delta.reasoning_content = Some(text),
                Part::Call(call) => {
                    let id = self.0.app.new_id("call_");
                    delta.tool_calls = vec![ToolCallField::new(call, id, Some(number))];
                    number += 1;
                }
            }
            self.delta(choice, delta, logprobs.take(), None).await;
        }
    }

    async fn delta(
        &self,
        index: usize,
        delta: Delta,
        logprobs: Option<ChatLogprobs>,
        finish_reason: Option<&'static str>,
    ) {
        let choice = ChatDelta {
            index,
            delta,
            logprobs,
            finish_reason,
        };
        self.0.send(&self.chunk(vec![choice], None)).await;
    }

    fn chunk(&self, choices: Vec<ChatDelta>, usage: Option<UsageField>) -> ChatChunk {
        ChatChunk {
            id: self.0.id.clone(),
            object: "chat.completion.chunk",
            created: self.0.created,
            model: self.0.model(),
            choices,
            usage,
        }
    }
}
