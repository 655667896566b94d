//! Numbers.

use serde_json::Value;

use super::super::nodes::{NodeId, Nodes};
use super::{Compiler, GrammarError, Keywords, malformed};

/// Keywords that bound a number.
pub(super) const BOUNDS: [&str; 4] = ["minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"];
/// Digits of an integer at most, so that none is endless.
const MAX_DIGITS: usize = 18;
/// Digits behind the point at most.
const MAX_FRACTION: u32 = 16;

fn digit(nodes: &mut Nodes, from: u8, to: u8) -> NodeId {
    nodes.class(&[(b'0' + from, b'0' + to)])
}

/// Integers from 0, without needless zeros.
fn natural(nodes: &mut Nodes) -> NodeId {
    let (zero, first, any) = (nodes.literal("0"), digit(nodes, 1, 9), digit(nodes, 0, 9));
    let more = nodes.repeat(any, 0, Some(MAX_DIGITS as u32 - 1));
    let positive = nodes.sequence([first, more]);
    nodes.choice([zero, positive])
}

/// Any integer.
pub(super) fn any_integer(nodes: &mut Nodes) -> NodeId {
    let (minus, natural) = (nodes.literal("-"), natural(nodes));
    let sign = nodes.optional(minus);
    nodes.sequence([sign, natural])
}

/// Any number.
pub(super) fn any(nodes: &mut Nodes) -> NodeId {
    let integer = any_integer(nodes);
    with_fraction(nodes, integer)
}

fn with_fraction(nodes: &mut Nodes, integer: NodeId) -> NodeId {
    let any = digit(nodes, 0, 9);
    let (point, digits) = (nodes.literal("."), nodes.repeat(any, 1, Some(MAX_FRACTION)));
    let fraction = nodes.sequence([point, digits]);
    let fraction = nodes.optional(fraction);
    let e = nodes.class(&[(b'e', b'e'), (b'E', b'E')]);
    let sign = nodes.class(&[(b'+', b'+'), (b'-', b'-')]);
    let (sign, digits) = (nodes.optional(sign), nodes.repeat(any, 1, Some(2)));
    let exponent = nodes.sequence([e, sign, digits]);
    let exponent = nodes.optional(exponent);
    nodes.sequence([integer, fraction, exponent])
}

impl Compiler<'_> {
    pub(super) fn number_of(
        &mut self,
        keywords: &Keywords,
        at: &str,
    ) -> Result<NodeId, GrammarError> {
        let mut set = BOUNDS.iter().filter(|word| keywords.contains_key(**word));
        match (set.next(), set.next()) {
            (None, _) => Ok(self.number),
            (Some(&"minimum"), None) if keywords["minimum"].as_f64() == Some(0.0) => {
                let integer = natural(&mut self.nodes);
                Ok(with_fraction(&mut self.nodes, integer))
            }
            (Some(keyword), _) => Err(GrammarError::Unsupported {
                at: at.to_owned(),
                keyword: format!("{keyword}, of numbers that are no integers,"),
            }),
        }
    }

    pub(super) fn integer_of(
        &mut self,
        keywords: &Keywords,
        at: &str,
    ) -> Result<NodeId, GrammarError> {
        if !BOUNDS.iter().any(|word| keywords.contains_key(*word)) {
            return Ok(self.integer);
        }
        let least = [("minimum", 0.0), ("exclusiveMinimum", 1.0)];
        let mut min = None;
        for (word, step) in least {
            if let Some(bound) = bound(keywords, at, word)? {
                let first = if step > 0.0 {
                    bound.floor() + step
                } else {
                    bound.ceil()
                };
                min = Some(min.map_or(first, |m: f64| m.max(first)));
            }
        }
        let most = [("maximum", 0.0), ("exclusiveMaximum", 1.0)];
        let mut max = None;
        for (word, step) in most {
            if let Some(bound) = bound(keywords, at, word)? {
                let last = if step > 0.0 {
                    bound.ceil() - step
                } else {
                    bound.floor()
                };
                max = Some(max.map_or(last, |m: f64| m.min(last)));
            }
        }
        Ok(self.integers(min.map(|m| m as i64), max.map(|m| m as i64)))
    }

    /// Integers of a range; none is no bound.
    fn integers(&mut self, min: Option<i64>, max: Option<i64>) -> NodeId {
        let mut choices = Vec::new();
        // The negative ones are mirrored: from -max to -min.
        if min.is_none_or(|min| min < 0) {
            let from = max.map_or(1, |max| (-max).max(1)) as u64;
            let to = min.map(|min| min.unsigned_abs());
            if to.is_none_or(|to| from <= to) {
                let (minus, naturals) = (self.nodes.literal("-"), self.naturals(from, to));
                choices.push(self.nodes.sequence([minus, naturals]));
            }
        }
        if max.is_none_or(|max| max >= 0) {
            let from = min.map_or(0, |min| min.max(0)) as u64;
            let to = max.map(|max| max as u64);
            if to.is_none_or(|to| from <= to) {
                choices.push(self.naturals(from, to));
            }
        }
        self.nodes.choice(choices)
    }

    /// Integers from 0 or more, by their number of digits.
    fn naturals(&mut self, from: u64, to: Option<u64>) -> NodeId {
        let mut choices = Vec::new();
        for digits in 1..=MAX_DIGITS as u32 {
            let least = if digits == 1 {
                0
            } else {
                10u64.pow(digits - 1)
            };
            let most = 10u64.pow(digits) - 1;
            let (first, last) = (from.max(least), to.unwrap_or(most).min(most));
            if first <= last {
                let (first, last) = (first.to_string(), last.to_string());
                choices.push(self.between(first.as_bytes(), last.as_bytes()));
            }
        }
        self.nodes.choice(choices)
    }

    /// Texts of digits of one length between two, both included.
    fn between(&mut self, from: &[u8], to: &[u8]) -> NodeId {
        let ([first, from_rest @ ..], [last, to_rest @ ..]) = (from, to) else {
            return self.nodes.sequence([]);
        };
        let (first, last) = (first - b'0', last - b'0');
        let least = vec![b'0'; from_rest.len()];
        let most = vec![b'9'; to_rest.len()];
        if from_rest == least && to_rest == most {
            let (digit, any) = (
                digit(&mut self.nodes, first, last),
                digit(&mut self.nodes, 0, 9),
            );
            let count = from_rest.len() as u32;
            let rest = self.nodes.repeat(any, count, Some(count));
            return self.nodes.sequence([digit, rest]);
        }
        let mut choices = Vec::new();
        let mut add = |compiler: &mut Self, digits: (u8, u8), rest: NodeId| {
            let digit = digit(&mut compiler.nodes, digits.0, digits.1);
            choices.push(compiler.nodes.sequence([digit, rest]));
        };
        if first == last {
            let rest = self.between(from_rest, to_rest);
            add(self, (first, first), rest);
        } else {
            let rest = self.between(from_rest, &most);
            add(self, (first, first), rest);
            if first + 1 < last {
                let rest = self.between(&least, &most);
                add(self, (first + 1, last - 1), rest);
            }
            let rest = self.between(&least, to_rest);
            add(self, (last, last), rest);
        }
        self.nodes.choice(choices)
    }
}

/// The value of a bound that an integer can be compared with.
fn bound(keywords: &Keywords, at: &str, word: &str) -> Result<Option<f64>, GrammarError> {
    const LARGEST: f64 = 1e15;
    match keywords.get(word) {
        None | Some(Value::Null) => Ok(None),
        Some(value) => match value.as_f64() {
            Some(bound) if bound.abs() <= LARGEST => Ok(Some(bound)),
            // What no answer reaches bounds nothing.
            Some(bound) if (bound > 0.0) == word.to_lowercase().contains("max") => Ok(None),
            _ => Err(malformed(
                at,
                &format!("`{word}` is no number, or too large"),
            )),
        },
    }
}
