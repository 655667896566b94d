//! From a JSON schema to a grammar.

mod merge;
mod numbers;
mod strings;

use std::collections::HashMap;
use std::sync::Arc;

use serde_json::{Map, Value, json};

use super::nodes::{Node, NodeId, Nodes};
use super::{Grammar, GrammarError};

/// Schemas within each other.
const MAX_DEPTH: usize = 64;
/// Parts of a grammar.
const MAX_NODES: usize = 100_000;
/// Largest `minLength` and `minItems`.
const MAX_MINIMUM: u64 = 10_000;

/// Keywords that say something of a value and that are not checked here.
const UNSUPPORTED: [&str; 19] = [
    "pattern",
    "multipleOf",
    "uniqueItems",
    "not",
    "if",
    "then",
    "else",
    "patternProperties",
    "propertyNames",
    "dependentRequired",
    "dependentSchemas",
    "dependencies",
    "minProperties",
    "maxProperties",
    "contains",
    "minContains",
    "maxContains",
    "$dynamicRef",
    "$recursiveRef",
];

/// Makes a grammar of a schema.
pub(super) fn compile(schema: &Value) -> Result<Grammar, GrammarError> {
    let mut compiler = Compiler::new(schema);
    let root = compiler.schema(schema, "#", 0)?;
    if !schema.is_boolean() && !compiler.nodes.possible()[root.0 as usize] {
        return Err(GrammarError::Endless);
    }
    Ok(Grammar {
        nodes: Arc::new(compiler.nodes),
        root,
    })
}

/// An object of a schema.
pub(super) type Keywords = Map<String, Value>;

pub(super) struct Compiler<'a> {
    root: &'a Value,
    pub(super) nodes: Nodes,
    /// What references stand for; set once it is known.
    references: HashMap<String, NodeId>,
    space: NodeId,
    string: NodeId,
    number: NodeId,
    integer: NodeId,
    /// Any value, and any object and array.
    any: NodeId,
    any_object: NodeId,
    any_array: NodeId,
}

impl<'a> Compiler<'a> {
    fn new(root: &'a Value) -> Self {
        let mut nodes = Nodes::default();
        let space = space(&mut nodes);
        let string = strings::any(&mut nodes);
        let number = numbers::any(&mut nodes);
        let integer = numbers::any_integer(&mut nodes);
        let any = nodes.choice([]);
        let mut compiler = Self {
            root,
            nodes,
            references: HashMap::new(),
            space,
            string,
            number,
            integer,
            any,
            any_object: any,
            any_array: any,
        };
        compiler.any_object = compiler.map_of(any);
        compiler.any_array = compiler.list(&[], Some(any), 0, None);
        let words = ["true", "false", "null"].map(|word| compiler.nodes.literal(word));
        let (object, array) = (compiler.any_object, compiler.any_array);
        let all = [&words[..], &[string, number, object, array]].concat();
        compiler.nodes.set(any, Node::Choice(all.into()));
        compiler
    }

    /// The values that meet a schema.
    fn schema(&mut self, schema: &Value, at: &str, depth: usize) -> Result<NodeId, GrammarError> {
        if depth > MAX_DEPTH || self.nodes.len() > MAX_NODES {
            return Err(GrammarError::TooLarge {
                reason: format!("at {at} it has more than {MAX_DEPTH} levels or {MAX_NODES} parts"),
            });
        }
        match schema {
            Value::Bool(true) => Ok(self.any),
            Value::Bool(false) => Ok(self.nodes.choice([])),
            Value::Object(keywords) => self.keywords(keywords, at, depth),
            _ => Err(malformed(at, "a schema is an object, true or false")),
        }
    }

    fn keywords(
        &mut self,
        keywords: &Keywords,
        at: &str,
        depth: usize,
    ) -> Result<NodeId, GrammarError> {
        refuse_unsupported(keywords, at)?;
        if let Some(reference) = keywords.get("$ref") {
            return self.reference(reference, keywords, at, depth);
        }
        if let Some(all) = keywords.get("allOf") {
            let merged = merge::all_of(without(keywords, "allOf"), list_at(all, at, "allOf")?, at)?;
            return self.keywords(&merged, at, depth + 1);
        }
        for word in ["anyOf", "oneOf"] {
            if let Some(choices) = keywords.get(word) {
                let rest = without(keywords, word);
                return self.choices(rest, list_at(choices, at, word)?, at, depth);
            }
        }
        if let Some(value) = keywords.get("const") {
            return Ok(self.nodes.literal(&value.to_string()));
        }
        if let Some(values) = keywords.get("enum") {
            let values = list_at(values, at, "enum")?;
            let choices: Vec<NodeId> = values
                .iter()
                .map(|v| self.nodes.literal(&v.to_string()))
                .collect();
            return Ok(self.nodes.choice(choices));
        }
        match keywords.get("type") {
            None => self.of_type(guess(keywords), keywords, at, depth),
            Some(Value::String(name)) => self.of_type(Some(name), keywords, at, depth),
            Some(Value::Array(names)) => {
                let mut choices = Vec::new();
                for name in names {
                    let name = name
                        .as_str()
                        .ok_or_else(|| malformed(at, "a type is named by a text"))?;
                    choices.push(self.of_type(Some(name), keywords, at, depth)?);
                }
                Ok(self.nodes.choice(choices))
            }
            Some(_) => Err(malformed(at, "`type` is a text or a list of texts")),
        }
    }

    fn of_type(
        &mut self,
        name: Option<&str>,
        keywords: &Keywords,
        at: &str,
        depth: usize,
    ) -> Result<NodeId, GrammarError> {
        match name {
            None => Ok(self.any),
            Some("null") => Ok(self.nodes.literal("null")),
            Some("boolean") => {
                let words = ["true", "false"].map(|word| self.nodes.literal(word));
                Ok(self.nodes.choice(words))
            }
            Some("string") => self.string_of(keywords, at),
            Some("integer") => self.integer_of(keywords, at),
            Some("number") => self.number_of(keywords, at),
            Some("array") => self.array(keywords, at, depth),
            Some("object") => self.object(keywords, at, depth),
            Some(other) => Err(malformed(at, &format!("`{other}` is no type"))),
        }
    }

    /// What a reference within the schema stands for. It may stand for something around itself.
    fn reference(
        &mut self,
        reference: &Value,
        keywords: &Keywords,
        at: &str,
        depth: usize,
    ) -> Result<NodeId, GrammarError> {
        let pointer = reference
            .as_str()
            .and_then(|text| text.strip_prefix('#'))
            .ok_or_else(|| {
                malformed(
                    at,
                    "`$ref` must refer to a place in the schema: `#/$defs/…`",
                )
            })?;
        let target = self
            .root
            .pointer(pointer)
            .ok_or_else(|| malformed(at, &format!("nothing is at `#{pointer}`")))?;
        let mut beside = without(keywords, "$ref");
        beside.retain(|word, _| merge::constrains(word));
        if !beside.is_empty() {
            let parts = [target.clone()];
            let merged = merge::all_of(beside, &parts, at)?;
            return self.keywords(&merged, at, depth + 1);
        }
        if let Some(known) = self.references.get(pointer) {
            return Ok(*known);
        }
        let place = self.nodes.choice([]);
        self.references.insert(pointer.to_owned(), place);
        let node = self.schema(target, &format!("#{pointer}"), depth + 1)?;
        self.nodes.set(place, Node::Choice([node].into()));
        Ok(place)
    }

    fn choices(
        &mut self,
        rest: Keywords,
        choices: &[Value],
        at: &str,
        depth: usize,
    ) -> Result<NodeId, GrammarError> {
        let constrained = rest.keys().any(|word| merge::constrains(word));
        let mut nodes = Vec::new();
        for (index, choice) in choices.iter().enumerate() {
            let at = format!("{at}/{index}");
            nodes.push(match constrained {
                false => self.schema(choice, &at, depth + 1)?,
                true => {
                    let merged = merge::all_of(rest.clone(), std::slice::from_ref(choice), &at)?;
                    self.keywords(&merged, &at, depth + 1)?
                }
            });
        }
        Ok(self.nodes.choice(nodes))
    }

    fn array(
        &mut self,
        keywords: &Keywords,
        at: &str,
        depth: usize,
    ) -> Result<NodeId, GrammarError> {
        let mut first = Vec::new();
        if let Some(prefix) = keywords.get("prefixItems") {
            for (index, item) in list_at(prefix, at, "prefixItems")?.iter().enumerate() {
                first.push(self.schema(item, &format!("{at}/prefixItems/{index}"), depth + 1)?);
            }
        }
        let items = match keywords.get("items") {
            None => Some(self.any),
            Some(Value::Bool(false)) => None,
            Some(items) => Some(self.schema(items, &format!("{at}/items"), depth + 1)?),
        };
        let (min, max) = bounds(keywords, at, "minItems", "maxItems")?;
        Ok(self.list(&first, items, min, max))
    }

    /// `[` first ones, then more of `items` `]`, `min` to `max` in all.
    fn list(
        &mut self,
        first: &[NodeId],
        items: Option<NodeId>,
        min: u32,
        max: Option<u32>,
    ) -> NodeId {
        let (open, close) = (self.nodes.literal("["), self.nodes.literal("]"));
        let comma = self.comma();
        let fixed = first.len() as u32;
        let mut rest = match items {
            Some(item) if max.is_none_or(|max| max > fixed) => {
                let (min, max) = (min.saturating_sub(fixed), max.map(|max| max - fixed));
                self.separated(item, comma, min, max, fixed > 0)
            }
            _ => self.nodes.sequence([]),
        };
        // Those that may be missing end the list where they are.
        for (index, item) in first.iter().enumerate().rev() {
            let mut parts = vec![*item, rest];
            if index > 0 {
                parts.insert(0, comma);
            }
            let with = self.nodes.sequence(parts);
            rest = match (index as u32) < min {
                true => with,
                false => self.nodes.optional(with),
            };
            if max.is_some_and(|max| index as u32 >= max) {
                rest = self.nodes.sequence([]);
            }
        }
        let space = self.space;
        let filled = self.nodes.sequence([open, space, rest, space, close]);
        match min {
            0 => {
                let empty = self.nodes.literal("[]");
                self.nodes.choice([empty, filled])
            }
            _ => filled,
        }
    }

    /// Items with separators between, or before each of them.
    fn separated(
        &mut self,
        item: NodeId,
        separator: NodeId,
        min: u32,
        max: Option<u32>,
        separator_first: bool,
    ) -> NodeId {
        let next = self.nodes.sequence([separator, item]);
        if separator_first {
            return self.nodes.repeat(next, min, max);
        }
        if max == Some(0) {
            return self.nodes.sequence([]);
        }
        let more = self
            .nodes
            .repeat(next, min.saturating_sub(1), max.map(|max| max - 1));
        let some = self.nodes.sequence([item, more]);
        match min {
            0 => self.nodes.optional(some),
            _ => some,
        }
    }

    fn comma(&mut self) -> NodeId {
        let comma = self.nodes.literal(",");
        self.nodes.sequence([comma, self.space])
    }

    fn object(
        &mut self,
        keywords: &Keywords,
        at: &str,
        depth: usize,
    ) -> Result<NodeId, GrammarError> {
        let none = Map::new();
        let properties = match keywords.get("properties") {
            None => &none,
            Some(Value::Object(properties)) => properties,
            Some(_) => return Err(malformed(at, "`properties` is an object of schemas")),
        };
        let required = match keywords.get("required") {
            None => Vec::new(),
            Some(names) => list_at(names, at, "required")?
                .iter()
                .filter_map(|n| n.as_str())
                .collect(),
        };
        if properties.is_empty() && required.is_empty() {
            return match keywords.get("additionalProperties") {
                None | Some(Value::Bool(true)) => Ok(self.any_object),
                Some(Value::Bool(false)) => Ok(self.nodes.literal("{}")),
                Some(values) => {
                    let at = format!("{at}/additionalProperties");
                    let values = self.schema(values, &at, depth + 1)?;
                    Ok(self.map_of(values))
                }
            };
        }
        let mut members = Vec::new();
        for (name, schema) in properties {
            let value = self.schema(schema, &format!("{at}/properties/{name}"), depth + 1)?;
            members.push((self.member(name, value), required.contains(&name.as_str())));
        }
        // Those that are demanded and not described can be anything.
        for name in required.iter().filter(|n| !properties.contains_key(**n)) {
            members.push((self.member(name, self.any), true));
        }
        Ok(self.members(&members))
    }

    /// An object of any names with values of one kind.
    fn map_of(&mut self, values: NodeId) -> NodeId {
        let (open, close) = (self.nodes.literal("{"), self.nodes.literal("}"));
        let (colon, comma) = (self.colon(), self.comma());
        let member = self.nodes.sequence([self.string, colon, values]);
        let members = self.separated(member, comma, 1, None, false);
        let space = self.space;
        let filled = self.nodes.sequence([open, space, members, space, close]);
        let empty = self.nodes.literal("{}");
        self.nodes.choice([empty, filled])
    }

    fn colon(&mut self) -> NodeId {
        let (colon, space) = (self.nodes.literal(":"), self.nodes.literal(" "));
        let space = self.nodes.optional(space);
        self.nodes.sequence([colon, space])
    }

    /// `"name": value`
    fn member(&mut self, name: &str, value: NodeId) -> NodeId {
        let name = self.nodes.literal(&json!(name).to_string());
        let colon = self.colon();
        self.nodes.sequence([name, colon, value])
    }

    /// The members in their order; those that are not required may be missing.
    fn members(&mut self, members: &[(NodeId, bool)]) -> NodeId {
        let comma = self.comma();
        // What can follow if no member was written yet, and if one was.
        let mut at_first = self.nodes.sequence([]);
        let mut later = at_first;
        for (member, required) in members.iter().rev() {
            let first = self.nodes.sequence([*member, later]);
            let next = self.nodes.sequence([comma, *member, later]);
            match required {
                true => (at_first, later) = (first, next),
                false => {
                    at_first = self.nodes.choice([first, at_first]);
                    later = self.nodes.choice([next, later]);
                }
            }
        }
        let (open, close) = (self.nodes.literal("{"), self.nodes.literal("}"));
        let space = self.space;
        let filled = self.nodes.sequence([open, space, at_first, space, close]);
        match members.iter().any(|(_, required)| *required) {
            true => filled,
            false => {
                let empty = self.nodes.literal("{}");
                self.nodes.choice([empty, filled])
            }
        }
    }
}

/// Space between parts: none, one, or a new line with an indentation.
fn space(nodes: &mut Nodes) -> NodeId {
    let one = nodes.literal(" ");
    let line = nodes.literal("\n");
    let indentation = nodes.repeat(one, 0, Some(32));
    let line = nodes.sequence([line, indentation]);
    let some = nodes.choice([one, line]);
    nodes.optional(some)
}

/// The type of values that keywords speak of, if none is named.
fn guess(keywords: &Keywords) -> Option<&'static str> {
    let has = |words: &[&str]| words.iter().any(|word| keywords.contains_key(*word));
    if has(&["properties", "required", "additionalProperties"]) {
        Some("object")
    } else if has(&["items", "prefixItems", "minItems", "maxItems"]) {
        Some("array")
    } else if has(&["minLength", "maxLength"]) {
        Some("string")
    } else if has(&numbers::BOUNDS) {
        Some("number")
    } else {
        None
    }
}

fn refuse_unsupported(keywords: &Keywords, at: &str) -> Result<(), GrammarError> {
    let is_neutral =
        |value: &Value| matches!(value, Value::Null | Value::Bool(false)) || value == 0;
    let mut found = UNSUPPORTED.iter().filter(|word| {
        let value = keywords.get(**word);
        value.is_some_and(|value| **word == "not" || !is_neutral(value))
    });
    match found.next() {
        None => Ok(()),
        Some(keyword) => Err(GrammarError::Unsupported {
            at: at.to_owned(),
            keyword: (*keyword).to_owned(),
        }),
    }
}

fn without(keywords: &Keywords, word: &str) -> Keywords {
    let mut rest = keywords.clone();
    rest.shift_remove(word);
    rest
}

fn list_at<'v>(value: &'v Value, at: &str, word: &str) -> Result<&'v [Value], GrammarError> {
    value
        .as_array()
        .map(Vec::as_slice)
        .ok_or_else(|| malformed(at, &format!("`{word}` is a list")))
}

pub(super) fn malformed(at: &str, reason: &str) -> GrammarError {
    GrammarError::Malformed {
        at: at.to_owned(),
        reason: reason.to_owned(),
    }
}

/// Two keywords that bound a number of things.
pub(super) fn bounds(
    keywords: &Keywords,
    at: &str,
    min: &str,
    max: &str,
) -> Result<(u32, Option<u32>), GrammarError> {
    let number = |word: &str| match keywords.get(word) {
        None | Some(Value::Null) => Ok(None),
        Some(value) => match value.as_u64() {
            Some(n) => Ok(Some(n)),
            None => Err(malformed(at, &format!("`{word}` is a whole number from 0"))),
        },
    };
    let (least, most) = (number(min)?.unwrap_or(0), number(max)?);
    if least > MAX_MINIMUM {
        return Err(GrammarError::TooLarge {
            reason: format!("{at}: `{min}` is {least}; {MAX_MINIMUM} at most is supported"),
        });
    }
    if most.is_some_and(|most| most < least) {
        return Err(malformed(at, &format!("`{max}` is less than `{min}`")));
    }
    // A bound that no answer reaches is none.
    let most = most.and_then(|most| u32::try_from(most).ok());
    Ok((least as u32, most))
}
