//! Keyword arguments of a rule: named values, each with the place in the rule file it came from.

use std::fmt;
use std::sync::Arc;

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

/// A place in a text file, counted from 1.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Location {
    /// The file's name as the user gave it.
    pub file: Arc<str>,
    /// Line, from 1.
    pub line: usize,
    /// Column in characters, from 1.
    pub column: usize,
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:{}", self.file, self.line, self.column)
    }
}

/// One keyword argument.
#[derive(Debug, Clone, PartialEq)]
pub struct Kwarg {
    /// Its name.
    pub name: String,
    /// Its value. Integer keys of YAML maps are texts here, as in JSON.
    pub value: Value,
    /// Where it was written, if it came from a file.
    pub location: Option<Location>,
}

/// Keyword arguments in the order they were written. Names are unique: a later one replaces an earlier one.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Kwargs(Vec<Kwarg>);

impl Kwargs {
    /// No arguments.
    pub fn new() -> Self {
        Self::default()
    }

    /// The value of an argument.
    pub fn get(&self, name: &str) -> Option<&Value> {
        self.iter().find(|k| k.name == name).map(|k| &k.value)
    }

    /// Where an argument was written.
    pub fn location(&self, name: &str) -> Option<&Location> {
        self.iter()
            .find(|k| k.name == name)
            .and_then(|k| k.location.as_ref())
    }

    /// Sets an argument; one of the same name is replaced in its place.
    pub fn insert(&mut self, kwarg: Kwarg) {
        match self.0.iter_mut().find(|k| k.name == kwarg.name) {
            Some(old) => *old = kwarg,
            None => self.0.push(kwarg),
        }
    }

    /// Sets an argument that was written in no file.
    pub fn set(&mut self, name: &str, value: impl Into<Value>) {
        self.insert(Kwarg {
            name: name.to_owned(),
            value: value.into(),
            location: None,
        });
    }

    /// All arguments, in order.
    pub fn iter(&self) -> impl Iterator<Item = &Kwarg> {
        self.0.iter()
    }

    /// Number of arguments.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The arguments as a JSON object.
    pub fn to_json(&self) -> Map<String, Value> {
        self.iter()
            .map(|k| (k.name.clone(), k.value.clone()))
            .collect()
    }

    /// Only the arguments whose names pass.
    pub fn filtered(&self, mut keep: impl FnMut(&str) -> bool) -> Self {
        Self(self.iter().filter(|k| keep(&k.name)).cloned().collect())
    }
}

/// A keyword argument that an operator cannot take.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum KwargError {
    /// The operator has no argument of this name.
    #[error("{}`{class}` has no argument `{name}`{}; it takes: {known}", at(.location), did_you_mean(.nearest))]
    Unknown {
        /// The operator.
        class: String,
        /// The argument's name.
        name: String,
        /// The known name that looks most like it.
        nearest: Option<String>,
        /// All known names.
        known: String,
        /// Where it was written.
        location: Option<Location>,
    },
    /// The value has the wrong type or is out of range.
    #[error("{}argument `{name}` of `{class}` cannot be {value}: {reason}", at(.location))]
    BadValue {
        /// The operator.
        class: String,
        /// The argument's name.
        name: String,
        /// The value as JSON.
        value: String,
        /// What was expected.
        reason: String,
        /// Where it was written.
        location: Option<Location>,
    },
}

/// `file:line:column: ` in front of a message, or nothing.
pub fn at(location: &Option<Location>) -> String {
    location
        .as_ref()
        .map(|l| format!("{l}: "))
        .unwrap_or_default()
}

/// ` (did you mean `x`?)` behind a name, or nothing.
pub fn did_you_mean(nearest: &Option<String>) -> String {
    nearest
        .as_ref()
        .map(|n| format!(" (did you mean `{n}`?)"))
        .unwrap_or_default()
}

/// What is known of one argument besides its type.
#[derive(Debug, Clone, Copy)]
pub struct KwargDoc {
    /// Its name.
    pub name: &'static str,
    /// One line on what it does.
    pub doc: &'static str,
    /// Set for an argument that other engines' rule files carry and that means nothing here: why.
    pub ignored: Option<&'static str>,
}

/// The typed arguments of an operator: a struct with serde defaults, and a line on each field.
pub trait KwargSet: DeserializeOwned + Serialize + Default {
    /// One entry for each field.
    const DOCS: &'static [KwargDoc];
}

/// No arguments of its own.
#[derive(Debug, Clone, Copy, Default, Serialize, serde::Deserialize)]
pub struct NoKwargs {}

impl KwargSet for NoKwargs {
    const DOCS: &'static [KwargDoc] = &[];
}

/// The devices of the two phases: every operator takes them.
pub const PLACEMENT: &[KwargDoc] = &[
    KwargDoc {
        name: "generate_device",
        doc: "device of the generate phase",
        ignored: None,
    },
    KwargDoc {
        name: "prefill_device",
        doc: "device of the prefill phase",
        ignored: None,
    },
];

/// What the registry keeps of an operator's [`KwargSet`].
#[derive(Clone, Copy)]
pub struct KwargInfo {
    docs: &'static [KwargDoc],
    defaults: fn() -> Map<String, Value>,
    parse: fn(Map<String, Value>) -> Result<(), String>,
    open: bool,
}

impl KwargInfo {
    /// The arguments of a [`KwargSet`].
    pub const fn of<T: KwargSet>() -> Self {
        Self {
            docs: T::DOCS,
            defaults: defaults::<T>,
            parse: parse::<T>,
            open: false,
        }
    }

    /// As [`KwargInfo::of`], and arguments that are not named are handed on to inner operators,
    /// which check them.
    pub const fn open<T: KwargSet>() -> Self {
        Self {
            open: true,
            ..Self::of::<T>()
        }
    }

    /// A line on each argument.
    pub fn docs(&self) -> &'static [KwargDoc] {
        self.docs
    }

    /// The default of each argument, as JSON.
    pub fn defaults(&self) -> Map<String, Value> {
        (self.defaults)()
    }

    /// Whether arguments that are not named go to inner operators.
    pub fn is_open(&self) -> bool {
        self.open
    }

    /// Checks names and types against this set; `class` is for the message.
    pub fn check(&self, class: &str, kwargs: &Kwargs) -> Result<(), KwargError> {
        let known = || PLACEMENT.iter().chain(self.docs).map(|d| d.name);
        for kwarg in kwargs.iter() {
            if !self.open && !known().any(|name| name == kwarg.name) {
                return Err(KwargError::Unknown {
                    class: class.to_owned(),
                    name: kwarg.name.clone(),
                    nearest: crate::nearest::nearest(&kwarg.name, known()).map(str::to_owned),
                    known: known().collect::<Vec<_>>().join(", "),
                    location: kwarg.location.clone(),
                });
            }
            if self.docs.iter().any(|d| d.name == kwarg.name) {
                let one = Map::from_iter([(kwarg.name.clone(), kwarg.value.clone())]);
                (self.parse)(one).map_err(|reason| KwargError::BadValue {
                    class: class.to_owned(),
                    name: kwarg.name.clone(),
                    value: kwarg.value.to_string(),
                    reason,
                    location: kwarg.location.clone(),
                })?;
            }
        }
        Ok(())
    }
}

fn defaults<T: KwargSet>() -> Map<String, Value> {
    match serde_json::to_value(T::default()) {
        Ok(Value::Object(map)) => map,
        _ => Map::new(),
    }
}

fn parse<T: KwargSet>(map: Map<String, Value>) -> Result<(), String> {
    serde_json::from_value::<T>(Value::Object(map))
        .map(|_| ())
        .map_err(|e| e.to_string())
}
