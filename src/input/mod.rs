//! Input files: opened only where they are files, without a byte order mark, and named by what they are where they are not
//! what they should be.

mod formats;
mod rows;
mod words;

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::Path;

use serde::de::IgnoredAny;

use crate::meter::{Meter, Unit};
use crate::quote::quote;

pub use formats::{Format, recognise};
pub use rows::{RowsError, no_text_in, read_rows};
pub use words::{cut_off, json_problem, json_words, line_problem, problem_in, words, yaml_words};

/// How to get a damaged file again.
const FETCH_AGAIN: &str =
    "if the file is damaged, fetch it again (from the hub: `hf download ID FILE --force-download`)";

/// The same for a file that moewarden wrote.
const WRITE_AGAIN: &str = "if the file is damaged, run the command that wrote it again, with --overwrite";

/// Bytes that are hashed at a time: enough for all cores.
const CHUNK: u64 = 16 << 20;

/// Opens a file for reading. A folder, a pipe (FIFO), a socket or a device in its place is an error: opening a pipe would wait
/// for a writer, perhaps without end.
///
/// # Errors
/// The operating system's; [`io::ErrorKind::IsADirectory`] and [`io::ErrorKind::InvalidInput`] with what it is.
pub fn open(path: &Path) -> io::Result<File> {
    let kind = fs::metadata(path).map_err(|e| dangling(path).unwrap_or(e))?.file_type();
    if kind.is_dir() {
        return Err(io::Error::new(io::ErrorKind::IsADirectory, "it is a folder (a directory), not a file"));
    }
    if !kind.is_file() {
        let message = format!("it is {}, not a file: write its content into a file first", special(kind));
        return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
    }
    File::open(path)
}

/// The error of a link without a target. It is another one than that of a missing file, which may be optional.
pub fn dangling(path: &Path) -> Option<io::Error> {
    let target = fs::read_link(path).ok().filter(|_| !path.exists())?;
    let target = quote(&target.to_string_lossy());
    let message = format!(
        "it is a link to {target}, which does not exist: if the folder is a copy, such as one of a snapshot in the cache of Hugging Face, \
         copy it anew with the files that its links point to (`cp -rL`); if it is that cache itself, fetch the file again (`hf download`)"
    );
    Some(io::Error::new(io::ErrorKind::InvalidInput, message))
}

/// Whether there is a file, or a link, perhaps without a target: then opening it says so.
pub fn is_there(path: &Path) -> bool {
    path.exists() || path.is_symlink()
}

#[cfg(unix)]
fn special(kind: fs::FileType) -> &'static str {
    use std::os::unix::fs::FileTypeExt;
    match kind {
        kind if kind.is_fifo() => "a pipe (FIFO)",
        kind if kind.is_socket() => "a socket",
        _ => "a device",
    }
}

#[cfg(not(unix))]
fn special(_: fs::FileType) -> &'static str {
    "a special file"
}

/// Reads a file as it is.
///
/// # Errors
/// Those of [`open`] and of reading.
pub fn read(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    open(path)?.read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// The blake3 hash of a file's content.
///
/// # Errors
/// Those of [`open`] and of reading.
pub fn hash(path: &Path) -> io::Result<blake3::Hash> {
    let mut file = open(path)?;
    let size = file.metadata()?.len();
    let meter = Meter::start(format!("hashing {}", path.display()), Unit::Bytes, size);
    let mut hasher = blake3::Hasher::new();
    let mut chunk = vec![0; size.clamp(1, CHUNK) as usize];
    loop {
        match file.read(&mut chunk)? {
            0 => return Ok(hasher.finalize()),
            n => {
                hasher.update_rayon(&chunk[..n]);
                meter.add(n);
            }
        }
    }
}

/// Reads a UTF-8 text, without its byte order mark.
///
/// # Errors
/// Those of [`read`]; [`io::ErrorKind::InvalidData`] for another encoding.
pub fn read_text(path: &Path) -> io::Result<String> {
    let mut text = read_marked_text(path)?;
    if text.starts_with(MARK) {
        text.drain(..MARK.len_utf8());
    }
    Ok(text)
}

/// As [`read_text`], with a byte order mark if the file has one.
///
/// # Errors
/// Those of [`read_text`].
pub fn read_marked_text(path: &Path) -> io::Result<String> {
    let bytes = read(path)?;
    let other = |bytes: &[u8]| {
        let again = "write or fetch it again";
        let what = what_it_is_unless(bytes, again).unwrap_or_else(|| "it is not UTF-8".into());
        io::Error::new(io::ErrorKind::InvalidData, what)
    };
    // UTF-16 of ASCII characters without a byte order mark is valid UTF-8, too: with zero characters in between.
    if recognise(&bytes) == Some(Format::UTF_16) || is_zeroed(&bytes) {
        return Err(other(&bytes));
    }
    String::from_utf8(bytes).map_err(|e| other(e.as_bytes()))
}

/// The byte order mark.
const MARK: char = '\u{feff}';

/// A UTF-8 text without its byte order mark.
pub fn without_mark(bytes: &[u8]) -> &[u8] {
    bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes)
}

/// Why a file of a model is not the JSON that it should be, with the way out.
pub fn not_json(bytes: &[u8], error: &serde_json::Error) -> String {
    damaged(bytes, error, FETCH_AGAIN)
}

/// Why a file is not the JSON that moewarden writes, with the way out.
pub fn not_written(bytes: &[u8], error: &serde_json::Error) -> String {
    damaged(bytes, error, WRITE_AGAIN)
}

fn damaged(bytes: &[u8], error: &serde_json::Error, again: &str) -> String {
    if let Some(what) = what_it_is_unless(bytes, again) {
        return what;
    }
    // An error of the content may hide one of the syntax: of a file that ends too early, say.
    let syntax = serde_json::from_slice::<IgnoredAny>(bytes).err();
    let error = syntax.as_ref().unwrap_or(error);
    // Then the file itself is the value that is meant.
    let is_scalar = !matches!(bytes.trim_ascii_start().first(), Some(b'{' | b'['));
    let problem = match is_scalar && error.is_data() {
        true => json_words(error).replacen("a value should", "it should", 1),
        false => problem_in(bytes, error),
    };
    match &syntax {
        Some(syntax) if cut_off(bytes, syntax).is_some() => format!(
            "the file ends in the middle of its JSON, as after a download or a writing that was cut off: {problem}; {again}"
        ),
        Some(_) => format!("not JSON: {problem}; {again}"),
        None if std::str::from_utf8(bytes).is_err() => format!("not text in UTF-8: {problem}; {again}"),
        None => format!("not what this file should hold: {problem}; {again}"),
    }
}

/// What a file is, with the way out, where its first bytes say that it is no text.
pub fn what_it_is(bytes: &[u8]) -> Option<String> {
    what_it_is_unless(bytes, FETCH_AGAIN)
}

fn what_it_is_unless(bytes: &[u8], again: &str) -> Option<String> {
    if bytes.is_empty() {
        return Some(format!("the file is empty; {again}"));
    }
    if is_zeroed(bytes) {
        return Some(format!("{ZEROED}; {again}"));
    }
    let (name, way) = recognise(bytes)?.describe();
    Some(format!("the file is {name}; {way}"))
}

const ZEROED: &str = "the file holds only zero bytes, as after a crash or a full disk";

/// Whether a file was given its length and not its content.
fn is_zeroed(bytes: &[u8]) -> bool {
    !bytes.is_empty() && bytes.iter().all(|b| *b == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn json_error(text: &[u8]) -> String {
        let error = serde_json::from_slice::<serde_json::Map<String, serde_json::Value>>(text).unwrap_err();
        not_json(text, &error)
    }

    #[test]
    fn a_damaged_file_says_what_it_is_and_how_to_get_it_again() {
        for (text, says) in [
            (b"{\"a\": 1, \"b\"".as_slice(), "cut off"),
            (
                b"{\"a\": }",
                "not JSON: no JSON value begins here (line 1, column 7); if the file is damaged, fetch it again",
            ),
            (b"{\"a\": \"\xff\"}", "not text in UTF-8: a text is not UTF-8 (line 1"),
            (b"", "the file is empty"),
            (b"\0\0\0\0", "zero bytes"),
            (b"7", "not what this file should hold: it should be an object, not the number 7; if the file is damaged"),
            (b"[1]", "not what this file should hold: it should be an object, not a list; if the file is damaged"),
            (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "git lfs pull"),
            (b"<!DOCTYPE html><html>", "a web page"),
            (b"\xff\xfe{\0}\0", "UTF-16"),
            (b"{\0}\0", "UTF-16"),
            (b"\0{\0\n\0}", "UTF-16"),
        ] {
            let message = json_error(text);
            assert!(message.contains(says), "{message}");
        }
    }

    #[test]
    fn text_is_read_without_its_mark() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        fs::write(&path, "\u{feff}text").unwrap();
        assert_eq!(read_text(&path).unwrap(), "text");
        assert_eq!(without_mark(&read(&path).unwrap()), b"text");
        for bytes in [&b"t\0e\0x\0t\0"[..], b"\0t\0e\0x\0t", b"\xff\xfet\0", b"\0\n\0t\x4e\x2d"] {
            fs::write(&path, bytes).unwrap();
            assert!(read_text(&path).unwrap_err().to_string().contains("UTF-16; save it as UTF-8"), "{bytes:?}");
        }
        fs::write(&path, "\0\0\0\0").unwrap();
        assert!(read_text(&path).unwrap_err().to_string().contains("only zero bytes"));
        for text in ["", "t", "te", "tex", "é中"] {
            fs::write(&path, text).unwrap();
            assert_eq!(read_text(&path).unwrap(), text);
        }
    }

    #[cfg(unix)]
    #[test]
    fn only_files_are_opened() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(read(dir.path()).unwrap_err().to_string(), "it is a folder (a directory), not a file");
        assert!(read(Path::new("/dev/zero")).unwrap_err().to_string().contains("a device"));
        let pipe = dir.path().join("pipe");
        let name = std::ffi::CString::new(pipe.to_str().unwrap()).unwrap();
        // SAFETY: the name is a valid C string.
        assert_eq!(unsafe { libc::mkfifo(name.as_ptr(), 0o600) }, 0);
        assert!(read(&pipe).unwrap_err().to_string().contains("a pipe (FIFO)"));
        let link = dir.path().join("link");
        std::os::unix::fs::symlink("../blobs/1", &link).unwrap();
        let error = read(&link).unwrap_err();
        assert!(
            error.to_string().contains("a link to `../blobs/1`, which does not exist") && is_there(&link),
            "{error}"
        );
        assert!(!is_there(&dir.path().join("other")) && dangling(&pipe).is_none());
    }
}
