//! Files of rows in other formats: packed rows and Parquet tables give what their rows give; the rest is named.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use super::{Outcome, Scene};

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/parquet").join(name)
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut out = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    out.write_all(bytes).unwrap();
    out.finish().unwrap()
}

fn zst(bytes: &[u8]) -> Vec<u8> {
    zstd::encode_all(bytes, 3).unwrap()
}

#[test]
fn packed_rows_and_tables_are_read_as_their_rows() {
    let scene = Scene::new();
    let rows = fs::read(golden("rows.json")).unwrap();
    let (first, second) = rows.split_at(rows.len() / 2);
    let skippable = b"\x50\x2a\x4d\x18\x04\0\0\0skip";
    let table = |name: &str| fs::read(golden(name)).unwrap();
    let forms = [
        ("rows.json.gz", gzip(&rows)),
        ("members.gz", [gzip(first), gzip(second)].concat()),
        ("named_as_if_plain.jsonl", gzip(&rows)),
        ("rows.json.zst", zst(&rows)),
        ("frames.zst", [skippable.as_slice(), &zst(first), &zst(second)].concat()),
        ("twice", gzip(&zst(&rows))),
        ("marked.gz", gzip(&["\u{feff}".as_bytes(), &rows].concat())),
        ("table.parquet", table("snappy.parquet")),
        ("named_as_if_rows.json", table("none.parquet")),
        ("gzip.parquet", table("gzip.parquet")),
        ("zstd.parquet", table("zstd.parquet")),
        ("groups.parquet", table("groups.parquet")),
        ("unmarked.parquet", table("unmarked.parquet")),
        ("bytes.parquet", table("bytes.parquet")),
    ];
    let scores = |file: &str| {
        let ran = Outcome::of(scene.run("identify", &["--dataset-path", file]));
        ran.is(0, &[]);
        // Bytes that nothing reads are counted as other fields.
        let noted = "fields that neither moewarden nor the chat template reads: digest of a turn (4 rows, first line 1), \
                     key (4 rows, first line 1), thumbnail (4 rows, first line 1)\n";
        assert_eq!(ran.stdout.contains(noted), file == "bytes.parquet", "{file}: {}", ran.stdout);
        let scores = fs::read_to_string(scene.out().join("expert_scores.json")).unwrap();
        fs::remove_dir_all(scene.out()).unwrap();
        scores
    };
    fs::write(scene.path("rows.json"), &rows).unwrap();
    let plain = scores("rows.json");
    for (name, bytes) in forms {
        fs::write(scene.path(name), bytes).unwrap();
        assert_eq!(scores(name), plain, "{name}");
    }
}

#[test]
fn other_formats_are_named_with_the_way_to_convert() {
    let scene = Scene::new();
    let tar = [b"a".repeat(257), b"ustar\0".to_vec()].concat();
    let cases: [(&str, &[u8], &[&str]); 29] = [
        ("utf32", b"\xff\xfe\0\0{\0\0\0", &["text in UTF-32", "save it as UTF-8"]),
        ("utf32-big", b"\0\0\xfe\xff\0\0\0{", &["text in UTF-32"]),
        ("a.csv", b"goal,target\n\"How to, x\",\"Sure\"\n", &["CSV", "pandas.read_csv('FILE')"]),
        ("a.txt", b"goal,target\nx,y\n", &["CSV", "to_json('rows.jsonl'"]),
        ("quoted.csv", b"\"goal\",\"target\"\r\n\"x\",\"y\"\r\n", &["CSV"]),
        ("marked.csv", b"\xef\xbb\xbfgoal,target\nx,y\n", &["CSV"]),
        ("one.csv", b"prompt\nHow do I x?\n", &["CSV"]),
        ("a.tsv", b"goal\ttarget\nx\ty\n", &["TSV", "sep='\\t'"]),
        ("semicolons", b"goal;target\nx;y\n", &["CSV", "sep=';'"]),
        ("csv.gz", &gzip(b"goal,target\nx,y\n"), &["CSV"]),
        ("zeros.jsonl", &[0; 4096], &["only zero bytes, as after a crash or a full disk: fetch or write it again"]),
        ("a.zip", b"PK\x03\x04rest", &["zip archive", "unpack it"]),
        ("a.xz", b"\xfd7zXZ\0rest", &["xz", "xz -d"]),
        ("a.bz2", b"BZh91AY&SY", &["bzip2", "bzip2 -d"]),
        ("a.lz4", b"\x04\x22\x4d\x18rest", &["lz4"]),
        ("a.7z", b"7z\xbc\xaf\x27\x1crest", &["7-Zip"]),
        ("a.tar", &tar, &["tar archive"]),
        ("a.tar.gz", &gzip(&tar), &["what is packed in the file is a tar archive"]),
        ("a.feather", b"ARROW1\0\0rest", &["Arrow", "read_feather"]),
        ("a.arrow", b"\xff\xff\xff\xffrest", &["Arrow stream", "datasets"]),
        ("a.orc", b"ORCrest", &["ORC"]),
        ("a.avro", b"Obj\x01rest", &["Avro"]),
        ("a.db", b"SQLite format 3\0rest", &["SQLite"]),
        ("a.pkl", b"\x80\x04\x95rest", &["pickle", "run code"]),
        ("a.html", b"<!DOCTYPE html>\n<html>", &["a web page"]),
        ("a.json", b"version https://git-lfs.github.com/spec/v1\n", &["Git LFS", "git lfs pull"]),
        ("parquet.gz", &gzip(b"PAR1rest"), &["what is packed in the file is a Parquet table: unpack it (`gzip -d`"]),
        (
            "more.gz",
            &[gzip(b"{}"), b"more".to_vec()].concat(),
            &["4 bytes that are no gzip data follow what is packed"],
        ),
        ("a.gguf", b"GGUF\x03", &["GGUF"]),
    ];
    for (name, bytes, says) in cases {
        fs::write(scene.path(name), bytes).unwrap();
        scene.refuses(&["--dataset-path", name], 65, &[&[name], says].concat());
    }
    for (name, says) in [
        ("brotli.parquet", "compressed by brotli"),
        (
            "bytes_goal.parquet",
            "bytes_goal.parquet:1: the column goal holds bytes that are no text in UTF-8: write it as text",
        ),
        ("bytes_content.parquet", "bytes_content.parquet:1: the column messages.content holds bytes"),
        ("bytes_image.parquet", "bytes_image.parquet:1: the field image of a row is not supported: only text"),
        ("no_rows.parquet", "the file is a Parquet table without rows"),
    ] {
        fs::copy(golden(name), scene.path(name)).unwrap();
        scene.refuses(&["--dataset-path", name], 65, &[says]);
    }
    // Lines with commas are not a table.
    fs::write(scene.path("prose"), "I would like, if I may, to say this in so many words\nand, so, on\n").unwrap();
    scene.refuses(&["--dataset-path", "prose"], 65, &["prose:1: not JSON"]);
}

#[test]
fn damaged_packed_files_are_errors_of_the_file() {
    let scene = Scene::new();
    let rows = fs::read(golden("rows.json")).unwrap();
    for (name, good) in
        [("a.gz", gzip(&rows)), ("a.zst", zst(&rows)), ("a.parquet", fs::read(golden("snappy.parquet")).unwrap())]
    {
        for part in 1..6 {
            fs::write(scene.path(name), &good[..good.len() * part / 6]).unwrap();
            scene.refuses(&["--dataset-path", name], 65, &[name, "fetch"]);
        }
        // A flipped bit may spare the rows, but never ends as a bug of the program.
        for at in (0..good.len()).step_by(good.len() / 12) {
            let mut bad = good.clone();
            bad[at] ^= 1 << (at % 8);
            fs::write(scene.path(name), bad).unwrap();
            let ended = Outcome::of(scene.run("check", &["--dataset-path", name, "--show", "0"]));
            assert!([Some(0), Some(65)].contains(&ended.code), "{name}, byte {at}: {:?} {}", ended.code, ended.stderr);
        }
    }
}
