//! Answers of a given form: which tokens can come next so that a JSON schema is met.
//!
//! A [`Grammar`] is made of a schema. It describes bytes, and a token is allowed if all of its bytes are,
//! in their order: so it does not matter how a vocabulary cuts text. The machine that reads bytes is a
//! pushdown automaton that is made deterministic as it runs; what it finds out about a state, the
//! allowed tokens included, is kept.
//!
//! What a schema allows and the grammar does not: properties come in the order of the schema, and
//! properties that it does not name do not come at all, unless it names none. Everything that the
//! grammar allows meets the schema.

mod constraint;
mod machine;
mod nodes;
mod schema;
mod trie;

use std::sync::Arc;

use serde_json::Value;

pub use constraint::GrammarConstraint;
pub(crate) use trie::TokenTrie;

use machine::Machine;
use nodes::{NodeId, Nodes};

/// Why a schema is no grammar.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum GrammarError {
    /// A keyword that says something that is not checked here.
    #[error("{at}: `{keyword}` is not supported; leave it out, or check the answer afterwards")]
    Unsupported {
        /// Where in the schema.
        at: String,
        /// The keyword.
        keyword: String,
    },
    /// A keyword with a value that has no meaning.
    #[error("{at}: {reason}")]
    Malformed {
        /// Where in the schema.
        at: String,
        /// What is wrong.
        reason: String,
    },
    /// Too deep or too large.
    #[error("the schema is too large: {reason}")]
    TooLarge {
        /// What is too large.
        reason: String,
    },
    /// No text meets it.
    #[error("no answer can meet the schema: it demands a value that contains itself")]
    Endless,
}

/// The form of a text. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Grammar {
    nodes: Arc<Nodes>,
    root: NodeId,
}

impl Grammar {
    /// The JSON texts that meet a schema.
    ///
    /// # Errors
    /// [`GrammarError`] if the schema says something that is not supported, and has no meaning.
    pub fn from_json_schema(schema: &Value) -> Result<Self, GrammarError> {
        schema::compile(schema)
    }

    /// Whether a whole text has the form.
    pub fn accepts(&self, text: &str) -> bool {
        let mut machine = Machine::new(self.clone());
        let mut state = machine.start();
        for byte in text.bytes() {
            state = machine.step(state, byte);
        }
        machine.is_end(state)
    }

    /// Whether a text can be the beginning of one that has the form.
    pub fn accepts_beginning(&self, text: &str) -> bool {
        let mut machine = Machine::new(self.clone());
        let mut state = machine.start();
        for byte in text.bytes() {
            state = machine.step(state, byte);
        }
        !machine.is_dead(state)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn check(schema: Value, good: &[&str], bad: &[&str]) {
        let grammar = Grammar::from_json_schema(&schema).expect("the schema is supported");
        for text in good {
            assert!(grammar.accepts(text), "{schema}: {text} is refused");
        }
        for text in bad {
            assert!(!grammar.accepts(text), "{schema}: {text} is accepted");
        }
    }

    #[test]
    fn plain_types() {
        check(
            json!({"type": "null"}),
            &["null"],
            &["nul", "nulls", " null", ""],
        );
        check(json!({"type": "boolean"}), &["true", "false"], &["True"]);
        check(
            json!({"type": "integer"}),
            &["0", "-7", "120"],
            &["01", "1.0", "-", "+1"],
        );
        check(
            json!({"type": "number"}),
            &["0", "-7.25", "1e9", "2.5E-3"],
            &["1.", ".5", "1e", "NaN"],
        );
        check(
            json!({"type": "string"}),
            &[r#""""#, r#""a\n\"é😀\u00e9""#],
            &["\"a\nb\"", r#""\x""#, r#""a"#, r#""\ud800""#],
        );
        check(
            json!({"type": ["integer", "null"]}),
            &["1", "null"],
            &["true"],
        );
        check(
            json!({"enum": ["a", 1, null]}),
            &["\"a\"", "1", "null"],
            &["\"b\""],
        );
        check(json!({"const": {"a": [1]}}), &[r#"{"a":[1]}"#], &["{}"]);
        check(json!(false), &[], &["1"]);
    }

    #[test]
    fn lengths() {
        check(
            json!({"type": "string", "minLength": 2, "maxLength": 3}),
            &[r#""ab""#, r#""äöü""#],
            &[r#""a""#, r#""abcd""#],
        );
        check(
            json!({"type": "array", "items": {"type": "integer"}, "minItems": 1, "maxItems": 3}),
            &["[1]", "[1, 2,3]", "[\n  1,\n  2\n]"],
            &["[]", "[1,2,3,4]", "[1,]", "[,]"],
        );
        check(
            json!({"type": "array", "prefixItems": [{"type": "null"}], "items": {"type": "integer"}}),
            &["[null]", "[null, 1, 2]"],
            &["[1]"],
        );
    }

    #[test]
    fn ranges_of_integers() {
        let range = json!({"type": "integer", "minimum": -3, "maximum": 120});
        let good: Vec<String> = (-3..=120).map(|n| n.to_string()).collect();
        let good: Vec<&str> = good.iter().map(String::as_str).collect();
        check(range, &good, &["-4", "121", "-0", "1000", "007", "-30"]);
        check(
            json!({"type": "integer", "minimum": 18}),
            &["18", "19", "20", "99", "100", "123456"],
            &["17", "9", "0", "-18"],
        );
        check(
            json!({"type": "integer", "exclusiveMaximum": 0}),
            &["-1", "-99"],
            &["0", "1"],
        );
    }

    #[test]
    fn objects_have_their_properties_in_order() {
        let schema = json!({
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "string"}, "c": {"type": "null"}},
            "required": ["b"],
        });
        check(
            schema,
            &[
                r#"{"b":"x"}"#,
                r#"{"a": 1, "b": "x"}"#,
                r#"{"a":1,"b":"x","c":null}"#,
                "{\n  \"b\": \"x\"\n}",
            ],
            &[
                r#"{}"#,
                r#"{"a":1}"#,
                r#"{"b":"x","a":1}"#,
                r#"{"b":"x",}"#,
                r#"{"b":"x","d":1}"#,
            ],
        );
        check(
            json!({"type": "object", "additionalProperties": {"type": "integer"}}),
            &["{}", r#"{"x": 1, "y": 2}"#],
            &[r#"{"x": "1"}"#],
        );
        check(
            json!({"type": "object"}),
            &["{}", r#"{"x": {"y": [1, true, "z"]}}"#],
            &["[]", r#"{x: 1}"#],
        );
    }

    #[test]
    fn schemas_refer_to_themselves_and_others() {
        let schema = json!({
            "$ref": "#/$defs/node",
            "$defs": {"node": {
                "type": "object",
                "properties": {"value": {"type": "integer"}, "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}},
                "required": ["value", "next"],
            }},
        });
        check(
            schema,
            &[r#"{"value":1,"next":{"value":2,"next":null}}"#],
            &[r#"{"value":1,"next":{}}"#],
        );
        let endless =
            json!({"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]});
        assert_eq!(
            Grammar::from_json_schema(&endless).unwrap_err(),
            GrammarError::Endless
        );
        for circle in [
            json!({"$ref": "#"}),
            json!({"anyOf": [{"$ref": "#"}, {"$ref": "#"}]}),
        ] {
            assert_eq!(
                Grammar::from_json_schema(&circle).unwrap_err(),
                GrammarError::Endless
            );
        }
    }

    #[test]
    fn what_is_not_checked_is_refused_by_name() {
        for (schema, word) in [
            (json!({"type": "string", "pattern": "a+"}), "pattern"),
            (json!({"type": "array", "uniqueItems": true}), "uniqueItems"),
            (
                json!({"properties": {"x": {"not": {}}}}),
                "#/properties/x: `not`",
            ),
            (json!({"$ref": "https://example.org/x"}), "$ref"),
            (json!({"$ref": "#/nothing"}), "#/nothing"),
            (json!({"type": "text"}), "text"),
            (json!(3), "schema"),
        ] {
            let message = Grammar::from_json_schema(&schema).unwrap_err().to_string();
            assert!(message.contains(word), "{message}");
        }
    }

    #[test]
    fn formats_that_have_a_fixed_shape_are_kept() {
        check(
            json!({"type": "string", "format": "date"}),
            &["\"2024-02-29\""],
            &["\"2024-13-01\"", "\"today\""],
        );
        check(
            json!({"type": "string", "format": "date-time"}),
            &[
                "\"2024-02-29T23:59:59Z\"",
                "\"2024-02-29T23:59:59.5+01:00\"",
            ],
            &["\"2024-02-29\""],
        );
        check(
            json!({"type": "string", "format": "uuid"}),
            &["\"123e4567-e89b-12d3-a456-426614174000\""],
            &["\"123\""],
        );
    }

    #[test]
    fn deep_and_large_schemas_are_refused_and_deep_answers_end() {
        let mut deep = json!({"type": "null"});
        for _ in 0..500 {
            deep = json!({"type": "array", "items": deep});
        }
        assert!(matches!(
            Grammar::from_json_schema(&deep),
            Err(GrammarError::TooLarge { .. })
        ));
        let long = json!({"type": "string", "minLength": 1_000_000_000});
        assert!(Grammar::from_json_schema(&long).is_err());
        let free = Grammar::from_json_schema(&json!({"type": "array"})).expect("it is supported");
        assert!(free.accepts_beginning(&"[".repeat(20)));
        assert!(!free.accepts_beginning(&"[".repeat(5_000)));
    }
}
