//! Values of plain YAML 1.1 scalars, as PyYAML resolves them.

use serde_json::{Number, Value};

/// A scalar's value.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Scalar {
    Null,
    Bool(bool),
    Int(Number),
    Float(f64),
    Text(String),
}

impl Scalar {
    /// What an unquoted text stands for.
    pub(crate) fn resolve(text: &str) -> Self {
        match text {
            "" | "~" | "null" | "Null" | "NULL" => return Self::Null,
            "yes" | "Yes" | "YES" | "true" | "True" | "TRUE" | "on" | "On" | "ON" => {
                return Self::Bool(true);
            }
            "no" | "No" | "NO" | "false" | "False" | "FALSE" | "off" | "Off" | "OFF" => {
                return Self::Bool(false);
            }
            _ => {}
        }
        integer(text)
            .or_else(|| float(text))
            .unwrap_or_else(|| Self::Text(text.to_owned()))
    }

    /// Python's `bool(value)`.
    pub(crate) fn is_truthy(&self) -> bool {
        match self {
            Self::Null => false,
            Self::Bool(b) => *b,
            Self::Int(n) => n.as_f64() != Some(0.0),
            Self::Float(f) => *f != 0.0,
            Self::Text(text) => !text.is_empty(),
        }
    }

    /// The value as JSON; infinities and NaN, which JSON lacks, as text.
    pub(crate) fn to_json(&self) -> Value {
        match self {
            Self::Null => Value::Null,
            Self::Bool(b) => Value::Bool(*b),
            Self::Int(n) => Value::Number(n.clone()),
            Self::Float(f) => {
                Number::from_f64(*f).map_or_else(|| Value::String(f.to_string()), Value::Number)
            }
            Self::Text(text) => Value::String(text.clone()),
        }
    }

    /// The value as a mapping's key in JSON, which knows only texts.
    pub(crate) fn to_key(&self) -> String {
        match self {
            Self::Text(text) => text.clone(),
            other => other.to_json().to_string().trim_matches('"').to_owned(),
        }
    }

    /// What it is, for messages.
    pub(crate) fn kind(&self) -> &'static str {
        match self {
            Self::Null => "nothing",
            Self::Bool(_) => "a boolean",
            Self::Int(_) | Self::Float(_) => "a number",
            Self::Text(_) => "a text",
        }
    }
}

fn unsigned(text: &str) -> (bool, &str) {
    match text.as_bytes().first() {
        Some(b'-') => (true, &text[1..]),
        Some(b'+') => (false, &text[1..]),
        _ => (false, text),
    }
}

fn integer(text: &str) -> Option<Scalar> {
    let (negative, digits) = unsigned(text);
    let all = |digits: &str, valid: fn(&u8) -> bool| {
        !digits.is_empty() && digits.bytes().all(|b| b == b'_' || valid(&b))
    };
    let decimal = |digits: &str| all(digits, u8::is_ascii_digit);
    let magnitude = if let Some(binary) = digits.strip_prefix("0b") {
        all(binary, |b| matches!(b, b'0' | b'1')).then(|| in_base(binary, 2))?
    } else if let Some(hexadecimal) = digits.strip_prefix("0x") {
        all(hexadecimal, u8::is_ascii_hexdigit).then(|| in_base(hexadecimal, 16))?
    } else if digits == "0" {
        0.0f64.into()
    } else if let Some(octal) = digits.strip_prefix('0') {
        all(octal, |b| matches!(b, b'0'..=b'7')).then(|| in_base(octal, 8))?
    } else if digits.bytes().next().is_some_and(|b| b.is_ascii_digit()) {
        match digits.split_once(':') {
            None => decimal(digits).then(|| in_base(digits, 10))?,
            Some((first, rest)) if decimal(first) && rest.split(':').all(is_sixtieth) => {
                sixties(digits)?
            }
            Some(_) => return None,
        }
    } else {
        return None;
    };
    Some(magnitude.signed(negative))
}

/// A whole number, or the nearest float of one that no machine integer holds.
enum Magnitude {
    Whole(u64),
    Large(f64),
}

impl From<f64> for Magnitude {
    fn from(value: f64) -> Self {
        if value == 0.0 {
            Self::Whole(0)
        } else {
            Self::Large(value)
        }
    }
}

impl Magnitude {
    fn signed(self, negative: bool) -> Scalar {
        match self {
            Self::Whole(n) if !negative => Scalar::Int(n.into()),
            Self::Whole(n) => match 0i64.checked_sub_unsigned(n) {
                Some(n) => Scalar::Int(n.into()),
                None => Scalar::Float(-(n as f64)),
            },
            Self::Large(n) => Scalar::Float(if negative { -n } else { n }),
        }
    }
}

/// Digits with `_` between them; no digits at all count as zero.
fn in_base(digits: &str, base: u32) -> Magnitude {
    let values = || digits.chars().filter_map(|c| c.to_digit(base));
    let whole = values().try_fold(0u64, |n, d| {
        n.checked_mul(base.into())?.checked_add(d.into())
    });
    match whole {
        Some(n) => Magnitude::Whole(n),
        None => Magnitude::Large(values().fold(0.0, |n, d| n * f64::from(base) + f64::from(d))),
    }
}

/// One or two digits below 60.
fn is_sixtieth(digits: &str) -> bool {
    match digits.as_bytes() {
        [a] => a.is_ascii_digit(),
        [a, b] => matches!(a, b'0'..=b'5') && b.is_ascii_digit(),
        _ => false,
    }
}

fn sixties(digits: &str) -> Option<Magnitude> {
    let whole = digits.split(':').try_fold(0u64, |n, part| {
        let part: u64 = part.replace('_', "").parse().ok()?;
        n.checked_mul(60)?.checked_add(part)
    });
    whole.map(Magnitude::Whole)
}

fn float(text: &str) -> Option<Scalar> {
    let (negative, digits) = unsigned(text);
    let sign = if negative { -1.0 } else { 1.0 };
    match digits {
        ".inf" | ".Inf" | ".INF" => return Some(Scalar::Float(sign * f64::INFINITY)),
        ".nan" | ".NaN" | ".NAN" if digits.len() == text.len() => {
            return Some(Scalar::Float(f64::NAN));
        }
        _ => {}
    }
    let (mantissa, exponent) = match digits.find(['e', 'E']) {
        Some(at) => (&digits[..at], Some(&digits[at + 1..])),
        None => (digits, None),
    };
    let (whole, fraction) = mantissa.split_once('.')?;
    let plain = |part: &str| part.bytes().all(|b| b == b'_' || b.is_ascii_digit());
    let starts_with_digit = |part: &str| part.bytes().next().is_some_and(|b| b.is_ascii_digit());
    if !plain(fraction) {
        return None;
    }
    if let Some((first, rest)) = whole.split_once(':') {
        let valid = starts_with_digit(first)
            && plain(first)
            && rest.split(':').all(is_sixtieth)
            && exponent.is_none();
        return valid.then(|| Scalar::Float(sign * sixty_float(whole, fraction)));
    }
    let whole_is_valid = match whole {
        "" => starts_with_digit(fraction) && digits.len() == text.len(),
        whole => starts_with_digit(whole) && plain(whole),
    };
    let exponent_is_valid = exponent.is_none_or(|e| {
        matches!(e.as_bytes(), [b'+' | b'-', rest @ ..] if !rest.is_empty() && rest.iter().all(u8::is_ascii_digit))
    });
    if !whole_is_valid || !exponent_is_valid {
        return None;
    }
    let number = format!("0{whole}.{fraction}0e{}", exponent.unwrap_or("0")).replace('_', "");
    number.parse::<f64>().ok().map(|f| Scalar::Float(sign * f))
}

fn sixty_float(whole: &str, fraction: &str) -> f64 {
    let fraction = format!("0.{}", fraction.replace('_', ""))
        .parse()
        .unwrap_or(0.0);
    let parts = whole
        .split(':')
        .map(|part| part.replace('_', "").parse::<f64>().unwrap_or(0.0));
    parts.fold(0.0, |n, part| n * 60.0 + part) + fraction
}
