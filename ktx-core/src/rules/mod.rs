//! Rule files: which operator takes the place of which module, and on which device.
//!
//! The format is KTransformers': a YAML list of rules, each with a `match` (a regular expression on
//! the module's path, a class path, or both), a `replace` (class and keyword arguments), and maybe
//! `recursive: False`. The first rule that matches a module decides. What is wrong with a rule is
//! kept with it and reported when a module reaches it, as in the original.
//!
//! A file whose first item is `ktx: 1` may use extensions of that format: globs, layers and tensor types in
//! `match`, variables, and other files. The original refuses every such file.

mod classes;
mod dialect;
mod error;
mod glob;
mod layers;
mod lint;
mod lint_devices;
mod load;
mod parse;
mod pattern;
mod presets;
mod variables;
mod yaml;
mod yaml_scalar;

use std::fmt;
use std::path::Path;
use std::sync::Arc;

use ktx_gguf::GgmlType;
use ktx_ops::{Kwargs, Location};
use serde_json::Value;

use load::{Loaded, Source};

pub(crate) use classes::{ClassTable, Descent, NoClass};
pub use error::RuleError;
pub use glob::Glob;
pub use layers::Layers;
pub(crate) use layers::layer_of;
pub use lint::{Advice, lint, lint_plan};
pub use lint_devices::{lint_device_names, lint_missing_devices};
pub use pattern::NamePattern;
pub use presets::{Preset, preset_for, presets};
pub use variables::{RuleVariable, RuleVariables};

/// Bytes of the largest rule file that is read.
const MAX_FILE: usize = 1 << 20;

/// A rule file.
#[derive(Debug, Clone)]
pub struct RuleSet {
    file: Arc<str>,
    rules: Vec<Rule>,
    variables: Vec<RuleVariable>,
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
    /// Whether it came with the program. Rules of a preset are for several families of models, so one that
    /// takes no module is no reason for a warning.
    pub is_preset: bool,
}

/// A rule of a file: its number and its place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RuleRef {
    /// Index among all rules, those of included files counted, from 0.
    pub index: usize,
    /// Number among the rules of its file, from 1.
    pub number: usize,
    /// Whether its file is included by another.
    pub is_included: bool,
    /// Where it starts.
    pub location: Location,
}

impl fmt::Display for RuleRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "rule {} (line {}", self.number, self.location.line)?;
        if self.is_included {
            write!(f, " of {}", self.location.file)?;
        }
        f.write_str(")")
    }
}

/// Which modules a rule takes: those that meet every condition that is there.
#[derive(Debug, Clone)]
pub struct Match {
    /// The module is of this class or of one that descends from it.
    pub class: Option<Result<ClassPath, RuleError>>,
    /// This is found in the module's path.
    pub name: Option<Result<NamePattern, RuleError>>,
    /// This fits the module's whole path. An extension.
    pub glob: Option<Result<Glob, RuleError>>,
    /// The module belongs to one of these layers. An extension.
    pub layers: Option<Result<Layers, RuleError>>,
    /// The module has weights, and all of them are of these types. An extension.
    pub types: Option<Result<TensorTypes, RuleError>>,
}

impl Match {
    fn is_empty(&self) -> bool {
        self.class.is_none()
            && self.name.is_none()
            && self.glob.is_none()
            && self.layers.is_none()
            && self.types.is_none()
    }
}

/// Types of tensors, and where they are written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorTypes {
    /// The types.
    pub types: Vec<GgmlType>,
    /// Where they are written.
    pub location: Location,
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
        /// Whether it means something with the extensions, which this file does not switch on.
        is_extension: bool,
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
                is_extension: true,
                ..
            } => write!(
                f,
                "{location}: `{key}` is ignored in `match`: it is an extension of ktx, which `- ktx: 1` as the file's \
                 first item switches on"
            ),
            Self::IgnoredKey {
                location,
                key,
                within,
                nearest,
                ..
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
    /// Reads the text of a rule file; `file_name` is for messages. Files that it includes are looked for from
    /// the working directory.
    ///
    /// # Errors
    /// If the text is no YAML or no list. What is wrong with a single rule is kept in the rule.
    pub fn parse(text: &str, file_name: &str) -> Result<Self, RuleError> {
        Self::parse_with(text, file_name, &RuleVariables::default())
    }

    /// As [`RuleSet::parse`], with values for variables.
    ///
    /// # Errors
    /// As [`RuleSet::parse`], and if the text declares no variable of a name that is given.
    pub fn parse_with(
        text: &str,
        file_name: &str,
        variables: &RuleVariables,
    ) -> Result<Self, RuleError> {
        if text.len() > MAX_FILE {
            return Err(RuleError::TooLarge {
                file: file_name.to_owned(),
                limit: MAX_FILE,
            });
        }
        let source = Source {
            text,
            file: file_name.into(),
            path: None,
            is_preset: false,
        };
        Self::load(&source, variables)
    }

    /// Reads a rule file.
    ///
    /// # Errors
    /// If it cannot be read, or as [`RuleSet::parse`].
    pub fn from_path(path: impl AsRef<Path>) -> Result<Self, RuleError> {
        Self::from_path_with(path, &RuleVariables::default())
    }

    /// As [`RuleSet::from_path`], with values for variables.
    ///
    /// # Errors
    /// As [`RuleSet::from_path`], and if the file declares no variable of a name that is given.
    pub fn from_path_with(
        path: impl AsRef<Path>,
        variables: &RuleVariables,
    ) -> Result<Self, RuleError> {
        let path = path.as_ref();
        let source = Source {
            text: &load::read(path)?,
            file: path.display().to_string().into(),
            path: Some(path.to_owned()),
            is_preset: false,
        };
        Self::load(&source, variables)
    }

    /// Reads a preset.
    ///
    /// # Errors
    /// As [`RuleSet::parse`].
    pub fn from_preset(preset: &Preset) -> Result<Self, RuleError> {
        Self::from_preset_with(preset, &RuleVariables::default())
    }

    /// As [`RuleSet::from_preset`], with values for variables.
    ///
    /// # Errors
    /// As [`RuleSet::from_preset`], and if the preset declares no variable of a name that is given.
    pub fn from_preset_with(preset: &Preset, variables: &RuleVariables) -> Result<Self, RuleError> {
        let source = Source {
            text: preset.text,
            file: format!("preset {}", preset.name).into(),
            path: None,
            is_preset: true,
        };
        Self::load(&source, variables)
    }

    fn load(source: &Source<'_>, variables: &RuleVariables) -> Result<Self, RuleError> {
        let Loaded { rules, variables } = load::load(source, variables)?;
        Ok(Self {
            file: Arc::clone(&source.file),
            rules,
            variables,
        })
    }

    /// The file's name.
    pub fn file(&self) -> &str {
        &self.file
    }

    /// The rules, in order; those of included files in their places.
    pub fn rules(&self) -> &[Rule] {
        &self.rules
    }

    /// The variables that the file and those it includes declare.
    pub fn variables(&self) -> &[RuleVariable] {
        &self.variables
    }
}
