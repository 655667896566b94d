//! What would fit, where a placement does not.

use super::solve::{Goal, Limits, solve};
use super::units::Stages;
use super::{PAGE, PROCESS_BYTES, PlacementError, Request, conditions, limits, scratch};
use crate::memory::Bytes;

/// Unit of the amounts that are recommended.
const MIB: u64 = 1 << 20;

/// The error of a request that cannot be met, with the nearest ones that can.
pub(super) fn does_not_fit(stages: &Stages, request: &Request) -> PlacementError {
    let ram = request.budget.ram;
    let needed = host_bytes(stages, request).unwrap_or(u64::MAX);
    let mut advice = Vec::new();
    if let Some(context) = largest_context(stages, request) {
        advice.push(format!("it fits with --context {context}"));
    }
    let rounded = needed.div_ceil(MIB);
    advice.push(format!(
        "it fits with --ram {rounded}MiB, {} more",
        Bytes(needed.saturating_sub(ram))
    ));
    let gpus = &request.budget.gpus;
    if !gpus.is_empty() {
        advice.push(format!(
            "or with about as much more in --gpu-memory ({})",
            Bytes(needed.saturating_sub(ram))
        ));
    }
    advice.push("or take a smaller quantisation of the model".to_owned());
    PlacementError::DoesNotFit {
        gpus: match gpus.as_slice() {
            [] => "no GPU".to_owned(),
            [one] => format!("{} on a GPU", Bytes(*one)),
            many => format!("{} on {} GPUs", Bytes(many.iter().sum()), many.len()),
        },
        needed: Bytes(needed),
        ram: Bytes(ram),
        context: request.context,
        advice: advice.join("; "),
    }
}

/// The least main memory that a placement takes.
fn host_bytes(stages: &Stages, request: &Request) -> Option<u64> {
    let chain = conditions(request).chain(stages);
    let limits = Limits {
        ram: u64::MAX,
        ..limits(stages, request).ok()?
    };
    let choices = solve(&chain, &limits, Goal::HostBytes)?;
    let bytes = |(stage, choice): (&super::cost::StageCost, &super::Choice)| stage.bytes(*choice).1;
    let host: u64 = chain.stages.iter().zip(&choices).map(bytes).sum();
    Some(host + scratch(stages, request) + PROCESS_BYTES)
}

/// The largest context, in whole pages, with which the model fits.
fn largest_context(stages: &Stages, request: &Request) -> Option<usize> {
    let fits = |pages: usize| {
        let request = Request {
            context: pages * PAGE,
            ..request.clone()
        };
        host_bytes(stages, &request).is_some_and(|bytes| bytes <= request.budget.ram)
    };
    let (mut good, mut bad) = (1, request.context.div_ceil(PAGE));
    if !fits(good) || good >= bad {
        return None;
    }
    while bad - good > 1 {
        let middle = good.midpoint(bad);
        match fits(middle) {
            true => good = middle,
            false => bad = middle,
        }
    }
    Some(good * PAGE)
}
