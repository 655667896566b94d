//! Chat templates: from a list of messages to the text that the model was trained on.
//!
//! The template is a Jinja program in the model's file. It is rendered as Hugging Face's `apply_chat_template` does
//! (`trim_blocks`, `lstrip_blocks`, `tojson`, `raise_exception`, `strftime_now`, Python's string methods), and
//! distrusted as the file is: instructions, data and nesting are bounded by a budget. One gap is left, because the engine
//! has no hook there: joining with `~`, or comparing, lists that hold themselves many times over.

mod clock;
mod error;
mod json;
mod message;
mod methods;

use std::fmt;
use std::time::SystemTime;

use ktx_gguf::Metadata;
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Serde, Value};
use minijinja::{Environment, Error, ErrorKind, UndefinedBehavior};
use serde_json::Map;

pub use error::ChatError;
pub use message::Message;

use error::Raised;

/// Longest template; the longest published ones have some 30 KB.
const MAX_TEMPLATE_BYTES: usize = 256 << 10;
/// The engine's budget for a chat without text: about so many instructions, or 64 bytes of data each.
const BASE_FUEL: u64 = 2_000_000;
/// More budget per byte of the messages, enough to copy each some 60 times.
const FUEL_PER_BYTE: u64 = 1;
/// Address space of the stack for parsing and rendering, of which an honest template touches some kilobytes.
const STACK_BYTES: usize = 512 << 20;
/// Calls and blocks within each other.
const MAX_RECURSION: usize = 100;

const KEY: &str = "tokenizer.chat_template";

const CHATML: &str = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] \
                      + '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' \
                      }}{% endif %}";

/// Where a template comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TemplateOrigin {
    /// The model's file.
    File,
    /// The model's file, under this name.
    Named(String),
    /// ChatML, which the caller chose.
    ChatMl,
    /// The caller.
    Given,
}

impl fmt::Display for TemplateOrigin {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File => write!(formatter, "{KEY} of the model's file"),
            Self::Named(name) => write!(formatter, "{KEY}.{name} of the model's file"),
            Self::ChatMl => write!(
                formatter,
                "ChatML, chosen instead of a template from the model's file"
            ),
            Self::Given => write!(formatter, "a template given by the caller"),
        }
    }
}

/// What a rendering is told besides the messages.
#[derive(Clone, Debug, Default)]
pub struct RenderOptions {
    /// Whether the text ends where the model's answer begins.
    pub add_generation_prompt: bool,
    /// For templates that can switch reasoning: on, off, or the template's own default.
    pub enable_thinking: Option<bool>,
    /// Descriptions of the functions that the model may call, as JSON schemas.
    pub tools: Vec<serde_json::Value>,
    /// Further variables for the template.
    pub variables: Map<String, serde_json::Value>,
    /// The time that the template reads; now if not given.
    pub now: Option<SystemTime>,
}

impl RenderOptions {
    /// For an answer: the text ends where the model goes on.
    pub fn for_answer() -> Self {
        Self {
            add_generation_prompt: true,
            ..Self::default()
        }
    }
}

/// A parsed chat template with the special tokens that it may write.
pub struct ChatTemplate {
    environment: Environment<'static>,
    source: String,
    origin: TemplateOrigin,
    special_tokens: Vec<(&'static str, String)>,
}

impl fmt::Debug for ChatTemplate {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("ChatTemplate")
            .field("origin", &self.origin)
            .finish_non_exhaustive()
    }
}

impl ChatTemplate {
    /// The template of a model's file, with the file's BOS and EOS.
    ///
    /// # Errors
    /// [`ChatError::NoTemplate`] when the file has none: the caller decides whether to use [`Self::chatml`].
    /// [`ChatError::Syntax`] when it does not parse.
    pub fn from_metadata(metadata: &Metadata) -> Result<Self, ChatError> {
        Self::from_key(metadata, KEY, TemplateOrigin::File)
    }

    /// A template that the file carries under a name of its own, `tool_use` for example.
    ///
    /// # Errors
    /// As [`Self::from_metadata`].
    pub fn named(metadata: &Metadata, name: &str) -> Result<Self, ChatError> {
        Self::from_key(
            metadata,
            &format!("{KEY}.{name}"),
            TemplateOrigin::Named(name.to_owned()),
        )
    }

    /// The names of the further templates in the file.
    pub fn names(metadata: &Metadata) -> Vec<&str> {
        metadata
            .iter()
            .filter_map(|(key, _)| key.strip_prefix(KEY)?.strip_prefix('.'))
            .collect()
    }

    /// ChatML (`<|im_start|>user`), for files without a template. Whether a model knows it is the caller's judgement.
    pub fn chatml() -> Self {
        Self::parse(CHATML, TemplateOrigin::ChatMl).expect("the built-in template is tested")
    }

    /// A template from elsewhere, without special tokens.
    ///
    /// # Errors
    /// [`ChatError::Syntax`] when it does not parse, [`ChatError::TooLong`] above 256 KiB.
    pub fn from_source(source: &str) -> Result<Self, ChatError> {
        Self::parse(source, TemplateOrigin::Given)
    }

    /// Sets what the template knows as `bos_token`, `eos_token`, `pad_token` or `unk_token`.
    pub fn with_special_token(mut self, variable: &'static str, text: impl Into<String>) -> Self {
        self.special_tokens.retain(|(name, _)| *name != variable);
        self.special_tokens.push((variable, text.into()));
        self
    }

    fn from_key(metadata: &Metadata, key: &str, origin: TemplateOrigin) -> Result<Self, ChatError> {
        let source = metadata.str(key)?.ok_or_else(|| ChatError::NoTemplate {
            key: key.to_owned(),
        })?;
        let mut template = Self::parse(source, origin)?;
        let tokens = metadata
            .strings("tokenizer.ggml.tokens")?
            .unwrap_or_default();
        for (variable, key) in [
            ("bos_token", "tokenizer.ggml.bos_token_id"),
            ("eos_token", "tokenizer.ggml.eos_token_id"),
            ("pad_token", "tokenizer.ggml.padding_token_id"),
            ("unk_token", "tokenizer.ggml.unknown_token_id"),
        ] {
            let id = metadata.i64(key)?.and_then(|id| usize::try_from(id).ok());
            if let Some(text) = id.and_then(|id| tokens.get(id)) {
                template.special_tokens.push((variable, text.clone()));
            }
        }
        Ok(template)
    }

    fn parse(source: &str, origin: TemplateOrigin) -> Result<Self, ChatError> {
        if source.len() > MAX_TEMPLATE_BYTES {
            return Err(ChatError::TooLong {
                length: source.len(),
                limit: MAX_TEMPLATE_BYTES,
            });
        }
        let mut environment = environment();
        let source_without_tags = without_generation_tags(source);
        let environment = on_large_stack(move || {
            environment
                .add_template_owned(KEY, source_without_tags)
                .map_err(|error| ChatError::from_engine(&error))?;
            Ok(environment)
        })?;
        Ok(Self {
            environment,
            source: source.to_owned(),
            origin,
            special_tokens: Vec::new(),
        })
    }

    /// Where the template comes from.
    pub fn origin(&self) -> &TemplateOrigin {
        &self.origin
    }

    /// The template's text.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// The text of a conversation. It holds the BOS that the template writes; encode it with
    /// [`EncodeOptions::rendered_chat`](crate::tokenizer::EncodeOptions::rendered_chat).
    ///
    /// # Errors
    /// [`ChatError::Refused`] when the template raises an exception, [`ChatError::OutOfFuel`] when it does too much,
    /// [`ChatError::Render`] otherwise; all name the template's line.
    pub fn render(
        &self,
        messages: &[Message],
        options: &RenderOptions,
    ) -> Result<String, ChatError> {
        let mut environment = self.environment.clone();
        environment.set_fuel(Some(fuel(messages, options)));
        let now = options.now;
        environment.add_function("strftime_now", move |pattern: &str| {
            clock::format(now.unwrap_or_else(SystemTime::now), pattern)
        });
        on_large_stack(|| {
            environment
                .get_template(KEY)
                .and_then(|template| template.render(self.variables(messages, options)))
                .map_err(|error| ChatError::from_engine(&error))
        })
    }

    fn variables(&self, messages: &[Message], options: &RenderOptions) -> Value {
        let mut variables: Vec<(&str, Value)> = vec![
            ("messages", Value::from(Serde(messages))),
            (
                "add_generation_prompt",
                Value::from(options.add_generation_prompt),
            ),
            (
                "tools",
                if options.tools.is_empty() {
                    Value::from(())
                } else {
                    Value::from(Serde(&options.tools))
                },
            ),
            ("documents", Value::from(())),
        ];
        variables.extend(
            self.special_tokens
                .iter()
                .map(|(name, text)| (*name, Value::from(text.as_str()))),
        );
        variables.extend(
            options
                .enable_thinking
                .map(|enabled| ("enable_thinking", Value::from(enabled))),
        );
        variables.extend(
            options
                .variables
                .iter()
                .map(|(name, value)| (name.as_str(), Value::from(Serde(value)))),
        );
        Value::from_pairs(variables)
    }
}

/// Runs on a thread whose stack holds the deepest expression that fits a template and the deepest value that the budget
/// lets it build: the engine compiles the one and drops the other by recursion.
fn on_large_stack<T: Send>(
    work: impl FnOnce() -> Result<T, ChatError> + Send,
) -> Result<T, ChatError> {
    std::thread::scope(|scope| {
        let running = std::thread::Builder::new()
            .name("chat template".to_owned())
            .stack_size(STACK_BYTES)
            .spawn_scoped(scope, work)
            .map_err(ChatError::Thread)?;
        running.join().unwrap_or(Err(ChatError::Panicked))
    })
}

/// The engine as transformers sets it up.
fn environment() -> Environment<'static> {
    let mut environment = Environment::new();
    let syntax = SyntaxConfig::builder()
        .trim_blocks(true)
        .lstrip_blocks(true)
        .build();
    environment.set_syntax(syntax.expect("the delimiters are Jinja's own"));
    environment.set_undefined_behavior(UndefinedBehavior::Lenient);
    environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
    environment.set_recursion_limit(MAX_RECURSION);
    environment.set_unknown_method_callback(methods::call);
    environment.add_filter("tojson", json::to_json);
    // The engine iterates over none as over an empty list; templates ask in order to tell the two apart.
    environment.add_test("iterable", |value: &Value| {
        !value.is_none() && value.try_iter().is_ok()
    });
    environment.set_formatter(|output, state, value| {
        methods::charge_for_printing(state, value)?;
        minijinja::escape_formatter(output, state, value)
    });
    environment.add_function(
        "raise_exception",
        |message: String| -> Result<Value, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, message.clone())
                .with_source(Raised(message)))
        },
    );
    environment
}

fn fuel(messages: &[Message], options: &RenderOptions) -> u64 {
    let of_messages: usize = messages
        .iter()
        .map(|message| message.role.len() + message.content.len() + size_of_map(&message.extra))
        .sum();
    let of_tools: usize = options.tools.iter().map(size_of_value).sum();
    BASE_FUEL + FUEL_PER_BYTE * (of_messages + of_tools + size_of_map(&options.variables)) as u64
}

fn size_of_map(map: &Map<String, serde_json::Value>) -> usize {
    map.iter()
        .map(|(key, value)| key.len() + size_of_value(value))
        .sum()
}

fn size_of_value(value: &serde_json::Value) -> usize {
    match value {
        serde_json::Value::String(text) => text.len(),
        serde_json::Value::Array(values) => values.iter().map(size_of_value).sum(),
        serde_json::Value::Object(map) => size_of_map(map),
        _ => 8,
    }
}

/// Replaces `{% generation %}`, transformers' mark of what is trained on, by a block that changes nothing.
fn without_generation_tags(source: &str) -> String {
    let mut rewritten = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let (before, tag) = rest.split_at(start);
        let Some(end) = tag.find("%}") else { break };
        let inside = &tag[2..end];
        let replacement = match inside.trim_matches(['-', '+', ' ', '\t', '\n', '\r']) {
            "generation" => Some(inside.replace("generation", "if true")),
            "endgeneration" => Some(inside.replace("endgeneration", "endif")),
            _ => None,
        };
        rewritten.push_str(before);
        match replacement {
            Some(inside) => rewritten.extend(["{%", &inside, "%}"]),
            None => rewritten.push_str(&tag[..end + 2]),
        }
        rest = &tag[end + 2..];
    }
    rewritten.push_str(rest);
    rewritten
}
