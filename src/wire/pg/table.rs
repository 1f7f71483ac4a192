//! Answers that the gate makes itself: columns with a type, rows, and both of PostgreSQL's formats for them.
//!
//! What it is NOT: a decoder; and nobody's rows but the gate's own pass here.

use super::put;
use bytes::{BufMut, BytesMut};
use pgwire::messages::data::{DataRow, FieldDescription, RowDescription};

/// A column's type.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Text,
    Int,
    Float,
    Bool,
}

impl Kind {
    /// PostgreSQL's own number of it, by which drivers decode; and its length.
    fn oid(self) -> (u32, i16) {
        match self {
            Kind::Bool => (16, 1),
            Kind::Int => (20, 8),
            Kind::Text => (25, -1),
            Kind::Float => (701, 8),
        }
    }
}

/// One value. It must be of its column's kind, or null.
#[derive(Debug, Clone, PartialEq)]
pub enum Cell {
    Text(String),
    Int(i64),
    Float(f64),
    Bool(bool),
    Null,
}

impl From<String> for Cell {
    fn from(text: String) -> Cell {
        Cell::Text(text)
    }
}
impl From<&str> for Cell {
    fn from(text: &str) -> Cell {
        Cell::Text(text.to_owned())
    }
}
impl From<bool> for Cell {
    fn from(is: bool) -> Cell {
        Cell::Bool(is)
    }
}
impl From<f64> for Cell {
    fn from(number: f64) -> Cell {
        Cell::Float(number)
    }
}
impl From<u64> for Cell {
    fn from(number: u64) -> Cell {
        Cell::Int(i64::try_from(number).unwrap_or(i64::MAX))
    }
}
impl From<u32> for Cell {
    fn from(number: u32) -> Cell {
        Cell::Int(number.into())
    }
}
impl From<i32> for Cell {
    fn from(number: i32) -> Cell {
        Cell::Int(number.into())
    }
}
impl<T: Into<Cell>> From<Option<T>> for Cell {
    fn from(value: Option<T>) -> Cell {
        value.map_or(Cell::Null, Into::into)
    }
}

/// Name and type of a column.
pub type Column<'a> = (&'a str, Kind);
pub type Row = Vec<Cell>;

/// How an answer is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Typing {
    /// With PostgreSQL's types.
    Typed,
    /// All columns of type 0 and in text, as pgpool-II answers a simple query.
    Untyped,
}

/// The format of column `at`, from the formats of a Bind: none means text, one is for all.
fn format_of(formats: &[i16], at: usize) -> i16 {
    match formats {
        [one] => *one,
        many => many.get(at).copied().unwrap_or(0),
    }
}

/// Appends the RowDescription.
pub fn describe(columns: &[Column<'_>], formats: &[i16], typing: Typing, out: &mut BytesMut) {
    let field = |(at, (name, kind)): (usize, &Column<'_>)| {
        let (oid, length) = if typing == Typing::Untyped { (0, -1) } else { kind.oid() };
        FieldDescription::new((*name).to_owned(), 0, 0, oid, length, -1, format_of(formats, at))
    };
    put(&RowDescription::new(columns.iter().enumerate().map(field).collect()), out);
}

/// Appends a DataRow.
pub fn row(cells: &[Cell], formats: &[i16], out: &mut BytesMut) {
    let mut data = BytesMut::new();
    for (at, cell) in cells.iter().enumerate() {
        let binary = format_of(formats, at) == 1;
        let text = match cell {
            Cell::Null => {
                data.put_i32(-1);
                continue;
            }
            Cell::Int(number) if binary => {
                data.put_i32(8);
                data.put_i64(*number);
                continue;
            }
            Cell::Float(number) if binary => {
                data.put_i32(8);
                data.put_f64(*number);
                continue;
            }
            Cell::Bool(is) if binary => {
                data.put_i32(1);
                data.put_u8(u8::from(*is));
                continue;
            }
            Cell::Text(text) => text.as_bytes(),
            Cell::Int(number) => &number.to_string().into_bytes()[..],
            Cell::Float(number) => &number.to_string().into_bytes()[..],
            Cell::Bool(is) => {
                if *is {
                    &b"t"[..]
                } else {
                    &b"f"[..]
                }
            }
        };
        data.put_i32(i32::try_from(text.len()).unwrap_or(0));
        data.put_slice(text);
    }
    put(&DataRow::new(data, i16::try_from(cells.len()).unwrap_or(0)), out);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_looks_like_postgresqls_in_both_formats() {
        let cells = [Cell::from("ä"), Cell::from(-7), Cell::from(1.5), Cell::from(true), Cell::Null];
        let mut out = BytesMut::new();
        row(&cells, &[], &mut out);
        let text = b"D\0\0\0\x27\0\x05\0\0\0\x02\xc3\xa4\0\0\0\x02-7\0\0\0\x031.5\0\0\0\x01t\xff\xff\xff\xff";
        assert_eq!(&out[5..], &text[5..]);
        let mut out = BytesMut::new();
        row(&cells[1..], &[1], &mut out);
        let mut binary = b"\0\x04\0\0\0\x08".to_vec();
        binary.extend((-7i64).to_be_bytes());
        binary.extend(b"\0\0\0\x08");
        binary.extend(1.5f64.to_be_bytes());
        binary.extend(b"\0\0\0\x01\x01\xff\xff\xff\xff");
        assert_eq!(&out[5..], &binary);
        let mut mixed = BytesMut::new();
        row(&cells[1..3], &[0, 1], &mut mixed);
        assert!(mixed.windows(2).any(|two| two == b"-7") && mixed.ends_with(&1.5f64.to_be_bytes()));
    }

    #[test]
    fn columns_are_described_with_their_types_or_without() {
        let columns = [("a", Kind::Int), ("b", Kind::Text)];
        let mut out = BytesMut::new();
        describe(&columns, &[1, 0], Typing::Typed, &mut out);
        let typed = [
            &b"\0\x02a\0\0\0\0\0\0\0\0\0\0\x14\0\x08\xff\xff\xff\xff\0\x01"[..],
            b"b\0\0\0\0\0\0\0\0\0\0\x19\xff\xff\xff\xff\xff\xff\0\0",
        ];
        assert_eq!(&out[5..], typed.concat());
        let mut out = BytesMut::new();
        describe(&columns[..1], &[], Typing::Untyped, &mut out);
        assert_eq!(&out[5..], b"\0\x01a\0\0\0\0\0\0\0\0\0\0\0\xff\xff\xff\xff\xff\xff\0\0");
    }
}
