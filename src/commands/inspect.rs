//! `ktx inspect`: what a GGUF file, or safetensors files, hold.

use std::collections::BTreeMap;
use std::io::{Write, stdout};
use std::path::{Path, PathBuf};

use clap::Args;
use ktx_core::gguf::{Array, Gguf, Safetensors, Value};
use ktx_core::memory::Bytes;
use ktx_core::model_files::ModelFiles;
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
  ktx inspect model.safetensors.index.json
  ktx inspect --json model-00001-of-00003.gguf | jq .tensors";

/// Print a file's metadata, tensors, and sizes per type
#[derive(Debug, Args)]
#[command(after_help = EXAMPLE)]
pub(crate) struct InspectArgs {
    /// GGUF file, of a split model any part; safetensors file or index; or a directory of either or both; without it,
    /// the built-in model
    #[arg(value_name = "MODEL")]
    model: Option<PathBuf>,

    /// Print long values and arrays whole
    #[arg(long)]
    full: bool,

    /// Print one JSON object, with values whole
    #[arg(long)]
    json: bool,
}

/// Files that are read together.
struct Files {
    gguf: Option<Gguf>,
    safetensors: Option<Safetensors>,
}

/// Runs the command.
pub(crate) fn run(args: &InspectArgs) -> Result<(), CliError> {
    let files = open(args.model.as_deref())?;
    let mut out = stdout().lock();
    if args.json {
        writeln!(out, "{}", to_json(&files))?;
        return Ok(());
    }
    if let Some(gguf) = &files.gguf {
        write_gguf(gguf, args.full, &mut out)?;
    }
    if files.gguf.is_some() && files.safetensors.is_some() {
        writeln!(out)?;
    }
    if let Some(safetensors) = &files.safetensors {
        write_safetensors(safetensors, &mut out)?;
    }
    Ok(())
}

fn open(path: Option<&Path>) -> Result<Files, CliError> {
    let safetensors = |path: &Path| -> Result<Files, CliError> {
        Ok(Files {
            gguf: None,
            safetensors: Some(Safetensors::open(path)?),
        })
    };
    let Some(path) = path else {
        return Ok(Files {
            gguf: Some(builtin_model()?),
            safetensors: None,
        });
    };
    match path.extension().and_then(|extension| extension.to_str()) {
        Some("safetensors" | "json") if !path.is_dir() => return safetensors(path),
        _ => {}
    }
    match ModelFiles::at(path) {
        Ok(files) => Ok(Files {
            gguf: Some(Gguf::open(files.gguf)?),
            safetensors: files.beside.map(Safetensors::open).transpose()?,
        }),
        // A directory without a GGUF model may be a checkpoint; if not, the first error says more.
        Err(error) => safetensors(path).map_err(|_| error.into()),
    }
}

fn write_gguf(gguf: &Gguf, full: bool, out: &mut dyn Write) -> Result<(), CliError> {
    let tensors = Listed::of_gguf(gguf);
    let (version, files) = (gguf.version(), gguf.parts());
    let size = size(&tensors, gguf.file_size(), files);
    writeln!(out, "{}: GGUF version {version}, {size}", gguf.name())?;
    writeln!(out, "\nmetadata")?;
    for (key, value) in gguf.metadata().iter() {
        writeln!(
            out,
            "  {} ({}) = {}",
            printable(key),
            value.type_name(),
            show(value, full)
        )?;
    }
    Ok(write_tensors(&tensors, out)?)
}

fn write_safetensors(set: &Safetensors, out: &mut dyn Write) -> Result<(), CliError> {
    let tensors = Listed::of_safetensors(set);
    let size = size(&tensors, set.file_size(), set.files().len());
    writeln!(out, "{}: safetensors, {size}", set.name())?;
    writeln!(out, "\nmetadata")?;
    for (key, text) in set.metadata(0) {
        writeln!(out, "  {} = {}", printable(key), printable(text))?;
    }
    Ok(write_tensors(&tensors, out)?)
}

/// One tensor of either kind of file; shapes are in the file's order: row length first in GGUF, last in safetensors.
struct Listed<'a> {
    name: &'a str,
    ty: &'static str,
    shape: &'a [usize],
    offset: u64,
    bytes: u64,
}

impl<'a> Listed<'a> {
    fn of_gguf(gguf: &'a Gguf) -> Vec<Self> {
        gguf.tensors()
            .map(|t| Self {
                name: &t.name,
                ty: t.ty.name(),
                shape: &t.shape,
                offset: t.offset,
                bytes: t.bytes,
            })
            .collect()
    }

    fn of_safetensors(set: &'a Safetensors) -> Vec<Self> {
        set.tensors()
            .map(|t| Self {
                name: &t.name,
                ty: t.dtype.name(),
                shape: &t.shape,
                offset: t.offset,
                bytes: t.bytes,
            })
            .collect()
    }

    fn elements(&self) -> u64 {
        self.shape.iter().map(|&n| n as u64).product()
    }

    fn shape(&self) -> String {
        let sizes: Vec<String> = self.shape.iter().map(ToString::to_string).collect();
        sizes.join(" x ")
    }
}

fn size(tensors: &[Listed<'_>], bytes: u64, files: usize) -> String {
    let elements: u64 = tensors.iter().map(Listed::elements).sum();
    let parts = match files {
        1 => String::new(),
        files => format!(" in {files} files"),
    };
    format!(
        "{} ({bytes} bytes){parts}, {} tensors, {:.1} M parameters",
        Bytes(bytes),
        tensors.len(),
        elements as f64 / 1e6
    )
}

fn write_tensors(tensors: &[Listed<'_>], out: &mut dyn Write) -> std::io::Result<()> {
    writeln!(out, "\ntensors")?;
    let mut table = Table::new([
        ("  name", Align::Left),
        ("type", Align::Left),
        ("shape", Align::Left),
        ("size", Align::Right),
    ]);
    for tensor in tensors {
        table.push([
            format!("  {}", printable(tensor.name)),
            tensor.ty.to_owned(),
            tensor.shape(),
            Bytes(tensor.bytes).to_string(),
        ]);
    }
    table.write(out)?;
    writeln!(out, "\nsizes per type")?;
    write_types(tensors, out)
}

fn write_types(tensors: &[Listed<'_>], out: &mut dyn Write) -> std::io::Result<()> {
    let mut table = Table::new([
        ("  type", Align::Left),
        ("tensors", Align::Right),
        ("parameters", Align::Right),
        ("size", Align::Right),
        ("bits per weight", Align::Right),
    ]);
    for (ty, sum) in per_type(tensors) {
        table.push([
            format!("  {ty}"),
            sum.tensors.to_string(),
            sum.elements.to_string(),
            Bytes(sum.bytes).to_string(),
            format!("{:.2}", sum.bytes as f64 * 8.0 / sum.elements.max(1) as f64),
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
fn per_type(tensors: &[Listed<'_>]) -> Vec<(&'static str, Sum)> {
    let mut sums: BTreeMap<&'static str, Sum> = BTreeMap::new();
    for tensor in tensors {
        let sum = sums.entry(tensor.ty).or_default();
        sum.tensors += 1;
        sum.elements += tensor.elements();
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

/// The GGUF file, with the safetensors files under a key of their own; or these alone.
fn to_json(files: &Files) -> serde_json::Value {
    let beside = files.safetensors.as_ref().map(|set| {
        let metadata: Map<_, _> = set
            .metadata(0)
            .map(|(k, v)| (k.to_owned(), json!(v)))
            .collect();
        let tensors = Listed::of_safetensors(set);
        listing(
            set.name(),
            set.file_size(),
            set.files().len(),
            metadata,
            &tensors,
        )
    });
    let Some(gguf) = &files.gguf else {
        return beside.map_or(serde_json::Value::Null, Into::into);
    };
    let metadata: Map<_, _> = gguf
        .metadata()
        .iter()
        .map(|(key, value)| (key.to_owned(), value_json(value)))
        .collect();
    let tensors = Listed::of_gguf(gguf);
    let mut all = listing(
        gguf.name(),
        gguf.file_size(),
        gguf.parts(),
        metadata,
        &tensors,
    );
    all.insert("version".to_owned(), json!(gguf.version()));
    all.extend(beside.map(|set| ("safetensors".to_owned(), set.into())));
    all.into()
}

fn listing(
    name: &str,
    bytes: u64,
    files: usize,
    metadata: Map<String, serde_json::Value>,
    tensors: &[Listed<'_>],
) -> Map<String, serde_json::Value> {
    let types: Map<_, _> = per_type(tensors)
        .into_iter()
        .map(|(ty, s)| {
            (
                ty.to_owned(),
                json!({ "tensors": s.tensors, "parameters": s.elements, "bytes": s.bytes }),
            )
        })
        .collect();
    let tensors: Vec<_> = tensors
        .iter()
        .map(|t| json!({ "name": t.name, "type": t.ty, "shape": t.shape, "offset": t.offset, "bytes": t.bytes }))
        .collect();
    Map::from_iter([
        ("file".to_owned(), json!(name)),
        ("bytes".to_owned(), json!(bytes)),
        ("files".to_owned(), json!(files)),
        ("metadata".to_owned(), metadata.into()),
        ("tensors".to_owned(), tensors.into()),
        ("types".to_owned(), types.into()),
    ])
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
