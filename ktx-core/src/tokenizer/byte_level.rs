//! GPT-2's table: every byte as one printable character, so that tokens can be written as text.

/// A token per byte, where the vocabulary has one.
pub(super) type ByteTokens = [Option<u32>; 256];

/// The character that stands for a byte: itself if it is printable in Latin-1, else the next one from U+0100 on.
pub(super) fn character_of(byte: u8) -> char {
    let shifted = match byte {
        0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF => return char::from(byte),
        0x00..=0x20 => u32::from(byte),
        0x7F..=0xA0 => u32::from(byte) - 0x7F + 0x21,
        0xAD => 0x43,
    };
    char::from_u32(0x100 + shifted).expect("U+0100 to U+0143 are characters")
}

/// The byte that a character stands for.
fn byte_of(character: char) -> Option<u8> {
    match u32::from(character) {
        code @ (0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF) => u8::try_from(code).ok(),
        code @ 0x100..=0x120 => u8::try_from(code - 0x100).ok(),
        code @ 0x121..=0x142 => u8::try_from(code - 0x121 + 0x7F).ok(),
        0x143 => Some(0xAD),
        _ => None,
    }
}

/// Appends the bytes that a token stands for; a token that is not written in the table's characters stands for its
/// own text.
pub(super) fn decode_into(token: &str, bytes: &mut Vec<u8>) {
    let start = bytes.len();
    for character in token.chars() {
        match byte_of(character) {
            Some(byte) => bytes.push(byte),
            None => {
                bytes.truncate(start);
                bytes.extend_from_slice(token.as_bytes());
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn table_is_a_bijection() {
        for byte in 0..=255 {
            assert_eq!(byte_of(character_of(byte)), Some(byte));
        }
        assert_eq!(character_of(b' '), 'Ġ');
        assert_eq!(character_of(b'\n'), 'Ċ');
        assert_eq!(byte_of('你'), None);
    }
}
