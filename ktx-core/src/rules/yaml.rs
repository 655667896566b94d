//! YAML text to a tree of nodes that know where they were written.
//!
//! Reads what PyYAML's `FullLoader` reads: YAML 1.1 scalars, anchors, merge keys, the last of two
//! equal keys. Aliases share their node, so a file that names one anchor a billion times costs
//! nothing until it is written out, and how large it would be then is known and limited.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use serde_json::{Map, Value};
use serde_yaml::granit_parser::{Event, Parser, ScalarStyle, Span, Tag, options};

use super::yaml_scalar::Scalar;

/// Collections may not nest deeper, aliases followed.
const MAX_DEPTH: usize = 64;
/// A node may not stand for more nodes than this, aliases followed.
const MAX_NODES: usize = 200_000;

/// A node.
#[derive(Debug)]
pub(crate) struct Node {
    pub kind: Kind,
    pub place: Place,
    depth: usize,
    size: usize,
}

/// What a node is.
#[derive(Debug)]
pub(crate) enum Kind {
    Scalar(Scalar),
    Sequence(Vec<Arc<Node>>),
    Mapping(Vec<Pair>),
}

/// A key and its value.
pub(crate) type Pair = (Arc<Node>, Arc<Node>);

/// Where a node stands.
#[derive(Debug, Clone, Default)]
pub(crate) struct Place {
    /// From 1.
    pub line: usize,
    /// In characters, from 1.
    pub column: usize,
    /// Bytes of the text; quotes included.
    pub bytes: Range<usize>,
    pub quotes: Quotes,
}

/// How a scalar is written.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) enum Quotes {
    #[default]
    None,
    Single,
    Double,
    /// A block scalar, or no scalar.
    Other,
}

/// Why a text is no YAML, and where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct YamlError {
    pub line: usize,
    pub column: usize,
    pub reason: String,
}

impl YamlError {
    fn new(place: &Place, reason: impl Into<String>) -> Self {
        Self {
            line: place.line,
            column: place.column,
            reason: reason.into(),
        }
    }
}

impl Node {
    fn scalar(scalar: Scalar, place: Place) -> Self {
        Self {
            kind: Kind::Scalar(scalar),
            place,
            depth: 0,
            size: 1,
        }
    }

    fn collection(kind: Kind, place: Place) -> Result<Self, YamlError> {
        let (mut depth, mut size) = (0, 1usize);
        let mut count = |node: &Node| {
            depth = depth.max(node.depth);
            size = size.saturating_add(node.size);
        };
        match &kind {
            Kind::Scalar(_) => {}
            Kind::Sequence(items) => items.iter().for_each(|n| count(n)),
            Kind::Mapping(pairs) => pairs.iter().for_each(|(k, v)| {
                count(k);
                count(v);
            }),
        }
        if depth >= MAX_DEPTH {
            return Err(YamlError::new(
                &place,
                format!("values are nested deeper than {MAX_DEPTH}"),
            ));
        }
        if size > MAX_NODES {
            return Err(YamlError::new(
                &place,
                format!("with its aliases written out this has more than {MAX_NODES} values"),
            ));
        }
        Ok(Self {
            kind,
            place,
            depth: depth + 1,
            size,
        })
    }

    /// Python's `bool(value)`.
    pub(crate) fn is_truthy(&self) -> bool {
        match &self.kind {
            Kind::Scalar(scalar) => scalar.is_truthy(),
            Kind::Sequence(items) => !items.is_empty(),
            Kind::Mapping(pairs) => !pairs.is_empty(),
        }
    }

    /// The text of a scalar that is one.
    pub(crate) fn text(&self) -> Option<&str> {
        match &self.kind {
            Kind::Scalar(Scalar::Text(text)) => Some(text),
            _ => None,
        }
    }

    /// The value, for JSON. Keys become texts.
    pub(crate) fn to_json(&self) -> Value {
        match &self.kind {
            Kind::Scalar(scalar) => scalar.to_json(),
            Kind::Sequence(items) => items.iter().map(|n| n.to_json()).collect(),
            Kind::Mapping(pairs) => Value::Object(
                pairs
                    .iter()
                    .map(|(k, v)| (k.key(), v.to_json()))
                    .collect::<Map<_, _>>(),
            ),
        }
    }

    /// The text that stands for this node as a key.
    pub(crate) fn key(&self) -> String {
        match &self.kind {
            Kind::Scalar(scalar) => scalar.to_key(),
            _ => self.to_json().to_string(),
        }
    }

    /// What it is, for messages.
    pub(crate) fn describe(&self) -> &'static str {
        match &self.kind {
            Kind::Scalar(scalar) => scalar.kind(),
            Kind::Sequence(_) => "a list",
            Kind::Mapping(_) => "a mapping",
        }
    }
}

/// Reads the one document of a text; none if the text holds nothing.
pub(crate) fn read(text: &str) -> Result<Option<Arc<Node>>, YamlError> {
    let options = options! { emit_comments: false, block_scalar_eof_without_line_feed: true };
    let mut builder = Builder::default();
    for event in Parser::new_from_str_with_options(text, options) {
        let (event, span) = event.map_err(|e| YamlError {
            line: e.marker().line(),
            column: e.marker().col() + 1,
            reason: e.info().to_owned(),
        })?;
        builder.take(event, place(&span))?;
    }
    Ok(builder.document)
}

fn place(span: &Span) -> Place {
    Place {
        line: span.start.line(),
        column: span.start.col() + 1,
        bytes: span.byte_range().unwrap_or_default(),
        quotes: Quotes::Other,
    }
}

/// A collection whose end was not read yet.
struct Open {
    place: Place,
    anchor: usize,
    /// Items; of a mapping keys and values in turn.
    nodes: Vec<Arc<Node>>,
}

#[derive(Default)]
struct Builder {
    open: Vec<Open>,
    /// None while the anchored node is still being read.
    anchors: HashMap<usize, Option<Arc<Node>>>,
    documents: usize,
    document: Option<Arc<Node>>,
}

impl Builder {
    fn take(&mut self, event: Event<'_>, place: Place) -> Result<(), YamlError> {
        match event {
            Event::DocumentStart(..) => {
                self.documents += 1;
                self.anchors.clear();
                if self.documents > 1 {
                    return Err(YamlError::new(
                        &place,
                        "a second document starts here; a rule file is one list",
                    ));
                }
                Ok(())
            }
            Event::Scalar(text, style, anchor, tag) => {
                let quotes = match style {
                    ScalarStyle::Plain => Quotes::None,
                    ScalarStyle::SingleQuoted => Quotes::Single,
                    ScalarStyle::DoubleQuoted => Quotes::Double,
                    ScalarStyle::Literal | ScalarStyle::Folded => Quotes::Other,
                };
                let scalar = tagged(&text, style, tag.as_deref())
                    .map_err(|reason| YamlError::new(&place, reason))?;
                self.push(Node::scalar(scalar, Place { quotes, ..place }), anchor);
                Ok(())
            }
            Event::SequenceStart(_, anchor, tag) => {
                self.start(place, anchor, tag.as_deref(), "seq")
            }
            Event::MappingStart(_, anchor, tag) => self.start(place, anchor, tag.as_deref(), "map"),
            Event::SequenceEnd => self.end(|nodes, _| Ok(Kind::Sequence(nodes))),
            Event::MappingEnd => self.end(|nodes, place| mapping(nodes, place).map(Kind::Mapping)),
            Event::Alias(anchor) => match self.anchors.get(&anchor) {
                Some(Some(node)) => {
                    let node = Arc::clone(node);
                    self.push_shared(node);
                    Ok(())
                }
                _ => Err(YamlError::new(
                    &place,
                    "this alias stands inside of what it names",
                )),
            },
            _ => Ok(()),
        }
    }

    fn start(
        &mut self,
        place: Place,
        anchor: usize,
        tag: Option<&Tag>,
        kind: &str,
    ) -> Result<(), YamlError> {
        if let Some(tag) = tag.filter(|t| !t.is_yaml_core_schema_tag(kind)) {
            return Err(YamlError::new(
                &place,
                format!("the tag `{tag}` means nothing in a rule file"),
            ));
        }
        if self.open.len() >= MAX_DEPTH {
            return Err(YamlError::new(
                &place,
                format!("values are nested deeper than {MAX_DEPTH}"),
            ));
        }
        if anchor != 0 {
            self.anchors.insert(anchor, None);
        }
        self.open.push(Open {
            place,
            anchor,
            nodes: Vec::new(),
        });
        Ok(())
    }

    fn end(
        &mut self,
        make: impl FnOnce(Vec<Arc<Node>>, &Place) -> Result<Kind, YamlError>,
    ) -> Result<(), YamlError> {
        if let Some(open) = self.open.pop() {
            let kind = make(open.nodes, &open.place)?;
            self.push(Node::collection(kind, open.place)?, open.anchor);
        }
        Ok(())
    }

    fn push(&mut self, node: Node, anchor: usize) {
        let node = Arc::new(node);
        if anchor != 0 {
            self.anchors.insert(anchor, Some(Arc::clone(&node)));
        }
        self.push_shared(node);
    }

    fn push_shared(&mut self, node: Arc<Node>) {
        match self.open.last_mut() {
            Some(open) => open.nodes.push(node),
            None => self.document = Some(node),
        }
    }
}

/// A scalar's value, its tag obeyed.
fn tagged(text: &str, style: ScalarStyle, tag: Option<&Tag>) -> Result<Scalar, String> {
    let Some(tag) = tag else {
        return Ok(match style {
            ScalarStyle::Plain => Scalar::resolve(text),
            _ => Scalar::Text(text.to_owned()),
        });
    };
    let resolved = Scalar::resolve(text);
    match (tag.core_suffix(), resolved) {
        (Some("str"), _) => Ok(Scalar::Text(text.to_owned())),
        (Some("null"), _) => Ok(Scalar::Null),
        (Some("bool"), value @ Scalar::Bool(_))
        | (Some("int"), value @ Scalar::Int(_))
        | (Some("float"), value @ Scalar::Float(_)) => Ok(value),
        (Some("float"), Scalar::Int(n)) => Ok(Scalar::Float(n.as_f64().unwrap_or(f64::INFINITY))),
        (Some(_), _) => Err(format!("`{text}` is not what its tag `{tag}` says")),
        (None, value) if tag.to_string() == "!" => Ok(value),
        (None, _) => Err(format!("the tag `{tag}` means nothing in a rule file")),
    }
}

/// Pairs keys with values: merge keys written out, the last of two equal keys in the first one's place.
fn mapping(nodes: Vec<Arc<Node>>, place: &Place) -> Result<Vec<Pair>, YamlError> {
    let mut nodes = nodes.into_iter();
    let (mut merged, mut own) = (Vec::new(), Vec::new());
    while let (Some(key), Some(value)) = (nodes.next(), nodes.next()) {
        match &key.kind {
            Kind::Scalar(Scalar::Text(text))
                if text == "<<" && key.place.quotes == Quotes::None =>
            {
                merge(&value, &mut merged)?;
            }
            Kind::Scalar(_) => own.push((key, value)),
            _ => {
                return Err(YamlError::new(
                    &key.place,
                    format!("{} cannot be a key", key.describe()),
                ));
            }
        }
        if merged.len() > MAX_NODES {
            return Err(YamlError::new(
                place,
                format!("merge keys bring more than {MAX_NODES} keys"),
            ));
        }
    }
    if merged.is_empty() && own.len() < 2 {
        return Ok(own);
    }
    let mut index: HashMap<(u8, String), usize> = HashMap::new();
    let mut pairs: Vec<Pair> = Vec::with_capacity(merged.len() + own.len());
    for (key, value) in merged.into_iter().chain(own) {
        let identity = match &key.kind {
            Kind::Scalar(Scalar::Text(text)) => (0, text.clone()),
            _ => (1, key.key()),
        };
        match index.get(&identity) {
            Some(&at) => pairs[at] = (key, value),
            None => {
                index.insert(identity, pairs.len());
                pairs.push((key, value));
            }
        }
    }
    Ok(pairs)
}

/// The pairs that `<<: value` brings. Of several mappings the first has the last word.
fn merge(value: &Node, merged: &mut Vec<Pair>) -> Result<(), YamlError> {
    let wrong = |node: &Node| {
        YamlError::new(
            &node.place,
            format!(
                "`<<` takes a mapping or a list of them, not {}",
                node.describe()
            ),
        )
    };
    match &value.kind {
        Kind::Mapping(pairs) => merged.extend(pairs.iter().cloned()),
        Kind::Sequence(items) => {
            for item in items.iter().rev() {
                let Kind::Mapping(pairs) = &item.kind else {
                    return Err(wrong(item));
                };
                merged.extend(pairs.iter().cloned());
                if merged.len() > MAX_NODES {
                    return Err(YamlError::new(
                        &value.place,
                        format!("merge keys bring more than {MAX_NODES} keys"),
                    ));
                }
            }
        }
        Kind::Scalar(_) => return Err(wrong(value)),
    }
    Ok(())
}

/// Line and column of a character inside a scalar's value; the scalar's start where the value and
/// the text do not run side by side (several lines, block scalars).
pub(crate) fn position_in(text: &str, place: &Place, character: usize) -> (usize, usize) {
    let start = (place.line, place.column);
    let Some(source) = text.get(place.bytes.clone()).filter(|s| !s.contains('\n')) else {
        return start;
    };
    let mut chars = source.chars().peekable();
    let mut column = place.column;
    if matches!(place.quotes, Quotes::Single | Quotes::Double) {
        chars.next();
        column += 1;
    }
    for _ in 0..character {
        let width = match (place.quotes, chars.next()) {
            (Quotes::Other, _) | (_, None) => return start,
            (Quotes::Single, Some('\'')) => 2,
            (Quotes::Double, Some('\\')) => match chars.peek() {
                Some('x') => 4,
                Some('u') => 6,
                Some('U') => 10,
                _ => 2,
            },
            _ => 1,
        };
        for _ in 1..width {
            chars.next();
        }
        column += width;
    }
    (place.line, column)
}
