//! A file's metadata, and typed access to it.

use std::collections::HashMap;
use std::sync::Arc;

use crate::{GgufError, Place, Value};

/// The metadata of a model: keys and values in file order.
#[derive(Clone, Debug)]
pub struct Metadata {
    file: Arc<str>,
    entries: Vec<(String, Value)>,
    by_key: HashMap<String, usize>,
}

impl Metadata {
    /// Metadata from entries in memory; `name` stands for the file in error texts.
    ///
    /// # Errors
    /// [`GgufError::DuplicateKey`] when two entries have the same key.
    pub fn from_entries(name: &str, entries: Vec<(String, Value)>) -> Result<Self, GgufError> {
        let mut by_key = HashMap::with_capacity(entries.len());
        for (index, (key, _)) in entries.iter().enumerate() {
            if let Some(first) = by_key.insert(key.clone(), index) {
                return Err(GgufError::DuplicateKey {
                    place: Place {
                        file: name.to_owned(),
                        field: format!("metadata[{index}].key"),
                        offset: 0,
                    },
                    key: key.clone(),
                    first,
                });
            }
        }
        Ok(Self {
            file: name.into(),
            entries,
            by_key,
        })
    }

    /// The value of a key.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.by_key.get(key).map(|&index| &self.entries[index].1)
    }

    /// Keys and values in file order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&str, &Value)> {
        self.entries
            .iter()
            .map(|(key, value)| (key.as_str(), value))
    }

    /// Number of entries.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there are no entries.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    fn typed<'a, T>(
        &'a self,
        key: &str,
        expected: &'static str,
        convert: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, GgufError> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        convert(value)
            .map(Some)
            .ok_or_else(|| GgufError::WrongType {
                file: self.file.to_string(),
                key: key.to_owned(),
                found: value.describe(),
                expected,
            })
    }

    fn missing(&self, key: &str) -> GgufError {
        GgufError::MissingKey {
            file: self.file.to_string(),
            key: key.to_owned(),
        }
    }

    /// A string.
    ///
    /// # Errors
    /// [`GgufError::WrongType`] when the value is something else.
    pub fn str(&self, key: &str) -> Result<Option<&str>, GgufError> {
        self.typed(key, "a string", |value| match value {
            Value::String(text) => Some(text.as_str()),
            _ => None,
        })
    }

    /// A string that has to be there.
    ///
    /// # Errors
    /// [`GgufError::WrongType`] when the value is something else, [`GgufError::MissingKey`] without the key.
    pub fn required_str(&self, key: &str) -> Result<&str, GgufError> {
        self.str(key)?.ok_or_else(|| self.missing(key))
    }

    /// An array of strings.
    ///
    /// # Errors
    /// [`GgufError::WrongType`] when the value is something else.
    pub fn strings(&self, key: &str) -> Result<Option<&[String]>, GgufError> {
        self.typed(key, "an array of strings", |value| match value {
            Value::Array(crate::Array::String(texts)) => Some(texts.as_slice()),
            _ => None,
        })
    }

    /// An array of strings that has to be there.
    ///
    /// # Errors
    /// [`GgufError::WrongType`] when the value is something else, [`GgufError::MissingKey`] without the key.
    pub fn required_strings(&self, key: &str) -> Result<&[String], GgufError> {
        self.strings(key)?.ok_or_else(|| self.missing(key))
    }
}

macro_rules! accessors {
    ($($doc:literal $name:ident $required:ident -> $ty:ty, $expected:literal, $convert:expr;)*) => {
        impl Metadata {
            $(
                #[doc = concat!($doc, ".")]
                ///
                /// # Errors
                /// [`GgufError::WrongType`] when the value is something else.
                pub fn $name(&self, key: &str) -> Result<Option<$ty>, GgufError> {
                    self.typed(key, $expected, $convert)
                }

                #[doc = concat!($doc, "; the key has to be there.")]
                ///
                /// # Errors
                /// [`GgufError::WrongType`] when the value is something else, [`GgufError::MissingKey`] without
                /// the key.
                pub fn $required(&self, key: &str) -> Result<$ty, GgufError> {
                    self.$name(key)?.ok_or_else(|| self.missing(key))
                }
            )*
        }
    };
}

fn integer<T: TryFrom<i128>>(value: &Value) -> Option<T> {
    T::try_from(value.as_integer()?).ok()
}

fn integers<T: TryFrom<i128>>(value: &Value) -> Option<Vec<T>> {
    match value {
        Value::Array(array) => array.to_integers(),
        _ => None,
    }
}

accessors! {
    "An integer of any type that fits 32 bits without sign"
    u32 required_u32 -> u32, "an integer from 0 to 4294967295", integer;
    "An integer of any type that fits 64 bits without sign"
    u64 required_u64 -> u64, "an integer from 0 to 18446744073709551615", integer;
    "An integer of any type that fits 64 bits with sign"
    i64 required_i64 -> i64, "an integer of 64 bits", integer;
    "An integer of any type that fits an address"
    usize required_usize -> usize, "an integer that is not negative", integer;
    "A float of any type, or an integer, in single precision"
    f32 required_f32 -> f32, "a number", |value| value.as_f64().map(|number| number as f32);
    "A float of any type, or an integer, in double precision"
    f64 required_f64 -> f64, "a number", Value::as_f64;
    "A boolean"
    bool required_bool -> bool, "a boolean", |value| match value {
        Value::Bool(flag) => Some(*flag),
        _ => None,
    };
    "An array of numbers of any type, in single precision"
    f32s required_f32s -> Vec<f32>, "an array of numbers", |value| match value {
        Value::Array(array) => array.to_f32s(),
        _ => None,
    };
    "An array of integers of any type that fit 32 bits with sign"
    i32s required_i32s -> Vec<i32>, "an array of integers of 32 bits", integers;
    "An array of integers of any type that fit 32 bits without sign"
    u32s required_u32s -> Vec<u32>, "an array of integers from 0 to 4294967295", integers;
    "An array of integers of any type that fit 64 bits without sign"
    u64s required_u64s -> Vec<u64>, "an array of integers that are not negative", integers;
    "An array of booleans"
    bools required_bools -> Vec<bool>, "an array of booleans", |value| match value {
        Value::Array(crate::Array::Bool(flags)) => Some(flags.clone()),
        _ => None,
    };
}
