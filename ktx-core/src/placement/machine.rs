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
    /// Multiplications and additions a second of a product with many tokens.
    pub flops: f64,
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
        let rate = |ty, stream, flops| TypeRate { ty, stream, flops };
        Self {
            cpu: CpuSpeed {
                bandwidth: 60e9,
                region: 3e-6,
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
            flops: self.bandwidth * 10.0,
        })
    }

    /// As JSON, for a cache.
    pub fn to_json(&self) -> Value {
        let rates: Vec<Value> = self
            .rates
            .iter()
            .map(|r| json!({"type": r.ty.name(), "stream": r.stream, "flops": r.flops}))
            .collect();
        json!({"bandwidth": self.bandwidth, "region": self.region, "rates": rates})
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
                flops: positive(value.get("flops")?)?,
            })
        };
        let rates = rates.iter().map(rate).collect::<Option<Vec<_>>>()?;
        Some(Self {
            bandwidth: positive(value.get("bandwidth")?)?,
            region: positive(value.get("region")?)?,
            rates: Some(rates).filter(|r| !r.is_empty())?,
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
            r#"{"bandwidth":-1,"region":1,"rates":[]}"#,
            r#"{"bandwidth":1,"region":1,"rates":[]}"#,
            r#"{"bandwidth":1,"region":1,"rates":[{"type":"Q9_X","stream":1,"flops":1}]}"#,
        ] {
            let value = serde_json::from_str(text).unwrap();
            assert_eq!(CpuSpeed::from_json(&value), None, "{text}");
        }
    }

    #[test]
    fn a_type_that_was_not_measured_has_the_rates_of_its_neighbour() {
        let speed = Machine::typical().cpu;
        assert_eq!(speed.rate(GgmlType::Q4_0).ty, GgmlType::Q8_0);
        assert_eq!(speed.rate(GgmlType::BF16).ty, GgmlType::F16);
        assert_eq!(speed.rate(GgmlType::Q5_K).ty, GgmlType::Q4_K);
    }
}
