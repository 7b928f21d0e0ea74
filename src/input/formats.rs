//! File formats by their first bytes.

/// What a file is, where it is neither JSON nor another text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// One or more gzip members.
    Gzip,
    /// One or more Zstandard frames.
    Zstd,
    /// Apache Parquet.
    Parquet,
    /// Another format: its name, and how to get from it what moewarden reads.
    Other(&'static str, &'static str),
}

impl Format {
    /// Text in UTF-16, with a byte order mark or without.
    pub const UTF_16: Self = Format::Other("text in UTF-16", "save it as UTF-8");

    /// Whether it is one file, compressed.
    pub fn is_compressed(self) -> bool {
        self.describe().0.starts_with("compressed by ")
    }

    /// Name and way out.
    pub fn describe(self) -> (&'static str, &'static str) {
        match self {
            Format::Gzip => ("compressed by gzip", "unpack it with `gzip -d`"),
            Format::Zstd => ("compressed by zstd", "unpack it with `zstd -d`"),
            Format::Parquet => ("a Parquet table", "this file must be JSON"),
            Format::Other(name, way) => (name, way),
        }
    }
}

const UNPACK: &str = "unpack it, and give the file in it";

/// First bytes, name, way out.
const OTHERS: [(&[u8], &str, &str); 19] = [
    (b"PARE", "an encrypted Parquet table", "decrypt it"),
    (b"PK\x03\x04", "a zip archive (or a workbook, which is one)", UNPACK),
    (b"PK\x05\x06", "an empty zip archive", UNPACK),
    (b"\xfd7zXZ\0", "compressed by xz", "unpack it with `xz -d`"),
    (b"BZh", "compressed by bzip2", "unpack it with `bzip2 -d`"),
    (b"\x04\x22\x4d\x18", "compressed by lz4", "unpack it with `lz4 -d`"),
    (b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive", UNPACK),
    (b"Rar!\x1a\x07", "a RAR archive", UNPACK),
    (
        b"ARROW1\0\0",
        "an Arrow (Feather) table",
        "convert it: pandas.read_feather(FILE).to_json('rows.jsonl', orient='records', lines=True)",
    ),
    (
        b"\xff\xff\xff\xff",
        "an Arrow stream, as datasets caches it",
        "convert it: datasets.Dataset.from_file(FILE).to_json('rows.jsonl')",
    ),
    (b"ORC", "an ORC table", "convert it: pandas.read_orc(FILE).to_json('rows.jsonl', orient='records', lines=True)"),
    (b"Obj\x01", "an Avro file", "convert it to JSONL"),
    (
        b"SQLite format 3\0",
        "an SQLite database",
        "convert it: pandas.read_sql(QUERY, CONNECTION).to_json('rows.jsonl', orient='records', lines=True)",
    ),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file", "convert it to JSONL, or weights to safetensors"),
    (b"\x93NUMPY", "a NumPy array", "convert it to JSONL"),
    (b"GGUF", "a GGUF model", "give the original model in safetensors"),
    (b"%PDF-", "a PDF document", "convert it to JSONL"),
    (
        b"version https://git-lfs.github.com/spec/",
        "a pointer of Git LFS in place of the file",
        "fetch the file itself: `git lfs pull`, or `hf download`",
    ),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an old Office document", "convert it: save it as CSV, then to JSONL"),
];

/// The format of a file with these bytes; `None`: nothing but text is known.
pub fn recognise(bytes: &[u8]) -> Option<Format> {
    if bytes.starts_with(b"\x1f\x8b") {
        return Some(Format::Gzip);
    }
    // A skippable frame may come first.
    let skippable = bytes.first().is_some_and(|b| b & 0xf0 == 0x50) && bytes.get(1..4) == Some(b"\x2a\x4d\x18");
    if bytes.starts_with(b"\x28\xb5\x2f\xfd") || skippable {
        return Some(Format::Zstd);
    }
    if bytes.starts_with(b"PAR1") {
        return Some(Format::Parquet);
    }
    if bytes.first() == Some(&0x80) && bytes.get(1).is_some_and(|protocol| (2..=5).contains(protocol)) {
        return Some(Format::Other(
            "a pickle",
            "it could run code, so it is not loaded: convert it where you trust it",
        ));
    }
    if bytes.get(257..262) == Some(b"ustar") {
        return Some(Format::Other("a tar archive", UNPACK));
    }
    if [&b"\xff\xfe\0\0"[..], b"\0\0\xfe\xff"].iter().any(|mark| bytes.starts_with(mark)) {
        return Some(Format::Other("text in UTF-32", "save it as UTF-8"));
    }
    let marked =
        bytes.starts_with(b"\xff\xfe") && !bytes.starts_with(b"\xff\xfe\xff") || bytes.starts_with(b"\xfe\xff");
    if marked || is_utf_16_without_mark(bytes) {
        return Some(Format::UTF_16);
    }
    if let Some((_, name, way)) = OTHERS.iter().find(|(magic, ..)| bytes.starts_with(magic)) {
        return Some(Format::Other(name, way));
    }
    let head = super::without_mark(bytes);
    let head = head[..head.len().min(512)].trim_ascii_start().to_ascii_lowercase();
    if head.starts_with(b"<!doctype") || head.starts_with(b"<html") {
        return Some(Format::Other(
            "a web page",
            "an error page or a login page was saved in place of the file: fetch it again",
        ));
    }
    if head.starts_with(b"<?xml") {
        return Some(Format::Other("an XML document", "convert it to JSON"));
    }
    None
}

/// Whether the first two characters are ASCII in UTF-16, of either byte order.
fn is_utf_16_without_mark(bytes: &[u8]) -> bool {
    let text = |b: u8| b.is_ascii_graphic() || b.is_ascii_whitespace();
    let pairs = || bytes.chunks_exact(2);
    let first = |of: fn(&[u8]) -> [u8; 2]| pairs().take(2).all(|pair| matches!(of(pair), [c, 0] if text(c)));
    bytes.len() >= 4 && (first(|pair| [pair[0], pair[1]]) || first(|pair| [pair[1], pair[0]]))
}
