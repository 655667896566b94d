//! Tensors and metadata of a GGUF in double precision.

use ktx_gguf::{Gguf, Tensor};

use super::matrix::{Matrix, Norm};

/// A file, and the prefix of its metadata keys.
pub struct Weights<'a> {
    file: &'a Gguf,
    architecture: String,
}

impl<'a> Weights<'a> {
    pub fn new(file: &'a Gguf) -> Self {
        let metadata = file.metadata();
        let architecture = metadata.required_str("general.architecture").unwrap();
        Self {
            file,
            architecture: architecture.to_owned(),
        }
    }

    pub fn architecture(&self) -> &str {
        &self.architecture
    }

    fn key(&self, key: &str) -> String {
        format!("{}.{key}", self.architecture)
    }

    pub fn number(&self, key: &str) -> Option<f64> {
        self.file.metadata().f64(&self.key(key)).unwrap()
    }

    pub fn count(&self, key: &str) -> usize {
        self.file.metadata().required_usize(&self.key(key)).unwrap()
    }

    pub fn count_or(&self, key: &str, default: usize) -> usize {
        let found = self.file.metadata().usize(&self.key(key)).unwrap();
        found.unwrap_or(default)
    }

    pub fn flag_or(&self, key: &str, default: bool) -> bool {
        let found = self.file.metadata().bool(&self.key(key)).unwrap();
        found.unwrap_or(default)
    }

    pub fn text(&self, key: &str) -> Option<&str> {
        self.file.metadata().str(&self.key(key)).unwrap()
    }

    pub fn has(&self, name: &str) -> bool {
        self.file.tensor(name).is_some()
    }

    fn tensor(&self, name: &str) -> Tensor {
        let tensor = self.file.tensor(name);
        tensor.unwrap_or_else(|| panic!("no tensor {name}"))
    }

    /// All elements, row after row.
    pub fn vector(&self, name: &str) -> Vec<f64> {
        let values = self.tensor(name).to_f32();
        values.into_iter().map(f64::from).collect()
    }

    pub fn optional_vector(&self, name: &str) -> Option<Vec<f64>> {
        self.has(name).then(|| self.vector(name))
    }

    pub fn matrix(&self, name: &str) -> Matrix {
        Matrix::new(self.tensor(name).shape()[0], self.vector(name))
    }

    /// A tensor with three dimensions as a list over its outermost.
    pub fn matrices(&self, name: &str) -> Vec<Matrix> {
        let shape = self.tensor(name).shape().to_vec();
        assert_eq!(shape.len(), 3, "{name}");
        let all = self.matrix(name);
        let part = |i: usize| all.slice(i * shape[1], (i + 1) * shape[1]);
        (0..shape[2]).map(part).collect()
    }

    /// A norm with the model's epsilon.
    pub fn norm(&self, name: &str) -> Norm {
        let epsilon = self.number("attention.layer_norm_rms_epsilon");
        Norm {
            weight: self.vector(name),
            epsilon: epsilon.expect("an epsilon"),
        }
    }

    /// A norm with an epsilon of its own.
    pub fn norm_with_epsilon(&self, name: &str, epsilon: f64) -> Norm {
        Norm {
            weight: self.vector(name),
            epsilon,
        }
    }
}
