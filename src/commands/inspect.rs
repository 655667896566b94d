//! `ktx inspect`: what a GGUF file holds.

use std::collections::BTreeMap;
use std::io::{Write, stdout};
use std::path::PathBuf;

use clap::Args;
use ktx_core::gguf::{Array, GgmlType, Gguf, TensorInfo, Value};
use ktx_core::memory::Bytes;
use serde_json::{Map, json};

use crate::builtin::builtin_model;
use crate::error::CliError;
use crate::table::{Align, Table};

/// Characters of a value that are shown.
const SHOWN: usize = 80;
/// Elements of an array that are shown.
const ELEMENTS: usize = 4;

const EXAMPLE: &str = "\
Examples:
  ktx inspect model.gguf
  ktx inspect --json model-00001-of-00003.gguf | jq .tensors";

/// Print a GGUF file's metadata, tensors, and sizes per type
#[derive(Debug, Args)]
#[command(after_help = EXAMPLE)]
pub(crate) struct InspectArgs {
    /// GGUF file, of a split model any part; without it, the built-in model
    #[arg(value_name = "MODEL")]
    model: Option<PathBuf>,

    /// Print long values and arrays whole
    #[arg(long)]
    full: bool,

    /// Print one JSON object, with values whole
    #[arg(long)]
    json: bool,
}

/// Runs the command.
pub(crate) fn run(args: &InspectArgs) -> Result<(), CliError> {
    let gguf = match &args.model {
        Some(path) => Gguf::open(path)?,
        None => builtin_model()?,
    };
    let mut out = stdout().lock();
    if args.json {
        writeln!(out, "{}", to_json(&gguf))?;
        return Ok(());
    }
    writeln!(
        out,
        "{}: GGUF version {}, {}",
        gguf.name(),
        gguf.version(),
        size(&gguf)
    )?;
    writeln!(out, "\nmetadata")?;
    for (key, value) in gguf.metadata().iter() {
        writeln!(
            out,
            "  {} ({}) = {}",
            printable(key),
            value.type_name(),
            show(value, args.full)
        )?;
    }
    writeln!(out, "\ntensors")?;
    write_tensors(&gguf, &mut out)?;
    writeln!(out, "\nsizes per type")?;
    Ok(write_types(&gguf, &mut out)?)
}

fn size(gguf: &Gguf) -> String {
    let elements: u64 = gguf.tensors().map(elements).sum();
    let parts = match gguf.parts() {
        1 => String::new(),
        parts => format!(" in {parts} files"),
    };
    format!(
        "{} ({} bytes){parts}, {} tensors, {:.1} M parameters",
        Bytes(gguf.file_size()),
        gguf.file_size(),
        gguf.tensors().len(),
        elements as f64 / 1e6
    )
}

fn elements(tensor: &TensorInfo) -> u64 {
    tensor.shape.iter().map(|&n| n as u64).product()
}

/// Row length first, as in the file.
fn shape(tensor: &TensorInfo) -> String {
    let sizes: Vec<String> = tensor.shape.iter().map(ToString::to_string).collect();
    sizes.join(" x ")
}

fn write_tensors(gguf: &Gguf, out: &mut dyn Write) -> std::io::Result<()> {
    let mut table = Table::new([
        ("  name", Align::Left),
        ("type", Align::Left),
        ("shape", Align::Left),
        ("size", Align::Right),
    ]);
    for tensor in gguf.tensors() {
        table.push([
            format!("  {}", printable(&tensor.name)),
            tensor.ty.name().to_owned(),
            shape(tensor),
            Bytes(tensor.bytes).to_string(),
        ]);
    }
    table.write(out)
}

fn write_types(gguf: &Gguf, out: &mut dyn Write) -> std::io::Result<()> {
    let mut table = Table::new([
        ("  type", Align::Left),
        ("tensors", Align::Right),
        ("parameters", Align::Right),
        ("size", Align::Right),
        ("bits per weight", Align::Right),
    ]);
    for (ty, sum) in per_type(gguf) {
        table.push([
            format!("  {ty}"),
            sum.tensors.to_string(),
            sum.elements.to_string(),
            Bytes(sum.bytes).to_string(),
            format!("{:.2}", sum.bytes as f64 * 8.0 / sum.elements as f64),
        ]);
    }
    table.write(out)
}

#[derive(Default)]
struct Sum {
    tensors: usize,
    elements: u64,
    bytes: u64,
}

/// Sums over the tensors of each type, the largest first.
fn per_type(gguf: &Gguf) -> Vec<(&'static str, Sum)> {
    let mut sums: BTreeMap<&'static str, Sum> = BTreeMap::new();
    for tensor in gguf.tensors() {
        let sum = sums.entry(GgmlType::name(tensor.ty)).or_default();
        sum.tensors += 1;
        sum.elements += elements(tensor);
        sum.bytes += tensor.bytes;
    }
    let mut sums: Vec<_> = sums.into_iter().collect();
    sums.sort_by_key(|(_, sum)| std::cmp::Reverse(sum.bytes));
    sums
}

/// Names and texts come from the file: what would steer the terminal is escaped.
fn printable(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    for c in text.chars() {
        match c.is_control() {
            true => shown.extend(c.escape_default()),
            false => shown.push(c),
        }
    }
    shown
}

/// A value on one line, shortened unless it shall be shown whole.
fn show(value: &Value, full: bool) -> String {
    let text = match value {
        Value::Array(array) if !full && array.len() > ELEMENTS => {
            let first = serde_json::Value::from(array_json(array, ELEMENTS)).to_string();
            format!(
                "{}, ...] ({} elements)",
                first.trim_end_matches(']'),
                array.len()
            )
        }
        Value::String(text) => printable(text),
        value => value_json(value).to_string(),
    };
    let length = text.chars().count();
    match full || length <= SHOWN {
        true => text,
        false => format!(
            "{}... ({length} characters)",
            text.chars().take(SHOWN).collect::<String>()
        ),
    }
}

fn value_json(value: &Value) -> serde_json::Value {
    match value {
        Value::U8(v) => json!(v),
        Value::I8(v) => json!(v),
        Value::U16(v) => json!(v),
        Value::I16(v) => json!(v),
        Value::U32(v) => json!(v),
        Value::I32(v) => json!(v),
        Value::F32(v) => json!(v),
        Value::Bool(v) => json!(v),
        Value::String(v) => json!(v),
        Value::Array(v) => array_json(v, usize::MAX).into(),
        Value::U64(v) => json!(v),
        Value::I64(v) => json!(v),
        Value::F64(v) => json!(v),
    }
}

/// The first `limit` elements.
fn array_json(array: &Array, limit: usize) -> Vec<serde_json::Value> {
    macro_rules! numbers {
        ($values:expr) => {
            $values.iter().take(limit).map(|v| json!(v)).collect()
        };
    }
    match array {
        Array::U8(v) => numbers!(v),
        Array::I8(v) => numbers!(v),
        Array::U16(v) => numbers!(v),
        Array::I16(v) => numbers!(v),
        Array::U32(v) => numbers!(v),
        Array::I32(v) => numbers!(v),
        Array::F32(v) => numbers!(v),
        Array::Bool(v) => numbers!(v),
        Array::String(v) => numbers!(v),
        Array::Array(v) => v
            .iter()
            .take(limit)
            .map(|inner| array_json(inner, limit).into())
            .collect(),
        Array::U64(v) => numbers!(v),
        Array::I64(v) => numbers!(v),
        Array::F64(v) => numbers!(v),
    }
}

fn to_json(gguf: &Gguf) -> serde_json::Value {
    let metadata: Map<_, _> = gguf
        .metadata()
        .iter()
        .map(|(key, value)| (key.to_owned(), value_json(value)))
        .collect();
    let tensors: Vec<_> = gguf
        .tensors()
        .map(|t| json!({ "name": t.name, "type": t.ty.name(), "shape": t.shape, "offset": t.offset, "bytes": t.bytes }))
        .collect();
    let types: Map<_, _> = per_type(gguf)
        .into_iter()
        .map(|(ty, s)| {
            (
                ty.to_owned(),
                json!({ "tensors": s.tensors, "parameters": s.elements, "bytes": s.bytes }),
            )
        })
        .collect();
    json!({
        "file": gguf.name(),
        "version": gguf.version(),
        "bytes": gguf.file_size(),
        "files": gguf.parts(),
        "metadata": metadata,
        "tensors": tensors,
        "types": types,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_values_are_shortened_and_control_characters_escaped() {
        assert_eq!(
            show(&Value::String("a\x1b[2Jb".into()), false),
            "a\\u{1b}[2Jb"
        );
        let long = show(&Value::String("x".repeat(200)), false);
        assert!(long.ends_with("... (200 characters)"), "{long}");
        assert_eq!(
            show(&Value::Array(Array::U8(vec![1; 9])), false),
            "[1,1,1,1, ...] (9 elements)"
        );
        assert_eq!(
            show(&Value::Array(Array::U8(vec![1; 5])), true),
            "[1,1,1,1,1]"
        );
    }
}
