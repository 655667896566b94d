//! Regular expressions for sets of layers.

/// An expression, without groups that capture, that matches exactly these numbers; they are ascending.
pub(super) fn numbers(set: &[usize]) -> String {
    let mut parts: Vec<String> = Vec::new();
    for decade in set.chunk_by(|a, b| a / 10 == b / 10) {
        let tens = match decade[0] / 10 {
            0 => String::new(),
            tens => tens.to_string(),
        };
        let digits: Vec<usize> = decade.iter().map(|n| n % 10).collect();
        let class = class(&digits);
        // Decades with the same digits become one: [3-5][0-9].
        match parts.last_mut() {
            Some(last) if !tens.is_empty() && joins(last, &tens, &class) => {
                *last = joined(last, &tens, &class);
            }
            _ => parts.push(format!("{tens}{class}")),
        }
    }
    match parts.as_slice() {
        [one] => one.clone(),
        many => format!("({})", many.join("|")),
    }
}

fn class(digits: &[usize]) -> String {
    let mut text = String::new();
    for run in digits.chunk_by(|a, b| a + 1 == *b) {
        match run {
            [one] => text.push_str(&one.to_string()),
            [one, other] => text.push_str(&format!("{one}{other}")),
            [first, .., last] => text.push_str(&format!("{first}-{last}")),
            [] => {}
        }
    }
    match digits {
        [one] => one.to_string(),
        _ => format!("[{text}]"),
    }
}

/// The tens and the class of a part with one digit or one range of tens.
fn split<'a>(part: &'a str, class: &str) -> Option<&'a str> {
    part.strip_suffix(class).filter(|tens| !tens.is_empty())
}

fn joins(last: &str, tens: &str, class: &str) -> bool {
    let Some(before) = split(last, class) else {
        return false;
    };
    let end = before
        .trim_end_matches(']')
        .chars()
        .last()
        .and_then(|c| c.to_digit(10));
    let single = |t: &str| t.len() == 1 || t.starts_with('[') && t.len() == 5;
    let next = tens.parse::<u32>().ok().filter(|t| *t < 10);
    single(before) && next.is_some() && end.map(|e| e + 1) == next
}

fn joined(last: &str, tens: &str, class: &str) -> String {
    let before = split(last, class).unwrap_or_default();
    let first = before.trim_start_matches('[').chars().next().unwrap_or('0');
    format!("[{first}-{tens}]{class}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matches(set: &[usize]) -> Vec<usize> {
        let regex = regex(&numbers(set));
        (0..300).filter(|n| regex(&n.to_string())).collect()
    }

    fn regex(text: &str) -> impl Fn(&str) -> bool + use<> {
        let regex = fancy_regex::Regex::new(&format!("^{text}$")).unwrap();
        move |n| regex.is_match(n).unwrap()
    }

    #[test]
    fn sets_match_their_members_and_nothing_else() {
        let sets: Vec<Vec<usize>> = vec![
            vec![0],
            vec![3, 4],
            (0..61).collect(),
            (3..94).collect(),
            (7..250).collect(),
            vec![0, 2, 4, 6, 8, 10, 15, 20, 100, 110, 119, 210],
            (0..300).step_by(7).collect(),
            (10..30).chain(45..60).collect(),
        ];
        for set in sets {
            assert_eq!(matches(&set), set, "{}", numbers(&set));
        }
        assert_eq!(
            numbers(&(3..61).collect::<Vec<_>>()),
            "([3-9]|[1-5][0-9]|60)"
        );
    }
}
