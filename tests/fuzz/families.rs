//! The families of inputs: which files are mutated, how, and which commands then read them.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::corpus::{Corpus, SHORT};
use crate::dice::Dice;
use crate::mutate;

type Mutation = fn(&mut Dice, &mut Vec<u8>);

/// Inputs of one kind.
pub struct Family {
    pub name: &'static str,
    files: &'static [&'static str],
    mutation: Mutation,
    /// Words; `FILE` is the mutated file, `FOLDER` the output folder with files of others, `SHORT` the options of a short run.
    commands: &'static [&'static str],
}

/// One run of a family.
pub struct Case {
    /// What was mutated, for messages.
    pub what: String,
    /// The words of the command.
    pub words: Vec<String>,
    /// The output folder.
    pub out: String,
    /// Files of others below the folder of the run, with their content.
    pub foreign: Vec<(PathBuf, Vec<u8>)>,
}

const OF_ROWS: &[&str] = &[
    "check --model-name model --dataset-path FILE --top-k-experts 2",
    "identify --model-name model --dataset-path FILE --top-k-experts 2 --output-dir out",
    "identify --model-name model --dataset-path rows.json --eval-dataset-path FILE --top-k-experts 2 --output-dir out --method routing",
    "eval --model-name model --dataset-path FILE --output-dir out --max-new-tokens 2",
    "train --model-name model --dataset-path rows.json --retain-dataset-path FILE --output-dir out SHORT",
];

const OF_MODEL: &[&str] = &[
    "check --model-name model --dataset-path rows.json --top-k-experts 2",
    "identify --model-name model --dataset-path rows.jsonl --top-k-experts 2 --output-dir out",
    "eval --model-name model --dataset-path rows.json --output-dir out --max-new-tokens 2",
    "train --model-name model --dataset-path rows.json --output-dir out SHORT",
    "export --base model --delta delta.safetensors --output-dir out",
];

const OF_SHARDED: &[&str] = &[
    "check --model-name sharded --dataset-path rows.json --top-k-experts 2",
    "identify --model-name sharded --dataset-path rows.json --top-k-experts 2 --output-dir out",
    "train --model-name sharded --dataset-path rows.json --output-dir out SHORT",
];

const REPORT: &[&str] = &["report done --output-dir out", "report done answers --output-dir out"];

const OF_EXPERTS: &[&str] = &[
    "ablate --model-name model --dataset-path rows.json --experts FILE --random-sets 2 --max-new-tokens 2 --output-dir out",
    "identify --model-name model --dataset-path rows.json --method given --experts FILE --output-dir out",
];

/// Files that moewarden does not write, at the top of an output folder and in its subfolders, some with names like its own.
const FOREIGN: [&str; 22] = [
    "thesis.txt",
    "rows.json",
    "config.json",
    "metrics.jsonl.bak",
    "expert_scores.json~",
    "heatmap.png",
    ".thesis.txt.qX3f9a.part",
    ".data.partial/a",
    ".git/HEAD",
    "notes/plan.md",
    "round_x/config.json",
    "round_1/pytorch_model.bin",
    "round_1/old/config.json",
    "round_2/thesis.txt",
    "final_model/notes.md",
    "final_model/old/model.safetensors",
    "final_model/.hidden",
    "final_model.bak/config.json",
    "tensorboard/events.out.tfevents.1.host",
    "evaluations/notes.md",
    "frozen/thesis.txt",
    "model/config.json",
];

/// Commands that write a folder, each with the options that decide what becomes of one that is not empty.
const INTO_FOLDERS: &[&str] = &[
    "train --model-name model --dataset-path rows.json --output-dir FOLDER SHORT",
    "train --model-name model --dataset-path rows.json --output-dir FOLDER SHORT --resume",
    "train --model-name model --dataset-path rows.json --output-dir FOLDER SHORT --overwrite",
    "train --model-name model --dataset-path rows.jsonl --output-dir FOLDER SHORT --resume",
    "identify --model-name model --dataset-path rows.json --top-k-experts 2 --output-dir FOLDER --overwrite",
    "eval --model-name model --dataset-path rows.json --output-dir FOLDER --max-new-tokens 2 --resume",
    "eval --model-name model --dataset-path rows.json --output-dir FOLDER --max-new-tokens 2 --overwrite",
    "ablate --model-name model --dataset-path rows.json --experts experts.json --random-sets 2 --max-new-tokens 2 --output-dir FOLDER \
     --overwrite",
    "report done --output-dir FOLDER --overwrite",
    "export --base model --delta delta.safetensors --output-dir FOLDER",
    "export --base model --delta delta.safetensors --output-dir FOLDER --overwrite",
];

/// All families. Those with an empty list of files choose theirs in [`Family::apply`].
pub const FAMILIES: &[Family] = &[
    Family { name: "rows, bytes", files: &["rows.jsonl", "rows.json"], mutation: mutate::bytes, commands: OF_ROWS },
    Family { name: "rows, JSON", files: &["rows.json", "rows.jsonl"], mutation: mutate::json_lines, commands: OF_ROWS },
    Family {
        name: "rows, gzip, zstd, Parquet",
        files: &["rows.json.gz", "rows.jsonl.zst", "snappy.parquet", "groups.parquet", "gzip.parquet", "zstd.parquet"],
        mutation: mutate::bytes,
        commands: OF_ROWS,
    },
    Family {
        name: "routing traces",
        files: &["traces.jsonl"],
        mutation: mutate::json_lines,
        commands: &[
            "identify --model-name model --dataset-path rows.json --method routing --routing-replies FILE --top-k-experts 2 --output-dir out",
        ],
    },
    Family {
        name: "options file",
        files: &["config.yaml"],
        mutation: |dice, text| mutate::text(dice, text, mutate::YAML),
        commands: &[
            "check --config FILE",
            "train --config FILE --output-dir out",
            "identify --config FILE --output-dir out",
            "compare --config FILE --output-dir out",
        ],
    },
    Family {
        name: "chat template",
        files: &["model/chat_template.jinja"],
        mutation: |dice, text| mutate::text(dice, text, mutate::JINJA),
        commands: OF_MODEL,
    },
    Family { name: "config.json", files: &["model/config.json"], mutation: mutate::json, commands: OF_MODEL },
    Family {
        name: "config.json of shards",
        files: &["sharded/config.json"],
        mutation: mutate::json,
        commands: OF_SHARDED,
    },
    Family {
        name: "tokenizer files",
        files: &["model/tokenizer.json", "model/tokenizer_config.json", "model/generation_config.json"],
        mutation: mutate::json,
        commands: OF_MODEL,
    },
    Family {
        name: "safetensors header",
        files: &["model/model.safetensors"],
        mutation: mutate::safetensors,
        commands: OF_MODEL,
    },
    Family {
        name: "index of shards",
        files: &["sharded/model.safetensors.index.json"],
        mutation: mutate::json,
        commands: OF_SHARDED,
    },
    Family {
        name: "weights",
        files: &["model/model.safetensors"],
        mutation: |dice, bytes| mutate::weights(dice, bytes),
        commands: OF_MODEL,
    },
    Family {
        name: "checkpoint",
        files: &[],
        mutation: mutate::any,
        commands: &["train --model-name model --dataset-path rows.json --output-dir stopped SHORT --resume"],
    },
    Family { name: "outputs of a run", files: &[], mutation: mutate::any, commands: REPORT },
    Family {
        name: "selection",
        files: &["expert_scores.json", "experts.json"],
        mutation: mutate::json,
        commands: OF_EXPERTS,
    },
    Family {
        name: "command line",
        files: &["rows.json"],
        mutation: |_, _| {},
        commands: &[
            "check --model-name model --dataset-path rows.json --top-k-experts 2",
            "identify --model-name model --dataset-path rows.json --top-k-experts 2 --output-dir out",
            "train --model-name model --dataset-path rows.json --output-dir out SHORT",
            "ablate --model-name model --dataset-path rows.json --experts experts.json --random-sets 2 --max-new-tokens 2 --output-dir out",
            "eval --model-name model --dataset-path rows.json --output-dir out --max-new-tokens 2",
        ],
    },
    Family { name: "foreign files", files: &[], mutation: |_, _| {}, commands: INTO_FOLDERS },
    Family {
        name: "delta",
        files: &["delta.safetensors"],
        mutation: mutate::safetensors,
        commands: &["export --base model --delta FILE --output-dir out"],
    },
];

impl Family {
    /// Mutates a file of the copy in `folder`, or puts files of others into it.
    pub fn apply(&self, dice: &mut Dice, corpus: &Corpus, folder: &Path) -> Case {
        if self.name == "foreign files" {
            return self.among_others(dice, folder);
        }
        let file = match self.name {
            "checkpoint" => dice.pick(&corpus.files("stopped")).clone(),
            "outputs of a run" => {
                let files = [corpus.files("done"), corpus.files("answers")].concat();
                dice.pick(&files).clone()
            }
            _ => (*dice.pick(self.files)).to_owned(),
        };
        let path = folder.join(&file);
        let mut content = fs::read(&path).unwrap();
        (self.mutation)(dice, &mut content);
        fs::remove_file(&path).unwrap(); // it may be a link to the corpus
        fs::write(&path, content).unwrap();
        if self.name == "checkpoint" && !dice.one_in(3) {
            mend_manifest(&path);
        }
        let mut words = self.words(dice, &file);
        if self.name == "command line" {
            add_options(dice, &mut words);
        }
        let out = if file.starts_with("stopped/") { "stopped" } else { "out" };
        Case { what: file, words, out: out.to_owned(), foreign: Vec::new() }
    }

    /// A command into a folder of a run, or a new one, that holds files of others.
    fn among_others(&self, dice: &mut Dice, folder: &Path) -> Case {
        let out = *dice.pick(&["out", "done", "stopped", "answers"]);
        let mut foreign = Vec::new();
        for i in 0..=dice.below(2) {
            let name = Path::new(out).join(dice.pick(&FOREIGN));
            let (path, content) = (folder.join(&name), format!("mine {i}").into_bytes());
            if !path.exists() {
                fs::create_dir_all(path.parent().unwrap()).unwrap();
                fs::write(path, &content).unwrap();
                foreign.push((name, content));
            }
        }
        let names: Vec<_> = foreign.iter().map(|(name, _)| name.display().to_string()).collect();
        Case { what: names.join(", "), words: self.words(dice, out), out: out.to_owned(), foreign }
    }

    /// The words of one of the commands.
    fn words(&self, dice: &mut Dice, named: &str) -> Vec<String> {
        let words = dice.pick(self.commands).split_whitespace().flat_map(|word| match word {
            "FILE" | "FOLDER" => vec![named.to_owned()],
            "SHORT" => SHORT.split(' ').map(str::to_owned).collect(),
            word => vec![word.to_owned()],
        });
        words.collect()
    }
}

/// Options that a test must not set: what is written where, and the network.
const LEFT_ALONE: [&str; 3] = ["output-dir", "overwrite", "download"];

/// Values of options that no command runs for long by.
const SHORT_VALUES: [&str; 14] =
    ["0", "1", "2", "-1", "0.5", "nan", "inf", "", "x", "true", "rows.json", "0-1", "\u{1b}[2J", "{}"];

/// Values that only `check` gets, which trains nothing.
const ANY_VALUES: [&str; 8] = [
    "18446744073709551615",
    "1e308",
    "-1e-320",
    "9999999999999999999999",
    "4294967296",
    "model",
    "/dev/null",
    "[[0, 99999999]]",
];

/// Gives the command one to three more options, or others in place of its own.
fn add_options(dice: &mut Dice, words: &mut Vec<String>) {
    let command = moewarden::cli::command();
    let command = command.find_subcommand(&words[0]).unwrap();
    let options: Vec<_> = command.get_arguments().filter(|option| option.get_long().is_some()).collect();
    for _ in 0..=dice.below(3) {
        let option = *dice.pick(&options);
        let name = option.get_long().unwrap();
        if LEFT_ALONE.contains(&name) {
            continue;
        }
        let possible: Vec<String> =
            option.get_possible_values().iter().map(|value| value.get_name().to_owned()).collect();
        let value = match dice.below(3) {
            0 | 1 if !possible.is_empty() => dice.pick(&possible).clone(),
            1 if words[0] == "check" => (*dice.pick(&ANY_VALUES)).to_owned(),
            2 => (*dice.pick(&SHORT_VALUES)).to_owned(),
            _ => (*dice.pick(&SHORT_VALUES[..3])).to_owned(),
        };
        let given = format!("--{name}");
        if let Some(at) = words.iter().position(|word| *word == given) {
            words.drain(at..at + 2);
        }
        words.push(if option.get_action().takes_values() { format!("{given}={value}") } else { given });
    }
}

/// Makes the manifest of a checkpoint agree with a changed file, as someone would who edits a checkpoint.
fn mend_manifest(changed: &Path) {
    let manifest = changed.with_file_name("manifest.json");
    let Ok(Ok(mut content)) = fs::read(&manifest).map(|bytes| serde_json::from_slice::<Value>(&bytes)) else { return };
    let name = changed.file_name().unwrap().to_str().unwrap();
    let bytes = fs::read(changed).unwrap();
    if let Some(entry) = content.get_mut("files").and_then(|files| files.get_mut(name)) {
        entry["bytes"] = bytes.len().into();
        entry["blake3"] = blake3::hash(&bytes).to_string().into();
        fs::write(manifest, serde_json::to_vec_pretty(&content).unwrap()).unwrap();
    }
}
