//! A turn of a conversation.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// A message of a chat, as templates see it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Message {
    /// Who speaks: `system`, `user`, `assistant` or `tool`; templates may know others.
    pub role: String,
    /// The text.
    pub content: String,
    /// Whatever else a template may read: `reasoning_content`, `tool_calls`, `name`.
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

impl Message {
    /// A message without further fields.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self {
            role: role.into(),
            content: content.into(),
            extra: Map::new(),
        }
    }

    /// Instructions that stand before the conversation.
    pub fn system(content: impl Into<String>) -> Self {
        Self::new("system", content)
    }

    /// What the person says.
    pub fn user(content: impl Into<String>) -> Self {
        Self::new("user", content)
    }

    /// What the model said.
    pub fn assistant(content: impl Into<String>) -> Self {
        Self::new("assistant", content)
    }

    /// Adds a field for templates that read it.
    pub fn with(mut self, field: impl Into<String>, value: Value) -> Self {
        self.extra.insert(field.into(), value);
        self
    }
}
