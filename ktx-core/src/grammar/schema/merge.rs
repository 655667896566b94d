//! Schemas that hold at once, as one.

use serde_json::{Value, json};

use super::{GrammarError, Keywords, malformed};

/// Keywords that say nothing of a value.
const ANNOTATIONS: [&str; 16] = [
    "title",
    "description",
    "default",
    "example",
    "examples",
    "deprecated",
    "readOnly",
    "writeOnly",
    "$schema",
    "$id",
    "$anchor",
    "$comment",
    "$defs",
    "definitions",
    "discriminator",
    "strict",
];

/// Whether a keyword says something of a value.
pub(super) fn constrains(word: &str) -> bool {
    !ANNOTATIONS.contains(&word)
}

/// A schema that is met by what meets all of these.
pub(super) fn all_of(
    mut merged: Keywords,
    parts: &[Value],
    at: &str,
) -> Result<Keywords, GrammarError> {
    for part in parts {
        match part {
            Value::Bool(true) => {}
            Value::Object(keywords) => {
                for (word, value) in keywords {
                    add(&mut merged, word, value, at)?;
                }
            }
            _ => return Err(malformed(at, "a part of `allOf` is no schema")),
        }
    }
    Ok(merged)
}

fn add(merged: &mut Keywords, word: &str, value: &Value, at: &str) -> Result<(), GrammarError> {
    let Some(there) = merged.get_mut(word) else {
        merged.insert(word.to_owned(), value.clone());
        return Ok(());
    };
    if there == value || !constrains(word) {
        return Ok(());
    }
    let (before, now) = (there.as_f64(), value.as_f64());
    match (word, &mut *there, value) {
        ("properties", Value::Object(there), Value::Object(more)) => {
            for (name, schema) in more {
                match there.get_mut(name) {
                    None => {
                        there.insert(name.clone(), schema.clone());
                    }
                    Some(same) => *same = json!({"allOf": [same.clone(), schema]}),
                }
            }
        }
        ("required", Value::Array(there), Value::Array(more)) => {
            there.extend(more.iter().cloned());
        }
        ("minimum" | "minLength" | "minItems", ..) if before < now => {
            *there = value.clone();
        }
        ("maximum" | "maxLength" | "maxItems", ..) if before > now => {
            *there = value.clone();
        }
        ("minimum" | "minLength" | "minItems" | "maximum" | "maxLength" | "maxItems", ..) => {}
        ("type", there, more) => *there = common_types(there, more),
        ("additionalProperties", there, Value::Bool(false)) => *there = Value::Bool(false),
        ("additionalProperties", Value::Bool(false), _) => {}
        ("allOf", Value::Array(there), Value::Array(more)) => there.extend(more.iter().cloned()),
        _ => {
            return Err(GrammarError::Unsupported {
                at: at.to_owned(),
                keyword: format!("{word}, in two schemas that hold at once,"),
            });
        }
    }
    Ok(())
}

/// The types that both name.
fn common_types(a: &Value, b: &Value) -> Value {
    let list = |value: &Value| match value {
        Value::Array(names) => names.clone(),
        name => vec![name.clone()],
    };
    let b = list(b);
    let has =
        |name: &Value| b.contains(name) || (*name == "integer" && b.contains(&json!("number")));
    let common: Vec<Value> = list(a).into_iter().filter(has).collect();
    Value::Array(common)
}
