//! A placement in words: what is where, how full each device is, how fast it will be, and why.

use std::fmt;

use ktx_kernels::device::Device;

use super::{PlacedStage, Placement};
use crate::memory::Bytes;

impl fmt::Display for Placement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let request = &self.request;
        for (device, memory) in &self.memory {
            let budget = self.budget(*device);
            writeln!(
                f,
                "{device}: {} of {}: {} weights, {} cache for a context of {}, {} activations, {} {}",
                Bytes(memory.total()),
                Bytes(budget),
                Bytes(memory.weights),
                Bytes(memory.kv),
                request.context,
                Bytes(memory.scratch),
                Bytes(memory.process),
                match device.is_cpu() {
                    true => "program",
                    false => "driver and kernels",
                },
            )?;
        }
        self.write_parts(f)?;
        writeln!(
            f,
            "predicted: {:.1} tokens/s of a prompt of {}, {:.2} tokens/s generated",
            self.prediction.prefill, request.workload.prompt, self.prediction.generate
        )?;
        if self.is_host_only() {
            return self.why_host_only(f);
        }
        writeln!(
            f,
            "with all on the cpu: {:.1} and {:.2} tokens/s",
            self.host_only.prefill, self.host_only.generate
        )?;
        self.why(f)
    }
}

impl Placement {
    fn budget(&self, device: Device) -> u64 {
        match device.is_cpu() {
            true => self.request.budget.ram,
            false => self
                .request
                .budget
                .gpus
                .get(usize::from(device.index()))
                .copied()
                .unwrap_or(0),
        }
    }

    /// One line for each kind of part: which layers' are where.
    fn write_parts(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(([first, layers @ ..], last)) = self.stages.split_last().map(|(l, s)| (s, l))
        else {
            return Ok(());
        };
        writeln!(f, "embedding: {}; head: {}", first.home, last.home)?;
        let all = |of: &dyn Fn(&PlacedStage) -> Option<Device>| {
            let mut runs: Vec<(Device, Vec<usize>)> = Vec::new();
            for (layer, stage) in layers.iter().enumerate() {
                let Some(device) = of(stage) else { continue };
                match runs.iter_mut().find(|(d, _)| *d == device) {
                    Some((_, list)) => list.push(layer),
                    None => runs.push((device, vec![layer])),
                }
            }
            let told: Vec<String> = runs
                .iter()
                .map(|(device, layers)| format!("layers {} on {device}", ranges(layers)))
                .collect();
            told.join(", ")
        };
        writeln!(f, "attention and router: {}", all(&|s| Some(s.home)))?;
        for (name, of) in [
            (
                "dense and shared blocks",
                &(|s: &PlacedStage| s.ffn.as_ref().map(|(d, _)| *d)) as &dyn Fn(&PlacedStage) -> _,
            ),
            ("routed experts", &|s: &PlacedStage| {
                s.experts.as_ref().map(|(d, _)| *d)
            }),
        ] {
            let told = all(of);
            if !told.is_empty() {
                writeln!(f, "{name}: {told}")?;
            }
        }
        if let Some(bytes) = self.request.streams {
            writeln!(
                f,
                "long prompts: experts in main memory are streamed to the GPU, through {} of it",
                Bytes(bytes)
            )?;
        }
        Ok(())
    }

    fn why_host_only(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.request.budget.gpus.is_empty() {
            true => writeln!(f, "why: no GPU memory was given (--gpu-memory)"),
            false => writeln!(
                f,
                "why: nothing that fits the GPU is worth the copies to it and back"
            ),
        }
    }

    fn why(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let share = |of: &dyn Fn(&PlacedStage) -> Option<Device>| {
            let all: Vec<Device> = self.stages.iter().filter_map(of).collect();
            (all.iter().filter(|d| !d.is_cpu()).count(), all.len())
        };
        let (home, homes) = share(&|s| Some(s.home));
        if home * 10 >= homes * 8 {
            writeln!(
                f,
                "why: attention, norms and heads are read whole for every token, so a GPU's bandwidth pays most there"
            )?;
        }
        match share(&|s| s.experts.as_ref().map(|(d, _)| *d)) {
            (_, 0) => Ok(()),
            (0, _) => writeln!(
                f,
                "     routed experts are most of the bytes and few of them are read for a token: main memory is the place"
            ),
            (some, of) if some == of => {
                writeln!(f, "     all routed experts fit on the GPU, too")
            }
            (some, of) => writeln!(
                f,
                "     what is left of the GPU takes the routed experts of {some} of {of} layers"
            ),
        }
    }
}

/// `0-3, 7, 9-12`.
fn ranges(layers: &[usize]) -> String {
    let told: Vec<String> = layers
        .chunk_by(|a, b| a + 1 == *b)
        .map(|run| match run {
            [one] => one.to_string(),
            [first, .., last] => format!("{first}-{last}"),
            [] => String::new(),
        })
        .collect();
    told.join(", ")
}

#[cfg(test)]
mod tests {
    use super::ranges;

    #[test]
    fn runs_of_layers_are_ranges() {
        assert_eq!(ranges(&[0, 1, 2, 3, 7, 9, 10]), "0-3, 7, 9-10");
    }
}
