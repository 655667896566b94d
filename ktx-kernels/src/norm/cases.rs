//! Shapes that the tests walk: `(rows, width)`, with every tail of the lanes, the widths of real
//! models, and both sides of the parallel threshold.

pub(super) const CASES: &[(usize, usize)] = &[
    (1, 1),
    (1, 7),
    (2, 8),
    (3, 15),
    (1, 16),
    (5, 17),
    (4, 64),
    (33, 128),
    (2, 255),
    (2, 257),
    (1, 512),
    (7, 576),
    (1, 7168),
    (9, 7168),
    (64, 2048),
];
