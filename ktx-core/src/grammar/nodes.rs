//! What a grammar is made of.

/// Number of a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct NodeId(pub(super) u32);

/// Some bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct ByteSet([u64; 4]);

impl ByteSet {
    /// The bytes of these ranges, ends included.
    pub(super) fn of(ranges: &[(u8, u8)]) -> Self {
        let mut words = [0u64; 4];
        for (first, last) in ranges {
            for byte in *first..=*last {
                words[usize::from(byte) / 64] |= 1 << (byte % 64);
            }
        }
        Self(words)
    }

    pub(super) fn contains(&self, byte: u8) -> bool {
        self.0[usize::from(byte) / 64] >> (byte % 64) & 1 == 1
    }
}

/// A part of a grammar.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Node {
    /// These bytes.
    Literal(Box<[u8]>),
    /// One of these bytes.
    Class(ByteSet),
    /// All of these, one after the other; none: nothing.
    Sequence(Box<[NodeId]>),
    /// One of these; none: it cannot be met.
    Choice(Box<[NodeId]>),
    /// This, from `min` to `max` times.
    Repeat {
        node: NodeId,
        min: u32,
        max: Option<u32>,
    },
}

/// The parts of a grammar.
#[derive(Debug, Default)]
pub(super) struct Nodes(Vec<Node>);

impl Nodes {
    pub(super) fn get(&self, id: NodeId) -> &Node {
        &self.0[id.0 as usize]
    }

    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    pub(super) fn add(&mut self, node: Node) -> NodeId {
        self.0.push(node);
        NodeId(self.0.len() as u32 - 1)
    }

    /// Sets what stood for a node that was not known yet.
    pub(super) fn set(&mut self, id: NodeId, node: Node) {
        self.0[id.0 as usize] = node;
    }

    pub(super) fn literal(&mut self, text: &str) -> NodeId {
        self.add(Node::Literal(text.as_bytes().into()))
    }

    pub(super) fn class(&mut self, ranges: &[(u8, u8)]) -> NodeId {
        self.add(Node::Class(ByteSet::of(ranges)))
    }

    pub(super) fn sequence(&mut self, nodes: impl Into<Vec<NodeId>>) -> NodeId {
        self.add(Node::Sequence(nodes.into().into()))
    }

    pub(super) fn choice(&mut self, nodes: impl Into<Vec<NodeId>>) -> NodeId {
        self.add(Node::Choice(nodes.into().into()))
    }

    pub(super) fn repeat(&mut self, node: NodeId, min: u32, max: Option<u32>) -> NodeId {
        self.add(Node::Repeat { node, min, max })
    }

    pub(super) fn optional(&mut self, node: NodeId) -> NodeId {
        self.repeat(node, 0, Some(1))
    }

    /// Which nodes some text meets.
    pub(super) fn possible(&self) -> Vec<bool> {
        let mut possible = vec![false; self.0.len()];
        let mut changed = true;
        while changed {
            changed = false;
            for (i, node) in self.0.iter().enumerate() {
                let is = |id: &NodeId| possible[id.0 as usize];
                let now = match node {
                    Node::Literal(_) | Node::Class(_) => true,
                    Node::Sequence(parts) => parts.iter().all(is),
                    Node::Choice(parts) => parts.iter().any(is),
                    Node::Repeat { node, min, .. } => *min == 0 || is(node),
                };
                changed |= now && !possible[i];
                possible[i] |= now;
            }
        }
        possible
    }
}
