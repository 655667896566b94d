use super::{ELSEWHERE, MoeError, Routing};
use crate::linear::tiles::{TILE, TokenTiles};
use crate::linear::{Activations, ProductOrder};

/// Working memory of [`super::forward`], for one call at a time.
#[derive(Debug, Default)]
pub struct MoeScratch {
    /// The tokens, quantised.
    pub(super) x: Activations,
    /// SiLU(gate) * up, quantised: a row per slot.
    pub(super) h: Activations,
    /// The same of slots that are multiplied in tiles.
    pub(super) x_tiles: TokenTiles,
    pub(super) h_tiles: TokenTiles,
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
            x_tiles: TokenTiles::default(),
            h_tiles: TokenTiles::default(),
            plan: Plan {
                groups: Vec::with_capacity(experts.min(slots)),
                starts: Vec::with_capacity(experts + 1),
                tokens: Vec::with_capacity(slots),
                weights: Vec::with_capacity(slots),
                tiles: Vec::with_capacity(slots.div_ceil(TILE) + experts.min(slots)),
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
    /// For each tile of tokens, in the order of groups, its first slot and how many there are.
    pub(super) tiles: Vec<(usize, usize)>,
}

/// The slots of one expert.
#[derive(Debug, Clone, Copy)]
pub(super) struct Group {
    pub(super) expert: usize,
    pub(super) first: usize,
    pub(super) len: usize,
    /// The number of its first tile of tokens; none when it has so few that rows are multiplied one by one.
    pub(super) tile: Option<usize>,
}

impl Plan {
    /// Sorts the routing by expert. The order depends on nothing but the ids.
    pub(super) fn make(
        &mut self,
        routing: &Routing<'_>,
        experts: usize,
        order: ProductOrder,
    ) -> Result<(), MoeError> {
        self.count(routing, experts)?;
        self.groups.clear();
        self.tiles.clear();
        let mut first = 0;
        for expert in 0..experts {
            let len = std::mem::replace(&mut self.starts[expert], first) as usize;
            if len > 0 {
                let tile = self.take_tiles(first as usize, len, order);
                self.groups.push(Group {
                    expert,
                    first: first as usize,
                    len,
                    tile,
                });
                first += len as u32;
            }
        }
        self.tokens.clear();
        self.tokens.resize(routing.ids.len(), 0);
        self.weights.clear();
        self.weights.resize(routing.ids.len(), 0.0);
        for (index, (id, weight)) in routing.ids.iter().zip(routing.weights).enumerate() {
            if id & ELSEWHERE != 0 || (*id as usize) < routing.first_expert {
                continue;
            }
            let next = &mut self.starts[*id as usize];
            let slot = *next as usize;
            *next += 1;
            self.tokens[slot] = (index / routing.top_k) as u32;
            self.weights[slot] = *weight;
        }
        Ok(())
    }

    /// Cuts a group into tiles of tokens, and numbers them.
    fn take_tiles(&mut self, first: usize, len: usize, order: ProductOrder) -> Option<usize> {
        if order.is_row_by_row(len) {
            return None;
        }
        let tile = self.tiles.len();
        let starts = (0..len).step_by(TILE);
        self.tiles
            .extend(starts.map(|start| (first + start, TILE.min(len - start))));
        Some(tile)
    }

    fn count(&mut self, routing: &Routing<'_>, experts: usize) -> Result<(), MoeError> {
        self.starts.clear();
        self.starts.resize(experts, 0);
        for (index, id) in routing.ids.iter().enumerate() {
            let Some(count) = self.starts.get_mut((id & !ELSEWHERE) as usize) else {
                let token = index / routing.top_k;
                return Err(MoeError::ExpertOutOfRange {
                    token,
                    id: *id,
                    experts,
                });
            };
            let is_here = id & ELSEWHERE == 0 && *id as usize >= routing.first_expert;
            *count += u32::from(is_here);
        }
        Ok(())
    }

    /// Whether every expert's rows are multiplied one by one, as for few tokens.
    pub(super) fn is_row_by_row(&self) -> bool {
        self.tiles.is_empty()
    }

    /// Whether no expert's are.
    pub(super) fn is_tiled(&self) -> bool {
        self.groups.iter().all(|group| group.tile.is_some())
    }
}
