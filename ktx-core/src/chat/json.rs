//! `tojson` as chat templates expect it: Python's `json.dumps(value, ensure_ascii=False)`.

use std::io;

use minijinja::value::{Kwargs, Value};
use minijinja::{Error, ErrorKind, State};
use serde::Serialize;
use serde_json::ser::{Formatter, Serializer};

/// Deepest indentation that a template may ask for; Python has no limit, and no template needs more.
const MAX_INDENT: usize = 16;

/// Bytes of JSON that cost one unit of the engine's budget, as in its own `tojson`.
const BYTES_PER_FUEL: usize = 4;
/// Deepest nesting of a value; deeper ones would exhaust the stack.
const MAX_DEPTH: usize = 128;

/// The filter `tojson(ensure_ascii=False, indent=None, separators=None, sort_keys=False)`.
pub(super) fn to_json(state: &State, value: &Value, options: Kwargs) -> Result<Value, Error> {
    let indent: Option<usize> = options.get("indent")?;
    let separators: Option<Vec<String>> = options.get("separators")?;
    let sort_keys: Option<bool> = options.get("sort_keys")?;
    let ensure_ascii: Option<bool> = options.get("ensure_ascii")?;
    options.assert_all_used()?;
    let (item, key) = match separators.as_deref() {
        Some([item, key]) => (item.clone(), key.clone()),
        Some(_) => {
            return Err(Error::new(
                ErrorKind::InvalidOperation,
                "tojson: separators are two strings",
            ));
        }
        None if indent.is_some() => (",".to_owned(), ": ".to_owned()),
        None => (", ".to_owned(), ": ".to_owned()),
    };
    let style = PythonStyle {
        indent: indent.map(|width| width.min(MAX_INDENT)),
        item,
        key,
        ensure_ascii: ensure_ascii == Some(true),
        depth: 0,
        has_value: false,
    };
    let text = if sort_keys == Some(true) {
        // The first pass bounds size and depth, so that the copy in between is harmless.
        let unsorted = write_json(
            state,
            value,
            PythonStyle {
                indent: None,
                ..style.clone()
            }
            .with_plain_separators(),
        )?;
        let mut sorted: serde_json::Value = serde_json::from_str(&unsorted).map_err(failed)?;
        sorted.sort_all_objects();
        write_json(state, &sorted, style)?
    } else {
        write_json(state, value, style)?
    };
    Ok(Value::from(text))
}

fn failed(error: serde_json::Error) -> Error {
    Error::new(ErrorKind::InvalidOperation, format!("tojson: {error}"))
}

fn write_json(state: &State, value: &impl Serialize, style: PythonStyle) -> Result<String, Error> {
    let mut output = Metered {
        state,
        text: Vec::new(),
        out_of_fuel: None,
    };
    let written = value.serialize(&mut Serializer::with_formatter(&mut output, style));
    match (written, output.out_of_fuel) {
        (_, Some(error)) => Err(error),
        (Err(error), None) => Err(failed(error)),
        (Ok(()), None) => Ok(String::from_utf8_lossy(&output.text).into_owned()),
    }
}

/// Output that is paid for as it grows: a value that holds itself many times over is small, its JSON is not.
struct Metered<'s, 'e> {
    state: &'s State<'s, 'e>,
    text: Vec<u8>,
    out_of_fuel: Option<Error>,
}

impl io::Write for Metered<'_, '_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let cost =
            (self.text.len() + bytes.len()) / BYTES_PER_FUEL - self.text.len() / BYTES_PER_FUEL;
        if let Err(error) = self.state.consume_fuel(cost as u64) {
            self.out_of_fuel = Some(error);
            return Err(io::Error::other("the budget is used up"));
        }
        self.text.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[derive(Clone)]
struct PythonStyle {
    indent: Option<usize>,
    item: String,
    key: String,
    ensure_ascii: bool,
    depth: usize,
    /// Whether the array or object that ends has had an element.
    has_value: bool,
}

impl PythonStyle {
    fn with_plain_separators(self) -> Self {
        Self {
            item: ",".to_owned(),
            key: ":".to_owned(),
            ..self
        }
    }

    fn open(&mut self) -> io::Result<()> {
        self.depth += 1;
        self.has_value = false;
        if self.depth > MAX_DEPTH {
            Err(io::Error::other("the value is nested too deeply"))
        } else {
            Ok(())
        }
    }

    fn close<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.depth -= 1;
        if self.has_value {
            self.line_break(writer)
        } else {
            Ok(())
        }
    }

    fn next<W: ?Sized + io::Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        if !first {
            writer.write_all(self.item.as_bytes())?;
        }
        self.line_break(writer)
    }

    fn line_break<W: ?Sized + io::Write>(&self, writer: &mut W) -> io::Result<()> {
        match self.indent {
            Some(width) => write!(writer, "\n{:1$}", "", width * self.depth),
            None => Ok(()),
        }
    }
}

impl Formatter for PythonStyle {
    fn write_string_fragment<W: ?Sized + io::Write>(
        &mut self,
        writer: &mut W,
        fragment: &str,
    ) -> io::Result<()> {
        if !self.ensure_ascii {
            return writer.write_all(fragment.as_bytes());
        }
        let mut units = [0; 2];
        for character in fragment.chars() {
            if character.is_ascii() {
                writer.write_all(&[character as u8])?;
            } else {
                for unit in character.encode_utf16(&mut units) {
                    write!(writer, "\\u{unit:04x}")?;
                }
            }
        }
        Ok(())
    }

    fn begin_array<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.open()?;
        writer.write_all(b"[")
    }

    fn end_array<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.close(writer)?;
        writer.write_all(b"]")
    }

    fn begin_array_value<W: ?Sized + io::Write>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> io::Result<()> {
        self.next(writer, first)
    }

    fn end_array_value<W: ?Sized + io::Write>(&mut self, _writer: &mut W) -> io::Result<()> {
        self.has_value = true;
        Ok(())
    }

    fn begin_object<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.open()?;
        writer.write_all(b"{")
    }

    fn end_object<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.close(writer)?;
        writer.write_all(b"}")
    }

    fn begin_object_key<W: ?Sized + io::Write>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> io::Result<()> {
        self.next(writer, first)
    }

    fn begin_object_value<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        writer.write_all(self.key.as_bytes())
    }

    fn end_object_value<W: ?Sized + io::Write>(&mut self, _writer: &mut W) -> io::Result<()> {
        self.has_value = true;
        Ok(())
    }
}
