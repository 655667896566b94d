//! How fast a machine is: what the predictions are made of.

use ktx_gguf::GgmlType;
use serde_json::{Value, json};

/// How fast the host works on weights of one type.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TypeRate {
    /// The weights' type.
    pub ty: GgmlType,
    /// Bytes of weights a second that a product with one token passes.
    pub stream: f64,
    /// Bytes of weights a second that a product with many tokens unpacks, once for all of them.
    pub unpack: f64,
    /// Multiplications and additions a second of a product with many tokens, besides.
    pub flops: f64,
}

impl TypeRate {
    /// Seconds of a product with many tokens of so many bytes of weights.
    pub(super) fn product_of_many(&self, bytes: f64, flops: f64) -> f64 {
        bytes / self.unpack + flops / self.flops
    }
}

/// The speed of the host, as [`super::measure`] finds it.
#[derive(Debug, Clone, PartialEq)]
pub struct CpuSpeed {
    /// Bytes a second that all threads together read from main memory.
    pub bandwidth: f64,
    /// Seconds of a parallel region that does nothing.
    pub region: f64,
    /// Products with weights of the types that were measured.
    pub rates: Vec<TypeRate>,
    /// Seconds that a layer of experts takes for each byte of those that were chosen, whose weights are Q4_K, with so
    /// many tokens each as [`Self::EXPERT_ROWS`] says.
    pub experts: [f64; 4],
}

/// The speed of a GPU.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GpuSpeed {
    /// Bytes a second that kernels read from its memory.
    pub bandwidth: f64,
    /// Multiplications and additions a second of a product with many tokens.
    pub flops: f64,
    /// Seconds to launch a kernel.
    pub launch: f64,
    /// Bytes a second between it and main memory.
    pub link: f64,
    /// Seconds until such a copy begins.
    pub link_latency: f64,
    /// Bytes that the driver and the kernels take of its memory.
    pub reserved: u64,
}

impl GpuSpeed {
    /// A card of the middle of 2022 to 2024: about 500 GB/s, 40 TFLOP/s in half precision, PCIe 4.0.
    /// What matters for a choice is the ratio to the host, which is 5 and more for every such card.
    pub const TYPICAL: Self = Self {
        bandwidth: 450e9,
        flops: 40e12,
        launch: 4e-6,
        link: 20e9,
        link_latency: 10e-6,
        reserved: 400 << 20,
    };
}

/// The speed of all that modules can be placed on.
#[derive(Debug, Clone, PartialEq)]
pub struct Machine {
    /// The host.
    pub cpu: CpuSpeed,
    /// Each of its GPUs.
    pub gpu: GpuSpeed,
}

impl Machine {
    /// A desktop of 16 threads and two channels of DDR5 with a typical GPU: for plans that are the same
    /// on every machine.
    pub fn typical() -> Self {
        let rate = |ty, stream, flops| TypeRate {
            ty,
            stream,
            unpack: stream,
            flops,
        };
        Self {
            cpu: CpuSpeed {
                bandwidth: 60e9,
                region: 3e-6,
                experts: [18e-12, 22e-12, 80e-12, 290e-12],
                rates: vec![
                    rate(GgmlType::Q4_K, 55e9, 900e9),
                    rate(GgmlType::Q6_K, 55e9, 800e9),
                    rate(GgmlType::Q8_0, 58e9, 900e9),
                    rate(GgmlType::F16, 58e9, 500e9),
                    rate(GgmlType::F32, 60e9, 500e9),
                ],
            },
            gpu: GpuSpeed::TYPICAL,
        }
    }
}

impl CpuSpeed {
    /// The rates of a type: as measured, or those of the measured type with the nearest bits.
    pub fn rate(&self, ty: GgmlType) -> TypeRate {
        let bits = |ty: GgmlType| ty.block_bytes() as f64 * 8.0 / ty.block_len() as f64;
        let distance = |rate: &&TypeRate| {
            // Kernels come in families: floats, blocks of 32, and blocks of 256.
            let other_family = f64::from(rate.ty.block_len() != ty.block_len());
            match rate.ty == ty {
                true => 0.0,
                false => 1.0 + (bits(rate.ty) - bits(ty)).abs() + 64.0 * other_family,
            }
        };
        let nearest = self
            .rates
            .iter()
            .min_by(|a, b| distance(a).total_cmp(&distance(b)));
        nearest.copied().unwrap_or(TypeRate {
            ty,
            stream: self.bandwidth,
            unpack: self.bandwidth,
            flops: self.bandwidth * 10.0,
        })
    }

    /// Tokens of each expert that [`Self::experts`] is for.
    pub const EXPERT_ROWS: [usize; 4] = [1, 4, 16, 64];
    /// The type that it is for.
    pub(super) const EXPERT_TYPE: GgmlType = GgmlType::Q4_K;

    /// Seconds of experts' products with so many tokens for each expert that was chosen; `bytes` are those of their
    /// weights.
    pub(super) fn experts_of(&self, ty: GgmlType, bytes: f64, flops: f64, rows_each: f64) -> f64 {
        let rows = Self::EXPERT_ROWS.map(|rows| rows as f64);
        // The piece of the curve that it is on; behind the last point the curve goes on straight.
        let piece = (1..rows.len() - 1)
            .take_while(|i| rows[*i] < rows_each)
            .count();
        let slope =
            (self.experts[piece + 1] - self.experts[piece]) / (rows[piece + 1] - rows[piece]);
        let each = self.experts[piece] + slope * (rows_each - rows[piece]).max(0.0);
        let of = |ty| self.rate(ty).product_of_many(bytes, flops);
        let relative = of(ty) / of(Self::EXPERT_TYPE);
        (bytes / self.rate(ty).stream).max(bytes * each * relative)
    }

    /// As JSON, for a cache.
    pub fn to_json(&self) -> Value {
        let rates: Vec<Value> = self
            .rates
            .iter()
            .map(|r| {
                json!({"type": r.ty.name(), "stream": r.stream, "unpack": r.unpack, "flops": r.flops})
            })
            .collect();
        json!({
            "bandwidth": self.bandwidth, "region": self.region, "rates": rates, "experts": self.experts
        })
    }

    /// From JSON; `None` if anything in it is not as [`Self::to_json`] writes it.
    pub fn from_json(value: &Value) -> Option<Self> {
        let positive = |value: &Value| value.as_f64().filter(|n| n.is_finite() && *n > 0.0);
        let rates = value.get("rates")?.as_array()?;
        let rate = |value: &Value| {
            let name = value.get("type")?.as_str()?;
            Some(TypeRate {
                ty: *GgmlType::ALL.iter().find(|ty| ty.name() == name)?,
                stream: positive(value.get("stream")?)?,
                unpack: positive(value.get("unpack")?)?,
                flops: positive(value.get("flops")?)?,
            })
        };
        let rates = rates.iter().map(rate).collect::<Option<Vec<_>>>()?;
        let experts = value.get("experts")?.as_array()?.iter();
        let experts = experts.map(positive).collect::<Option<Vec<_>>>()?;
        Some(Self {
            bandwidth: positive(value.get("bandwidth")?)?,
            region: positive(value.get("region")?)?,
            rates: Some(rates).filter(|r| !r.is_empty())?,
            experts: experts.try_into().ok()?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn speeds_survive_json_and_nonsense_is_refused() {
        let speed = Machine::typical().cpu;
        assert_eq!(CpuSpeed::from_json(&speed.to_json()), Some(speed));
        for text in [
            "null",
            "{}",
            r#"{"bandwidth":-1,"region":1,"experts":[1,1,1,1],"rates":[]}"#,
            r#"{"bandwidth":1,"region":1,"experts":[1,1,1,1],"rates":[]}"#,
            r#"{"bandwidth":1,"region":1,"experts":[1,1,1,1],"rates":[{"type":"Q9_X","stream":1,"unpack":1,"flops":1}]}"#,
        ] {
            let value = serde_json::from_str(text).unwrap();
            assert_eq!(CpuSpeed::from_json(&value), None, "{text}");
        }
    }

    #[test]
    fn experts_are_priced_on_the_measured_curve_and_beyond_it() {
        let mut speed = Machine::typical().cpu;
        speed.experts = [1.0, 1.0, 5.0, 21.0];
        let price = |rows| speed.experts_of(GgmlType::Q4_K, 1.0, 3.6 * rows, rows);
        for (rows, expected) in [
            (0.5, 1.0),
            (1.0, 1.0),
            (3.0, 1.0),
            (10.0, 3.0),
            (16.0, 5.0),
            (128.0, 42.33),
        ] {
            assert!(
                (price(rows) - expected).abs() < 0.01,
                "{rows}: {}",
                price(rows)
            );
        }
        // Slower products, slower experts.
        assert!(speed.experts_of(GgmlType::F32, 1.0, 36.0, 16.0) > price(16.0));
    }

    #[test]
    fn a_type_that_was_not_measured_has_the_rates_of_its_neighbour() {
        let speed = Machine::typical().cpu;
        assert_eq!(speed.rate(GgmlType::Q4_0).ty, GgmlType::Q8_0);
        assert_eq!(speed.rate(GgmlType::BF16).ty, GgmlType::F16);
        assert_eq!(speed.rate(GgmlType::Q5_K).ty, GgmlType::Q4_K);
    }
}
