use ktx_gguf::GgmlType;

use super::MoeError;
use crate::activation::GatedActivation;
use crate::cpu::IsaLevel;
use crate::linear::tiles::has_tiles;
use crate::linear::{Forms, LinearError, Precision, WeightRows};

/// One of the three projections of all experts: `[experts, rows, cols]`.
#[derive(Debug, Clone, Copy)]
pub struct ExpertStack<'a> {
    layout: Layout<'a>,
    experts: usize,
    rows: usize,
    cols: usize,
}

#[derive(Debug, Clone, Copy)]
enum Layout<'a> {
    /// One tensor, expert after expert, as GGUF files have it.
    Stacked { ty: GgmlType, bytes: &'a [u8] },
    /// A tensor per expert.
    Separate(&'a [WeightRows<'a>]),
}

impl<'a> ExpertStack<'a> {
    /// A tensor `[experts, rows, cols]` of one type.
    ///
    /// # Errors
    /// As [`WeightRows::new`] for all rows together.
    pub fn stacked(
        ty: GgmlType,
        [experts, rows, cols]: [usize; 3],
        bytes: &'a [u8],
    ) -> Result<Self, LinearError> {
        let all_rows = experts.checked_mul(rows).ok_or(LinearError::WeightBytes {
            ty,
            rows,
            cols,
            actual: bytes.len(),
        })?;
        WeightRows::new(ty, all_rows, cols, bytes)?;
        Ok(Self {
            layout: Layout::Stacked { ty, bytes },
            experts,
            rows,
            cols,
        })
    }

    /// A tensor per expert, all of one shape; types may differ.
    ///
    /// # Errors
    /// [`MoeError::Shape`] when an expert has another shape than the first.
    pub fn separate(experts: &'a [WeightRows<'a>]) -> Result<Self, MoeError> {
        let (rows, cols) = experts
            .first()
            .map_or((0, 0), |first| (first.rows(), first.cols()));
        for expert in experts {
            if (expert.rows(), expert.cols()) != (rows, cols) {
                return Err(MoeError::Shape {
                    stack: "separate",
                    experts: experts.len(),
                    rows,
                    cols,
                    actual_experts: experts.len(),
                    actual_rows: expert.rows(),
                    actual_cols: expert.cols(),
                });
            }
        }
        Ok(Self {
            layout: Layout::Separate(experts),
            experts: experts.len(),
            rows,
            cols,
        })
    }

    /// Number of experts.
    pub fn experts(&self) -> usize {
        self.experts
    }

    /// Rows (outputs) of an expert.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Columns (inputs) of an expert.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// The weights of expert number `index`; `None` when there are not so many.
    pub fn expert(&self, index: usize) -> Option<WeightRows<'a>> {
        match self.layout {
            Layout::Separate(experts) => experts.get(index).copied(),
            Layout::Stacked { ty, bytes } => {
                let len = bytes.len().checked_div(self.experts)?;
                let bytes = bytes.get(index * len..(index + 1) * len)?;
                WeightRows::new(ty, self.rows, self.cols, bytes).ok()
            }
        }
    }

    /// Whether all products with many tokens take tiles at `level`.
    pub(super) fn takes_tiles(&self, level: IsaLevel, precision: Precision) -> bool {
        let forms = self.forms(precision);
        has_tiles(level) && forms.codes && !forms.floats
    }

    /// All experts' rows one after the other; `None` of a tensor per expert.
    pub(super) fn all_rows(&self) -> Option<WeightRows<'a>> {
        let Layout::Stacked { ty, bytes } = self.layout else {
            return None;
        };
        WeightRows::new(ty, self.experts * self.rows, self.cols, bytes).ok()
    }

    /// What activations these weights are multiplied with.
    pub(super) fn forms(&self, precision: Precision) -> Forms {
        match self.layout {
            Layout::Stacked { ty, .. } => Forms::for_types(precision, &[ty]),
            Layout::Separate(experts) => experts
                .iter()
                .fold(Forms::for_types(precision, &[]), |forms, expert| {
                    forms.and(Forms::for_types(precision, &[expert.ty()]))
                }),
        }
    }
}

/// The weights of one layer's routed experts: gate and up `[experts, intermediate, hidden]`, down
/// `[experts, hidden, intermediate]`.
#[derive(Debug, Clone, Copy)]
pub struct MoeWeights<'a> {
    pub(super) gate: ExpertStack<'a>,
    pub(super) up: ExpertStack<'a>,
    pub(super) down: ExpertStack<'a>,
    pub(super) biases: Option<ExpertBiases<'a>>,
    pub(super) activation: GatedActivation,
}

/// What is added to the products of every expert.
#[derive(Debug, Clone, Copy)]
pub struct ExpertBiases<'a> {
    /// `[experts, intermediate]`.
    pub gate: &'a [f32],
    /// `[experts, intermediate]`.
    pub up: &'a [f32],
    /// `[experts, hidden]`.
    pub down: &'a [f32],
}

impl<'a> MoeWeights<'a> {
    /// Puts the three stacks together: experts without biases, with SwiGLU between gate and up.
    ///
    /// # Errors
    /// [`MoeError::Shape`] when up differs in shape from gate, or down is not its transpose.
    pub fn new(
        gate: ExpertStack<'a>,
        up: ExpertStack<'a>,
        down: ExpertStack<'a>,
    ) -> Result<Self, MoeError> {
        check("up", &up, gate.experts, gate.rows, gate.cols)?;
        check("down", &down, gate.experts, gate.cols, gate.rows)?;
        Ok(Self {
            gate,
            up,
            down,
            biases: None,
            activation: GatedActivation::SwiGlu,
        })
    }

    /// The same experts with biases.
    ///
    /// # Errors
    /// [`MoeError::BiasLength`] when a bias is not one value per expert and row.
    pub fn with_biases(self, biases: ExpertBiases<'a>) -> Result<Self, MoeError> {
        let stacks = [
            ("gate", &self.gate, biases.gate),
            ("up", &self.up, biases.up),
            ("down", &self.down, biases.down),
        ];
        for (stack, weights, bias) in stacks {
            if weights.experts.checked_mul(weights.rows) != Some(bias.len()) {
                return Err(MoeError::BiasLength {
                    stack,
                    experts: weights.experts,
                    rows: weights.rows,
                    actual: bias.len(),
                });
            }
        }
        Ok(Self {
            biases: Some(biases),
            ..self
        })
    }

    /// The same experts with another activation between gate and up than SwiGLU.
    pub fn with_activation(self, activation: GatedActivation) -> Self {
        Self { activation, ..self }
    }

    /// Number of experts.
    pub fn experts(&self) -> usize {
        self.gate.experts
    }

    /// Values of a token, in and out.
    pub fn hidden_size(&self) -> usize {
        self.gate.cols
    }

    /// Values between the projections.
    pub fn intermediate_size(&self) -> usize {
        self.gate.rows
    }
}

fn check(
    stack: &'static str,
    actual: &ExpertStack<'_>,
    experts: usize,
    rows: usize,
    cols: usize,
) -> Result<(), MoeError> {
    if (actual.experts, actual.rows, actual.cols) == (experts, rows, cols) {
        return Ok(());
    }
    Err(MoeError::Shape {
        stack,
        experts,
        rows,
        cols,
        actual_experts: actual.experts,
        actual_rows: actual.rows,
        actual_cols: actual.cols,
    })
}
