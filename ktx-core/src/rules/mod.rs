//! Rule files: which operator takes the place of which module, and on which device.
//!
//! The format is KTransformers': a YAML list of rules, each with a `match` (a regular expression on
//! the module's path, a class path, or both), a `replace` (class and keyword arguments), and maybe
//! `recursive: False`. The first rule that matches a module decides. What is wrong with a rule is
//! kept with it and reported when a module reaches it, as in the original.

mod classes;
mod dialect;
mod error;
mod lint;
mod parse;
mod pattern;
mod presets;
mod yaml;
mod yaml_scalar;

use std::fmt;
use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::sync::Arc;

use ktx_ops::{Kwargs, Location};
use serde_json::Value;

pub(crate) use classes::{ClassTable, Descent, NoClass};
pub use error::RuleError;
pub use lint::{Advice, lint, lint_plan};
pub use pattern::NamePattern;
pub use presets::{Preset, preset_for, presets};

/// Bytes of the largest rule file that is read.
const MAX_FILE: usize = 1 << 20;

/// A rule file.
#[derive(Debug, Clone)]
pub struct RuleSet {
    file: Arc<str>,
    rules: Vec<Rule>,
    is_preset: bool,
}

/// One rule, with all that is wrong with it.
#[derive(Debug, Clone)]
pub struct Rule {
    /// Which one it is, and where.
    pub reference: RuleRef,
    /// Which modules it takes.
    pub matches: Result<Match, RuleError>,
    /// What it puts there.
    pub replace: Result<Replace, RuleError>,
    /// Whether rules apply to the modules below those it takes.
    pub recursive: bool,
    /// What stands in it without effect.
    pub notes: Vec<RuleNote>,
}

/// A rule of a file: its number and its place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RuleRef {
    /// Index in the file, from 0.
    pub index: usize,
    /// Where it starts.
    pub location: Location,
}

impl fmt::Display for RuleRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "rule {} (line {})", self.index + 1, self.location.line)
    }
}

/// Which modules a rule takes: those that meet every condition that is there.
#[derive(Debug, Clone)]
pub struct Match {
    /// The module is of this class or of one that descends from it.
    pub class: Option<Result<ClassPath, RuleError>>,
    /// This is found in the module's path.
    pub name: Option<Result<NamePattern, RuleError>>,
}

/// A class path, and where it is written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClassPath {
    /// The path.
    pub path: String,
    /// Where it is written.
    pub location: Location,
}

/// What a rule puts in a module's place.
#[derive(Debug, Clone)]
pub struct Replace {
    /// The operator, or `default`; `None` where the file says `class: null`.
    pub class: Option<String>,
    /// Where the class is written; the rule's place if it is not.
    pub class_location: Location,
    /// Its keyword arguments; `None` where the file says `kwargs: null`.
    pub kwargs: Option<Kwargs>,
    /// Class and keyword arguments of types that no operator takes, as JSON.
    pub odd: Odd,
}

/// A class that is no text, or arguments that are no mapping. Planning copies them, nothing can use them.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Odd {
    /// What stands in the class's place.
    pub class: Option<Value>,
    /// What stands in the arguments' place.
    pub kwargs: Option<Value>,
}

/// Something in a rule that has no effect, or another one than it seems.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RuleNote {
    /// A key that nothing reads.
    IgnoredKey {
        /// Where it is.
        location: Location,
        /// The key.
        key: String,
        /// The mapping it stands in: `rule`, `match` or `replace`.
        within: &'static str,
        /// The key that was meant, perhaps.
        nearest: Option<String>,
    },
    /// `recursive` is a text, and every text but the empty one is true.
    RecursiveText {
        /// Where it is.
        location: Location,
        /// The text.
        text: String,
    },
    /// `replace` is no mapping, so it changes nothing.
    EmptyReplace {
        /// Where it is.
        location: Location,
        /// What it is.
        found: &'static str,
    },
}

impl fmt::Display for RuleNote {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::IgnoredKey {
                location,
                key,
                within: "replace",
                ..
            } if key == "device" => write!(
                f,
                "{location}: `device` in `replace` is ignored: write `generate_device` and `prefill_device` in `kwargs`"
            ),
            Self::IgnoredKey {
                location,
                key,
                within,
                nearest,
            } => {
                let hint = ktx_ops::kwargs::did_you_mean(nearest);
                let within = if *within == "rule" {
                    "a rule".to_owned()
                } else {
                    format!("`{within}`")
                };
                write!(
                    f,
                    "{location}: `{key}` means nothing in {within} and is ignored{hint}"
                )
            }
            Self::RecursiveText { location, text } => write!(
                f,
                "{location}: `recursive: '{text}'` is a text, and that counts as true; write False without quotes to stop here"
            ),
            Self::EmptyReplace { location, found } => write!(
                f,
                "{location}: `replace` is {found} and changes nothing; it should be a mapping with `class` and `kwargs`"
            ),
        }
    }
}

impl RuleSet {
    /// Reads the text of a rule file; `file_name` is for messages.
    ///
    /// # Errors
    /// If the text is no YAML or no list. What is wrong with a single rule is kept in the rule.
    pub fn parse(text: &str, file_name: &str) -> Result<Self, RuleError> {
        if text.len() > MAX_FILE {
            return Err(RuleError::TooLarge {
                file: file_name.to_owned(),
                limit: MAX_FILE,
            });
        }
        let file: Arc<str> = file_name.into();
        let rules = parse::rules(text, &file)?;
        Ok(Self {
            file,
            rules,
            is_preset: false,
        })
    }

    /// Reads a rule file.
    ///
    /// # Errors
    /// If it cannot be read, or as [`RuleSet::parse`].
    pub fn from_path(path: impl AsRef<Path>) -> Result<Self, RuleError> {
        let path = path.as_ref();
        let name = path.display().to_string();
        let unreadable = |source| RuleError::Unreadable {
            file: name.clone(),
            source: Arc::new(source),
        };
        if path.is_dir() {
            return Err(RuleError::Directory { file: name });
        }
        let mut bytes = Vec::new();
        let file = File::open(path).map_err(unreadable)?;
        file.take(MAX_FILE as u64 + 1)
            .read_to_end(&mut bytes)
            .map_err(unreadable)?;
        if bytes.len() > MAX_FILE {
            return Err(RuleError::TooLarge {
                file: name,
                limit: MAX_FILE,
            });
        }
        match String::from_utf8(bytes) {
            Ok(text) => Self::parse(&text, &name),
            Err(e) => Err(RuleError::NotText {
                file: name,
                offset: e.utf8_error().valid_up_to(),
            }),
        }
    }

    /// Reads a preset. Its rules are for several families of models, so one that matches no module of
    /// the model at hand is no reason for a warning.
    ///
    /// # Errors
    /// As [`RuleSet::parse`].
    pub fn from_preset(preset: &Preset) -> Result<Self, RuleError> {
        let rules = Self::parse(preset.text, &format!("preset {}", preset.name))?;
        Ok(Self {
            is_preset: true,
            ..rules
        })
    }

    /// Whether this came with the program.
    pub fn is_preset(&self) -> bool {
        self.is_preset
    }

    /// The file's name.
    pub fn file(&self) -> &str {
        &self.file
    }

    /// The rules, in order.
    pub fn rules(&self) -> &[Rule] {
        &self.rules
    }
}
