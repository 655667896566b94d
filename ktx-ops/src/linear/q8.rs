//! Products with weights that are rounded to signed bytes at load, with a scale for each input column.

use ktx_gguf::Tensor;
use ktx_kernels::device::Device;
use ktx_kernels::linear::WeightRows;
use ktx_kernels::workspace::{Act, Workspace};

use super::host::{bias, weight};
use super::{kernel_error, multiply};
use crate::build::{BuildArgs, OpError, Operator, Placement};
use crate::kwargs::NoKwargs;
use crate::module::{Capacity, Forward, Holding, HostMatrix, KModule, Linear, Loader, Phase};
use crate::register_operator;
use crate::spec::{LinearSpec, Spec};
use crate::tree::Module;

/// `y = W (s * x) + b` in f32, `W` in signed bytes: column `k` is `round(w / s_k)` with
/// `s_k = max |w| / 127` over the column, and 1 where that is zero.
///
/// Scales are those of columns, so the activations take them, once for all rows.
pub struct KLinearQ8 {
    module: Module,
    spec: LinearSpec,
    placement: Placement,
    /// `[out, in]`.
    codes: Vec<i8>,
    /// `[in]`.
    scales: Vec<f32>,
    bias: Option<Vec<f32>>,
}

impl KLinearQ8 {
    const CLASS: &'static str = "ktransformers.operators.linear.KLinearQ8";
}

/// Codes `[out, in]` and scales `[in]`.
fn quantise(weight: &Tensor) -> Result<(Vec<i8>, Vec<f32>), String> {
    let rows = WeightRows::of(weight).map_err(|e| e.to_string())?;
    let mut row = vec![0.0; rows.cols()];
    let mut scales = vec![0.0f32; rows.cols()];
    let missing = || "its weight has fewer rows than it says".to_owned();
    for index in 0..rows.rows() {
        rows.dequantize(index, &mut row).ok_or_else(missing)?;
        for (most, w) in scales.iter_mut().zip(&row) {
            // What is no number stays, once it is there.
            if w.is_nan() || w.abs() > *most {
                *most = w.abs();
            }
        }
    }
    if let Some(column) = scales.iter().position(|most| !most.is_finite()) {
        let name = weight.name();
        return Err(format!(
            "column {column} of `{name}` holds what is no number"
        ));
    }
    for scale in &mut scales {
        *scale = if *scale == 0.0 { 1.0 } else { *scale / 127.0 };
    }
    let mut codes = Vec::with_capacity(rows.rows() * rows.cols());
    for index in 0..rows.rows() {
        rows.dequantize(index, &mut row).ok_or_else(missing)?;
        let quotients = row.iter().zip(&scales).map(|(w, s)| w / s);
        codes.extend(quotients.map(|q| q.round_ties_even() as i8));
    }
    Ok((codes, scales))
}

impl KModule for KLinearQ8 {
    fn path(&self) -> &str {
        &self.module.path
    }

    fn class_path(&self) -> &'static str {
        Self::CLASS
    }

    fn device(&self, phase: Phase) -> Device {
        self.placement.device(phase)
    }

    fn load(&mut self, loader: &mut Loader<'_>) -> Result<(), OpError> {
        let (weight, _) = weight(&self.module, &self.spec, loader.store())?;
        (self.codes, self.scales) = quantise(&weight).map_err(|e| kernel_error(self.path(), e))?;
        loader.took(&[&weight])?;
        self.bias = bias(&self.module, &self.spec, loader.store())?;
        Ok(())
    }

    fn unload(&mut self) {
        (self.codes, self.scales, self.bias) = (Vec::new(), Vec::new(), None);
    }

    fn holding(&self) -> Vec<Holding> {
        vec![Holding {
            device: self.placement.generate,
            bytes: (self.codes.len() + size_of_val(self.scales.as_slice())) as u64,
        }]
    }

    fn scratch(&self, capacity: Capacity) -> usize {
        Workspace::values_for(capacity.tokens, self.spec.in_features)
    }
}

impl Linear for KLinearQ8 {
    fn in_features(&self) -> usize {
        self.spec.in_features
    }

    fn out_features(&self) -> usize {
        self.spec.out_features
    }

    fn forward(&self, cx: &mut Forward<'_>, x: Act, out: Act) -> Result<(), OpError> {
        let (rows, cols) = (self.spec.out_features, self.spec.in_features);
        // An error if nothing is loaded: no bytes are no matrix.
        let weights = WeightRows::signed_bytes(rows, cols, &self.codes)
            .map_err(|e| kernel_error(self.path(), e))?;
        let matrix = HostMatrix {
            weights,
            bias: self.bias.as_deref(),
        };
        cx.scoped(|cx| {
            let scaled = cx.alloc(x.device(), x.rows(), cols)?;
            let ([x], [to]) = cx.workspace.views([x], [scaled]);
            for (x, to) in x.chunks_exact(cols).zip(to.chunks_exact_mut(cols)) {
                for ((to, x), scale) in to.iter_mut().zip(x).zip(&self.scales) {
                    *to = x * scale;
                }
            }
            multiply(cx, self.path(), &[matrix], scaled, [out])
        })
    }
}

fn build(args: &mut BuildArgs<'_>) -> Result<Operator, OpError> {
    let Spec::Linear(spec) = args.spec().clone() else {
        return Err(args.unfit("a linear module"));
    };
    args.require_host(KLinearQ8::CLASS)?;
    let mut module = args.module.clone();
    module.children.clear();
    Ok(Operator::Linear(Box::new(KLinearQ8 {
        module,
        spec,
        placement: args.placement,
        codes: Vec::new(),
        scales: Vec::new(),
        bias: None,
    })))
}

register_operator! {
    class: KLinearQ8::CLASS,
    aliases: ["KLinearQ8", "ktx.linear.KLinearQ8"],
    role: Linear,
    summary: "product with weights in signed bytes made at load, a scale for each input column",
    lossy: "weights are rounded to 8 bits, with one scale for each input column",
    kwargs: NoKwargs,
    build: build,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_rounded_to_127_steps_of_their_largest_value() {
        let values = vec![1.0, 0.0, -254.0, -0.25, 0.0, 3.0];
        let (codes, scales) = quantise(&Tensor::from_f32("w", &[3, 2], values)).unwrap();
        assert_eq!(scales, [1.0 / 127.0, 1.0, 2.0]);
        assert_eq!(codes, [127, 0, -127, -32, 0, 2]);
    }

    #[test]
    fn weights_that_are_no_numbers_are_refused() {
        for bad in [f32::NAN, f32::INFINITY] {
            let values = vec![1.0, bad, 3.0, 4.0];
            let error = quantise(&Tensor::from_f32("w", &[2, 2], values)).unwrap_err();
            assert!(error.contains("column 1 of `w`"), "{error}");
        }
    }
}
