//! Metadata values of all types.

/// A metadata value.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs, reason = "the variants are the format's type names")]
pub enum Value {
    U8(u8),
    I8(i8),
    U16(u16),
    I16(i16),
    U32(u32),
    I32(i32),
    F32(f32),
    Bool(bool),
    String(String),
    Array(Array),
    U64(u64),
    I64(i64),
    F64(f64),
}

/// An array of metadata values, all of one type; arrays of arrays are bounded in depth.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs, reason = "the variants are the format's type names")]
pub enum Array {
    U8(Vec<u8>),
    I8(Vec<i8>),
    U16(Vec<u16>),
    I16(Vec<i16>),
    U32(Vec<u32>),
    I32(Vec<i32>),
    F32(Vec<f32>),
    Bool(Vec<bool>),
    String(Vec<String>),
    Array(Vec<Array>),
    U64(Vec<u64>),
    I64(Vec<i64>),
    F64(Vec<f64>),
}

/// Numbers of the value types in a file.
pub(crate) mod id {
    pub const U8: u32 = 0;
    pub const I8: u32 = 1;
    pub const U16: u32 = 2;
    pub const I16: u32 = 3;
    pub const U32: u32 = 4;
    pub const I32: u32 = 5;
    pub const F32: u32 = 6;
    pub const BOOL: u32 = 7;
    pub const STRING: u32 = 8;
    pub const ARRAY: u32 = 9;
    pub const U64: u32 = 10;
    pub const I64: u32 = 11;
    pub const F64: u32 = 12;
}

macro_rules! per_type {
    ($($variant:ident, $id:ident, $name:literal;)*) => {
        impl Value {
            /// The type's number in a file.
            pub(crate) fn type_id(&self) -> u32 {
                match self {
                    $(Value::$variant(_) => id::$id,)*
                }
            }

            /// Name of the value's type, `u32` or `array of string` for example.
            pub fn type_name(&self) -> String {
                if let Value::Array(array) = self {
                    return format!("array of {}", array.element_type_name());
                }
                match self {
                    $(Value::$variant(_) => $name.to_owned(),)*
                }
            }
        }

        impl Array {
            /// The elements' type number in a file.
            pub(crate) fn element_type_id(&self) -> u32 {
                match self {
                    $(Array::$variant(_) => id::$id,)*
                }
            }

            /// Name of the elements' type, `u32` for example.
            pub fn element_type_name(&self) -> &'static str {
                match self {
                    $(Array::$variant(_) => $name,)*
                }
            }

            /// Number of elements.
            pub fn len(&self) -> usize {
                match self {
                    $(Array::$variant(values) => values.len(),)*
                }
            }
        }
    };
}

per_type! {
    U8, U8, "u8";
    I8, I8, "i8";
    U16, U16, "u16";
    I16, I16, "i16";
    U32, U32, "u32";
    I32, I32, "i32";
    F32, F32, "f32";
    Bool, BOOL, "bool";
    String, STRING, "string";
    Array, ARRAY, "array";
    U64, U64, "u64";
    I64, I64, "i64";
    F64, F64, "f64";
}

impl Array {
    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The elements as integers, converted; `None` when they are not integers or one does not fit.
    pub fn to_integers<T: TryFrom<i128>>(&self) -> Option<Vec<T>> {
        fn convert<S: Copy + Into<i128>, T: TryFrom<i128>>(values: &[S]) -> Option<Vec<T>> {
            values
                .iter()
                .map(|&value| T::try_from(value.into()).ok())
                .collect()
        }
        match self {
            Array::U8(values) => convert(values),
            Array::I8(values) => convert(values),
            Array::U16(values) => convert(values),
            Array::I16(values) => convert(values),
            Array::U32(values) => convert(values),
            Array::I32(values) => convert(values),
            Array::U64(values) => convert(values),
            Array::I64(values) => convert(values),
            _ => None,
        }
    }

    /// The elements as single-precision floats; `None` when they are not numbers.
    pub fn to_f32s(&self) -> Option<Vec<f32>> {
        match self {
            Array::F32(values) => Some(values.clone()),
            Array::F64(values) => Some(values.iter().map(|&value| value as f32).collect()),
            _ => Some(
                self.to_integers::<i128>()?
                    .into_iter()
                    .map(|value| value as f32)
                    .collect(),
            ),
        }
    }
}

impl Value {
    /// The value as an integer of any width; `None` when it is not an integer.
    pub fn as_integer(&self) -> Option<i128> {
        Some(match self {
            Value::U8(value) => i128::from(*value),
            Value::I8(value) => i128::from(*value),
            Value::U16(value) => i128::from(*value),
            Value::I16(value) => i128::from(*value),
            Value::U32(value) => i128::from(*value),
            Value::I32(value) => i128::from(*value),
            Value::U64(value) => i128::from(*value),
            Value::I64(value) => i128::from(*value),
            _ => return None,
        })
    }

    /// The value as a float; integers are converted; `None` when it is not a number.
    pub fn as_f64(&self) -> Option<f64> {
        match self {
            Value::F32(value) => Some(f64::from(*value)),
            Value::F64(value) => Some(*value),
            _ => self.as_integer().map(|value| value as f64),
        }
    }

    /// Type and value for error texts; long values are left out.
    pub(crate) fn describe(&self) -> String {
        let name = self.type_name();
        match self {
            Value::Array(array) => format!("{name} ({} elements)", array.len()),
            Value::String(text) if text.len() > 40 => format!("a {name} of {} bytes", text.len()),
            Value::String(text) => format!("{name} {text:?}"),
            Value::Bool(value) => format!("{name} {value}"),
            Value::F32(value) => format!("{name} {value}"),
            Value::F64(value) => format!("{name} {value}"),
            _ => format!("{name} {}", self.as_integer().unwrap_or_default()),
        }
    }
}

macro_rules! from_rust_types {
    ($($variant:ident: $scalar:ty;)*) => {
        $(
            impl From<$scalar> for Value {
                fn from(value: $scalar) -> Self {
                    Value::$variant(value)
                }
            }
            impl From<Vec<$scalar>> for Value {
                fn from(values: Vec<$scalar>) -> Self {
                    Value::Array(Array::$variant(values))
                }
            }
        )*
    };
}

from_rust_types! {
    U8: u8;
    I8: i8;
    U16: u16;
    I16: i16;
    U32: u32;
    I32: i32;
    F32: f32;
    Bool: bool;
    String: String;
    Array: Array;
    U64: u64;
    I64: i64;
    F64: f64;
}

impl From<&str> for Value {
    fn from(value: &str) -> Self {
        Value::String(value.to_owned())
    }
}
