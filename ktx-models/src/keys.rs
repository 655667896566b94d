//! Metadata of one architecture, with errors that name the key.

use ktx_gguf::Gguf;

use crate::ModelError;

/// Larger sizes than this are no sizes of a model.
const MAX_SIZE: usize = 1 << 28;

/// The shape of a tensor by its GGUF name, row length first, if there is such a tensor.
pub(crate) type ShapeOf<'a> = &'a dyn Fn(&str) -> Option<Vec<usize>>;

/// The keys below an architecture's prefix.
pub(crate) struct Keys<'a> {
    gguf: &'a Gguf,
    shape_of: ShapeOf<'a>,
    prefix: &'a str,
}

impl<'a> Keys<'a> {
    pub(crate) fn new(gguf: &'a Gguf, shape_of: ShapeOf<'a>, prefix: &'a str) -> Self {
        Self {
            gguf,
            shape_of,
            prefix,
        }
    }

    fn key(&self, name: &str) -> String {
        format!("{}.{name}", self.prefix)
    }

    fn file(&self) -> String {
        self.gguf.name().to_owned()
    }

    fn required<T>(&self, name: &str, value: Option<T>) -> Result<T, ModelError> {
        value.ok_or_else(|| ModelError::MissingKey {
            file: self.file(),
            key: self.key(name),
            architecture: self.prefix.to_owned(),
        })
    }

    /// An error about a key's value.
    pub(crate) fn bad(&self, name: &str, value: impl ToString, reason: &str) -> ModelError {
        ModelError::BadValue {
            file: self.file(),
            key: self.key(name),
            value: value.to_string(),
            reason: reason.to_owned(),
        }
    }

    /// A size from 1 on, if the key is there.
    pub(crate) fn size_if_any(&self, name: &str) -> Result<Option<usize>, ModelError> {
        let Some(value) = self.gguf.metadata().usize(&self.key(name))? else {
            return Ok(None);
        };
        if value == 0 || value > MAX_SIZE {
            return Err(self.bad(name, value, "a size from 1 to 268435456 is expected"));
        }
        Ok(Some(value))
    }

    /// A size from 1 on.
    pub(crate) fn size(&self, name: &str) -> Result<usize, ModelError> {
        self.required(name, self.size_if_any(name)?)
    }

    /// A count, 0 if the key is missing.
    pub(crate) fn count(&self, name: &str) -> Result<usize, ModelError> {
        let value = self.gguf.metadata().usize(&self.key(name))?.unwrap_or(0);
        if value > MAX_SIZE {
            return Err(self.bad(name, value, "a count up to 268435456 is expected"));
        }
        Ok(value)
    }

    /// A finite number, if the key is there.
    pub(crate) fn float_if_any(&self, name: &str) -> Result<Option<f32>, ModelError> {
        let Some(value) = self.gguf.metadata().f32(&self.key(name))? else {
            return Ok(None);
        };
        if !value.is_finite() {
            return Err(self.bad(name, value, "a finite number is expected"));
        }
        Ok(Some(value))
    }

    /// A finite number.
    pub(crate) fn float(&self, name: &str) -> Result<f32, ModelError> {
        self.required(name, self.float_if_any(name)?)
    }

    /// A text, if the key is there.
    pub(crate) fn text(&self, name: &str) -> Result<Option<&'a str>, ModelError> {
        Ok(self.gguf.metadata().str(&self.key(name))?)
    }

    /// A truth value, if the key is there.
    pub(crate) fn flag(&self, name: &str) -> Result<Option<bool>, ModelError> {
        Ok(self.gguf.metadata().bool(&self.key(name))?)
    }

    /// The shape of a tensor, row length first, if there is such a tensor.
    pub(crate) fn tensor(&self, name: &str) -> Option<Vec<usize>> {
        (self.shape_of)(name)
    }

    /// The values of a small tensor, if the file has it.
    pub(crate) fn values(&self, name: &str) -> Option<Vec<f32>> {
        self.gguf.tensor(name).map(|t| t.to_f32())
    }

    /// Rows of the embedding table: the tokenizer's list can be shorter.
    pub(crate) fn vocab_size(&self) -> Result<usize, ModelError> {
        match self
            .tensor("token_embd.weight")
            .and_then(|shape| shape.get(1).copied())
        {
            Some(rows) => Ok(rows),
            None => self.size("vocab_size"),
        }
    }
}
