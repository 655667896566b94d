//! `strftime_now`: the date that some templates write into the system prompt.

use std::fmt::Write;
use std::time::{SystemTime, UNIX_EPOCH};

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const DAYS: [&str; 7] = [
    "Sunday",
    "Monday",
    "Tuesday",
    "Wednesday",
    "Thursday",
    "Friday",
    "Saturday",
];

/// A moment in UTC, in the parts that `strftime` writes.
struct Civil {
    year: i64,
    month: usize,
    day: u64,
    /// From 1.
    day_of_year: u64,
    /// From Sunday.
    weekday: usize,
    hour: u64,
    minute: u64,
    second: u64,
}

impl Civil {
    fn from_system_time(time: SystemTime) -> Self {
        let seconds = time
            .duration_since(UNIX_EPOCH)
            .map_or(0, |elapsed| elapsed.as_secs());
        let mut days = seconds / 86_400;
        let weekday = ((days + 4) % 7) as usize;
        let mut year = 1970;
        while days >= year_length(year) {
            days -= year_length(year);
            year += 1;
        }
        let day_of_year = days + 1;
        let mut month = 0;
        while days >= month_length(year, month) {
            days -= month_length(year, month);
            month += 1;
        }
        let second = seconds % 86_400;
        Self {
            year,
            month,
            day: days + 1,
            day_of_year,
            weekday,
            hour: second / 3600,
            minute: second / 60 % 60,
            second: second % 60,
        }
    }
}

fn year_length(year: i64) -> u64 {
    if is_leap(year) { 366 } else { 365 }
}

fn is_leap(year: i64) -> bool {
    year % 4 == 0 && (year % 100 != 0 || year % 400 == 0)
}

/// Days of a month, counted from 0.
fn month_length(year: i64, month: usize) -> u64 {
    match month {
        1 if is_leap(year) => 29,
        1 => 28,
        3 | 5 | 8 | 10 => 30,
        _ => 31,
    }
}

/// The time (UTC) in C's `strftime` notation; a specifier that is not known stays as it stands.
pub(super) fn format(time: SystemTime, pattern: &str) -> String {
    let civil = Civil::from_system_time(time);
    let mut text = String::with_capacity(pattern.len() * 2);
    let mut characters = pattern.chars();
    while let Some(character) = characters.next() {
        if character != '%' {
            text.push(character);
            continue;
        }
        match characters.next() {
            Some('-') => match characters.next() {
                Some(specifier) => {
                    let mut padded = String::new();
                    write_specifier(&mut padded, &civil, specifier);
                    let bare = padded.trim_start_matches(['0', ' ']);
                    text.push_str(if bare.is_empty() { "0" } else { bare });
                }
                None => text.push_str("%-"),
            },
            Some(specifier) => write_specifier(&mut text, &civil, specifier),
            None => text.push('%'),
        }
    }
    text
}

fn write_specifier(text: &mut String, civil: &Civil, specifier: char) {
    let hour_of_12 = (civil.hour + 11) % 12 + 1;
    let written = match specifier {
        'Y' => write!(text, "{}", civil.year),
        'y' => write!(text, "{:02}", civil.year % 100),
        'm' => write!(text, "{:02}", civil.month + 1),
        'B' => write!(text, "{}", MONTHS[civil.month]),
        'b' | 'h' => write!(text, "{}", &MONTHS[civil.month][..3]),
        'd' => write!(text, "{:02}", civil.day),
        'e' => write!(text, "{:2}", civil.day),
        'j' => write!(text, "{:03}", civil.day_of_year),
        'A' => write!(text, "{}", DAYS[civil.weekday]),
        'a' => write!(text, "{}", &DAYS[civil.weekday][..3]),
        'w' => write!(text, "{}", civil.weekday),
        'H' => write!(text, "{:02}", civil.hour),
        'I' => write!(text, "{hour_of_12:02}"),
        'M' => write!(text, "{:02}", civil.minute),
        'S' => write!(text, "{:02}", civil.second),
        'p' => write!(text, "{}", if civil.hour < 12 { "AM" } else { "PM" }),
        'F' => write!(
            text,
            "{}-{:02}-{:02}",
            civil.year,
            civil.month + 1,
            civil.day
        ),
        'T' => write!(
            text,
            "{:02}:{:02}:{:02}",
            civil.hour, civil.minute, civil.second
        ),
        'Z' => write!(text, "UTC"),
        'z' => write!(text, "+0000"),
        '%' => write!(text, "%"),
        other => write!(text, "%{other}"),
    };
    written.expect("writing to a String cannot fail");
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, UNIX_EPOCH};

    use super::format;

    #[test]
    fn dates_agree_with_the_system_date_command() {
        // Expected values from `date -u -d @SECONDS +FORMAT`.
        let at = |seconds| UNIX_EPOCH + Duration::from_secs(seconds);
        assert_eq!(
            format(at(0), "%d %b %Y %A %H:%M:%S"),
            "01 Jan 1970 Thursday 00:00:00"
        );
        assert_eq!(
            format(at(951_782_400), "%Y-%m-%d %j %a"),
            "2000-02-29 060 Tue"
        );
        assert_eq!(
            format(at(1_735_689_599), "%B %-d, %Y %I:%M %p"),
            "December 31, 2024 11:59 PM"
        );
        assert_eq!(
            format(at(4_107_542_400), "%F %w %%q %q"),
            "2100-03-01 1 %q %q"
        );
    }
}
