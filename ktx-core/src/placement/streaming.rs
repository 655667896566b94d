//! From how many tokens on a prompt's experts are worth streaming to a GPU, and how many of them.

use ktx_kernels::kv::KvType;
use ktx_ops::{Module, OpError, Streaming, WeightStore};

use super::cost::{Conditions, Workload};
use super::machine::Machine;
use super::units::{Stage, Stages};

/// Seconds a layer that streaming has to save: starts of its kernels, and what prices are off by.
const WORTH: f64 = 400e-6;
/// Rows of a chunk that prices are for.
const CHUNK: usize = 2048;
/// Rows from which on streaming is sought at most: with so many every GPU is faster.
const MOST_ROWS: usize = 4096;

/// When and how far the experts at the paths that `is_streamed` names are streamed; none if it names none.
///
/// # Errors
/// [`OpError`] if a tensor is missing or has another shape than the metadata say.
pub(crate) fn streaming(
    tree: &Module,
    store: &dyn WeightStore,
    machine: &Machine,
    is_streamed: impl Fn(&str) -> bool,
) -> Result<Option<Streaming>, OpError> {
    let stages = Stages::of(tree, store)?;
    let streamed: Vec<&Stage> = stages
        .all
        .iter()
        .filter(|s| {
            s.experts
                .as_ref()
                .is_some_and(|(_, path)| is_streamed(path))
        })
        .collect();
    if streamed.is_empty() {
        return Ok(None);
    }
    let conditions = Conditions {
        machine,
        workload: Workload::default(),
        cache_tokens: 0,
        kv_type: KvType::F16,
        chunk: CHUNK,
    };
    let mean = |price: &dyn Fn(&Stage) -> f64| {
        streamed.iter().map(|stage| price(stage)).sum::<f64>() / streamed.len() as f64
    };
    let on_cpu = |rows: usize| {
        mean(&|stage| {
            let experts = stage.experts.iter();
            experts
                .map(|(part, _)| conditions.on_cpu(part, rows as f64, 0.0))
                .sum()
        })
    };
    let upload = mean(&|stage| {
        let bytes: u64 = stage.experts.iter().map(|(part, _)| part.bytes()).sum();
        bytes as f64 / machine.gpu.link
    });
    let gpu_chunk = mean(&|stage| {
        let (ffn, experts) = (
            stage.ffn.iter().map(|f| &f.0),
            stage.experts.iter().map(|e| &e.0),
        );
        let parts = std::iter::once(&stage.home).chain(ffn).chain(experts);
        parts
            .map(|part| conditions.on_gpu(part, CHUNK as f64, CHUNK as f64 / 2.0))
            .sum()
    });
    let mut found = Streaming {
        from: 0,
        share: None,
        upload,
        cpu: std::array::from_fn(|power| on_cpu(1 << power)),
        gpu_row: gpu_chunk / CHUNK as f64,
        // There and back, on a bus that the uploads use too.
        handover_row: 2.0 * (stages.hidden_size * size_of::<f32>() as u64) as f64
            / (machine.gpu.link / 2.0),
    };
    found.from = first_worth(&found);
    Ok(Some(found))
}

/// The least number of rows that are read sooner with a GPU's help.
fn first_worth(streaming: &Streaming) -> usize {
    let is_worth = |rows: usize| streaming.on_both(rows) + WORTH < streaming.on_cpu(rows);
    let (mut no, mut yes) = (0, MOST_ROWS);
    while yes - no > 1 {
        let middle = (no + yes) / 2;
        match is_worth(middle) {
            true => yes = middle,
            false => no = middle,
        }
    }
    yes
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A layer that takes 7 ms to upload, on a CPU that takes 5 ms to read it and 29 us for each row.
    fn streaming() -> Streaming {
        Streaming {
            from: 0,
            share: None,
            upload: 7e-3,
            cpu: std::array::from_fn(|power| {
                let rows = f64::from(1 << power);
                (5e-3 * (1.0 - (15.0f64 / 16.0).powf(rows))).max(29e-6 * rows)
            }),
            gpu_row: 1e-6,
            handover_row: 0.5e-6,
        }
    }

    #[test]
    fn both_devices_end_together_and_a_busy_gpu_takes_all() {
        let streaming = streaming();
        for rows in [128, 256, 512] {
            let share = streaming.share(rows);
            let alone = Streaming {
                share: Some(1.0),
                ..streaming
            };
            assert!(
                share < 1.0 && streaming.on_both(rows) < alone.on_both(rows),
                "{rows} rows"
            );
            for other in [share - 0.1, share + 0.05] {
                let other = Streaming {
                    share: Some(other),
                    ..streaming
                };
                assert!(
                    streaming.on_both(rows) <= other.on_both(rows),
                    "{rows} rows"
                );
            }
        }
        assert_eq!(streaming.share(8192), 1.0);
        assert_eq!(streaming.experts(8192, 128), 128);
        assert_eq!(
            Streaming {
                share: Some(0.0),
                ..streaming
            }
            .experts(512, 128),
            1
        );
    }

    #[test]
    fn few_rows_stay_on_the_cpu() {
        let mut streaming = streaming();
        let from = first_worth(&streaming);
        assert!((8..96).contains(&from), "{from}");
        streaming.upload *= 100.0;
        assert!(first_worth(&streaming) > from);
    }
}
