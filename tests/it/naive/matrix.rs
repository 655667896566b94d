//! Vectors and matrices in double precision, and the functions on them.

/// `[rows, columns]`, row after row.
pub struct Matrix {
    columns: usize,
    values: Vec<f64>,
}

impl Matrix {
    pub fn new(columns: usize, values: Vec<f64>) -> Self {
        assert_eq!(values.len() % columns, 0, "rows of {columns}");
        Self { columns, values }
    }

    pub fn rows(&self) -> usize {
        self.values.len() / self.columns
    }

    pub fn row(&self, index: usize) -> &[f64] {
        &self.values[index * self.columns..(index + 1) * self.columns]
    }

    /// Rows `start..end`.
    pub fn slice(&self, start: usize, end: usize) -> Self {
        let values = self.values[start * self.columns..end * self.columns].to_vec();
        Self::new(self.columns, values)
    }

    pub fn transposed(&self) -> Self {
        let column = |c: usize| (0..self.rows()).map(move |r| self.row(r)[c]);
        Self::new(self.rows(), (0..self.columns).flat_map(column).collect())
    }

    /// Matrix times column vector.
    pub fn times(&self, x: &[f64]) -> Vec<f64> {
        assert_eq!(x.len(), self.columns);
        (0..self.rows()).map(|r| dot(self.row(r), x)).collect()
    }
}

/// RMSNorm.
pub struct Norm {
    pub weight: Vec<f64>,
    pub epsilon: f64,
}

impl Norm {
    pub fn of(&self, x: &[f64]) -> Vec<f64> {
        assert_eq!(x.len(), self.weight.len());
        let mean_square = dot(x, x) / x.len() as f64;
        let factor = 1.0 / (mean_square + self.epsilon).sqrt();
        x.iter()
            .zip(&self.weight)
            .map(|(x, w)| x * factor * w)
            .collect()
    }
}

pub fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

pub fn add(x: &mut [f64], y: &[f64]) {
    add_scaled(x, y, 1.0);
}

pub fn add_scaled(x: &mut [f64], y: &[f64], factor: f64) {
    assert_eq!(x.len(), y.len());
    for (x, y) in x.iter_mut().zip(y) {
        *x += y * factor;
    }
}

pub fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

pub fn silu(x: f64) -> f64 {
    x * sigmoid(x)
}

pub fn softmax(x: &[f64]) -> Vec<f64> {
    let largest = x.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let exponentials: Vec<f64> = x.iter().map(|x| (x - largest).exp()).collect();
    let sum: f64 = exponentials.iter().sum();
    exponentials.iter().map(|e| e / sum).collect()
}
