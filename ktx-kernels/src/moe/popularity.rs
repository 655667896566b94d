//! Which of a layer's experts a cache holds: those that were chosen most of late.

/// What a look at the counters keeps of the score so far: it halves in some 180 looks, a look a token.
const KEPT: f32 = 0.99615;
/// How much more an expert must be chosen than the one whose slot it takes, so that two of nearly equal use do not
/// take turns: uploads are not free.
const BETTER: f32 = 1.25;
const MORE: f32 = 2.0;

/// The experts of a layer and the slots that some of them have. Slot 0 is nobody's.
#[derive(Debug)]
pub(super) struct Popularity {
    /// Choices up to the last look, by expert.
    seen: Vec<u64>,
    /// Choices of late, by expert.
    scores: Vec<f32>,
    /// By expert; 0 without one.
    slots: Vec<u32>,
    /// By slot, from slot 1 on.
    held: Vec<Option<usize>>,
}

/// An expert and the slot that it takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Swap {
    pub(super) expert: usize,
    pub(super) slot: usize,
}

impl Popularity {
    pub(super) fn new(experts: usize, slots: usize) -> Self {
        Self {
            seen: vec![0; experts],
            scores: vec![0.0; experts],
            slots: vec![0; experts],
            held: vec![None; slots],
        }
    }

    /// The slot of every expert, 0 without one.
    pub(super) fn slots(&self) -> &[u32] {
        &self.slots
    }

    /// Takes the counters' state.
    pub(super) fn look(&mut self, uses: impl Iterator<Item = u64>) {
        for ((seen, score), now) in self.seen.iter_mut().zip(&mut self.scores).zip(uses) {
            *score = KEPT * *score + now.saturating_sub(*seen) as f32;
            *seen = now;
        }
    }

    /// The next change that is worth an upload; done when the call returns.
    pub(super) fn swap(&mut self) -> Option<Swap> {
        let outside = (0..self.scores.len()).filter(|e| self.slots[*e] == 0);
        let expert = outside.max_by(|a, b| self.scores[*a].total_cmp(&self.scores[*b]))?;
        let score = self.scores[expert];
        let free = self.held.iter().position(Option::is_none);
        let place = match free {
            Some(place) => (score > 0.0).then_some(place)?,
            None => {
                let inside = self.held.iter().enumerate();
                let inside = inside.filter_map(|(place, e)| e.map(|e| (place, self.scores[e])));
                let (place, least) = inside.min_by(|a, b| a.1.total_cmp(&b.1))?;
                (score > BETTER * least + MORE).then_some(place)?
            }
        };
        if let Some(before) = self.held[place].replace(expert) {
            self.slots[before] = 0;
        }
        let slot = place + 1;
        self.slots[expert] = slot as u32;
        Some(Swap { expert, slot })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Random;

    /// Experts chosen by a skewed distribution whose head is at `first`.
    fn choose(random: &mut Random, uses: &mut [u64], first: usize) {
        for _ in 0..8 {
            let u = f64::from(random.float(1.0).abs());
            let rank = (64.0 * u.powi(4)) as usize;
            let experts = uses.len();
            uses[(first + rank.min(experts - 1)) % experts] += 1;
        }
    }

    fn check(popularity: &Popularity) {
        for (place, held) in popularity.held.iter().enumerate() {
            if let Some(expert) = held {
                assert_eq!(popularity.slots[*expert] as usize, place + 1);
            }
        }
        let with = popularity.slots.iter().filter(|slot| **slot > 0).count();
        assert_eq!(with, popularity.held.iter().flatten().count());
    }

    #[test]
    fn the_most_chosen_have_slots_and_others_take_them_when_the_choices_move() {
        let mut random = Random::new(7);
        let mut popularity = Popularity::new(64, 16);
        let mut uses = vec![0; 64];
        for first in [0, 30] {
            let (mut hits, mut all, mut late_swaps) = (0, 0, 0);
            for token in 0..2000 {
                let before = uses.clone();
                choose(&mut random, &mut uses, first);
                let slots = popularity.slots().to_vec();
                popularity.look(uses.iter().copied());
                for _ in 0..2 {
                    late_swaps += usize::from(popularity.swap().is_some() && token >= 1500);
                }
                check(&popularity);
                if token >= 1500 {
                    for (expert, (now, before)) in uses.iter().zip(&before).enumerate() {
                        let chosen = now - before;
                        all += chosen;
                        hits += if slots[expert] > 0 { chosen } else { 0 };
                    }
                }
            }
            // The sixteen most frequent are chosen with (16 / 64)^(1/4) = 0.707.
            let rate = hits as f64 / all as f64;
            assert!(rate > 0.66, "head at {first}: {rate}");
            assert!(late_swaps < 60, "head at {first}: {late_swaps}");
        }
    }

    #[test]
    fn nothing_is_uploaded_without_a_choice() {
        let mut popularity = Popularity::new(4, 2);
        assert_eq!(popularity.swap(), None);
        popularity.look([0, 0, 3, 0].into_iter());
        assert_eq!(popularity.swap(), Some(Swap { expert: 2, slot: 1 }));
        assert_eq!(popularity.swap(), None);
    }
}
