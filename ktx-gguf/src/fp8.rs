//! Eight-bit floats (E4M3) with one scale for each block of 128 x 128: the weights of DeepSeek-V3's checkpoints.

/// Rows and columns of a block that share a scale.
pub const BLOCK: usize = 128;

/// The value of an E4M3 code: sign, four bits of exponent (bias 7), three of mantissa. There are no infinities, the
/// largest magnitude is 448; 0x7f and 0xff are not numbers.
///
/// Without branches, so that loops over it become vector code.
#[inline(always)]
pub fn e4m3_to_f32(code: u8) -> f32 {
    /// 2^-6, the smallest normal number.
    const LEAST: f32 = 1.0 / 64.0;
    let magnitude = u32::from(code & 0x7f);
    let bits = magnitude << 20;
    let normal = f32::from_bits(bits + (120 << 23));
    // Read with the exponent of the smallest normal numbers, a subnormal one is too large by just that number.
    let subnormal = f32::from_bits(bits + (121 << 23)) - LEAST;
    let value = if magnitude < 8 { subnormal } else { normal };
    let value = if magnitude == 0x7f { f32::NAN } else { value };
    f32::from_bits(value.to_bits() | u32::from(code & 0x80) << 24)
}

/// The scales of some rows of a matrix `[rows, cols]` in E4M3; a value is its code's times its block's scale.
#[derive(Debug, Clone, Copy)]
pub struct BlockScales<'a> {
    /// `[ceil(rows / 128), ceil(cols / 128)]` in little-endian single precision.
    values: &'a [[u8; 4]],
    blocks_per_row: usize,
    /// The matrix's row that is row 0 here.
    first_row: usize,
}

impl<'a> BlockScales<'a> {
    /// Scales of a matrix of `rows` rows of `cols` columns, `[ceil(rows / 128), ceil(cols / 128)]` in little-endian
    /// single precision; `None` when `bytes` is not as long as that.
    pub fn new(rows: usize, cols: usize, bytes: &'a [u8]) -> Option<Self> {
        let (values, rest) = bytes.as_chunks::<4>();
        let blocks_per_row = cols.div_ceil(BLOCK);
        let count = rows.div_ceil(BLOCK).checked_mul(blocks_per_row)?;
        (rest.is_empty() && values.len() == count).then_some(Self {
            values,
            blocks_per_row,
            first_row: 0,
        })
    }

    /// The scales of the rows from `start` on.
    #[must_use]
    pub fn from_row(self, start: usize) -> Self {
        Self {
            first_row: self.first_row + start,
            ..self
        }
    }

    /// Whether there are scales for this many rows of this many columns.
    pub fn covers(&self, rows: usize, cols: usize) -> bool {
        let last = self
            .first_row
            .checked_add(rows)
            .and_then(|end| end.div_ceil(BLOCK).checked_mul(self.blocks_per_row));
        self.blocks_per_row == cols.div_ceil(BLOCK) && last.is_some_and(|n| n <= self.values.len())
    }

    /// The scale of the block that holds this row and column; zero outside of the matrix.
    #[inline(always)]
    pub fn at(&self, row: usize, col: usize) -> f32 {
        let index = (self.first_row + row) / BLOCK * self.blocks_per_row + col / BLOCK;
        self.values
            .get(index)
            .map_or(0.0, |&bytes| f32::from_le_bytes(bytes))
    }

    /// Converts the codes of row `row` from column `col` on, which is a multiple of [`BLOCK`].
    #[inline(always)]
    pub fn dequantize(&self, row: usize, col: usize, codes: &[u8], out: &mut [f32]) {
        let blocks = codes.chunks(BLOCK).zip(out.chunks_mut(BLOCK));
        for (index, (codes, out)) in blocks.enumerate() {
            let scale = self.at(row, col + index * BLOCK);
            for (value, &code) in out.iter_mut().zip(codes) {
                *value = e4m3_to_f32(code) * scale;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// From the definition (OCP 8-bit floating point, table 2), digit by digit.
    fn by_definition(code: u8) -> f64 {
        let (exponent, mantissa) = (i32::from(code >> 3 & 15), f64::from(code & 7));
        let magnitude = match (exponent, code & 7) {
            (15, 7) => f64::NAN,
            (0, _) => mantissa / 8.0 * 2f64.powi(-6),
            _ => (1.0 + mantissa / 8.0) * 2f64.powi(exponent - 7),
        };
        if code >> 7 == 1 {
            -magnitude
        } else {
            magnitude
        }
    }

    #[test]
    fn every_code_has_the_value_of_the_definition() {
        for code in 0..=u8::MAX {
            let (found, expected) = (e4m3_to_f32(code), by_definition(code));
            let same = f64::from(found) == expected
                && found.is_sign_negative() == expected.is_sign_negative();
            assert!(
                same || (found.is_nan() && expected.is_nan()),
                "{code:#04x}: {found} and not {expected}"
            );
        }
        assert_eq!(e4m3_to_f32(0x7e), 448.0);
        assert!(e4m3_to_f32(0x7f).is_nan() && e4m3_to_f32(0xff).is_nan());
    }

    #[test]
    fn scales_belong_to_blocks_of_128_rows_and_columns() {
        let values: Vec<u8> = (1..=6_u8)
            .flat_map(|n| f32::from(n).to_le_bytes())
            .collect();
        let scales = BlockScales::new(200, 300, &values).expect("2 x 3 blocks");
        for (row, col, scale) in [
            (0, 0, 1.0),
            (127, 127, 1.0),
            (0, 128, 2.0),
            (127, 299, 3.0),
            (128, 0, 4.0),
            (199, 256, 6.0),
        ] {
            assert_eq!(scales.at(row, col), scale, "row {row}, column {col}");
        }
        assert_eq!(scales.from_row(100).at(28, 0), 4.0);
        assert!(scales.from_row(100).covers(100, 300) && !scales.from_row(157).covers(100, 300));
        assert!(!scales.covers(200, 256) && !scales.covers(usize::MAX, 300));
        assert!(BlockScales::new(257, 300, &values).is_none());
        assert!(BlockScales::new(usize::MAX, usize::MAX, &values).is_none());
    }
}
