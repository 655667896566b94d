//! The automaton that reads bytes, made deterministic as it runs.
//!
//! What is left to be read is a stack of parts of the grammar. Stacks are kept once, in an arena: equal
//! stacks have equal numbers. A state is a set of stacks whose tops take a byte, and maybe the empty
//! one. States and their transitions are kept as well.

use std::collections::{BTreeSet, HashMap};

use super::Grammar;
use super::nodes::{Node, NodeId};

/// Parts within each other: deeper ones are refused.
const MAX_DEPTH: u32 = 512;
/// States that are kept; then all are forgotten but the current one.
const MAX_STATES: usize = 4_000;
/// States that one walk through a vocabulary may make; behind that, nothing is allowed.
const MOST_STATES: usize = 20_000;
/// Stacks of one state; a grammar that needs more is refused there.
const MAX_STACKS: usize = 512;

/// Number of a stack; the empty one is 0.
type StackId = u32;
const EMPTY: StackId = 0;

/// Number of a state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct StateId(u32);

const UNKNOWN: u32 = u32::MAX;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Frame {
    node: NodeId,
    /// Bytes of a literal, parts of a sequence, or repetitions that are done.
    done: u32,
    below: StackId,
}

struct Stack {
    frame: Frame,
    depth: u32,
}

struct State {
    stacks: Box<[StackId]>,
    next: Box<[u32; 256]>,
}

/// Reads bytes.
pub(super) struct Machine {
    grammar: Grammar,
    /// Without the empty one: number `n` is at `n - 1`.
    stacks: Vec<Stack>,
    stack_ids: HashMap<Frame, StackId>,
    states: Vec<State>,
    state_ids: HashMap<Box<[StackId]>, StateId>,
}

impl Machine {
    pub(super) fn new(grammar: Grammar) -> Self {
        Self {
            grammar,
            stacks: Vec::new(),
            stack_ids: HashMap::new(),
            states: Vec::new(),
            state_ids: HashMap::new(),
        }
    }

    /// Before the first byte.
    pub(super) fn start(&mut self) -> StateId {
        let root = self.grammar.root;
        let mut found = BTreeSet::new();
        if let Some(stack) = self.push(root, 0, EMPTY) {
            self.settle([stack], &mut found);
        }
        self.state(found)
    }

    /// After one more byte.
    pub(super) fn step(&mut self, state: StateId, byte: u8) -> StateId {
        let known = self.states[state.0 as usize].next[usize::from(byte)];
        if known != UNKNOWN {
            return StateId(known);
        }
        let mut moved = Vec::new();
        for stack in self.states[state.0 as usize].stacks.clone() {
            moved.extend(self.take(stack, byte));
        }
        let mut found = BTreeSet::new();
        self.settle(moved, &mut found);
        let next = self.state(found);
        self.states[state.0 as usize].next[usize::from(byte)] = next.0;
        next
    }

    /// Whether the text can end here.
    pub(super) fn is_end(&self, state: StateId) -> bool {
        self.states[state.0 as usize].stacks.first() == Some(&EMPTY)
    }

    /// Whether nothing can come any more, not even the end.
    pub(super) fn is_dead(&self, state: StateId) -> bool {
        self.states[state.0 as usize].stacks.is_empty()
    }

    /// Whether nothing but the end can come.
    pub(super) fn is_complete(&self, state: StateId) -> bool {
        *self.states[state.0 as usize].stacks == [EMPTY]
    }

    /// Forgets states if they are many. Gives the number that `state` has then, if that changed.
    pub(super) fn forget(&mut self, state: StateId) -> Option<StateId> {
        if self.states.len() < MAX_STATES {
            return None;
        }
        let stacks = self.states[state.0 as usize].stacks.clone();
        self.states.clear();
        self.state_ids.clear();
        Some(self.state(stacks.iter().copied().collect()))
    }

    fn state(&mut self, stacks: BTreeSet<StackId>) -> StateId {
        let fits = stacks.len() <= MAX_STACKS && self.states.len() < MOST_STATES;
        let stacks: Box<[StackId]> = match fits {
            true => stacks.into_iter().collect(),
            false => Box::default(),
        };
        if let Some(known) = self.state_ids.get(&stacks) {
            return *known;
        }
        let id = StateId(self.states.len() as u32);
        self.states.push(State {
            stacks: stacks.clone(),
            next: Box::new([UNKNOWN; 256]),
        });
        self.state_ids.insert(stacks, id);
        id
    }

    fn push(&mut self, node: NodeId, done: u32, below: StackId) -> Option<StackId> {
        let frame = Frame { node, done, below };
        if let Some(known) = self.stack_ids.get(&frame) {
            return Some(*known);
        }
        let depth = 1 + self.get(below).map_or(0, |stack| stack.depth);
        if depth > MAX_DEPTH {
            return None;
        }
        self.stacks.push(Stack { frame, depth });
        let id = self.stacks.len() as StackId;
        self.stack_ids.insert(frame, id);
        Some(id)
    }

    fn get(&self, stack: StackId) -> Option<&Stack> {
        self.stacks.get((stack as usize).checked_sub(1)?)
    }

    /// A stack whose top takes bytes, after one of them.
    fn take(&mut self, stack: StackId, byte: u8) -> Option<StackId> {
        let Frame { node, done, below } = self.get(stack)?.frame;
        match self.grammar.nodes.get(node) {
            Node::Class(bytes) => bytes.contains(byte).then_some(below),
            Node::Literal(text) => {
                let fits = text.get(done as usize) == Some(&byte);
                let is_last = done as usize + 1 == text.len();
                match (fits, is_last) {
                    (false, _) => None,
                    (true, true) => Some(below),
                    (true, false) => self.push(node, done + 1, below),
                }
            }
            _ => None,
        }
    }

    /// Opens the tops of stacks until they take bytes.
    fn settle(&mut self, stacks: impl IntoIterator<Item = StackId>, found: &mut BTreeSet<StackId>) {
        let mut pending: Vec<StackId> = stacks.into_iter().collect();
        let mut seen: BTreeSet<StackId> = pending.iter().copied().collect();
        while let Some(stack) = pending.pop() {
            let mut opened = Vec::new();
            if self.open(stack, &mut opened) {
                found.insert(stack);
            }
            pending.extend(opened.into_iter().filter(|stack| seen.insert(*stack)));
            if seen.len() > 64 * MAX_STACKS {
                return found.clear();
            }
        }
    }

    /// Says whether the top takes bytes, or there is none; otherwise gives what it stands for.
    fn open(&mut self, stack: StackId, opened: &mut Vec<StackId>) -> bool {
        let Some(frame) = self.get(stack).map(|stack| stack.frame) else {
            return true;
        };
        let Frame { node, done, below } = frame;
        let nodes = std::sync::Arc::clone(&self.grammar.nodes);
        match nodes.get(node) {
            Node::Class(_) => return true,
            Node::Literal(text) if text.is_empty() => opened.push(below),
            Node::Literal(_) => return true,
            Node::Choice(choices) => {
                let choices = choices.iter().filter_map(|c| self.push(*c, 0, below));
                opened.extend(choices);
            }
            Node::Sequence(parts) => match parts.get(done as usize) {
                None => opened.push(below),
                Some(part) => {
                    // Behind the last part nothing of the sequence is left: lists do not pile up.
                    let rest = match done as usize + 1 == parts.len() {
                        true => Some(below),
                        false => self.push(node, done + 1, below),
                    };
                    opened.extend(rest.and_then(|rest| self.push(*part, 0, rest)));
                }
            },
            Node::Repeat {
                node: part,
                min,
                max,
            } => {
                if done >= *min {
                    opened.push(below);
                }
                if max.is_none_or(|max| done < max) {
                    // Without an upper bound, repetitions beyond the lower one are all alike.
                    let next = match max {
                        Some(_) => done + 1,
                        None => (done + 1).min(*min),
                    };
                    let rest = self.push(node, next, below);
                    opened.extend(rest.and_then(|rest| self.push(*part, 0, rest)));
                }
            }
        }
        false
    }
}

impl std::fmt::Debug for Machine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Machine")
            .field("states", &self.states.len())
            .finish_non_exhaustive()
    }
}
