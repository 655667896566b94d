//! Variables of rule files: `${gpu}` in keyword arguments, with a value from the file or from outside.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};

use ktx_ops::Location;
use ktx_ops::nearest::nearest;
use serde_json::Value;

use super::error::RuleError;
use super::yaml_scalar::Scalar;

/// Values of variables that are given from outside, by name. They come before those in the files.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct RuleVariables {
    values: BTreeMap<String, Value>,
}

impl RuleVariables {
    /// Gives a variable a value, read as YAML reads an unquoted one: `8` is a number.
    pub fn set(&mut self, name: &str, value: &str) {
        self.values
            .insert(name.to_owned(), Scalar::resolve(value).to_json());
    }

    /// Whether none is given.
    pub fn is_empty(&self) -> bool {
        self.values.is_empty()
    }

    /// The names, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.values.keys().map(String::as_str)
    }

    fn get(&self, name: &str) -> Option<&Value> {
        self.values.get(name)
    }
}

/// A variable that a rule file declares.
#[derive(Debug, Clone, PartialEq)]
pub struct RuleVariable {
    /// Its name.
    pub name: String,
    /// The value that this file gives it.
    pub value: Value,
    /// Where.
    pub location: Location,
    /// Whether a rule of this file, or of one that it includes, uses it.
    pub is_used: bool,
}

/// Whether a name can be one of a variable: a letter or `_`, then letters, digits, `_` and `-`.
pub(crate) fn is_variable_name(name: &str) -> bool {
    let mut letters = name.chars();
    letters
        .next()
        .is_some_and(|c| c == '_' || c.is_ascii_alphabetic())
        && letters.all(|c| matches!(c, '_' | '-') || c.is_ascii_alphanumeric())
}

/// The variables that the rules of one file can use.
pub(super) struct Scope<'a> {
    set: &'a RuleVariables,
    /// Index among all variables, name and value: those of the outermost file first.
    visible: Vec<(usize, String, Value)>,
    used: RefCell<BTreeSet<usize>>,
}

impl<'a> Scope<'a> {
    pub(super) fn new(set: &'a RuleVariables, visible: Vec<(usize, String, Value)>) -> Self {
        Self {
            set,
            visible,
            used: RefCell::default(),
        }
    }

    pub(super) fn visible(&self) -> &[(usize, String, Value)] {
        &self.visible
    }

    /// Indices of the variables that were used.
    pub(super) fn used(self) -> BTreeSet<usize> {
        self.used.into_inner()
    }

    /// A text with its variables replaced. A text that is one variable takes its value, of whatever type.
    pub(super) fn expand(&self, text: &str, location: &Location) -> Result<Value, RuleError> {
        let mut out = String::new();
        let mut rest = text;
        while let Some(at) = rest.find("${") {
            let (before, from) = rest.split_at(at);
            if let Some(before) = before.strip_suffix('$') {
                out.push_str(before);
                out.push_str("${");
                rest = &from[2..];
                continue;
            }
            out.push_str(before);
            let Some((name, after)) = from[2..].split_once('}') else {
                return Err(RuleError::OpenVariable {
                    location: location.clone(),
                    text: text.to_owned(),
                });
            };
            let value = self.value(name, location)?;
            if out.is_empty() && after.is_empty() {
                return Ok(value);
            }
            match value {
                Value::String(text) => out.push_str(&text),
                other => out.push_str(&other.to_string()),
            }
            rest = after;
        }
        out.push_str(rest);
        Ok(Value::String(out))
    }

    fn value(&self, name: &str, location: &Location) -> Result<Value, RuleError> {
        let mut found = None;
        for (index, declared, value) in &self.visible {
            if declared == name {
                self.used.borrow_mut().insert(*index);
                found.get_or_insert(value);
            }
        }
        match found {
            Some(value) => Ok(self.set.get(name).unwrap_or(value).clone()),
            None => Err(RuleError::UndeclaredVariable {
                location: location.clone(),
                name: name.to_owned(),
                nearest: nearest(name, self.visible.iter().map(|(_, n, _)| n.as_str()))
                    .map(str::to_owned),
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variables_are_replaced_and_a_doubled_sign_stands_for_itself() {
        let mut set = RuleVariables::default();
        set.set("n", "8");
        let visible = vec![
            (0, "gpu".to_owned(), "cuda:1".into()),
            (1, "n".to_owned(), 4.into()),
            (2, "gpu".to_owned(), "cuda:0".into()),
            (3, "idle".to_owned(), "x".into()),
        ];
        let scope = Scope::new(&set, visible);
        let at = Location {
            file: "r.yaml".into(),
            line: 1,
            column: 1,
        };
        for (text, wanted) in [
            ("${gpu}", Value::from("cuda:1")),
            ("${n}", 8.into()),
            ("cuda:${n}", "cuda:8".into()),
            ("${gpu}${n}", "cuda:18".into()),
            ("$${gpu} $5", "${gpu} $5".into()),
            ("", "".into()),
        ] {
            assert_eq!(scope.expand(text, &at).unwrap(), wanted, "{text}");
        }
        for wrong in ["${gpu", "${}", "${gpus}"] {
            assert!(scope.expand(wrong, &at).is_err(), "{wrong}");
        }
        assert_eq!(scope.used(), BTreeSet::from([0, 1, 2]));
    }
}
