use super::cuda::{self, DeviceRopeTable};
use super::{RopeLayout, RopeTable, cases, rope};
use crate::cuda::{DeviceBuffer, Gpu};
use crate::testing::{GpuMatrix, Random, pools};

const CONTEXT: usize = 131_072;

/// The host's result is compared with f64 elsewhere; the device's has its bits.
#[test]
fn gpu_rotation_has_the_bits_of_the_hosts_in_every_layout() {
    let Some(gpu) = Gpu::for_tests() else { return };
    let pool = &pools()[0];
    for (name, config) in cases::configs() {
        let table = RopeTable::new(&config, CONTEXT).unwrap();
        let on_gpu = DeviceRopeTable::upload(&gpu, &table, CONTEXT).unwrap();
        for heads in cases::heads(config.dim) {
            for positions in cases::POSITIONS {
                let len = positions.len() * heads.token_stride;
                let x = Random::new(len as u64).floats(len, 2.0);
                for layout in [RopeLayout::Interleaved, RopeLayout::Half] {
                    let mut want = x.clone();
                    rope(pool, &table, layout, &heads, positions, &mut want);
                    let a = GpuMatrix::of(&gpu, positions.len(), &x);
                    let p = DeviceBuffer::upload(&gpu, positions).unwrap();
                    cuda::rope(&gpu, &on_gpu, layout, &heads, p.address(), a.matrix).unwrap();
                    assert_eq!(a.values(), want, "{name} {heads:?} {layout:?}");
                }
            }
        }
    }
}
