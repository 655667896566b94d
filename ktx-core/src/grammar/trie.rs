//! A vocabulary as a tree of bytes, so that what begins alike is read once.

use crate::tokenizer::{TokenId, Tokenizer};

/// The tokens of a vocabulary that are text, in the order of their bytes.
///
/// It is written in the order in which it is walked: a node, then all that is below it. So a subtree is
/// skipped by one jump.
#[derive(Debug)]
pub(crate) struct TokenTrie {
    nodes: Vec<TrieNode>,
    tokens: Vec<TokenId>,
}

#[derive(Debug, Clone, Copy)]
struct TrieNode {
    byte: u8,
    depth: u16,
    /// The node behind all that are below this one.
    end: u32,
    /// Its tokens are `tokens[first_token..]` of the tree, up to the next node's.
    first_token: u32,
}

impl TokenTrie {
    /// Of a tokenizer's vocabulary, without special tokens.
    pub(crate) fn new(tokenizer: &Tokenizer) -> Self {
        let mut all: Vec<(&[u8], TokenId)> = (0..tokenizer.vocab_size() as u32)
            .map(TokenId)
            .filter(|id| !tokenizer.is_special(*id) && !tokenizer.is_end_of_generation(*id))
            .map(|id| (tokenizer.token_bytes(id), id))
            .filter(|(bytes, _)| !bytes.is_empty() && bytes.len() < usize::from(u16::MAX))
            .collect();
        all.sort_unstable();
        let mut trie = Self {
            nodes: Vec::new(),
            tokens: Vec::new(),
        };
        let mut path: Vec<usize> = Vec::new();
        let mut before: &[u8] = &[];
        for (bytes, id) in all {
            let same = before.iter().zip(bytes).take_while(|(a, b)| a == b).count();
            trie.close(&mut path, same);
            for (depth, byte) in bytes.iter().enumerate().skip(same) {
                path.push(trie.nodes.len());
                trie.nodes.push(TrieNode {
                    byte: *byte,
                    depth: depth as u16,
                    end: 0,
                    first_token: trie.tokens.len() as u32,
                });
            }
            trie.tokens.push(id);
            before = bytes;
        }
        trie.close(&mut path, 0);
        trie
    }

    fn close(&mut self, path: &mut Vec<usize>, depth: usize) {
        let end = self.nodes.len() as u32;
        for node in path.drain(depth..) {
            self.nodes[node].end = end;
        }
    }

    /// Walks the tree: `step` takes the state before a byte and gives the one behind it, or none if the byte
    /// cannot come; `found` gets the tokens whose bytes all could.
    pub(super) fn walk<S: Copy>(
        &self,
        start: S,
        mut step: impl FnMut(S, u8) -> Option<S>,
        mut found: impl FnMut(TokenId),
    ) {
        let mut states = vec![start];
        let mut at = 0;
        while let Some(node) = self.nodes.get(at) {
            states.truncate(usize::from(node.depth) + 1);
            let state = states[usize::from(node.depth)];
            match step(state, node.byte) {
                None => at = node.end as usize,
                Some(next) => {
                    states.push(next);
                    let last = self
                        .nodes
                        .get(at + 1)
                        .map_or(self.tokens.len(), |n| n.first_token as usize);
                    self.tokens[node.first_token as usize..last]
                        .iter()
                        .for_each(|token| found(*token));
                    at += 1;
                }
            }
        }
    }
}
