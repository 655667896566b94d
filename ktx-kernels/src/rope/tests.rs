use super::*;
use crate::testing::{Random, assert_close, pools};

const CONTEXT: usize = 131_072;

#[test]
fn frequencies_agree_with_f64_within_1e_6() {
    for (name, config) in cases::configs() {
        let (expected, factor) = reference::frequencies(&config);
        let table = RopeTable::new(&config, 1).unwrap();
        assert_eq!(table.dim(), config.dim);
        for (actual, expected) in table.inv_freq().iter().zip(expected) {
            let error = (f64::from(*actual) - expected).abs() / expected;
            assert!(error < 1e-6, "{name}: {actual} against {expected}");
        }
        let error = (f64::from(table.attention_factor()) - factor).abs();
        assert!(error < 1e-6, "{name}: factor");
    }
}

#[test]
fn deepseek_yarn_ramps_from_dimension_10_to_23() {
    let deepseek = cases::configs().remove(8).1;
    let inv_freq = deepseek.inv_freq().unwrap();
    let plain = RopeConfig::plain(64, 10_000.0).inv_freq().unwrap();
    for i in 0..32 {
        let ratio = inv_freq[i] / plain[i];
        match i {
            0..=10 => assert_eq!(ratio, 1.0),
            23.. => assert!((ratio - 1.0 / 40.0).abs() < 1e-8),
            _ => assert!(ratio < 1.0 && ratio > 1.0 / 40.0),
        }
    }
    assert_eq!(deepseek.attention_factor(), 1.0);
    assert!((yarn_mscale(40.0, 0.707) - 1.260_804).abs() < 1e-6);
    assert!((yarn_mscale(40.0, 1.0) - 1.368_888).abs() < 1e-6);
    assert_eq!(yarn_mscale(1.0, 1.0), 1.0);
}

#[test]
fn rotation_agrees_with_f64_in_every_layout() {
    let pool = &pools()[1];
    for (name, config) in cases::configs() {
        let table = RopeTable::new(&config, CONTEXT).unwrap();
        let factor = f64::from(table.attention_factor());
        for heads in cases::heads(config.dim) {
            for positions in cases::POSITIONS {
                let len = positions.len() * heads.token_stride + heads.offset + 128;
                let x = Random::new(len as u64).floats(len, 2.0);
                for layout in [RopeLayout::Interleaved, RopeLayout::Half] {
                    let expected =
                        reference::rope(table.inv_freq(), factor, layout, &heads, positions, &x);
                    for level in IsaLevel::supported() {
                        let mut y = x.clone();
                        rope_at(level, pool, &table, layout, &heads, positions, &mut y);
                        assert_close(&y, &expected, 1e-13, name);
                    }
                }
            }
        }
    }
}

#[test]
fn all_instruction_sets_and_thread_counts_give_the_same_bits() {
    let table = RopeTable::new(&RopeConfig::plain(64, 1e4), 1000).unwrap();
    let heads = RopeHeads::contiguous(16, 192, 128);
    let positions: Vec<u32> = (100..150).collect();
    let x = Random::new(8).floats(50 * 16 * 192, 2.0);
    for layout in [RopeLayout::Interleaved, RopeLayout::Half] {
        let mut results = Vec::new();
        for pool in pools() {
            for level in IsaLevel::supported() {
                let mut y = x.clone();
                rope_at(level, &pool, &table, layout, &heads, &positions, &mut y);
                results.push(y);
            }
        }
        assert!(results.windows(2).all(|pair| pair[0] == pair[1]));
    }
}

#[test]
fn a_prepared_table_equals_a_lazy_one() {
    let config = RopeConfig::plain(32, 1e4);
    let (lazy, prepared) = (
        RopeTable::new(&config, 700).unwrap(),
        RopeTable::new(&config, 700).unwrap(),
    );
    prepared.prepare(1_000_000);
    for position in [0, 255, 256, 699] {
        assert_eq!(lazy.row(position), prepared.row(position));
    }
}

#[test]
fn numbers_that_define_no_rotation_are_refused() {
    let plain = RopeConfig::plain;
    assert!(matches!(
        plain(0, 1e4).inv_freq(),
        Err(RopeError::Dimension { .. })
    ));
    assert!(matches!(
        plain(63, 1e4).inv_freq(),
        Err(RopeError::Dimension { .. })
    ));
    for base in [0.0, -1.0, f32::NAN, f32::INFINITY] {
        assert!(matches!(
            plain(64, base).inv_freq(),
            Err(RopeError::NotPositive { .. })
        ));
    }
    let divisors = RopeConfig {
        freq_divisors: vec![1.0; 31],
        ..plain(64, 1e4)
    };
    assert!(matches!(
        divisors.inv_freq(),
        Err(RopeError::Divisors { .. })
    ));
}

#[test]
#[should_panic(expected = "position 10 of a rope table for 10")]
fn positions_beyond_the_table_are_refused() {
    let table = RopeTable::new(&RopeConfig::plain(4, 1e4), 10).unwrap();
    let heads = RopeHeads::contiguous(1, 4, 0);
    rope(
        &pools()[0],
        &table,
        RopeLayout::Half,
        &heads,
        &[10],
        &mut [0.0; 4],
    );
}

#[test]
#[should_panic(expected = "leave a buffer")]
fn heads_beyond_the_buffer_are_refused() {
    let table = RopeTable::new(&RopeConfig::plain(4, 1e4), 10).unwrap();
    let heads = RopeHeads::contiguous(2, 4, 0);
    rope(
        &pools()[0],
        &table,
        RopeLayout::Half,
        &heads,
        &[1, 2],
        &mut [0.0; 15],
    );
}
