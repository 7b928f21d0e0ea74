//! Files of rows as text: JSON or JSONL as it is, unpacked from gzip or zstd, or from a Parquet table.

use std::io::{self, BufRead, Read};
use std::path::Path;

use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::{Field, Row};
use serde_json::{Map, Value};

use super::formats::{Format, recognise};
use crate::meter::{Meter, Unit};
use crate::panics::catch_expected;
use crate::quote::{cut, quote};

/// Most bytes of an unpacked text, so that a small file cannot fill the memory.
const MOST: u64 = 4 << 30;

/// Layers of packing that are opened: a `.json.gz` in a `.zst`, say.
const MOST_LAYERS: usize = 3;

/// Why rows cannot be read.
#[derive(Debug)]
pub enum RowsError {
    /// The file cannot be read.
    Io(io::Error),
    /// It is in another format, or damaged: what it is, with the way out.
    Format(String),
}

/// Reads a file of rows as JSON or JSONL, by its first bytes. A Parquet table gives one row a line.
///
/// # Errors
/// A file that cannot be read, that is damaged, or of another format.
pub fn read_rows(path: &Path) -> Result<Vec<u8>, RowsError> {
    let mut bytes = super::read(path).map_err(RowsError::Io)?;
    if super::is_zeroed(&bytes) {
        return Err(RowsError::Format(format!("{}: fetch or write it again", super::ZEROED)));
    }
    for layer in 0..=MOST_LAYERS {
        let unpacked = match recognise(&bytes) {
            Some(Format::Gzip) if layer < MOST_LAYERS => gzip(Packed::new(path, &bytes)),
            Some(Format::Zstd) if layer < MOST_LAYERS => zstd(Packed::new(path, &bytes)),
            Some(Format::Parquet) if layer == 0 => {
                drop(bytes);
                return table(path);
            }
            // The caller names the encoding with the line.
            Some(Format::UTF_16) => return Ok(bytes),
            Some(Format::Parquet) => {
                let message = "what is packed in the file is a Parquet table: unpack it (`gzip -d`, `zstd -d`), and give the table";
                return Err(RowsError::Format(message.into()));
            }
            Some(other) => {
                let (name, way) = other.describe();
                let inside = if layer > 0 { "what is packed in the file is" } else { "the file is" };
                return Err(RowsError::Format(format!("{inside} {name}, not rows of JSON; {way}")));
            }
            None => return separated(&bytes, path).map_or(Ok(bytes), |message| Err(RowsError::Format(message))),
        };
        bytes = unpacked.map_err(RowsError::Format)?;
    }
    Err(RowsError::Format("it is packed too many times; unpack it".into()))
}

/// Packed bytes that are left, and how far their unpacking is.
struct Packed<'a> {
    bytes: &'a [u8],
    meter: Meter,
}

impl<'a> Packed<'a> {
    /// All bytes of a file.
    fn new(path: &Path, bytes: &'a [u8]) -> Self {
        Self { bytes, meter: Meter::start(format!("unpacking {}", path.display()), Unit::Bytes, bytes.len() as u64) }
    }
}

impl Read for Packed<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.bytes.read(buffer)?;
        self.meter.add(n);
        Ok(n)
    }
}

impl BufRead for Packed<'_> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        // In pieces: what a reader is given at once counts as done at once.
        Ok(&self.bytes[..self.bytes.len().min(1 << 16)])
    }

    fn consume(&mut self, n: usize) {
        self.bytes.consume(n);
        self.meter.add(n);
    }
}

/// One or more members. Zero bytes after them fill a block of a tape or a device, and are no data.
fn gzip(packed: Packed<'_>) -> Result<Vec<u8>, String> {
    /// The first bytes of a member.
    const MAGIC: [u8; 2] = [0x1f, 0x8b];
    let (mut unpacked, mut rest) = (Vec::new(), packed);
    while rest.bytes.iter().any(|b| *b != 0) {
        if !rest.bytes.starts_with(&MAGIC) {
            let more = rest.bytes.len();
            return Err(format!(
                "{more} bytes that are no gzip data follow what is packed: fetch the file again, or write it again"
            ));
        }
        let mut member = flate2::bufread::GzDecoder::new(rest);
        unpacked.extend(unpack(&mut member, MOST - unpacked.len() as u64)?);
        rest = member.into_inner();
    }
    Ok(unpacked)
}

fn zstd(packed: Packed<'_>) -> Result<Vec<u8>, String> {
    let damaged = |e: io::Error| format!("it is compressed by zstd, and damaged ({e})");
    let mut decoder = ::zstd::Decoder::with_buffer(packed).map_err(damaged)?;
    // `zstd --long`
    decoder.window_log_max(31).map_err(damaged)?;
    unpack(decoder, MOST)
}

/// At most `most` bytes.
fn unpack(packed: impl Read, most: u64) -> Result<Vec<u8>, String> {
    let mut bytes = Vec::new();
    packed.take(most + 1).read_to_end(&mut bytes).map_err(|e| {
        format!("the packed data are damaged or cut off ({}): fetch the file again", cut(&e.to_string(), 100))
    })?;
    match bytes.len() as u64 > most {
        true => Err(format!("unpacked it has more than {} GiB: unpack it, and give a part of it", MOST >> 30)),
        false => Ok(bytes),
    }
}

/// The rows of a Parquet table, one a line.
fn table(path: &Path) -> Result<Vec<u8>, RowsError> {
    let file = super::open(path).map_err(RowsError::Io)?;
    let damaged = |what: &str| {
        let convert = "convert it: pandas.read_parquet(FILE).to_json('rows.jsonl', orient='records', lines=True)";
        match what.split_once("Disabled feature at compile time: ") {
            Some((_, codec)) => {
                format!("the file is a Parquet table compressed by {}, which is not read; {convert}", cut(codec, 40))
            }
            None if what.contains("BYTE_ARRAY as String") => {
                "the file is a Parquet table with a column that is marked as text and holds bytes that are no text in UTF-8: leave that \
                 column out, or write it as bytes"
                    .into()
            }
            None => format!(
                "the file is a Parquet table that cannot be read ({}): fetch it again, or {convert}",
                cut(what, 200)
            ),
        }
    };
    let read = || -> Result<Vec<u8>, String> {
        let reader = SerializedFileReader::new(file).map_err(|e| damaged(&e.to_string()))?;
        let rows = u64::try_from(reader.metadata().file_metadata().num_rows()).unwrap_or_default();
        let meter = Meter::start(format!("reading the table {}", path.display()), Unit::Rows, rows);
        let mut text = Vec::new();
        for (number, row) in reader.get_row_iter(None).map_err(|e| damaged(&e.to_string()))?.enumerate() {
            let row = row.map_err(|e| damaged(&e.to_string()))?;
            let row = object(None, &row).map_err(|e| format!("row {}: {e}", number + 1))?;
            serde_json::to_writer(&mut text, &row).expect("values have string keys");
            text.push(b'\n');
            meter.add(1);
            if text.len() as u64 > MOST {
                return Err(format!("as JSON it has more than {} GiB: give a part of it", MOST >> 30));
            }
        }
        match text.is_empty() {
            true => Err("the file is a Parquet table without rows: give one that has some".into()),
            false => Ok(text),
        }
    };
    // The library panics on some damaged files.
    let read = catch_expected(read).unwrap_or_else(|| Err(damaged("its parts contradict each other")));
    read.map_err(RowsError::Format)
}

/// A column, or a field of a column that holds structures.
struct Column<'a> {
    of: Option<&'a Self>,
    name: &'a str,
}

impl Column<'_> {
    /// Its name after those of the columns that it is in: `image.bytes`.
    fn path(&self) -> String {
        self.of.map_or_else(String::new, |of| of.path() + ".") + self.name
    }

    /// In place of bytes that are no text.
    fn no_text(&self) -> Value {
        Value::Object(Map::from_iter([(NO_TEXT.to_owned(), self.path().into())]))
    }
}

/// The key of what stands for bytes that are no text, with their column as its value. No text has this character.
const NO_TEXT: &str = "\u{fdd0}no text";

/// The column of the first bytes in a value that are no text. Whoever reads the value must refuse it.
pub fn no_text_in(value: &Value) -> Option<&str> {
    match value {
        Value::Object(map) => map.get(NO_TEXT).and_then(Value::as_str).or_else(|| map.values().find_map(no_text_in)),
        Value::Array(items) => items.iter().find_map(no_text_in),
        _ => None,
    }
}

fn object(of: Option<&Column<'_>>, row: &Row) -> Result<Value, String> {
    let mut columns = Map::new();
    for (name, field) in row.get_column_iter() {
        let column = Column { of, name };
        if columns.insert(name.clone(), value(&column, field)?).is_some() {
            return Err(format!("the column {} is there twice: rename or remove one of them", quote(&column.path())));
        }
    }
    Ok(Value::Object(columns))
}

fn value(column: &Column<'_>, field: &Field) -> Result<Value, String> {
    match field {
        Field::Group(row) => object(Some(column), row),
        Field::ListInternal(list) => list.elements().iter().map(|item| value(column, item)).collect(),
        Field::MapInternal(map) => {
            let mut entries = Map::new();
            for (key, item) in map.entries() {
                let key = match value(column, key)? {
                    Value::String(key) => key,
                    no_text @ Value::Object(_) => return Ok(no_text),
                    other => other.to_string(),
                };
                entries.insert(key, value(column, item)?);
            }
            Ok(Value::Object(entries))
        }
        // Text that its writer has not marked as text, or other bytes, which harm nothing in a column that nobody reads.
        Field::Bytes(bytes) => {
            Ok(String::from_utf8(bytes.data().to_vec()).map_or_else(|_| column.no_text(), Value::String))
        }
        other => Ok(other.to_json_value()),
    }
}

/// The error for a table of separated values: a first line of names that are no JSON.
fn separated(bytes: &[u8], path: &Path) -> Option<String> {
    let text = super::without_mark(bytes).trim_ascii_start();
    let mut lines = text[..text.len().min(1 << 16)].split(|b| *b == b'\n').map(String::from_utf8_lossy);
    let first = lines.next()?;
    let first = first.trim_start_matches('\u{1e}'); // of RFC 7464
    if first.is_empty() || first.starts_with(['{', '[', '"']) && first.contains(['{', '[']) {
        return None;
    }
    let extension = path.extension().and_then(|e| e.to_str()).unwrap_or_default().to_ascii_lowercase();
    let separator = ['\t', ',', ';', '|'].into_iter().find(|separator| {
        let names: Vec<&str> = first.trim_end().split(*separator).collect();
        let plain = |name: &&str| !name.trim().is_empty() && name.split_whitespace().count() <= 3 && name.len() <= 60;
        names.len() > 1 && names.iter().all(plain)
    });
    let second = lines.next().is_some_and(|line| separator.is_some_and(|separator| line.contains(separator)));
    let (kind, given) = match (separator, &*extension) {
        (Some('\t'), _) | (None, "tsv" | "tab") => ("TSV", ", sep='\\t'"),
        (Some(';'), _) => ("CSV", ", sep=';'"),
        (Some('|'), _) => ("CSV", ", sep='|'"),
        (Some(_), _) | (None, "csv") => ("CSV", ""),
        (None, _) => return None,
    };
    (second || ["csv", "tsv", "tab"].contains(&&*extension)).then(|| {
        format!(
            "the file is a table of separated values ({kind}), not rows of JSON; convert it: python -c \"import pandas; \
             pandas.read_csv('FILE'{given}).to_json('rows.jsonl', orient='records', lines=True)\""
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use parquet::data_type::{ByteArray, ByteArrayType, Int32Type};
    use parquet::file::writer::{SerializedColumnWriter, SerializedFileWriter};
    use parquet::schema::parser::parse_message_type;
    use std::io::Write;

    #[test]
    fn a_json_text_sequence_is_no_table() {
        let row = "{\"a\": \"b\", \"c\": 1}\n";
        assert_eq!(separated(format!("\u{1e}{row}\u{1e}{row}").as_bytes(), Path::new("f")), None);
        assert!(separated(b"a,b\n1,2\n", Path::new("f")).unwrap().contains("(CSV)"));
    }

    #[test]
    fn zero_bytes_after_the_members_of_a_gzip_file_are_no_data() {
        let member = |text: &[u8]| {
            let mut packed = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
            packed.write_all(text).unwrap();
            packed.finish().unwrap()
        };
        let gzip = |bytes: &[u8]| super::gzip(Packed::new(Path::new("rows.gz"), bytes));
        let two = [member(b"{}\n"), member(b"[]")].concat();
        assert_eq!(gzip(&two).unwrap(), b"{}\n[]");
        assert_eq!(gzip(&[two.as_slice(), &[0; 700]].concat()).unwrap(), b"{}\n[]");
        assert!(gzip(&[two.as_slice(), b"rest"].concat()).is_err());
        assert!(gzip(&two[..two.len() - 3]).unwrap_err().contains("cut off"));
    }

    /// Reads a table of two columns, whose only row is written by `write` with the number of the column.
    fn table_of(columns: &str, write: fn(&mut SerializedColumnWriter<'_>, i32)) -> Result<Vec<u8>, String> {
        let file = tempfile::NamedTempFile::new().unwrap();
        let schema = parse_message_type(&format!("message table {{ {columns} }}")).unwrap().into();
        let to = std::fs::File::create(file.path()).unwrap();
        let mut writer = SerializedFileWriter::new(to, schema, <_>::default()).unwrap();
        let mut group = writer.next_row_group().unwrap();
        for number in [1, 2] {
            let mut column = group.next_column().unwrap().unwrap();
            write(&mut column, number);
            column.close().unwrap();
        }
        group.close().unwrap();
        writer.close().unwrap();
        table(file.path()).map_err(|error| match error {
            RowsError::Format(what) => what,
            RowsError::Io(error) => error.to_string(),
        })
    }

    #[test]
    fn a_table_with_two_columns_of_a_name_is_refused() {
        let read = |second: &str| {
            table_of(&format!("required int32 label; required int32 {second};"), |column, number| {
                _ = column.typed::<Int32Type>().write_batch(&[number], None, None).unwrap();
            })
        };
        assert_eq!(read("other").unwrap(), b"{\"label\":1,\"other\":2}\n");
        let error = read("label").unwrap_err();
        assert!(error.contains("row 1: the column `label` is there twice"), "{error}");
    }

    #[test]
    fn bytes_that_are_no_text_stand_for_their_column_unless_it_is_marked_as_text() {
        let read = |columns: &str| {
            table_of(columns, |column, _| {
                let bytes = ByteArray::from(vec![0xff, 0xfe]);
                _ = column.typed::<ByteArrayType>().write_batch(&[bytes], None, None).unwrap();
            })
        };
        let rows = read("required binary key; required group image { required binary bytes; }").unwrap();
        let row: Value = serde_json::from_slice(&rows).unwrap();
        assert_eq!(["key", "image"].map(|name| no_text_in(&row[name])), [Some("key"), Some("image.bytes")]);
        let error = read("required binary key; required binary label (UTF8);").unwrap_err();
        assert!(error.starts_with("the file is a Parquet table with a column that is marked as text"), "{error}");
        assert!(!error.contains("Utf8Error"), "{error}");
    }
}
