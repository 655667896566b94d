//! The search: which parts go to which GPU, so that the workload takes the least time and nothing
//! holds more than it has.
//!
//! Stages follow one another, so the search does too. A state is the GPU whose range of layers is at
//! hand, and where the residual stream was last; in a state, an assignment of the stages so far is
//! worth keeping only if no other takes no more of that GPU, leaves no more to main memory and is no
//! slower. Layers of the same kind make the same few sums of bytes over and over, so few are kept.
//! Where many are, bytes are counted in larger units, rounded against the budget: the result then
//! fits, and is optimal for budgets up to that rounding.

use std::collections::BTreeMap;

use super::cost::{Chain, Seconds, StageCost};

/// Assignments that one state keeps before bytes are counted in larger units.
const MAX_KEPT: usize = 20_000;
/// The first unit that is tried after bytes.
const COARSE: u64 = 1 << 20;

/// Where a part is: on the host, or on the GPU of this number.
pub(super) type Spot = Option<usize>;

/// Where the parts of a stage are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Choice {
    pub home: Spot,
    pub ffn: Spot,
    pub experts: Spot,
}

/// Bytes that each device has for weights and cache.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Limits {
    pub gpus: Vec<u64>,
    pub ram: u64,
}

/// What the search looks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Goal {
    /// The least time.
    Time,
    /// The least main memory.
    HostBytes,
}

impl StageCost {
    /// Time of the stage alone.
    pub(super) fn time(&self, choice: Choice, transfer: Seconds) -> Seconds {
        let at = |part: &super::cost::PartCost, spot: Spot| match spot {
            None => part.cpu,
            Some(_) => part.gpu,
        };
        let away = |spot: Spot| match spot == choice.home {
            true => Seconds::default(),
            // There and back.
            false => transfer.then(transfer),
        };
        let home = at(&self.home, choice.home);
        let ffn = self
            .ffn
            .map(|part| at(&part, choice.ffn).then(away(choice.ffn)));
        let experts = self
            .experts
            .map(|part| at(&part, choice.experts).then(away(choice.experts)));
        home.then(match (ffn, experts) {
            (Some(ffn), Some(experts)) if choice.ffn != choice.experts => ffn.beside(experts),
            (Some(ffn), Some(experts)) => ffn.then(experts),
            (one, other) => one.or(other).unwrap_or_default(),
        })
    }

    /// Bytes that it puts on a GPU, and bytes that it leaves to the host.
    pub(super) fn bytes(&self, choice: Choice) -> (u64, u64) {
        let parts = [
            (Some(self.home), choice.home),
            (self.ffn, choice.ffn),
            (self.experts, choice.experts),
        ];
        parts
            .into_iter()
            .filter_map(|(part, spot)| {
                let part = part?;
                let bytes = match spot {
                    None => part.bytes - part.on_host,
                    Some(_) => part.bytes,
                };
                Some((bytes, spot))
            })
            .fold((0, 0), |(gpu, host), (bytes, spot)| match spot {
                Some(_) => (gpu + bytes, host),
                None => (gpu, host + bytes),
            })
    }

    /// All choices with this GPU, none of its parts on another.
    pub(super) fn choices(&self, gpu: Spot) -> impl Iterator<Item = Choice> + use<> {
        let spots = |there: bool| match (there, gpu) {
            (true, Some(_)) => vec![None, gpu],
            _ => vec![None],
        };
        let (homes, ffns, experts) = (
            spots(self.home_moves),
            spots(self.ffn.is_some()),
            spots(self.experts.is_some()),
        );
        homes.into_iter().flat_map(move |home| {
            let experts = experts.clone();
            ffns.clone().into_iter().flat_map(move |ffn| {
                experts
                    .clone()
                    .into_iter()
                    .map(move |experts| Choice { home, ffn, experts })
            })
        })
    }
}

/// Where the residual stream was last.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Stream {
    /// Nowhere yet.
    Start,
    Host,
    /// On the GPU whose range is at hand.
    Here,
    /// On an earlier one.
    Before,
}

/// An assignment of the stages so far.
#[derive(Debug, Clone, Copy)]
struct Kept {
    /// Units taken of the GPU at hand.
    gpu: u64,
    /// Units left to the host, at least those that are no matter.
    host: u64,
    cost: f64,
    /// Its last stage, in the trail.
    trail: usize,
}

/// Assignments by GPU at hand and stream.
type Frontier = BTreeMap<(usize, Stream), Vec<Kept>>;

/// The best assignment, or `None` if none fits.
pub(super) fn solve(chain: &Chain, limits: &Limits, goal: Goal) -> Option<Vec<Choice>> {
    let mut unit = 1;
    loop {
        let search = Search {
            chain,
            limits,
            goal,
            unit,
        };
        match search.run() {
            Ok(found) => return found,
            Err(TooMany) if unit == 1 => unit = COARSE,
            Err(TooMany) => unit *= 4,
        }
    }
}

/// More assignments than are kept.
struct TooMany;

struct Search<'a> {
    chain: &'a Chain,
    limits: &'a Limits,
    goal: Goal,
    unit: u64,
}

impl Search<'_> {
    fn run(&self) -> Result<Option<Vec<Choice>>, TooMany> {
        let mut trail: Vec<(Choice, usize)> = Vec::new();
        let mut frontier = Frontier::new();
        let none = Kept {
            gpu: 0,
            host: 0,
            cost: 0.0,
            trail: usize::MAX,
        };
        frontier.insert((0, Stream::Start), vec![none]);
        let mut ahead = self.host_ahead();
        for (stage, ahead) in self.chain.stages.iter().zip(ahead.drain(..)) {
            let mut next = Frontier::new();
            for ((gpu, stream), kept) in &frontier {
                for at in *gpu..self.limits.gpus.len().max(1) {
                    self.extend(stage, (*gpu, *stream), at, kept, &mut next, &mut trail);
                }
            }
            let slack = (self.limits.ram / self.unit).saturating_sub(ahead);
            for kept in next.values_mut() {
                thin(kept, slack);
                if kept.len() > MAX_KEPT {
                    return Err(TooMany);
                }
            }
            frontier = next;
        }
        let best = frontier
            .into_values()
            .flatten()
            .min_by(|a, b| a.cost.total_cmp(&b.cost));
        Ok(best.map(|best| self.choices(&trail, best.trail)))
    }

    /// For each stage, the most that the stages behind it can leave to the host.
    fn host_ahead(&self) -> Vec<u64> {
        let all_on_host = Choice {
            home: None,
            ffn: None,
            experts: None,
        };
        let mut sum = 0;
        let mut ahead: Vec<u64> = self
            .chain
            .stages
            .iter()
            .rev()
            .map(|stage| {
                let behind = sum;
                sum += stage.bytes(all_on_host).1.div_ceil(self.unit);
                behind
            })
            .collect();
        ahead.reverse();
        ahead
    }

    /// Adds a stage to assignments, with the range of GPU `at`.
    fn extend(
        &self,
        stage: &StageCost,
        (gpu, stream): (usize, Stream),
        at: usize,
        kept: &[Kept],
        next: &mut Frontier,
        trail: &mut Vec<(Choice, usize)>,
    ) {
        let moved_on = at != gpu;
        let stream = match stream {
            Stream::Here if moved_on => Stream::Before,
            other => other,
        };
        let capacity = self
            .limits
            .gpus
            .get(at)
            .map_or(0, |bytes| bytes / self.unit);
        let ram = self.limits.ram / self.unit;
        let spot = (at < self.limits.gpus.len()).then_some(at);
        for choice in stage.choices(spot) {
            let (on_gpu, on_host) = stage.bytes(choice);
            let on_gpu = on_gpu.div_ceil(self.unit);
            let on_host = on_host.div_ceil(self.unit);
            let now = match choice.home {
                None => Stream::Host,
                Some(_) => Stream::Here,
            };
            let cost = self.cost(stage, choice, stream != Stream::Start && stream != now);
            let list = next.entry((at, now)).or_default();
            for old in kept {
                let gpu = on_gpu + if moved_on { 0 } else { old.gpu };
                let host = old.host + on_host;
                if gpu > capacity || host > ram {
                    continue;
                }
                list.push(Kept {
                    gpu,
                    host,
                    cost: old.cost + cost,
                    trail: trail.len(),
                });
                trail.push((choice, old.trail));
            }
        }
    }

    fn cost(&self, stage: &StageCost, choice: Choice, transfers: bool) -> f64 {
        match self.goal {
            Goal::HostBytes => stage.bytes(choice).1 as f64,
            Goal::Time => {
                let time = stage.time(choice, self.chain.transfer);
                self.chain.seconds(match transfers {
                    true => time.then(self.chain.transfer),
                    false => time,
                })
            }
        }
    }

    fn choices(&self, trail: &[(Choice, usize)], last: usize) -> Vec<Choice> {
        let mut choices = Vec::with_capacity(self.chain.stages.len());
        let mut at = last;
        while let Some((choice, before)) = trail.get(at) {
            choices.push(*choice);
            at = *before;
        }
        choices.reverse();
        choices
    }
}

/// Drops what another assignment beats. What is left to the host does not matter up to `slack`: the
/// rest of the model fits with it wherever it goes.
fn thin(kept: &mut Vec<Kept>, slack: u64) {
    kept.iter_mut().for_each(|k| k.host = k.host.max(slack));
    kept.sort_by(|a, b| {
        (a.gpu, a.host)
            .cmp(&(b.gpu, b.host))
            .then(a.cost.total_cmp(&b.cost))
    });
    // Of those with no more on the GPU: the cost by what is left to the host, falling as that grows.
    let mut best: BTreeMap<u64, f64> = BTreeMap::new();
    kept.retain(|k| {
        let beaten = best
            .range(..=k.host)
            .next_back()
            .is_some_and(|(_, cost)| *cost <= k.cost);
        if beaten {
            return false;
        }
        let worse: Vec<u64> = best
            .range(k.host..)
            .take_while(|(_, cost)| **cost >= k.cost)
            .map(|(host, _)| *host)
            .collect();
        worse.iter().for_each(|host| _ = best.remove(host));
        best.insert(k.host, k.cost);
        true
    });
}

/// Time of an assignment: of the workload in [`Chain::seconds`], by phases here.
pub(super) fn time_of(chain: &Chain, choices: &[Choice]) -> Seconds {
    let mut total = Seconds::default();
    let mut before: Option<Spot> = None;
    for (stage, choice) in chain.stages.iter().zip(choices) {
        if before.is_some_and(|spot| spot != choice.home) {
            total = total.then(chain.transfer);
        }
        total = total.then(stage.time(*choice, chain.transfer));
        before = Some(choice.home);
    }
    total
}

#[cfg(test)]
mod tests {
    use super::super::cost::PartCost;
    use super::*;
    use proptest::prelude::*;

    /// Tries every assignment.
    fn brute_force(chain: &Chain, limits: &Limits) -> Option<f64> {
        let mut best: Option<f64> = None;
        let mut choices = Vec::new();
        try_all(chain, limits, 0, &mut choices, &mut best);
        best
    }

    fn try_all(
        chain: &Chain,
        limits: &Limits,
        first_gpu: usize,
        choices: &mut Vec<Choice>,
        best: &mut Option<f64>,
    ) {
        if choices.len() == chain.stages.len() {
            if fits(chain, limits, choices) {
                let cost = chain.seconds(time_of(chain, choices));
                *best = Some(best.map_or(cost, |b| b.min(cost)));
            }
            return;
        }
        let stage = &chain.stages[choices.len()];
        for gpu in first_gpu..limits.gpus.len().max(1) {
            let spot = (gpu < limits.gpus.len()).then_some(gpu);
            for choice in stage.choices(spot) {
                choices.push(choice);
                try_all(chain, limits, gpu, choices, best);
                choices.pop();
            }
        }
    }

    fn fits(chain: &Chain, limits: &Limits, choices: &[Choice]) -> bool {
        let mut gpus = vec![0; limits.gpus.len()];
        let mut ram = 0;
        for (stage, choice) in chain.stages.iter().zip(choices) {
            let parts = [
                (Some(stage.home), choice.home),
                (stage.ffn, choice.ffn),
                (stage.experts, choice.experts),
            ];
            for (part, spot) in parts {
                let bytes = part.map_or(0, |p| p.bytes);
                match spot {
                    Some(gpu) => gpus[gpu] += bytes,
                    None => ram += bytes,
                }
            }
        }
        ram <= limits.ram
            && gpus
                .iter()
                .zip(&limits.gpus)
                .all(|(used, limit)| used <= limit)
    }

    fn seconds() -> impl Strategy<Value = Seconds> {
        (0.0..10.0f64, 0.0..10.0f64).prop_map(|(prefill, generate)| Seconds { prefill, generate })
    }

    fn part() -> impl Strategy<Value = PartCost> {
        (1u64..20, seconds(), seconds()).prop_map(|(bytes, cpu, gpu)| PartCost {
            bytes,
            on_host: 0,
            cpu,
            gpu,
        })
    }

    fn stage() -> impl Strategy<Value = StageCost> {
        (
            part(),
            proptest::option::of(part()),
            proptest::option::of(part()),
            proptest::bool::weighted(0.9),
        )
            .prop_map(|(home, ffn, experts, home_moves)| StageCost {
                home,
                ffn,
                experts,
                home_moves,
            })
    }

    fn chain() -> impl Strategy<Value = Chain> {
        (
            proptest::collection::vec(stage(), 1..5),
            seconds(),
            seconds(),
        )
            .prop_map(|(stages, transfer, weight)| Chain {
                stages,
                transfer: Seconds {
                    prefill: transfer.prefill / 4.0,
                    generate: transfer.generate / 4.0,
                },
                weight,
            })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        #[test]
        fn no_assignment_is_better(
            chain in chain(),
            gpus in proptest::collection::vec(0u64..60, 0..3),
            ram in 0u64..200,
        ) {
            let limits = Limits { gpus, ram };
            let expected = brute_force(&chain, &limits);
            let found = solve(&chain, &limits, Goal::Time);
            match (&found, expected) {
                (None, None) => {}
                (Some(choices), Some(expected)) => {
                    prop_assert!(fits(&chain, &limits, choices));
                    let cost = chain.seconds(time_of(&chain, choices));
                    prop_assert!((cost - expected).abs() < 1e-9, "{cost} and {expected}");
                }
                _ => prop_assert!(false, "{found:?} and {expected:?}"),
            }
        }
    }
}
