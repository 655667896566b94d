//! Functions that a model may call, and when it must.

use ktx_core::chat::Message;
use serde::Deserialize;
use serde_json::{Map, Value, json};
use utoipa::ToSchema;

use crate::error::ApiError;

/// Functions of a request at most.
const MAX_TOOLS: usize = 128;

/// Whether functions are called.
#[derive(Debug, Clone, Deserialize, ToSchema)]
#[serde(untagged)]
pub(crate) enum ToolChoice {
    /// `none`, `auto` or `required`.
    Word(String),
    /// One function.
    Function(Map<String, Value>),
}

/// What the request says of functions.
#[derive(Debug, Clone, Default)]
pub(crate) struct Tools {
    /// Those that the model is told of, as the request describes them.
    pub(crate) shown: Vec<Value>,
    /// Those of which one must be called.
    pub(crate) forced: Vec<Value>,
}

impl Tools {
    /// Checks what a request says.
    pub(crate) fn new(
        tools: Option<Vec<Value>>,
        choice: Option<ToolChoice>,
    ) -> Result<Self, ApiError> {
        let tools = tools.unwrap_or_default();
        if tools.len() > MAX_TOOLS {
            let message = format!("there are {} tools; {MAX_TOOLS} are allowed", tools.len());
            return Err(ApiError::field("tools", message));
        }
        for (index, tool) in tools.iter().enumerate() {
            check(tool).map_err(|why| ApiError::field(format!("tools[{index}]"), why))?;
        }
        let wrong = |message: &str| Err(ApiError::field("tool_choice", message));
        let forced = match choice {
            None => Vec::new(),
            Some(_) if tools.is_empty() => {
                return wrong(
                    "tool_choice says which of the `tools` is called, and there are none",
                );
            }
            Some(ToolChoice::Word(word)) => match word.as_str() {
                "none" => return Ok(Self::default()),
                "auto" => Vec::new(),
                "required" => tools.clone(),
                _ => return wrong("tool_choice is none, auto, required, or names a function"),
            },
            Some(ToolChoice::Function(choice)) => {
                let name = choice.get("function").map(|f| &f["name"]);
                let named = tools
                    .iter()
                    .filter(|t| Some(&t["function"]["name"]) == name);
                let named: Vec<Value> = named.cloned().collect();
                if named.is_empty() {
                    return wrong("tool_choice names a function that is none of the `tools`");
                }
                named
            }
        };
        Ok(Self {
            shown: tools,
            forced,
        })
    }

    /// The schema of a forced call: a name of one of the functions and its arguments.
    pub(crate) fn forced_schema(&self) -> Option<Value> {
        let calls: Vec<Value> = self
            .forced
            .iter()
            .map(|tool| {
                let function = &tool["function"];
                let arguments = match function.get("parameters") {
                    Some(parameters @ Value::Object(_)) => parameters.clone(),
                    _ => json!({"type": "object"}),
                };
                json!({
                    "type": "object",
                    "properties": {"name": {"const": function["name"]}, "arguments": arguments},
                    "required": ["name", "arguments"],
                    "additionalProperties": false,
                })
            })
            .collect();
        (!calls.is_empty()).then(|| json!({ "anyOf": calls }))
    }
}

fn check(tool: &Value) -> Result<(), &'static str> {
    if tool["type"] != "function" {
        return Err("only tools of type `function` are supported");
    }
    match tool["function"]["name"].as_str() {
        Some(name) if !name.is_empty() && name.len() <= 256 => {}
        _ => return Err("the function has no name, or one that is too long"),
    }
    match &tool["function"]["parameters"] {
        Value::Null | Value::Object(_) => Ok(()),
        _ => Err("the function's parameters must be a JSON schema"),
    }
}

/// Describes functions in the conversation, for templates that know none.
pub(crate) fn describe(messages: &mut Vec<Message>, tools: &[Value]) {
    let mut text = String::from(
        "You may call these functions. To call one, answer with\n<tool_call>\n\
         {\"name\": \"its name\", \"arguments\": {its arguments}}\n</tool_call>\n",
    );
    for tool in tools {
        text.push_str(&tool["function"].to_string());
        text.push('\n');
    }
    match messages.first_mut().filter(|m| m.role == "system") {
        Some(system) => system.content = format!("{}\n\n{text}", system.content),
        None => messages.insert(0, Message::system(text)),
    }
}
