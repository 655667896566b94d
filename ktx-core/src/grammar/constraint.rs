//! A grammar against a vocabulary.

use std::collections::HashMap;
use std::sync::Arc;

use super::Grammar;
use super::machine::{Machine, StateId};
use crate::engine::{Engine, Inner};
use crate::sampling::TokenSet;
use crate::serving::TokenConstraint;
use crate::tokenizer::TokenId;

/// Sets of allowed tokens that are kept; then all are forgotten.
const MAX_SETS: usize = 256;

/// Holds one answer to a grammar.
pub struct GrammarConstraint {
    engine: Arc<Inner>,
    machine: Machine,
    state: StateId,
    /// The allowed tokens behind a state.
    sets: HashMap<StateId, Arc<TokenSet>>,
    /// Until this text was generated, everything is allowed.
    after: Option<&'static str>,
    /// The last bytes before the grammar begins.
    tail: Vec<u8>,
}

impl GrammarConstraint {
    /// At the beginning of an answer.
    pub fn new(engine: &Engine, grammar: Grammar) -> Self {
        let mut machine = Machine::new(grammar);
        Self {
            state: machine.start(),
            machine,
            engine: engine.inner(),
            sets: HashMap::new(),
            after: None,
            tail: Vec::new(),
        }
    }

    /// Begins behind this text; until then all tokens are allowed.
    pub fn after(mut self, text: &'static str) -> Self {
        self.after = Some(text);
        self
    }

    fn read(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.state = self.machine.step(self.state, *byte);
        }
        if let Some(state) = self.machine.forget(self.state) {
            self.state = state;
            self.sets.clear();
        }
    }

    /// Waits for the text behind which the grammar begins.
    fn wait(&mut self, marker: &str, bytes: &[u8]) {
        self.tail.extend_from_slice(bytes);
        let marker = marker.as_bytes();
        let found = self.tail.windows(marker.len()).position(|w| w == marker);
        if let Some(at) = found {
            self.after = None;
            let rest = self.tail.split_off(at + marker.len());
            self.tail.clear();
            self.read(rest.trim_ascii_start());
            return;
        }
        let keep = self.tail.len().min(marker.len());
        self.tail.drain(..self.tail.len() - keep);
    }

    fn allowed(&mut self) -> Arc<TokenSet> {
        if let Some(known) = self.sets.get(&self.state) {
            return Arc::clone(known);
        }
        let tokenizer = &self.engine.tokenizer;
        let mut set = TokenSet::new(tokenizer.vocab_size());
        let machine = &mut self.machine;
        self.engine.trie().walk(
            self.state,
            |state, byte| {
                let next = machine.step(state, byte);
                (!machine.is_dead(next)).then_some(next)
            },
            |token| set.insert(token),
        );
        if machine.is_end(self.state) {
            tokenizer.end_of_generation().for_each(|t| set.insert(t));
        }
        if self.sets.len() >= MAX_SETS {
            self.sets.clear();
        }
        let set = Arc::new(set);
        self.sets.insert(self.state, Arc::clone(&set));
        set
    }
}

impl TokenConstraint for GrammarConstraint {
    fn allow(&mut self, allowed: &mut TokenSet) {
        if self.after.is_some() {
            let tokens = 0..self.engine.tokenizer.vocab_size() as u32;
            tokens.for_each(|id| allowed.insert(TokenId(id)));
        } else if !self.machine.is_complete(self.state) {
            allowed.clone_from(&self.allowed());
        }
    }

    fn accept(&mut self, token: TokenId) {
        let engine = Arc::clone(&self.engine);
        let bytes = engine.tokenizer.token_bytes(token);
        match self.after {
            Some(marker) => self.wait(marker, bytes),
            None if engine.tokenizer.is_end_of_generation(token) => {}
            None => self.read(bytes),
        }
    }
}
