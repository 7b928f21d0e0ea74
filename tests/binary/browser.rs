//! The pages of every command in a headless Chromium, by `tests/python/check_pages.py`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use crate::program::{files_of, model, moewarden, start, write_rows};

fn check(files: &[PathBuf]) -> Output {
    let name = |variable: &str, default: &str| std::env::var_os(variable).unwrap_or_else(|| default.into());
    Command::new(name("MOEWARDEN_PYTHON", "python3"))
        .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/python/check_pages.py"))
        .arg(name("MOEWARDEN_CHROMIUM", "chromium"))
        .args(files)
        .output()
        .unwrap()
}

/// Outputs of each command that writes a page, of models with a few experts.
fn pages(dir: &Path) -> Vec<PathBuf> {
    let path = |name: &str| dir.join(name);
    let run = |text: String| start(moewarden(0, text.split_whitespace())).end().ok();
    write_rows(&path("rows.json"), 6);
    fs::write(path("experts"), "0.1, 2.3, 2.0").unwrap();
    let common = |command: &str, output: &str| {
        format!(
            "{command} --model-name {} --dataset-path {} --output-dir {} --threads 1 --quiet",
            model("olmoe").display(),
            path("rows.json").display(),
            path(output).display(),
        )
    };
    let train = "--top-k-experts 3 --batch-size 2 --save-rounds none --num-rounds";
    run(format!("{} {train} 2 --bootstrap 20", common("train", "a-<b>-&-c")));
    run(format!("{} --top-k-experts 3 --method routing --risk-threshold -1", common("identify", "risk")));
    run(format!("{} --max-new-tokens 2", common("eval", "evaluated")));
    let ablate = "--max-new-tokens 3 --batch-size 2 --random-sets 12 --safe-response No.";
    run(format!("{} {ablate} --experts {}", common("ablate", "ablated"), path("experts").display()));
    run(format!("{} {train} 1 --methods gradient,random --ablations combined,frozen", common("compare", "compared")));
    // A name that is hostile in every way, and as long as a file system takes.
    let hostile = format!("a-<b>-&-c\n\t\u{9b}1m\u{202e}{}", "x".repeat(200));
    fs::rename(path("a-<b>-&-c"), path(&hostile)).unwrap();
    let mut report = moewarden(0, ["report", "--output-dir"]);
    report.arg(path("report")).args([&hostile, "risk", "evaluated"].map(path));
    start(report).end().ok();
    let mut drawings: Vec<PathBuf> = files_of(&path("report")).iter().map(|name| path("report").join(name)).collect();
    drawings.retain(|path| path.extension().is_some_and(|end| end == "svg"));
    assert_eq!(drawings.len(), 3, "{drawings:?}");
    let pages = ["report/report.html", "compared/compare.html", "ablated/ablation.html"].map(path);
    pages.into_iter().chain(drawings).collect()
}

#[test]
#[ignore = "skipped: needs python3 and chromium"]
fn pages_in_chromium() {
    let temp = tempfile::tempdir().unwrap();
    let checked = check(&pages(temp.path()));
    let (out, err) = (String::from_utf8_lossy(&checked.stdout), String::from_utf8_lossy(&checked.stderr));
    assert!(checked.status.success(), "{out}{err}");
    println!("{out}");
}

/// The check finds what it looks for.
#[test]
#[ignore = "skipped: needs python3 and chromium"]
fn bad_pages_in_chromium() {
    let temp = tempfile::tempdir().unwrap();
    let style = "<style>body { background: #fff; color: #000; } @media (prefers-color-scheme: dark) { body { background: #000; color: #fff; } }</style>";
    let bad = [
        ("open", "<p>", "mismatched tag"),
        ("wide", "<p style=\"width: 3000px\">x</p>", "500 pixels, dark: it is 30"),
        ("pale", "<p style=\"color: #888\">x</p>", "contrast of text below 4.5: ['3."),
        ("console", "<script>console.error(\"broken\")</script>", "console.error: ['broken']"),
        ("throws", "<script>nothing.at.all</script>", "nothing is not defined"),
        ("loads", "<img alt=\"\" src=\"absent.png\"/>", "it requests file://"),
        (
            "unsorted",
            "<table><thead><tr><th><button>a</button></th></tr></thead><tbody><tr><td>1</td></tr><tr><td>2</td></tr></tbody></table>",
            "aria-sort is not ascending",
        ),
    ];
    let files: Vec<PathBuf> = bad
        .iter()
        .map(|(name, body, _)| {
            let path = temp.path().join(format!("{name}.html"));
            fs::write(&path, format!("<html><head>{style}</head><body>{body}</body></html>")).unwrap();
            path
        })
        .collect();
    let checked = check(&files);
    let said = String::from_utf8_lossy(&checked.stderr);
    assert!(!checked.status.success());
    let lines: Vec<&str> = said.lines().collect();
    assert_eq!(lines.len(), bad.len(), "{said}");
    for (line, (name, _, wanted)) in lines.iter().zip(bad) {
        assert!(line.starts_with(&format!("{name}.html: ")) && line.contains(wanted), "{wanted}: {line}");
    }
}
