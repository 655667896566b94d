//! Expert deferral: while tokens are generated, a part of each token's experts is added one layer later, so
//! that the CPU computes them while the GPU is at the next layer's attention.
//!
//! The experts with the smallest weights are put off. What the last layer puts off is added behind it, where
//! it changes nothing.

use std::sync::Arc;

use ktx_kernels::device::Device;
use ktx_kernels::workspace::{Act, Workspace};

use crate::build::OpError;
use crate::module::{Capacity, Experts, Forward};
use crate::recording::HostTask;

/// Experts that are put off in a step, with their place in main memory.
#[derive(Debug, Clone, Copy)]
pub struct Deferral {
    routed: RoutedRows,
    /// Results `[rows, hidden]`: a layer's is taken while the next one's is computed.
    out: [Act; 2],
    /// The result that is not added yet.
    pending: Option<usize>,
}

/// Rows with the experts of each.
#[derive(Debug, Clone, Copy)]
struct RoutedRows {
    /// `[rows, hidden]`.
    x: Act,
    /// `[rows, experts]`.
    ids: Act,
    /// `[rows, experts]`.
    weights: Act,
}

impl Deferral {
    /// Values that the steps of a model with tokens of `hidden` values take.
    pub fn scratch(capacity: Capacity, hidden: usize) -> usize {
        match capacity.deferred_experts {
            0 => 0,
            experts => {
                3 * Workspace::values_for(capacity.tokens, hidden)
                    + 2 * Workspace::values_for(capacity.tokens, experts)
            }
        }
    }
}

impl Forward<'_> {
    /// Makes room for what layers of this step put off, if they do.
    ///
    /// # Errors
    /// If the workspace has no room.
    pub fn begin_deferral(&mut self, hidden: usize) -> Result<(), OpError> {
        self.deferral = None;
        let (rows, experts) = (self.batch.rows(), self.deferred_experts);
        if experts == 0 || self.prompt {
            return Ok(());
        }
        let mut take = |cols| self.alloc(Device::CPU, rows, cols);
        self.deferral = Some(Deferral {
            routed: RoutedRows {
                x: take(hidden)?,
                ids: take(experts)?,
                weights: take(experts)?,
            },
            out: [take(hidden)?, take(hidden)?],
            pending: None,
        });
        Ok(())
    }

    /// Adds what the last layers put off.
    ///
    /// # Errors
    /// If the workspace has no room, or a GPU refuses.
    pub fn end_deferral(&mut self, hidden: Act) -> Result<(), OpError> {
        let pending = self.deferral.and_then(|d| d.pending);
        if pending.is_some() {
            self.host_first(Arc::new(Nothing))?;
            self.add_deferred(hidden)?;
        }
        self.deferral = None;
        Ok(())
    }

    /// Whether experts on this device, of which each token has `top_k`, are put off in part.
    pub(crate) fn defers(&self, device: Device, top_k: usize) -> bool {
        self.deferral.is_some() && device.is_cpu() && top_k > self.deferred_experts
    }

    /// As [`Experts::submit`] with `rows` in main memory, but for the experts that are put off. `out` gets what
    /// is not; [`add_deferred`](Self::add_deferred) adds what the layer before put off.
    pub(crate) fn submit_deferring(
        &mut self,
        experts: &dyn Experts,
        [x, ids, weights]: [Act; 3],
        out: Act,
    ) -> Result<(), OpError> {
        let Some(deferral) = self.deferral else {
            return experts.submit(self, x, ids, weights, out);
        };
        let (rows, at_once) = (x.rows(), ids.cols() - self.deferred_experts);
        let now = RoutedRows {
            x,
            ids: self.alloc(Device::CPU, rows, at_once)?,
            weights: self.alloc(Device::CPU, rows, at_once)?,
        };
        let later = deferral.routed;
        let slot = deferral.next_slot();
        let split = Arc::new(Split {
            all: RoutedRows { x, ids, weights },
            now,
            later,
        });
        self.turn_in_two(
            |cx| {
                match cx.is_recording() {
                    true => cx.turn_of_host(split)?,
                    false => split.run(cx)?,
                }
                experts.submit(cx, now.x, now.ids, now.weights, out)
            },
            |cx| experts.submit(cx, later.x, later.ids, later.weights, deferral.out[slot]),
        )
    }

    /// Adds what the layer before put off to `out`, and lets this layer's wait. The GPU must have waited for this
    /// layer's experts.
    pub(crate) fn exchange_deferred(&mut self, out: Act) -> Result<(), OpError> {
        self.add_deferred(out)?;
        if let Some(deferral) = &mut self.deferral {
            deferral.pending = Some(deferral.next_slot());
        }
        Ok(())
    }

    fn add_deferred(&mut self, out: Act) -> Result<(), OpError> {
        let pending = self
            .deferral
            .and_then(|d| d.pending.map(|slot| d.out[slot]));
        match pending {
            None => Ok(()),
            Some(result) => self.scoped(|cx| {
                let there = cx.moved(result, out.device())?;
                cx.add(out, there)
            }),
        }
    }
}

impl Deferral {
    /// Where the current layer's result goes.
    fn next_slot(&self) -> usize {
        self.pending.map_or(0, |slot| 1 - slot)
    }
}

/// Parts the experts of each row into those of now and those that are put off.
struct Split {
    all: RoutedRows,
    now: RoutedRows,
    later: RoutedRows,
}

impl HostTask for Split {
    fn run(&self, cx: &mut Forward<'_>) -> Result<(), OpError> {
        let Self { all, now, later } = self;
        let (top_k, at_once) = (all.ids.cols(), now.ids.cols());
        let put_off = top_k - at_once;
        let ([x, ids, weights], [now_ids, now_weights, later_x, later_ids, later_weights]) =
            cx.workspace.views(
                [all.x, all.ids, all.weights],
                [now.ids, now.weights, later.x, later.ids, later.weights],
            );
        later_x.copy_from_slice(x);
        let mut order: Vec<usize> = Vec::with_capacity(top_k);
        for row in 0..all.ids.rows() {
            let (ids, weights) = (&ids[row * top_k..], &weights[row * top_k..]);
            by_weight(&weights[..top_k], &mut order);
            let parts = [
                (
                    &order[..at_once],
                    row * at_once,
                    &mut *now_ids,
                    &mut *now_weights,
                ),
                (
                    &order[at_once..],
                    row * put_off,
                    &mut *later_ids,
                    &mut *later_weights,
                ),
            ];
            for (from, at, to_ids, to_weights) in parts {
                for (offset, &k) in from.iter().enumerate() {
                    (to_ids[at + offset], to_weights[at + offset]) = (ids[k], weights[k]);
                }
            }
        }
        Ok(())
    }
}

/// Indices of weights, the largest first; of equal ones the first.
fn by_weight(weights: &[f32], order: &mut Vec<usize>) {
    order.clear();
    order.extend(0..weights.len());
    order.sort_unstable_by(|a, b| weights[*b].total_cmp(&weights[*a]).then(a.cmp(b)));
}

/// Ends when all tasks before it have.
struct Nothing;

impl HostTask for Nothing {
    fn run(&self, _cx: &mut Forward<'_>) -> Result<(), OpError> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_smallest_weights_come_last_and_of_equal_ones_the_later() {
        let mut order = Vec::new();
        by_weight(&[0.25, 0.5, 0.0, 0.25], &mut order);
        assert_eq!(order, [1, 0, 3, 2]);
    }
}
