//! Copies that GPUs make of activations, and their order where several GPUs use main memory.

use std::collections::btree_map::Entry;

use super::{Act, Workspace};
use crate::cuda::{CudaError, Gpu, Passage, copy_async, copy_by_kernel};

impl Workspace {
    /// In a recorded step: what is started on a GPU from now on may write main memory, which other GPUs read or
    /// wrote before, and others find what is there behind it.
    ///
    /// # Errors
    /// What a GPU refuses.
    pub fn order_host_behind(&mut self, gpu: &Gpu) -> Result<(), CudaError> {
        for other in self.reading.drain(..) {
            gpu.wait_for(&other)?;
        }
        self.reading.push(gpu.clone());
        self.host_is_behind = Some(gpu.clone());
        Ok(())
    }

    /// The GPU that [`order_host_behind`](Self::order_host_behind) was told of last in this recording.
    pub fn host_is_behind(&self) -> Option<&Gpu> {
        self.host_is_behind.as_ref()
    }

    /// The way from one GPU to another.
    fn passage(&mut self, source: &Gpu, target: &Gpu) -> Result<&Passage, CudaError> {
        match self.passages.entry((source.index(), target.index())) {
            Entry::Occupied(known) => Ok(known.into_mut()),
            Entry::Vacant(place) => {
                let passage = Passage::new(source, target)?;
                Ok(place.insert(passage))
            }
        }
    }

    /// A copy that a GPU does.
    pub(super) fn copy_by_gpu(&mut self, from: Act, to: Act) -> Result<(), CudaError> {
        let (source, target) = (self.gpu(from.device).cloned(), self.gpu(to.device).cloned());
        let (x, y) = (self.matrix(from), self.matrix(to));
        if x.is_empty() {
            return Ok(());
        }
        let is_recording = self.is_recording;
        let on = |gpu: &Gpu| match is_recording {
            true => copy_by_kernel(gpu, x, y),
            // SAFETY: both ranges are this workspace's memory (`matrix` checks), which lives on.
            false => unsafe {
                copy_async(gpu, y.address(), x.address(), x.len() * size_of::<f32>())
            },
        };
        match (&source, &target) {
            (Some(source), Some(target)) if source.index() != target.index() => {
                self.passage(source, target)?.copy(x, y, is_recording)
            }
            (Some(source), None) => {
                if is_recording {
                    self.order_host_behind(source)?;
                    return on(source);
                }
                on(source)?;
                source.synchronize()
            }
            (None, Some(target)) => {
                if let Some(before) = &self.host_is_behind {
                    target.wait_for(before)?;
                }
                self.is_read_by(target);
                on(target)
            }
            (Some(gpu), _) => on(gpu),
            (None, None) => Ok(()),
        }
    }
}
