//! The name that looks most like a misspelt one.

/// The candidate with the smallest edit distance to `name`, if it is near enough to be a slip.
///
/// Case, `-` and `_` do not count. Near enough is a third of the name's length, at least 2.
pub fn nearest<'a>(name: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let wanted = folded(name);
    let limit = (wanted.len() / 3).max(2);
    candidates
        .into_iter()
        .map(|c| (distance(&wanted, &folded(c)), c))
        .filter(|(d, _)| *d <= limit)
        .min_by_key(|(d, c)| (*d, c.len()))
        .map(|(_, c)| c)
}

fn folded(name: &str) -> Vec<char> {
    name.chars()
        .flat_map(char::to_lowercase)
        .filter(|c| !matches!(c, '-' | '_'))
        .collect()
}

/// Levenshtein's distance.
fn distance(a: &[char], b: &[char]) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.iter().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, y) in b.iter().enumerate() {
            let substituted = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = substituted.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::nearest;

    #[test]
    fn a_slip_finds_its_name_and_a_stranger_finds_none() {
        let names = ["KLinearMarlin", "KLinearTorch", "KExpertsCPU"];
        assert_eq!(nearest("KLinarMarlin", names), Some("KLinearMarlin"));
        assert_eq!(nearest("kexpertscpu", names), Some("KExpertsCPU"));
        assert_eq!(nearest("Banana", names), None);
    }
}
