//! Merging neighbours by priority: the loop that byte-level BPE and SentencePiece BPE have in common.
//!
//! Symbols form a linked list; a heap holds the merges that are possible, best first, left before right. A merge
//! adds at most two candidates, so n symbols cost O(n log n) whatever the text is.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

const NONE: usize = usize::MAX;

struct Node<S> {
    symbol: S,
    previous: usize,
    next: usize,
    merged_away: bool,
}

#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Candidate<P, S> {
    priority: P,
    left: usize,
    pair: (S, S),
    merged: S,
}

/// Buffers of the merge loop, kept from word to word.
pub(super) struct Merger<S, P> {
    nodes: Vec<Node<S>>,
    queue: BinaryHeap<Reverse<Candidate<P, S>>>,
}

impl<S: Copy + Ord, P: Ord> Merger<S, P> {
    pub(super) fn new() -> Self {
        Self {
            nodes: Vec::new(),
            queue: BinaryHeap::new(),
        }
    }

    /// Merges `symbols` until no pair can be merged, and returns what is left, in order.
    ///
    /// `merge` gives a pair's priority (the smallest goes first) and what it becomes, or `None`.
    pub(super) fn run(
        &mut self,
        symbols: impl Iterator<Item = S>,
        merge: impl Fn(S, S) -> Option<(P, S)>,
    ) -> impl Iterator<Item = S> + '_ {
        self.link(symbols);
        for left in 1..self.nodes.len() {
            self.consider(left - 1, &merge);
        }
        while let Some(Reverse(candidate)) = self.queue.pop() {
            if let Some(right) = self.right_of_current(&candidate) {
                self.join(candidate.left, right, candidate.merged);
                let previous = self.nodes[candidate.left].previous;
                if previous != NONE {
                    self.consider(previous, &merge);
                }
                self.consider(candidate.left, &merge);
            }
        }
        self.nodes
            .iter()
            .filter(|node| !node.merged_away)
            .map(|node| node.symbol)
    }

    fn link(&mut self, symbols: impl Iterator<Item = S>) {
        self.queue.clear();
        self.nodes.clear();
        self.nodes
            .extend(symbols.enumerate().map(|(index, symbol)| Node {
                symbol,
                previous: index.wrapping_sub(1),
                next: index + 1,
                merged_away: false,
            }));
        if let Some(last) = self.nodes.last_mut() {
            last.next = NONE;
        }
    }

    /// Queues the merge of a node with its right neighbour, if there is one.
    fn consider(&mut self, left: usize, merge: &impl Fn(S, S) -> Option<(P, S)>) {
        let Some(right) = self.nodes.get(self.nodes[left].next) else {
            return;
        };
        let pair = (self.nodes[left].symbol, right.symbol);
        if let Some((priority, merged)) = merge(pair.0, pair.1) {
            self.queue.push(Reverse(Candidate {
                priority,
                left,
                pair,
                merged,
            }));
        }
    }

    /// The candidate's right node, unless one of its two symbols has been merged since it was queued.
    fn right_of_current(&self, candidate: &Candidate<P, S>) -> Option<usize> {
        let left = &self.nodes[candidate.left];
        let right = self.nodes.get(left.next)?;
        (!left.merged_away && (left.symbol, right.symbol) == candidate.pair).then_some(left.next)
    }

    fn join(&mut self, left: usize, right: usize, merged: S) {
        let next = self.nodes[right].next;
        self.nodes[right].merged_away = true;
        self.nodes[left].symbol = merged;
        self.nodes[left].next = next;
        if let Some(node) = self.nodes.get_mut(next) {
            node.previous = left;
        }
    }
}
