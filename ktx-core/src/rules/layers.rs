//! Layer numbers that a rule asks for: `0-9,12`.

use std::fmt;

/// Layers by their numbers. A module belongs to the layer whose number follows `layers` in its path; the
/// layer itself does too.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layers {
    /// First and last number, in the order of the file; a last of `None` is the model's last layer.
    ranges: Vec<(u32, Option<u32>)>,
}

impl Layers {
    /// Reads `3`, `0-9`, `30-` (to the last layer), or several of them between commas.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        let number = |digits: &str| {
            let plain = digits.bytes().all(|b| b.is_ascii_digit())
                && (digits == "0" || !digits.starts_with('0'));
            digits
                .parse::<u32>()
                .ok()
                .filter(|_| plain)
                .ok_or_else(|| format!("`{digits}` is no layer number"))
        };
        let ranges = text
            .split(',')
            .map(|part| {
                let part = part.trim();
                let Some((first, last)) = part.split_once('-') else {
                    return number(part).map(|n| (n, Some(n)));
                };
                let (first, last) = (first.trim(), last.trim());
                let first = number(first)?;
                if last.is_empty() {
                    return Ok((first, None));
                }
                let last = number(last)?;
                if last < first {
                    return Err(format!("`{part}` runs backwards"));
                }
                Ok((first, Some(last)))
            })
            .collect::<Result<_, _>>()?;
        Ok(Self { ranges })
    }

    pub(crate) fn join(all: Vec<Self>) -> Self {
        Self {
            ranges: all.into_iter().flat_map(|l| l.ranges).collect(),
        }
    }

    /// Whether this layer is one of them.
    pub fn contains(&self, layer: u32) -> bool {
        self.ranges
            .iter()
            .any(|(first, last)| *first <= layer && last.is_none_or(|last| layer <= last))
    }

    /// Whether the module at this path belongs to one of them.
    pub fn matches(&self, path: &str) -> bool {
        layer_of(path).is_some_and(|layer| self.contains(layer))
    }

    /// The ranges that reach beyond layer `last`, as written; an open one only if it starts beyond.
    pub fn beyond(&self, last: u32) -> Vec<String> {
        self.ranges
            .iter()
            .filter(|(from, to)| *from > last || to.is_some_and(|to| to > last))
            .map(written)
            .collect()
    }
}

impl fmt::Display for Layers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ranges: Vec<String> = self.ranges.iter().map(written).collect();
        f.write_str(&ranges.join(","))
    }
}

fn written((first, last): &(u32, Option<u32>)) -> String {
    match last {
        Some(last) if last == first => first.to_string(),
        Some(last) => format!("{first}-{last}"),
        None => format!("{first}-"),
    }
}

/// 3 for `model.layers.3` and all below it.
pub(crate) fn layer_of(path: &str) -> Option<u32> {
    let mut components = path.split('.').skip_while(|c| *c != "layers");
    components.next()?;
    components.next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_ranges_and_open_ranges_are_read() {
        let layers = Layers::parse("0-2, 7,30-").unwrap();
        let found: Vec<u32> = (0..34).filter(|n| layers.contains(*n)).collect();
        assert_eq!(found, [0, 1, 2, 7, 30, 31, 32, 33]);
        assert_eq!(layers.to_string(), "0-2,7,30-");
        assert_eq!(layers.beyond(6), ["7", "30-"]);
        assert!(layers.beyond(40).is_empty());
        for wrong in ["", "a", "3-1", "-3", "1,,2", "01", "1-02", "1..3", "+1"] {
            assert!(Layers::parse(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_module_belongs_to_the_layer_in_its_path() {
        let layers = Layers::parse("1").unwrap();
        for (path, wanted) in [
            ("model.layers.1", true),
            ("model.layers.1.mlp.experts.3", true),
            ("model.layers.11.mlp", false),
            ("model.layers.3.mlp.experts.1", false),
            ("model.layers", false),
            ("model.norm", false),
            ("", false),
        ] {
            assert_eq!(layers.matches(path), wanted, "{path}");
        }
    }
}
