//! Calls of functions, as models write them.

use serde_json::{Map, Value};

/// A function that the model wants to be called.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ToolCall {
    /// Its name.
    pub(crate) name: String,
    /// Its arguments, as JSON.
    pub(crate) arguments: String,
}

/// How calls are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum CallFormat {
    /// `<tool_call>{"name": …, "arguments": …}</tool_call>`: Qwen, Hermes, SmolLM, and models that know none.
    Hermes,
    /// `<tool_call><function=NAME><parameter=KEY>VALUE</parameter></function></tool_call>`.
    QwenXml,
    /// Special tokens around a name and fenced JSON.
    DeepSeek,
    /// The answer is `{"name": …, "parameters": …}`.
    Llama,
    /// `[TOOL_CALLS]` and a list.
    Mistral,
    /// Messages to functions in a channel.
    Harmony,
}

/// What encloses calls.
pub(super) struct Markers {
    /// The first begins a call; others are left out of the content.
    pub(super) open: &'static [&'static str],
    /// What ends one; without any, the answer's end does.
    pub(super) close: &'static [&'static str],
}

impl Markers {
    pub(super) const NONE: Self = Self {
        open: &[],
        close: &[],
    };

    pub(super) fn starts_call(&self, marker: &str) -> bool {
        self.open.first() == Some(&marker)
    }
}

impl CallFormat {
    /// What a template's text tells of it.
    pub(super) fn of_template(template: &str) -> Self {
        let has = |text| template.contains(text);
        if has("<|channel|>") {
            Self::Harmony
        } else if has("<｜tool▁call▁begin｜>") {
            Self::DeepSeek
        } else if has("[TOOL_CALLS]") {
            Self::Mistral
        } else if has("<tool_call>") && has("<function=") {
            Self::QwenXml
        } else if !has("<tool_call>") && has("\"parameters\"") && has("python") {
            Self::Llama
        } else {
            Self::Hermes
        }
    }

    /// Whether special tokens enclose calls.
    pub(super) fn has_special_markers(self) -> bool {
        !matches!(self, Self::Hermes | Self::QwenXml)
    }

    pub(super) fn markers(self) -> Markers {
        match self {
            Self::Hermes | Self::QwenXml => Markers {
                open: &["<tool_call>"],
                close: &["</tool_call>"],
            },
            Self::DeepSeek => Markers {
                open: &[
                    "<｜tool▁call▁begin｜>",
                    "<｜tool▁calls▁begin｜>",
                    "<｜tool▁calls▁end｜>",
                ],
                close: &["<｜tool▁call▁end｜>"],
            },
            Self::Mistral => Markers {
                open: &["[TOOL_CALLS]"],
                close: &[],
            },
            Self::Llama => Markers {
                open: &["<|python_tag|>"],
                close: &[],
            },
            Self::Harmony => Markers::NONE,
        }
    }
}

/// Reads what markers enclose; none if it is no call.
pub(super) fn parse(
    format: CallFormat,
    header: &str,
    text: &str,
    tools: &[Value],
) -> Option<Vec<ToolCall>> {
    let text = text.trim();
    match format {
        CallFormat::Hermes => object(text).map(|call| vec![call]),
        CallFormat::QwenXml => match text.starts_with("<function=") {
            true => xml(text, tools).map(|call| vec![call]),
            false => object(text).map(|call| vec![call]),
        },
        CallFormat::DeepSeek => deepseek(text).map(|call| vec![call]),
        CallFormat::Llama => {
            let text = text.strip_prefix("<|python_tag|>").unwrap_or(text);
            let calls: Option<Vec<_>> = text.split("; ").map(object).collect();
            calls.or_else(|| Some(vec![object(text)?]))
        }
        CallFormat::Mistral => mistral(text),
        CallFormat::Harmony => {
            let name = header.split("to=functions.").nth(1)?;
            let end = name.find(|c: char| c.is_whitespace() || c == '<');
            call(&name[..end.unwrap_or(name.len())], json(text)?).map(|call| vec![call])
        }
    }
}

fn json(text: &str) -> Option<Value> {
    serde_json::from_str(text.trim()).ok()
}

fn call(name: &str, arguments: Value) -> Option<ToolCall> {
    let arguments = match arguments {
        // Some models write the arguments as a text of JSON.
        Value::String(text) => text,
        Value::Null => "{}".to_owned(),
        value @ Value::Object(_) => value.to_string(),
        _ => return None,
    };
    (!name.is_empty()).then(|| ToolCall {
        name: name.to_owned(),
        arguments,
    })
}

/// `{"name": …, "arguments": …}`
fn object(text: &str) -> Option<ToolCall> {
    of_object(json(text)?)
}

fn of_object(value: Value) -> Option<ToolCall> {
    let Value::Object(mut fields) = value else {
        return None;
    };
    let name = fields.get("name")?.as_str()?.to_owned();
    let arguments = fields
        .remove("arguments")
        .or_else(|| fields.remove("parameters"));
    call(&name, arguments.unwrap_or(Value::Null))
}

fn mistral(text: &str) -> Option<Vec<ToolCall>> {
    if let Some(Value::Array(calls)) = json(text) {
        return calls.into_iter().map(of_object).collect();
    }
    text.split("[TOOL_CALLS]")
        .map(|part| {
            let (name, arguments) = part.split_once("[ARGS]")?;
            call(name.trim(), json(arguments)?)
        })
        .collect()
}

/// `function<sep>NAME` and fenced JSON, or `NAME<sep>JSON`.
fn deepseek(text: &str) -> Option<ToolCall> {
    let (first, rest) = text.split_once("<｜tool▁sep｜>")?;
    match rest.split_once("```") {
        Some((name, fenced)) if first.trim() == "function" => {
            let fenced = fenced.trim_start_matches("json");
            let body = fenced.rsplit_once("```").map_or(fenced, |(body, _)| body);
            call(name.trim(), json(body)?)
        }
        _ => call(first.trim(), json(rest)?),
    }
}

fn xml(text: &str, tools: &[Value]) -> Option<ToolCall> {
    let (name, mut rest) = text.strip_prefix("<function=")?.split_once('>')?;
    let mut arguments = Map::new();
    while let Some((_, parameter)) = rest.split_once("<parameter=") {
        let (key, after) = parameter.split_once('>')?;
        let (value, after) = after.split_once("</parameter>")?;
        let value = value.strip_prefix('\n').unwrap_or(value);
        let value = value.strip_suffix('\n').unwrap_or(value);
        let value = match is_text(tools, name, key) {
            true => Value::String(value.to_owned()),
            false => json(value).unwrap_or_else(|| Value::String(value.to_owned())),
        };
        arguments.insert(key.to_owned(), value);
        rest = after;
    }
    call(name, Value::Object(arguments))
}

/// Whether a function's parameter is a text by its schema.
fn is_text(tools: &[Value], name: &str, key: &str) -> bool {
    let functions = tools.iter().filter_map(|tool| tool.get("function"));
    let mut named = functions.filter(|function| function["name"] == name);
    named.any(|function| function["parameters"]["properties"][key]["type"] == "string")
}
