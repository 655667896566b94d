//! From the nodes of a YAML file to rules.

use std::sync::Arc;

use ktx_gguf::GgmlType;
use ktx_ops::kwargs::Kwarg;
use ktx_ops::nearest::nearest;
use ktx_ops::{Kwargs, Location};
use serde_json::Value;

use super::error::RuleError;
use super::glob::{BadGlob, Glob};
use super::layers::Layers;
use super::pattern::{BadPattern, NamePattern};
use super::variables::Scope;
use super::yaml::{self, Kind, Node, Pair};
use super::yaml_scalar::Scalar;
use super::{ClassPath, Match, Odd, Replace, Rule, RuleNote, RuleRef, TensorTypes};

/// Keys of `match` that mean something only with the extensions.
const EXTENSIONS: [&str; 3] = ["glob", "layers", "type"];

/// Reads the rules of one file.
pub(super) struct Reader<'a> {
    pub text: &'a str,
    pub file: &'a Arc<str>,
    /// The variables; none if the extensions are off.
    pub scope: Option<&'a Scope<'a>>,
    pub is_preset: bool,
    pub is_included: bool,
}

/// The value of a key.
pub(super) fn get<'n>(pairs: &'n [Pair], key: &str) -> Option<&'n Node> {
    pairs
        .iter()
        .find(|(k, _)| k.text() == Some(key))
        .map(|(_, v)| &**v)
}

impl Reader<'_> {
    pub(super) fn location(&self, node: &Node) -> Location {
        Location {
            file: Arc::clone(self.file),
            line: node.place.line,
            column: node.place.column,
        }
    }

    pub(super) fn wrong_type(
        &self,
        node: &Node,
        what: &'static str,
        expected: &'static str,
    ) -> RuleError {
        RuleError::WrongType {
            location: self.location(node),
            what,
            expected,
            found: node.describe(),
        }
    }

    /// One rule: its index among all rules, and its number in this file.
    pub(super) fn rule(&self, index: usize, number: usize, node: &Node) -> Rule {
        let location = self.location(node);
        let reference = RuleRef {
            index,
            number,
            is_included: self.is_included,
            location: location.clone(),
        };
        let is_preset = self.is_preset;
        let mut notes = Vec::new();
        let Kind::Mapping(pairs) = &node.kind else {
            let wrong = self.wrong_type(node, "rule", "a mapping with `match` and `replace`");
            return Rule {
                reference,
                matches: Err(wrong.clone()),
                replace: Err(wrong),
                recursive: true,
                notes,
                is_preset,
            };
        };
        self.note_unknown_keys(
            pairs,
            "rule",
            &["match", "replace", "recursive"],
            &mut notes,
        );
        let matches = match get(pairs, "match") {
            Some(node) => self.criteria(node, &mut notes),
            None => Err(RuleError::NoMatch {
                location: location.clone(),
                extension: self
                    .scope
                    .is_none()
                    .then(|| {
                        ["ktx", "include"]
                            .into_iter()
                            .find(|k| get(pairs, k).is_some())
                    })
                    .flatten(),
            }),
        };
        let replace = match get(pairs, "replace") {
            Some(node) => self.replacement(node, &mut notes),
            None => Err(RuleError::NoReplace { location }),
        };
        let recursive = get(pairs, "recursive").is_none_or(|node| {
            if let Some(text) = node.text().filter(|text| !text.is_empty()) {
                notes.push(RuleNote::RecursiveText {
                    location: self.location(node),
                    text: text.to_owned(),
                });
            }
            node.is_truthy()
        });
        Rule {
            reference,
            matches,
            replace,
            recursive,
            notes,
            is_preset,
        }
    }

    fn note_unknown_keys(
        &self,
        pairs: &[Pair],
        within: &'static str,
        known: &[&str],
        notes: &mut Vec<RuleNote>,
    ) {
        for (key, _) in pairs
            .iter()
            .filter(|(k, _)| !k.text().is_some_and(|k| known.contains(&k)))
        {
            let is_extension = within == "match"
                && self.scope.is_none()
                && key.text().is_some_and(|k| EXTENSIONS.contains(&k));
            notes.push(RuleNote::IgnoredKey {
                location: self.location(key),
                key: key.key(),
                within,
                nearest: nearest(&key.key(), known.iter().copied()).map(str::to_owned),
                is_extension,
            });
        }
    }

    fn criteria(&self, node: &Node, notes: &mut Vec<RuleNote>) -> Result<Match, RuleError> {
        let Kind::Mapping(pairs) = &node.kind else {
            return Err(self.wrong_type(node, "match", "a mapping with `name`, `class`, or both"));
        };
        let is_extended = self.scope.is_some();
        if is_extended {
            self.refuse_unknown_keys(pairs)?;
        } else {
            self.note_unknown_keys(pairs, "match", &["name", "class"], notes);
        }
        let extension = |key: &str| get(pairs, key).filter(|_| is_extended);
        let matches = Match {
            class: get(pairs, "class").map(|node| self.class(node)),
            name: get(pairs, "name").map(|node| self.name(node)),
            glob: extension("glob").map(|node| self.glob(node)),
            layers: extension("layers").map(|node| self.layers(node)),
            types: extension("type").map(|node| self.types(node)),
        };
        if matches.is_empty() {
            return Err(RuleError::NoCriterion {
                location: self.location(node),
                extension: EXTENSIONS.into_iter().find(|k| get(pairs, k).is_some()),
            });
        }
        Ok(matches)
    }

    /// In `match`, a slip would make a rule take more modules than it should.
    fn refuse_unknown_keys(&self, pairs: &[Pair]) -> Result<(), RuleError> {
        let known = ["name", "class", "glob", "layers", "type"];
        match pairs
            .iter()
            .find(|(k, _)| !k.text().is_some_and(|k| known.contains(&k)))
        {
            None => Ok(()),
            Some((key, _)) => Err(RuleError::UnknownKey {
                location: self.location(key),
                key: key.key(),
                within: "`match`",
                known: "name, class, glob, layers, type",
                nearest: nearest(&key.key(), known).map(str::to_owned),
            }),
        }
    }

    fn glob(&self, node: &Node) -> Result<Glob, RuleError> {
        let Some(text) = node.text() else {
            return Err(self.wrong_type(node, "glob", "a glob in quotes"));
        };
        Glob::new(text, self.location(node)).map_err(|BadGlob { character, reason }| {
            RuleError::BadGlob {
                location: self.character(node, character),
                glob: text.to_owned(),
                character: character + 1,
                reason,
            }
        })
    }

    /// A text, a number, or a list of them. Numbers count as they are written: `010` and `1:30`, which YAML
    /// takes for others, are no layers.
    fn layers(&self, node: &Node) -> Result<Layers, RuleError> {
        let text = match &node.kind {
            Kind::Sequence(items) if !items.is_empty() => {
                let parts = items.iter().map(|item| self.layers(item));
                return parts.collect::<Result<_, _>>().map(Layers::join);
            }
            Kind::Scalar(Scalar::Text(text)) => text.as_str(),
            Kind::Scalar(Scalar::Int(_)) => self.text.get(node.place.bytes.clone()).unwrap_or(""),
            _ => return Err(self.wrong_type(node, "layers", "layer numbers, as in `0-9,12`")),
        };
        Layers::parse(text).map_err(|reason| RuleError::BadLayers {
            location: self.location(node),
            reason,
        })
    }

    fn types(&self, node: &Node) -> Result<TensorTypes, RuleError> {
        let one = |node: &Node| {
            let Some(text) = node.text() else {
                return Err(self.wrong_type(node, "type", "a tensor type, as in `Q4_K`"));
            };
            tensor_type(text).ok_or_else(|| RuleError::UnknownType {
                location: self.location(node),
                name: text.to_owned(),
                nearest: nearest(text, tensor_types().map(GgmlType::name)).map(str::to_owned),
            })
        };
        let types = match &node.kind {
            Kind::Sequence(items) if !items.is_empty() => items
                .iter()
                .map(|item| one(item))
                .collect::<Result<_, _>>()?,
            _ => vec![one(node)?],
        };
        Ok(TensorTypes {
            types,
            location: self.location(node),
        })
    }

    /// The place of a character of a scalar.
    fn character(&self, node: &Node, character: usize) -> Location {
        let (line, column) = yaml::position_in(self.text, &node.place, character);
        Location {
            file: Arc::clone(self.file),
            line,
            column,
        }
    }

    fn class(&self, node: &Node) -> Result<ClassPath, RuleError> {
        match node.text() {
            Some(path) => Ok(ClassPath {
                path: path.to_owned(),
                location: self.location(node),
            }),
            None => Err(self.wrong_type(node, "class", "a class path")),
        }
    }

    fn name(&self, node: &Node) -> Result<NamePattern, RuleError> {
        let Some(text) = node.text() else {
            return Err(self.wrong_type(node, "name", "a regular expression in quotes"));
        };
        NamePattern::new(text, self.location(node)).map_err(|BadPattern { character, reason }| {
            RuleError::BadPattern {
                location: self.character(node, character),
                pattern: text.to_owned(),
                character: character + 1,
                reason,
            }
        })
    }

    fn replacement(&self, node: &Node, notes: &mut Vec<RuleNote>) -> Result<Replace, RuleError> {
        let expected = "a mapping with `class`, `kwargs`, or both";
        let no_pairs = Vec::new();
        let pairs = match &node.kind {
            Kind::Mapping(pairs) => pairs,
            // Python asks such a value whether "class" is in it, and is content if it is not.
            Kind::Scalar(Scalar::Text(text))
                if !text.contains("class") && !text.contains("kwargs") =>
            {
                &no_pairs
            }
            Kind::Sequence(items)
                if !items
                    .iter()
                    .any(|i| matches!(i.text(), Some("class" | "kwargs"))) =>
            {
                &no_pairs
            }
            _ => return Err(self.wrong_type(node, "replace", expected)),
        };
        if !matches!(node.kind, Kind::Mapping(_)) {
            notes.push(RuleNote::EmptyReplace {
                location: self.location(node),
                found: node.describe(),
            });
        }
        self.note_unknown_keys(pairs, "replace", &["class", "kwargs"], notes);
        let mut odd = Odd::default();
        let class_node = get(pairs, "class");
        let class = match class_node {
            None => Some("default".to_owned()),
            Some(node) => match &node.kind {
                Kind::Scalar(Scalar::Null) => None,
                Kind::Scalar(Scalar::Text(class)) => Some(class.clone()),
                _ => {
                    odd.class = Some(node.to_json());
                    None
                }
            },
        };
        let kwargs = match get(pairs, "kwargs") {
            None => Some(Kwargs::new()),
            Some(node) => match &node.kind {
                Kind::Scalar(Scalar::Null) => None,
                Kind::Mapping(pairs) => Some(self.kwargs(pairs)?),
                _ => {
                    odd.kwargs = Some(node.to_json());
                    None
                }
            },
        };
        Ok(Replace {
            class,
            class_location: self.location(class_node.unwrap_or(node)),
            kwargs,
            odd,
        })
    }

    fn kwargs(&self, pairs: &[Pair]) -> Result<Kwargs, RuleError> {
        let mut kwargs = Kwargs::new();
        for (key, value) in pairs {
            kwargs.insert(Kwarg {
                name: key.key(),
                value: self.value(value)?,
                location: Some(self.location(key)),
            });
        }
        Ok(kwargs)
    }

    /// The value of a keyword argument, its variables replaced.
    fn value(&self, node: &Node) -> Result<Value, RuleError> {
        let Some(scope) = self.scope else {
            return Ok(node.to_json());
        };
        match &node.kind {
            Kind::Scalar(Scalar::Text(text)) => scope.expand(text, &self.location(node)),
            Kind::Scalar(scalar) => Ok(scalar.to_json()),
            Kind::Sequence(items) => items.iter().map(|item| self.value(item)).collect(),
            Kind::Mapping(pairs) => pairs
                .iter()
                .map(|(key, value)| Ok((key.key(), self.value(value)?)))
                .collect::<Result<serde_json::Map<_, _>, _>>()
                .map(Value::Object),
        }
    }
}

/// The type of this name, whatever its case.
fn tensor_type(name: &str) -> Option<GgmlType> {
    tensor_types().find(|ty| ty.name().eq_ignore_ascii_case(name))
}

/// The types of GGUF files, and that of safetensors files which GGUF does not have.
fn tensor_types() -> impl Iterator<Item = GgmlType> {
    let gguf = GgmlType::ALL.iter().copied();
    gguf.chain([GgmlType::F8_E4M3])
}
