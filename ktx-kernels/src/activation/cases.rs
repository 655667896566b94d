//! Shapes that the tests walk.

/// Lengths: every tail of 8 and 16 lanes, and both sides of the parallel chunk.
pub(super) const LENGTHS: &[usize] = &[
    0, 1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 100, 1408, 16_383, 16_384, 16_385, 40_000,
];

/// `[rows, width]` of the row operations.
pub(super) const ROWS: &[(usize, usize)] = &[
    (1, 1),
    (1, 5),
    (3, 8),
    (2, 17),
    (7, 64),
    (5, 256),
    (33, 1000),
    (2, 20_000),
];
