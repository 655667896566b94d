//! Messages, as clients write them and as chat templates read them.

use ktx_core::chat::Message;
use serde::Deserialize;
use serde_json::{Map, Value, json};
use utoipa::ToSchema;

use crate::error::ApiError;

/// A message of a conversation.
#[derive(Debug, Clone, Deserialize, ToSchema)]
pub(crate) struct MessageField {
    /// Who speaks: `system`, `developer`, `user`, `assistant`, `tool`.
    role: String,
    /// What is said.
    #[serde(default)]
    content: Option<Content>,
    /// Functions that the assistant called.
    #[serde(default)]
    tool_calls: Option<Vec<Map<String, Value>>>,
    /// Which call this message answers.
    #[serde(default)]
    tool_call_id: Option<String>,
    /// Who it is, among several of one role; of a tool, its name.
    #[serde(default)]
    name: Option<String>,
    /// What the assistant thought.
    #[serde(default)]
    reasoning_content: Option<String>,
    /// Why the assistant refused.
    #[serde(default)]
    #[allow(
        dead_code,
        reason = "a field that clients send back and that templates do not read"
    )]
    refusal: Option<String>,
    /// Fields that this server does not know.
    #[serde(flatten)]
    #[schema(ignore)]
    unknown: Map<String, Value>,
}

/// A text, or a list of parts.
#[derive(Debug, Clone, Deserialize, ToSchema)]
#[serde(untagged)]
pub(crate) enum Content {
    /// A text.
    Text(String),
    /// Parts; all must be texts.
    Parts(Vec<ContentPart>),
}

/// A part of a message.
#[derive(Debug, Clone, Deserialize, ToSchema)]
pub(crate) struct ContentPart {
    /// `text`.
    r#type: String,
    /// The text.
    #[serde(default)]
    text: Option<String>,
}

/// The conversation that a template reads.
pub(crate) fn chat_messages(messages: Vec<MessageField>) -> Result<Vec<Message>, ApiError> {
    if messages.is_empty() {
        return Err(ApiError::field(
            "messages",
            "the conversation is empty: send one message at least",
        ));
    }
    messages
        .into_iter()
        .enumerate()
        .map(|(index, message)| message.into_message(&format!("messages[{index}]")))
        .collect()
}

impl MessageField {
    fn into_message(self, at: &str) -> Result<Message, ApiError> {
        // Nothing that OpenAI's API has in a message is unknown here but sound and annotations.
        if let Some((name, _)) = self.unknown.iter().find(|(name, value)| {
            !value.is_null() && !matches!(name.as_str(), "annotations" | "reasoning")
        }) {
            return Err(ApiError::unsupported(
                &format!("{at}.{name}"),
                format!("`{name}` of a message is not supported here"),
            ));
        }
        let role = match self.role.as_str() {
            "developer" => "system",
            "function" => "tool",
            role @ ("system" | "user" | "assistant" | "tool") => role,
            other => {
                return Err(ApiError::field(
                    format!("{at}.role"),
                    format!("`{other}` is no role; there are system, user, assistant and tool"),
                ));
            }
        };
        let content = match self.content {
            Some(content) => content.into_text(at)?,
            None if role == "assistant" => String::new(),
            None => {
                return Err(ApiError::field(
                    format!("{at}.content"),
                    "the message has no content",
                ));
            }
        };
        let mut message = Message::new(role, content);
        if let Some(calls) = self.tool_calls.filter(|calls| !calls.is_empty()) {
            let calls: Vec<Value> = calls.into_iter().map(readable_call).collect();
            message = message.with("tool_calls", json!(calls));
        }
        for (field, value) in [
            ("tool_call_id", self.tool_call_id),
            ("name", self.name),
            ("reasoning_content", self.reasoning_content),
        ] {
            if let Some(value) = value {
                message = message.with(field, json!(value));
            }
        }
        Ok(message)
    }
}

impl Content {
    fn into_text(self, at: &str) -> Result<String, ApiError> {
        match self {
            Self::Text(text) => Ok(text),
            Self::Parts(parts) => {
                let mut text = String::new();
                for (index, part) in parts.into_iter().enumerate() {
                    match (part.r#type.as_str(), part.text) {
                        ("text", Some(part)) => text.push_str(&part),
                        (kind, _) => {
                            return Err(ApiError::unsupported(
                                &format!("{at}.content[{index}]"),
                                format!(
                                    "content of type `{kind}` is not supported: this model reads text"
                                ),
                            ));
                        }
                    }
                }
                Ok(text)
            }
        }
    }
}

/// Clients send arguments as a text of JSON; templates read them as JSON.
fn readable_call(mut call: Map<String, Value>) -> Value {
    if let Some(Value::Object(function)) = call.get_mut("function")
        && let Some(Value::String(text)) = function.get("arguments")
        && let Ok(arguments @ Value::Object(_)) = serde_json::from_str::<Value>(text)
    {
        function.insert("arguments".to_owned(), arguments);
    }
    Value::Object(call)
}
