//! Texts that end an answer.

/// Holds text back while it may be the beginning of a stop text.
#[derive(Debug, Clone, Default)]
pub struct StopStrings {
    stops: Vec<String>,
    held: String,
}

impl StopStrings {
    /// For these texts; empty ones are left out.
    pub fn new(stops: Vec<String>) -> Self {
        Self {
            stops: stops.into_iter().filter(|s| !s.is_empty()).collect(),
            held: String::new(),
        }
    }

    /// Takes more text. Gives out what is certain, and the stop text that was found behind it.
    pub fn push(&mut self, text: &str) -> (String, Option<String>) {
        if self.stops.is_empty() {
            return (text.to_owned(), None);
        }
        self.held.push_str(text);
        let first = self
            .stops
            .iter()
            .filter_map(|stop| Some((self.held.find(stop.as_str())?, stop)))
            .min_by_key(|(at, stop)| (*at, std::cmp::Reverse(stop.len())));
        if let Some((at, stop)) = first {
            let (stop, before) = (stop.clone(), self.held[..at].to_owned());
            self.held.clear();
            return (before, Some(stop));
        }
        let keep = self.stops.iter().map(|stop| overlap(&self.held, stop));
        let rest = self
            .held
            .split_off(self.held.len() - keep.max().unwrap_or(0));
        (std::mem::replace(&mut self.held, rest), None)
    }

    /// What is left at the end.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

/// Bytes at the end of `text` that are the beginning of `stop`.
fn overlap(text: &str, stop: &str) -> usize {
    let longest = stop.len().min(text.len());
    (1..=longest)
        .rev()
        .find(|n| text.as_bytes().ends_with(&stop.as_bytes()[..*n]))
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(stops: &[&str], pieces: &[&str]) -> (String, Option<String>) {
        let mut matcher = StopStrings::new(stops.iter().map(|s| (*s).to_owned()).collect());
        let mut text = String::new();
        for piece in pieces {
            let (released, stop) = matcher.push(piece);
            text.push_str(&released);
            if stop.is_some() {
                return (text, stop);
            }
        }
        text.push_str(&matcher.finish());
        (text, None)
    }

    #[test]
    fn a_stop_text_is_found_across_pieces_and_not_given_out() {
        assert_eq!(
            run(&["END"], &["a E", "N", "Dx"]),
            ("a ".into(), Some("END".into()))
        );
        assert_eq!(run(&["END"], &["a EN", "d"]), ("a ENd".into(), None));
        assert_eq!(run(&["aab"], &["a", "a", "a", "b"]).0, "a");
        assert_eq!(run(&["é!"], &["é", "é", "!"]).0, "é");
    }

    #[test]
    fn the_first_of_several_wins_and_the_longer_of_two_at_one_place() {
        assert_eq!(run(&["b", "a"], &["cab"]), ("c".into(), Some("a".into())));
        assert_eq!(run(&["a", "ab"], &["cab"]), ("c".into(), Some("ab".into())));
        assert_eq!(run(&["", "x"], &["yy"]), ("yy".into(), None));
    }
}
