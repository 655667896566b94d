//! Amounts of memory as people write them: `14GiB`, `64GB`, `512MiB`, `1073741824`.

use std::fmt;
use std::str::FromStr;

/// An amount of memory, from one byte on.
///
/// ```
/// use ktx_core::placement::ByteSize;
///
/// assert_eq!("14GiB".parse::<ByteSize>()?.0, 14 << 30);
/// assert_eq!("1.5 GB".parse::<ByteSize>()?.0, 1_500_000_000);
/// assert!("0".parse::<ByteSize>().is_err());
/// # Ok::<(), ktx_core::placement::ParseSizeError>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ByteSize(pub u64);

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        crate::memory::Bytes(self.0).fmt(f)
    }
}

/// A text that is no amount of memory.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is no amount of memory: {reason}; write 14GiB, 64GB or 512MiB")]
pub struct ParseSizeError {
    /// What was read.
    pub text: String,
    /// What is wrong with it.
    pub reason: &'static str,
}

impl FromStr for ByteSize {
    type Err = ParseSizeError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let error = |reason| ParseSizeError {
            text: text.to_owned(),
            reason,
        };
        let trimmed = text.trim();
        let end = trimmed
            .find(|c: char| !c.is_ascii_digit() && c != '.')
            .unwrap_or(trimmed.len());
        let (number, unit) = trimmed.split_at(end);
        let number: f64 = number
            .parse()
            .map_err(|_| error("it does not start with a number"))?;
        let unit = match unit.trim_start().to_ascii_lowercase().as_str() {
            "" | "b" => 1.0,
            "k" | "kib" => 1024.0,
            "m" | "mib" => 1024.0 * 1024.0,
            "g" | "gib" => 1024.0 * 1024.0 * 1024.0,
            "t" | "tib" => 1024.0 * 1024.0 * 1024.0 * 1024.0,
            "kb" => 1e3,
            "mb" => 1e6,
            "gb" => 1e9,
            "tb" => 1e12,
            _ => {
                return Err(error(
                    "the unit is none of B, KiB, MiB, GiB, TiB, KB, MB, GB, TB",
                ));
            }
        };
        let bytes = number * unit;
        if bytes < 1.0 {
            return Err(error("it is less than a byte"));
        }
        // The largest number of bytes that a file or an address can count.
        if bytes > i64::MAX as f64 {
            return Err(error("no machine has as much"));
        }
        Ok(Self(bytes as u64))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_are_binary_with_an_i_and_decimal_without() {
        for (text, bytes) in [
            ("1", 1),
            ("12 B", 12),
            ("3KiB", 3 << 10),
            ("3kb", 3000),
            ("14GiB", 14 << 30),
            ("14g", 14 << 30),
            ("0.5 MiB", 1 << 19),
            ("2TB", 2_000_000_000_000),
        ] {
            assert_eq!(text.parse(), Ok(ByteSize(bytes)), "{text}");
        }
    }

    #[test]
    fn what_is_no_amount_is_refused() {
        for text in [
            "",
            "GiB",
            "0",
            "0GiB",
            "-1GiB",
            "1.2.3GiB",
            "1e99",
            "99999999TiB",
            "5 apples",
            "NaN",
        ] {
            assert!(text.parse::<ByteSize>().is_err(), "{text}");
        }
    }
}
