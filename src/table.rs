//! Tables: columns padded to their widest cell, coloured on a terminal.

use std::io::{self, Write};

use crate::terminal::{Paint, Style};

/// How a column's cells stand in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Align {
    Left,
    Right,
}

/// Rows of cells below a header.
pub(crate) struct Table<const N: usize> {
    columns: [(&'static str, Align); N],
    rows: Vec<[String; N]>,
}

impl<const N: usize> Table<N> {
    pub(crate) fn new(columns: [(&'static str, Align); N]) -> Self {
        Self {
            columns,
            rows: Vec::new(),
        }
    }

    pub(crate) fn push(&mut self, row: [String; N]) {
        self.rows.push(row);
    }

    /// Writes the header and all rows, two spaces between columns and none at the ends of lines.
    pub(crate) fn write(&self, out: &mut dyn Write) -> io::Result<()> {
        self.write_painted(out, Style::Plain, &|_, _| Paint::Plain)
    }

    /// The same; where the style has colours, `paint` says how the cell of a column stands out.
    pub(crate) fn write_painted(
        &self,
        out: &mut dyn Write,
        style: Style,
        paint: &dyn Fn(usize, &str) -> Paint,
    ) -> io::Result<()> {
        let header = self.columns.map(|(name, _)| name.to_owned());
        let width = |i: usize| {
            let cells = self.rows.iter().map(|row| row[i].chars().count());
            cells.chain([header[i].chars().count()]).max().unwrap_or(0)
        };
        let widths: [usize; N] = std::array::from_fn(width);
        for (number, row) in std::iter::once(&header).chain(&self.rows).enumerate() {
            // Nothing stands behind the last cell that is not empty.
            let cells = row
                .iter()
                .rposition(|cell| !cell.is_empty())
                .map_or(0, |last| last + 1);
            for i in 0..cells {
                let space = " ".repeat(widths[i] - row[i].chars().count());
                let text = style.paint(
                    match number {
                        0 => Paint::Bold,
                        _ => paint(i, &row[i]),
                    },
                    &row[i],
                );
                let (before, after) = match self.columns[i].1 {
                    Align::Left if i + 1 == cells => ("", ""),
                    Align::Left => ("", space.as_str()),
                    Align::Right => (space.as_str(), ""),
                };
                let gap = if i == 0 { "" } else { "  " };
                write!(out, "{gap}{before}{text}{after}")?;
            }
            writeln!(out)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let mut table = Table::new([("name", Align::Left), ("bytes", Align::Right)]);
        table.push(["a".into(), "1234567".into()]);
        table.push(["überlang".into(), "".into()]);
        let mut out = Vec::new();
        table.write(&mut out).unwrap();
        assert_eq!(
            String::from_utf8(out).unwrap(),
            "name        bytes\na         1234567\nüberlang\n"
        );
    }

    #[test]
    fn colours_change_no_width() {
        let mut table = Table::new([("name", Align::Left), ("bytes", Align::Right)]);
        table.push(["a".into(), "12".into()]);
        let paint = |column: usize, cell: &str| match (column, cell) {
            (0, "a") => Paint::Green,
            _ => Paint::Plain,
        };
        let mut out = Vec::new();
        table
            .write_painted(&mut out, Style::Coloured, &paint)
            .unwrap();
        assert_eq!(
            String::from_utf8(out).unwrap(),
            "\x1b[1mname\x1b[0m  \x1b[1mbytes\x1b[0m\n\x1b[32ma\x1b[0m        12\n"
        );
    }
}
