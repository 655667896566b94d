//! From rule files to one list of rules: the switch to the extensions, and `include`.
//!
//! A list whose first item has the key `ktx` and no `match` may use ktx's extensions. The original refuses
//! every such file, at the root of every model, so no file that it accepts means anything else here.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ktx_ops::Location;
use ktx_ops::nearest::nearest;
use serde_json::Value;

use super::error::RuleError;
use super::parse::{Reader, get};
use super::presets::presets;
use super::variables::{RuleVariable, RuleVariables, Scope, is_variable_name};
use super::yaml::{self, Kind, Node, Pair};
use super::yaml_scalar::Scalar;
use super::{MAX_FILE, Rule};

/// The version of the extensions.
const VERSION: u64 = 1;
/// Files may not include each other deeper.
const MAX_DEPTH: usize = 16;
/// Files that one rule file may include, each time counted.
const MAX_FILES: usize = 256;
/// Included text that stands for a preset.
const PRESET: &str = "preset:";

/// What files became.
pub(super) struct Loaded {
    pub rules: Vec<Rule>,
    pub variables: Vec<RuleVariable>,
}

/// The text of a file, with what is needed to read it.
pub(super) struct Source<'a> {
    pub text: &'a str,
    pub file: Arc<str>,
    /// The file itself; none for a text or a preset.
    pub path: Option<PathBuf>,
    pub is_preset: bool,
}

/// Reads a rule file and all that it includes.
pub(super) fn load(source: &Source<'_>, set: &RuleVariables) -> Result<Loaded, RuleError> {
    let mut loader = Loader {
        set,
        rules: Vec::new(),
        variables: Vec::new(),
        chain: Vec::new(),
        files: 0,
    };
    loader.file(source, None, &[])?;
    let Loader {
        rules, variables, ..
    } = loader;
    for name in set.names() {
        if !variables.iter().any(|v| v.name == name) {
            return Err(RuleError::UnknownVariable {
                file: source.file.to_string(),
                name: name.to_owned(),
                nearest: nearest(name, variables.iter().map(|v| v.name.as_str()))
                    .map(str::to_owned),
            });
        }
    }
    Ok(Loaded { rules, variables })
}

/// A file that is being read.
struct Frame {
    /// What tells it from others: its path without detours, or a preset's name.
    identity: Option<String>,
    /// Its directory.
    directory: PathBuf,
    /// Where it is included.
    included_at: Option<Location>,
}

struct Loader<'a> {
    set: &'a RuleVariables,
    rules: Vec<Rule>,
    variables: Vec<RuleVariable>,
    chain: Vec<Frame>,
    files: usize,
}

type Visible = (usize, String, Value);

impl Loader<'_> {
    /// Reads one file into the list; `visible` are the variables of the files around it.
    fn file(
        &mut self,
        source: &Source<'_>,
        included_at: Option<Location>,
        visible: &[Visible],
    ) -> Result<(), RuleError> {
        let identity = match &source.path {
            Some(path) => path.canonicalize().ok().map(|p| p.display().to_string()),
            None => Some(source.file.to_string()),
        };
        let directory = source
            .path
            .as_deref()
            .and_then(Path::parent)
            .map(Path::to_owned)
            .unwrap_or_default();
        self.refuse_endless(&source.file, identity.as_deref(), included_at.as_ref())?;
        self.files += 1;
        self.chain.push(Frame {
            identity,
            directory,
            included_at,
        });
        let read = self.items(source, visible);
        let read = read.map_err(|error| self.with_chain(error));
        self.chain.pop();
        read
    }

    /// A file cannot be inside of itself, nor can there be any number of them.
    fn refuse_endless(
        &self,
        file: &str,
        identity: Option<&str>,
        at: Option<&Location>,
    ) -> Result<(), RuleError> {
        let Some(at) = at else {
            return Ok(());
        };
        let again =
            |frame: &Frame| frame.identity.is_some() && frame.identity.as_deref() == identity;
        if self.chain.iter().any(again) {
            return Err(RuleError::IncludeCycle {
                location: at.clone(),
                file: file.to_owned(),
            });
        }
        if self.chain.len() > MAX_DEPTH || self.files >= MAX_FILES {
            return Err(RuleError::TooManyIncludes {
                location: at.clone(),
                depth: MAX_DEPTH,
                files: MAX_FILES,
            });
        }
        Ok(())
    }

    /// An error in an included file, with the places that led there, the nearest first.
    fn with_chain(&self, error: RuleError) -> RuleError {
        let chain: Vec<Location> = self
            .chain
            .iter()
            .rev()
            .filter_map(|frame| frame.included_at.clone())
            .collect();
        if chain.is_empty() || matches!(error, RuleError::Included { .. }) {
            return error;
        }
        RuleError::Included {
            source: Box::new(error),
            chain,
        }
    }

    fn items(&mut self, source: &Source<'_>, visible: &[Visible]) -> Result<(), RuleError> {
        let document = yaml::read(source.text).map_err(|e| RuleError::Syntax {
            location: Location {
                file: Arc::clone(&source.file),
                line: e.line,
                column: e.column,
            },
            reason: e.reason,
        })?;
        let empty = || RuleError::Empty {
            file: source.file.to_string(),
        };
        let document = document.ok_or_else(empty)?;
        let reader = Reader {
            text: source.text,
            file: &source.file,
            scope: None,
            is_preset: source.is_preset,
            is_included: self.chain.len() > 1,
        };
        let items = match &document.kind {
            Kind::Sequence(items) => items,
            Kind::Scalar(Scalar::Null) => return Err(empty()),
            _ => {
                return Err(RuleError::NotAList {
                    location: reader.location(&document),
                    found: document.describe(),
                });
            }
        };
        match items.split_first() {
            Some((first, items)) if is_switch(first) => {
                let declared = self.header(&reader, first)?;
                let visible = [visible, &declared].concat();
                self.extended(reader, items, Scope::new(self.set, visible))
            }
            _ => {
                for (i, node) in items.iter().enumerate() {
                    let rule = reader.rule(self.rules.len(), i + 1, node);
                    self.rules.push(rule);
                }
                Ok(())
            }
        }
    }

    /// The items behind the switch: rules and other files.
    fn extended(
        &mut self,
        reader: Reader<'_>,
        items: &[Arc<Node>],
        scope: Scope<'_>,
    ) -> Result<(), RuleError> {
        let reader = Reader {
            scope: Some(&scope),
            ..reader
        };
        let mut number = 0;
        for node in items {
            match included(node) {
                Some(file) => self.include(&reader, node, file, scope.visible())?,
                None => {
                    number += 1;
                    let rule = reader.rule(self.rules.len(), number, node);
                    self.rules.push(rule);
                }
            }
        }
        for index in scope.used() {
            self.variables[index].is_used = true;
        }
        Ok(())
    }

    /// `- ktx: 1`, with `variables`.
    fn header(&mut self, reader: &Reader<'_>, node: &Node) -> Result<Vec<Visible>, RuleError> {
        let Kind::Mapping(pairs) = &node.kind else {
            return Ok(Vec::new());
        };
        let mut declared = Vec::new();
        for (key, value) in pairs {
            match key.text() {
                Some("ktx") => match &value.kind {
                    Kind::Scalar(Scalar::Int(n)) if n.as_u64() == Some(VERSION) => {}
                    _ => {
                        return Err(RuleError::Version {
                            location: reader.location(value),
                            found: value.to_json().to_string(),
                            known: VERSION,
                        });
                    }
                },
                Some("variables") => declared = self.declare(reader, value)?,
                _ => {
                    return Err(RuleError::UnknownKey {
                        location: reader.location(key),
                        key: key.key(),
                        within: "the first item",
                        known: "ktx, variables",
                        nearest: nearest(&key.key(), ["variables"]).map(str::to_owned),
                    });
                }
            }
        }
        Ok(declared)
    }

    fn declare(&mut self, reader: &Reader<'_>, node: &Node) -> Result<Vec<Visible>, RuleError> {
        let Kind::Mapping(pairs) = &node.kind else {
            return Err(reader.wrong_type(node, "variables", "a mapping of names and values"));
        };
        let mut declared = Vec::new();
        for (key, value) in pairs {
            let name = key.key();
            if !is_variable_name(&name) {
                return Err(RuleError::BadVariableName {
                    location: reader.location(key),
                    name,
                });
            }
            if !matches!(value.kind, Kind::Scalar(_)) {
                return Err(reader.wrong_type(value, "variables", "a mapping of names and values"));
            }
            let value = value.to_json();
            declared.push((self.variables.len(), name.clone(), value.clone()));
            self.variables.push(RuleVariable {
                name,
                value,
                location: reader.location(key),
                is_used: false,
            });
        }
        Ok(declared)
    }

    fn include(
        &mut self,
        reader: &Reader<'_>,
        item: &Node,
        node: &Node,
        visible: &[Visible],
    ) -> Result<(), RuleError> {
        if let Kind::Mapping(pairs) = &item.kind
            && let Some((key, _)) = pairs.iter().find(|(k, _)| k.text() != Some("include"))
        {
            return Err(RuleError::UnknownKey {
                location: reader.location(key),
                key: key.key(),
                within: "an item with `include`",
                known: "include",
                nearest: None,
            });
        }
        let location = reader.location(node);
        let Some(name) = node.text().filter(|name| !name.is_empty()) else {
            return Err(reader.wrong_type(node, "include", "a file's name or `preset:NAME`"));
        };
        if let Some(name) = name.strip_prefix(PRESET) {
            let name = name.trim();
            let Some(preset) = presets().iter().find(|p| p.name == name) else {
                let known: Vec<&str> = presets().iter().map(|p| p.name).collect();
                return Err(RuleError::UnknownPreset {
                    location,
                    name: name.to_owned(),
                    known: known.join(", "),
                });
            };
            let source = Source {
                text: preset.text,
                file: format!("preset {}", preset.name).into(),
                path: None,
                is_preset: true,
            };
            return self.file(&source, Some(location), visible);
        }
        let directory = self.chain.last().map(|frame| frame.directory.as_path());
        let path = directory.unwrap_or(Path::new("")).join(name);
        let text = read(&path).map_err(|error| match error {
            RuleError::Unreadable { file, source } => RuleError::MissingInclude {
                location: location.clone(),
                file,
                source,
            },
            other => RuleError::Included {
                source: Box::new(other),
                chain: vec![location.clone()],
            },
        })?;
        let source = Source {
            text: &text,
            file: path.display().to_string().into(),
            path: Some(path),
            is_preset: false,
        };
        self.file(&source, Some(location), visible)
    }
}

/// Whether the first item of a list switches the extensions on.
fn is_switch(node: &Node) -> bool {
    match &node.kind {
        Kind::Mapping(pairs) => get(pairs, "ktx").is_some() && get(pairs, "match").is_none(),
        _ => false,
    }
}

/// What an item includes; none if it is a rule.
fn included(node: &Node) -> Option<&Node> {
    let pairs: &[Pair] = match &node.kind {
        Kind::Mapping(pairs) => pairs,
        _ => return None,
    };
    get(pairs, "include").filter(|_| get(pairs, "match").is_none())
}

/// The text of a file, not larger than any rule file.
pub(super) fn read(path: &Path) -> Result<String, RuleError> {
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
    String::from_utf8(bytes).map_err(|e| RuleError::NotText {
        file: name,
        offset: e.utf8_error().valid_up_to(),
    })
}
