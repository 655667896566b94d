//! Strings.

use serde_json::Value;

use super::super::nodes::{NodeId, Nodes};
use super::{Compiler, GrammarError, Keywords, bounds};

/// One character of a JSON string: UTF-8 but quotes, backslashes and control characters; or an escape
/// sequence, surrogates left out.
fn character(nodes: &mut Nodes) -> NodeId {
    let plain = nodes.class(&[(0x20, 0x21), (0x23, 0x5b), (0x5d, 0x7e)]);
    let follow = nodes.class(&[(0x80, 0xbf)]);
    let mut choices = vec![plain];
    // Unicode standard, table 3-7: well-formed UTF-8.
    let mut sequence = |nodes: &mut Nodes, first: (u8, u8), second: (u8, u8), more: usize| {
        let mut parts = vec![nodes.class(&[first]), nodes.class(&[second])];
        parts.extend(std::iter::repeat_n(follow, more));
        choices.push(nodes.sequence(parts));
    };
    sequence(nodes, (0xc2, 0xdf), (0x80, 0xbf), 0);
    sequence(nodes, (0xe0, 0xe0), (0xa0, 0xbf), 1);
    sequence(nodes, (0xe1, 0xec), (0x80, 0xbf), 1);
    sequence(nodes, (0xed, 0xed), (0x80, 0x9f), 1);
    sequence(nodes, (0xee, 0xef), (0x80, 0xbf), 1);
    sequence(nodes, (0xf0, 0xf0), (0x90, 0xbf), 2);
    sequence(nodes, (0xf1, 0xf3), (0x80, 0xbf), 2);
    sequence(nodes, (0xf4, 0xf4), (0x80, 0x8f), 2);
    let backslash = nodes.literal("\\");
    let letters = b"\"\\/bfnrt".map(|b| (b, b));
    let letter = nodes.class(&letters);
    choices.push(nodes.sequence([backslash, letter]));
    let unicode = nodes.literal("\\u");
    let hex = nodes.class(&[(b'0', b'9'), (b'a', b'f'), (b'A', b'F')]);
    let not_d = nodes.class(&[
        (b'0', b'9'),
        (b'a', b'c'),
        (b'A', b'C'),
        (b'e', b'f'),
        (b'E', b'F'),
    ]);
    choices.push(nodes.sequence([unicode, not_d, hex, hex, hex]));
    let d = nodes.class(&[(b'd', b'd'), (b'D', b'D')]);
    let low = nodes.class(&[(b'0', b'7')]);
    choices.push(nodes.sequence([unicode, d, low, hex, hex]));
    nodes.choice(choices)
}

/// Any string.
pub(super) fn any(nodes: &mut Nodes) -> NodeId {
    of_length(nodes, 0, None)
}

fn of_length(nodes: &mut Nodes, min: u32, max: Option<u32>) -> NodeId {
    let character = character(nodes);
    let content = nodes.repeat(character, min, max);
    let quote = nodes.literal("\"");
    nodes.sequence([quote, content, quote])
}

impl Compiler<'_> {
    pub(super) fn string_of(
        &mut self,
        keywords: &Keywords,
        at: &str,
    ) -> Result<NodeId, GrammarError> {
        let (min, max) = bounds(keywords, at, "minLength", "maxLength")?;
        let pattern = match keywords.get("format").and_then(Value::as_str) {
            Some("date") => Some("dddd-MM-DD"),
            Some("time") => Some("TTZ"),
            Some("date-time") => Some("dddd-MM-DDtTTZ"),
            Some("uuid") => Some("xxxxxxxx-xxxx-xxxx-xxxx-xxxxxxxxxxxx"),
            // By the standard, a format says nothing of a value unless both sides agree on it.
            _ => None,
        };
        match pattern {
            Some(pattern) => Ok(self.shape(pattern)),
            None if min == 0 && max.is_none() => Ok(self.string),
            None => Ok(of_length(&mut self.nodes, min, max)),
        }
    }

    /// A string of a fixed shape: `d` is a digit, `x` one of base 16, `MM` a month, `DD` a day, `t` is T,
    /// `TT` a time of day, `Z` an offset; all else is itself.
    fn shape(&mut self, pattern: &str) -> NodeId {
        let nodes = &mut self.nodes;
        let digit = nodes.class(&[(b'0', b'9')]);
        let hex = nodes.class(&[(b'0', b'9'), (b'a', b'f'), (b'A', b'F')]);
        let two = |nodes: &mut Nodes, pairs: &[(&str, (u8, u8))]| {
            let choices: Vec<NodeId> = pairs
                .iter()
                .map(|(first, second)| {
                    let parts = [nodes.literal(first), nodes.class(&[*second])];
                    nodes.sequence(parts)
                })
                .collect();
            nodes.choice(choices)
        };
        let (nine, three) = ((b'0', b'9'), (b'0', b'3'));
        let month = two(nodes, &[("0", (b'1', b'9')), ("1", (b'0', b'2'))]);
        let days = [
            ("0", (b'1', b'9')),
            ("1", nine),
            ("2", nine),
            ("3", (b'0', b'1')),
        ];
        let day = two(nodes, &days);
        let hour = two(nodes, &[("0", nine), ("1", nine), ("2", three)]);
        let tens = ["0", "1", "2", "3", "4", "5"].map(|ten| (ten, nine));
        let minute = two(nodes, &tens);
        let (colon, point) = (nodes.literal(":"), nodes.literal("."));
        let fraction = nodes.repeat(digit, 1, Some(9));
        let fraction = nodes.sequence([point, fraction]);
        let fraction = nodes.optional(fraction);
        let sign = nodes.class(&[(b'+', b'+'), (b'-', b'-')]);
        let (zulu, offset) = (
            nodes.literal("Z"),
            nodes.sequence([sign, hour, colon, minute]),
        );
        let offset = nodes.choice([zulu, offset]);
        let quote = nodes.literal("\"");
        let mut parts = vec![quote];
        let mut rest = pattern;
        while let Some(c) = rest.chars().next() {
            let mut length = 1;
            match c {
                'd' => parts.push(digit),
                'x' => parts.push(hex),
                't' => parts.push(nodes.literal("T")),
                'Z' => parts.push(offset),
                'M' | 'D' | 'T' => {
                    length = 2;
                    match c {
                        'M' => parts.push(month),
                        'D' => parts.push(day),
                        _ => parts.extend([hour, colon, minute, colon, minute, fraction]),
                    }
                }
                _ => parts.push(nodes.literal(&rest[..1])),
            }
            rest = &rest[length..];
        }
        parts.push(quote);
        nodes.sequence(parts)
    }
}
