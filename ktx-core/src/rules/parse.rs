//! From the nodes of a YAML file to rules.

use std::sync::Arc;

use ktx_ops::kwargs::Kwarg;
use ktx_ops::nearest::nearest;
use ktx_ops::{Kwargs, Location};

use super::error::RuleError;
use super::pattern::{BadPattern, NamePattern};
use super::yaml::{self, Kind, Node, Pair};
use super::yaml_scalar::Scalar;
use super::{ClassPath, Match, Odd, Replace, Rule, RuleNote, RuleRef};

/// All rules of a text.
pub(super) fn rules(text: &str, file: &Arc<str>) -> Result<Vec<Rule>, RuleError> {
    let reader = Reader { text, file };
    let document = yaml::read(text).map_err(|e| RuleError::Syntax {
        location: Location {
            file: Arc::clone(file),
            line: e.line,
            column: e.column,
        },
        reason: e.reason,
    })?;
    let empty = || RuleError::Empty {
        file: file.to_string(),
    };
    let document = document.ok_or_else(empty)?;
    match &document.kind {
        Kind::Sequence(items) => Ok(items
            .iter()
            .enumerate()
            .map(|(i, node)| reader.rule(i, node))
            .collect()),
        Kind::Scalar(Scalar::Null) => Err(empty()),
        _ => Err(RuleError::NotAList {
            location: reader.location(&document),
            found: document.describe(),
        }),
    }
}

struct Reader<'a> {
    text: &'a str,
    file: &'a Arc<str>,
}

fn get<'n>(pairs: &'n [Pair], key: &str) -> Option<&'n Node> {
    pairs
        .iter()
        .find(|(k, _)| k.text() == Some(key))
        .map(|(_, v)| &**v)
}

impl Reader<'_> {
    fn location(&self, node: &Node) -> Location {
        Location {
            file: Arc::clone(self.file),
            line: node.place.line,
            column: node.place.column,
        }
    }

    fn wrong_type(&self, node: &Node, what: &'static str, expected: &'static str) -> RuleError {
        RuleError::WrongType {
            location: self.location(node),
            what,
            expected,
            found: node.describe(),
        }
    }

    fn rule(&self, index: usize, node: &Node) -> Rule {
        let location = self.location(node);
        let reference = RuleRef {
            index,
            location: location.clone(),
        };
        let mut notes = Vec::new();
        let Kind::Mapping(pairs) = &node.kind else {
            let wrong = self.wrong_type(node, "rule", "a mapping with `match` and `replace`");
            return Rule {
                reference,
                matches: Err(wrong.clone()),
                replace: Err(wrong),
                recursive: true,
                notes,
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
            notes.push(RuleNote::IgnoredKey {
                location: self.location(key),
                key: key.key(),
                within,
                nearest: nearest(&key.key(), known.iter().copied()).map(str::to_owned),
            });
        }
    }

    fn criteria(&self, node: &Node, notes: &mut Vec<RuleNote>) -> Result<Match, RuleError> {
        let Kind::Mapping(pairs) = &node.kind else {
            return Err(self.wrong_type(node, "match", "a mapping with `name`, `class`, or both"));
        };
        self.note_unknown_keys(pairs, "match", &["name", "class"], notes);
        let class = get(pairs, "class").map(|node| self.class(node));
        let name = get(pairs, "name").map(|node| self.name(node));
        if class.is_none() && name.is_none() {
            return Err(RuleError::NoCriterion {
                location: self.location(node),
            });
        }
        Ok(Match { class, name })
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
            let (line, column) = yaml::position_in(self.text, &node.place, character);
            RuleError::BadPattern {
                location: Location {
                    file: Arc::clone(self.file),
                    line,
                    column,
                },
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
                Kind::Mapping(pairs) => Some(self.kwargs(pairs)),
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

    fn kwargs(&self, pairs: &[Pair]) -> Kwargs {
        let mut kwargs = Kwargs::new();
        for (key, value) in pairs {
            kwargs.insert(Kwarg {
                name: key.key(),
                value: value.to_json(),
                location: Some(self.location(key)),
            });
        }
        kwargs
    }
}
