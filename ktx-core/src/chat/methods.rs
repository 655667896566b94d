//! Python's methods on strings and containers, with those bounded that make much out of little.

use minijinja::value::{Value, ValueKind};
use minijinja::{Error, ErrorKind, State};
use minijinja_contrib::pycompat;

/// Bytes of text that cost one unit of the engine's budget, as in its own filters.
const BYTES_PER_FUEL: usize = 64;
/// Digits of the widest field that `str.format` may be asked for.
const MAX_WIDTH_DIGITS: usize = 4;
/// Deepest nesting of a value that is printed.
const MAX_DEPTH: usize = 100;

/// Calls a method that the engine itself does not have.
///
/// The compatibility crate's methods are charged by the engine for what they return, which is too late for those
/// whose result is not bounded by their arguments' sizes; these are charged beforehand.
pub(super) fn call(
    state: &mut State,
    value: &Value,
    method: &str,
    arguments: &[Value],
) -> Result<Value, Error> {
    if let Some(text) = value.as_str() {
        match method {
            "replace" => charge_bytes(state, replaced_length(text, arguments))?,
            "format" => refuse_wide_fields(text)?,
            "join" => charge_joined(state, text, arguments)?,
            _ => {}
        }
    }
    pycompat::unknown_method_callback(state, value, method, arguments)
}

/// Pays for every part of a value before it is printed: a list that holds itself many times over is small, its text
/// is not.
pub(super) fn charge_for_printing(state: &State, value: &Value) -> Result<(), Error> {
    charge_parts(state, value, 0)
}

fn charge_parts(state: &State, value: &Value, depth: usize) -> Result<(), Error> {
    if depth > MAX_DEPTH {
        return Err(Error::new(
            ErrorKind::InvalidOperation,
            "the value is nested too deeply to be printed",
        ));
    }
    if let Some(text) = value.as_str() {
        return charge_bytes(state, text.len());
    }
    if !matches!(value.kind(), ValueKind::Seq | ValueKind::Map) {
        return Ok(());
    }
    for key in value.try_iter()? {
        state.consume_fuel(1)?;
        charge_parts(state, &key, depth + 1)?;
        if value.kind() == ValueKind::Map {
            charge_parts(state, &value.get_item(&key)?, depth + 1)?;
        }
    }
    Ok(())
}

fn charge_bytes(state: &State, bytes: usize) -> Result<(), Error> {
    state.consume_fuel((bytes / BYTES_PER_FUEL) as u64)
}

fn replaced_length(text: &str, arguments: &[Value]) -> usize {
    let argument = |index: usize| {
        arguments
            .get(index)
            .and_then(Value::as_str)
            .unwrap_or_default()
    };
    let matches = text.matches(argument(0)).count();
    text.len()
        .saturating_add(matches.saturating_mul(argument(1).len()))
}

fn refuse_wide_fields(text: &str) -> Result<(), Error> {
    let is_wide = text
        .split(|character: char| !character.is_ascii_digit())
        .any(|run| run.len() > MAX_WIDTH_DIGITS);
    // A field inside a field takes its width from an argument.
    let is_nested = text
        .split('{')
        .skip(1)
        .any(|field| field.contains(':') && !field.contains('}'));
    if is_wide || is_nested {
        return Err(Error::new(
            ErrorKind::InvalidOperation,
            "format: a field is wider than 9999 characters",
        ));
    }
    Ok(())
}

fn charge_joined(state: &State, separator: &str, arguments: &[Value]) -> Result<(), Error> {
    let Some(items) = arguments.first() else {
        return Ok(());
    };
    for item in items.try_iter()? {
        charge_bytes(state, separator.len() + BYTES_PER_FUEL)?;
        charge_for_printing(state, &item)?;
    }
    Ok(())
}
