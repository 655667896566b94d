use super::{MoeError, Routing};
use crate::linear::{Activations, ProductOrder};

/// Working memory of [`super::forward`], for one call at a time.
#[derive(Debug, Default)]
pub struct MoeScratch {
    /// The tokens, quantised.
    pub(super) x: Activations,
    /// SiLU(gate) * up, quantised: a row per slot.
    pub(super) h: Activations,
    pub(super) plan: Plan,
}

impl MoeScratch {
    /// Memory for up to `max_tokens` tokens of `top_k` experts each; a larger call grows it.
    pub fn new(
        max_tokens: usize,
        hidden_size: usize,
        intermediate_size: usize,
        experts: usize,
        top_k: usize,
    ) -> Self {
        let slots = max_tokens * top_k;
        Self {
            x: Activations::with_capacity(max_tokens, hidden_size),
            h: Activations::with_capacity(slots, intermediate_size),
            plan: Plan {
                groups: Vec::with_capacity(experts.min(slots)),
                starts: Vec::with_capacity(experts + 1),
                tokens: Vec::with_capacity(slots),
                weights: Vec::with_capacity(slots),
            },
        }
    }
}

/// Which tokens each expert works on. A *slot* is one token at one of its experts; slots are
/// ordered by expert, then by token.
#[derive(Debug, Default)]
pub(super) struct Plan {
    /// The experts that have work, in ascending order.
    pub(super) groups: Vec<Group>,
    /// Per expert, where its next slot goes while the plan is made.
    starts: Vec<u32>,
    /// The token of each slot.
    pub(super) tokens: Vec<u32>,
    /// The routing weight of each slot.
    pub(super) weights: Vec<f32>,
}

/// The slots of one expert.
#[derive(Debug, Clone, Copy)]
pub(super) struct Group {
    pub(super) expert: usize,
    pub(super) first: usize,
    pub(super) len: usize,
}

impl Plan {
    /// Sorts the routing by expert. The order depends on nothing but the ids.
    pub(super) fn make(&mut self, routing: &Routing<'_>, experts: usize) -> Result<(), MoeError> {
        self.count(routing, experts)?;
        self.groups.clear();
        let mut first = 0;
        for expert in 0..experts {
            let len = std::mem::replace(&mut self.starts[expert], first) as usize;
            if len > 0 {
                self.groups.push(Group {
                    expert,
                    first: first as usize,
                    len,
                });
                first += len as u32;
            }
        }
        self.tokens.clear();
        self.tokens.resize(routing.ids.len(), 0);
        self.weights.clear();
        self.weights.resize(routing.ids.len(), 0.0);
        for (index, (id, weight)) in routing.ids.iter().zip(routing.weights).enumerate() {
            let next = &mut self.starts[*id as usize];
            let slot = *next as usize;
            *next += 1;
            self.tokens[slot] = (index / routing.top_k) as u32;
            self.weights[slot] = *weight;
        }
        Ok(())
    }

    fn count(&mut self, routing: &Routing<'_>, experts: usize) -> Result<(), MoeError> {
        self.starts.clear();
        self.starts.resize(experts, 0);
        for (index, id) in routing.ids.iter().enumerate() {
            let Some(count) = self.starts.get_mut(*id as usize) else {
                let token = index / routing.top_k;
                return Err(MoeError::ExpertOutOfRange {
                    token,
                    id: *id,
                    experts,
                });
            };
            *count += 1;
        }
        Ok(())
    }

    /// Whether every expert's rows are multiplied one by one, as for few tokens.
    pub(super) fn is_row_by_row(&self, order: ProductOrder) -> bool {
        let mut groups = self.groups.iter();
        groups.all(|group| order.is_row_by_row(group.len))
    }
}
