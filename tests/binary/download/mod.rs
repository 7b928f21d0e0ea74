//! `--download` against a server on this machine that speaks the hub's routes.

pub mod hub;

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::process::Command;

use moewarden::model::tiny::{TinySpec, write_random_checkpoint};
use tempfile::TempDir;

use crate::golden_copy::golden_copy;
use crate::program::{Ran, files_of, moewarden, start};
use hub::{Hub, ID};

/// The files of a golden model, beside others that a repository has.
fn repository() -> BTreeMap<String, Vec<u8>> {
    let model = golden_copy("olmoe").join("model");
    let entries = fs::read_dir(model).unwrap().map(|entry| entry.unwrap());
    let mut files: BTreeMap<_, _> =
        entries.map(|file| (file.file_name().into_string().unwrap(), fs::read(file.path()).unwrap())).collect();
    for other in ["README.md", "pytorch_model.bin", "model.gguf", "onnx/model.onnx", "consolidated.safetensors"] {
        files.insert(other.into(), b"not fetched".to_vec());
    }
    files
}

/// A hub, an empty cache and rows.
pub struct Scene {
    pub hub: Hub,
    temp: TempDir,
}

impl Scene {
    pub fn new() -> Self {
        Self { hub: Hub::start(repository()), temp: tempfile::tempdir().unwrap() }
    }

    /// The folder of all models in the cache.
    pub fn cache(&self) -> PathBuf {
        self.temp.path().join("hf/hub")
    }

    fn model(&self) -> PathBuf {
        self.cache().join("models--org--tiny")
    }

    /// A command with this hub and cache, and no other variable of the environment.
    fn command(&self, words: &[&str]) -> Command {
        let mut command = moewarden(0, words);
        command.env_clear();
        self.surround(command)
    }

    /// `identify` of the model, which is downloaded, on so many processes.
    #[cfg(feature = "mpi")]
    fn on_processes(&self, processes: usize) -> Command {
        let rows = golden_copy("olmoe").join("data.json");
        let words = ["identify", "--model-name", ID, "--top-k-experts", "2", "--download", "--threads", "1"];
        let mut command = moewarden(processes, words);
        command.arg("--dataset-path").arg(rows).args(["--output-dir", "out"]);
        for variable in ["HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_TOKEN", "HF_HUB_OFFLINE"] {
            command.env_remove(variable);
        }
        self.surround(command)
    }

    fn surround(&self, mut command: Command) -> Command {
        command.current_dir(self.temp.path());
        let cache = self.temp.path().join("hf");
        command.env("HOME", self.temp.path()).env("HF_HOME", cache).env("HF_ENDPOINT", &self.hub.endpoint);
        command
    }

    /// `check` of the model.
    pub fn check(&self, more: &[&str]) -> Command {
        let rows = golden_copy("olmoe").join("data.json");
        let rows = rows.to_str().unwrap();
        self.command(&[&["check", "--model-name", ID, "--dataset-path", rows, "--top-k-experts", "2"], more].concat())
    }

    /// Brings the model into the cache.
    pub fn download(&self) {
        run(self.check(&["--download"])).ok();
    }

    /// Asserts how `check --download` ends.
    #[track_caller]
    fn ends(&self, variables: &[(&str, &str)], code: u8, said: &[&str]) {
        let mut command = self.check(&["--download"]);
        command.envs(variables.iter().copied());
        run(command).failed(code, said);
    }

    fn refuse(&self, path: &str, status: u16) {
        self.hub.state().refusals.insert(path.into(), status);
    }
}

fn run(command: Command) -> Ran {
    start(command).end()
}

#[test]
fn a_missing_model_is_downloaded_once_and_used() {
    let scene = Scene::new();
    run(scene.check(&[])).failed(66, &["--download", "hf download org/tiny"]);
    assert_eq!(scene.hub.requests(), [""; 0], "nothing is asked without the option");

    let rows = golden_copy("olmoe").join("data.json");
    let rows = rows.to_str().unwrap();
    let identify = ["identify", "--model-name", ID, "--dataset-path", rows, "--top-k-experts", "2", "--download"];
    run(scene.command(&[&identify[..], &["--output-dir", "out"]].concat())).ok();
    assert!(scene.temp.path().join("out/expert_scores.json").is_file());
    let commit = scene.hub.state().commit.clone();
    let snapshot = scene.model().join("snapshots").join(&commit);
    assert_eq!(
        files_of(&snapshot),
        [
            "chat_template.jinja",
            "config.json",
            "generation_config.json",
            "model.safetensors",
            "tokenizer.json",
            "tokenizer_config.json"
        ],
        "what moewarden reads, and nothing else"
    );
    for name in files_of(&snapshot) {
        assert_eq!(fs::read(snapshot.join(&name)).unwrap(), scene.hub.state().files[&name]);
        let target = fs::read_link(snapshot.join(&name)).unwrap();
        assert!(target.starts_with("../../blobs"), "{}", target.display());
    }
    assert_eq!(fs::read_to_string(scene.model().join("refs/main")).unwrap(), commit);
    assert_eq!(files_of(&scene.model().join("refs")), ["main"]);

    scene.hub.requests();
    scene.download();
    run(scene.check(&[])).ok();
    assert_eq!(scene.hub.requests(), [""; 0], "nothing is asked for a model that is there");
}

#[test]
fn an_interrupted_download_continues() {
    let scene = Scene::new();
    let size = scene.hub.state().files["model.safetensors"].len();
    let asked = |hub: &Hub| -> Vec<String> {
        hub.requests().into_iter().filter(|request| request.starts_with("/cdn/model.safetensors")).collect()
    };
    // The connection breaks once: the same command goes on.
    scene.hub.state().cuts.insert("model.safetensors".into(), (1, size / 3));
    scene.download();
    let expected = |from: usize| format!("/cdn/model.safetensors {from}");
    assert_eq!(asked(&scene.hub), [expected(0), expected(size / 3)]);

    // The server goes away: a later command goes on.
    fs::remove_dir_all(scene.cache()).unwrap();
    scene.hub.state().cuts.insert("model.safetensors".into(), (6, size / 10));
    scene.ends(&[], 74, &["model.safetensors of `org/tiny`", "it continues where it stopped"]);
    run(scene.check(&[])).failed(65, &["`org/tiny` is incomplete", "--download"]);
    asked(&scene.hub);
    scene.download();
    assert_eq!(asked(&scene.hub), [expected(6 * (size / 10))]);
}

#[test]
fn refusals_of_the_hub_say_what_to_do() {
    let scene = Scene::new();
    scene.hub.state().token = Some("hf_right".into());
    let gated = ["org/tiny", "HTTP 401", "gated", "HF_TOKEN", "none was sent"];
    scene.ends(&[], 66, &gated);
    scene.ends(&[("HF_TOKEN", "hf_wrong")], 66, &["HTTP 401", "one was sent"]);
    fs::write(scene.temp.path().join("token"), "hf_right\n").unwrap();
    let mut command = scene.check(&["--download"]);
    run({
        command.env("HF_TOKEN_PATH", scene.temp.path().join("token"));
        command
    })
    .ok();

    let scene = Scene::new();
    let mut command = scene.command(&["export", "--base", "org/other", "--delta", "d", "--download"]);
    command.arg("--output-dir").arg("out");
    run(command).failed(66, &["`org/other`", "HTTP 404", "spelling"]);
    scene.refuse("resolve", 403);
    scene.ends(&[], 66, &["chat_template.jinja of `org/tiny`", "HTTP 403", "gated"]);
    scene.hub.state().refusals.clear();
    scene.refuse("/api/", 429);
    scene.ends(&[], 74, &["HTTP 429", "wait some minutes"]);
}

#[test]
fn without_a_network_it_says_so() {
    let scene = Scene::new();
    for variable in ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"] {
        scene.ends(&[(variable, "1")], 66, &["org/tiny", variable, "unset"]);
    }
    assert_eq!(scene.hub.requests(), [""; 0]);
    scene.ends(&[("HF_ENDPOINT", "http://127.0.0.1:9")], 74, &["org/tiny", "127.0.0.1:9", "Check the network"]);
    scene.ends(&[("HF_ENDPOINT", "mirror.org")], 78, &["HF_ENDPOINT is `mirror.org`: expected an address"]);
    assert_eq!(fs::read_dir(scene.cache()).map_or(0, Iterator::count), 1, "only the locks");
    scene.hub.state().silent = true;
    scene.ends(&[("HF_HUB_DOWNLOAD_TIMEOUT", "1")], 74, &["nothing arrived for 1 seconds", "org/tiny"]);
    // A model that is there needs none.
    scene.hub.state().silent = false;
    scene.download();
    let mut command = scene.check(&["--download"]);
    command.env("HF_HUB_OFFLINE", "1");
    run(command).ok();
}

#[test]
fn damaged_and_missing_files_are_named() {
    let scene = Scene::new();
    scene.hub.state().damaged.push("model.safetensors".into());
    scene.ends(&[], 74, &["model.safetensors of `org/tiny`", "damaged", "its hash is"]);
    scene.hub.state().damaged.clear();
    scene.hub.state().damaged.push("tokenizer.json".into());
    fs::remove_dir_all(scene.cache()).unwrap();
    scene.ends(&[], 74, &["tokenizer.json of `org/tiny`", "damaged", "its hash is"]);
    scene.hub.state().damaged.clear();
    scene.download();

    let scene = Scene::new();
    scene.hub.state().claims.insert("model.safetensors".into(), 1 << 60);
    scene.ends(&[], 74, &["no room for `org/tiny`", "needed", "HF_HUB_CACHE"]);
    scene.hub.state().claims.clear();
    let weights = scene.hub.state().files.remove("model.safetensors").unwrap();
    scene.ends(&[], 66, &["`org/tiny` lacks model.safetensors", "safetensors"]);
    let random = ["--download", "--init", "random"];
    run(scene.check(&random)).ok();
    scene.hub.state().files.insert("model.safetensors".into(), weights);
    scene.hub.state().files.remove("tokenizer.json");
    fs::remove_dir_all(scene.cache()).unwrap();
    scene.ends(&[], 66, &["`org/tiny` lacks tokenizer.json"]);
}

#[test]
fn an_unusable_cache_is_named() {
    let scene = Scene::new();
    fs::write(scene.temp.path().join("file"), "").unwrap();
    scene.ends(&[("HF_HUB_CACHE", "file/hub")], 73, &["file/hub", "org/tiny", "HF_HUB_CACHE"]);
}

#[test]
fn a_revision_and_the_shards_of_an_index_are_fetched() {
    let scene = Scene::new();
    let folder = scene.temp.path().join("model");
    write_random_checkpoint(&folder, &TinySpec { vocab_size: 320, shards: 3, ..TinySpec::new("olmoe") }).unwrap();
    let mut shards: Vec<String> = files_of(&folder).into_iter().filter(|name| name.contains("-of-")).collect();
    {
        let mut state = scene.hub.state();
        state.files.remove("model.safetensors");
        for name in files_of(&folder) {
            state.files.insert(name.clone(), fs::read(folder.join(name)).unwrap());
        }
        state.revision = "v2".into();
    }
    let revision = ["--model-name", "org/tiny@v2"];
    let check = |more: &[&str]| {
        let rows = golden_copy("olmoe").join("data.json");
        let data = ["--dataset-path", rows.to_str().unwrap(), "--top-k-experts", "2"];
        run(scene.command(&[&["check"], &revision[..], &data[..], more].concat()))
    };
    check(&["--download"]).ok();
    let commit = scene.hub.state().commit.clone();
    let snapshot = scene.model().join("snapshots").join(&commit);
    shards.push("model.safetensors.index.json".into());
    assert!(shards.len() > 2 && shards.iter().all(|shard| snapshot.join(shard).is_file()), "{shards:?}");
    assert!(!snapshot.join("consolidated.safetensors").exists());
    assert_eq!(files_of(&scene.model().join("refs")), ["v2"]);
    check(&[]).ok();

    // A missing shard is fetched, and the others are not fetched again.
    let blob = snapshot.join(&shards[0]).canonicalize().unwrap();
    fs::remove_file(blob).unwrap();
    scene.hub.requests();
    check(&["--download"]).ok();
    let asked = scene.hub.requests();
    assert_eq!(asked.iter().filter(|request| request.starts_with("/cdn/")).count(), 1, "{asked:?}");
}

#[test]
fn of_two_processes_one_downloads() {
    let scene = Scene::new();
    let both = [(); 2].map(|()| start(scene.check(&["--download"])));
    for running in both {
        running.end().ok();
    }
    let asked = scene.hub.requests();
    assert_eq!(asked.iter().filter(|request| request.starts_with("/cdn/")).count(), 1, "{asked:?}");
}

#[cfg(feature = "mpi")]
#[test]
fn of_the_ranks_over_mpi_one_downloads() {
    for processes in [2, 3] {
        let scene = Scene::new();
        run(scene.on_processes(processes)).ok();
        assert!(scene.temp.path().join("out/expert_scores.json").is_file());
        let mut asked = scene.hub.requests();
        let requests = asked.len();
        asked.sort();
        asked.dedup();
        assert_eq!(asked.len(), requests, "each file and the list once: {asked:?}");
        assert!(asked.iter().any(|request| request.starts_with("/cdn/model.safetensors")), "{asked:?}");
    }
}

/// The ranks end together, with the code and the message of the one that asked, and the hub is asked once.
#[cfg(feature = "mpi")]
#[test]
fn a_failed_download_ends_all_ranks() {
    for processes in [2, 3] {
        let scene = Scene::new();
        scene.refuse("/api/", 403);
        let ran = run(scene.on_processes(processes)).ended(66);
        let cause = |line: &&str| line.contains("HTTP 403") && !line.contains("rank 0 stopped the run");
        assert_eq!(ran.err.lines().filter(cause).count(), 1, "{}", ran.err);
        assert_eq!(scene.hub.requests().len(), 1);

        // Later than the collective timeout would end a rank that waits without a sign of life.
        scene.hub.state().refusals.clear();
        scene.hub.state().silent = true;
        let mut command = scene.on_processes(processes);
        command.args(["--timeout", "1"]).env("HF_HUB_DOWNLOAD_TIMEOUT", "3");
        let ran = run(command).ended(74);
        assert!(ran.err.contains("nothing arrived for 3 seconds"), "{}", ran.err);
        assert!(!scene.temp.path().join("out").exists());
    }
}

#[test]
fn a_signal_ends_a_download_that_then_continues() {
    for signal in [libc::SIGTERM, libc::SIGUSR1] {
        let scene = Scene::new();
        scene.hub.state().silent = true;
        let rows = golden_copy("olmoe").join("data.json");
        let rows = rows.to_str().unwrap();
        let words = ["identify", "--model-name", ID, "--dataset-path", rows, "--top-k-experts", "2", "--download"];
        let command = || scene.command(&[&words[..], &["--output-dir", "out"]].concat());
        let mut running = start(command());
        let lock = scene.cache().join(".locks/models--org--tiny/moewarden.lock");
        assert!(running.wait_for(|| lock.exists()));
        running.signal(signal);
        running.end().failed(85, &["stopped by a signal while `org/tiny` was downloaded", "repeat the command"]);
        scene.hub.state().silent = false;
        run(command()).ok();
    }
}
