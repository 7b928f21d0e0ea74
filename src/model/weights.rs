//! A checkpoint's weights: memory-mapped safetensors files, checked before anything is read from them.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use memmap2::Mmap;
use serde::Deserialize;

use super::json::Members;
use super::safetensors::{Header, HeaderError, StoredDtype, TensorInfo};
use crate::backend::{HostTensor, SharedBytes};
use crate::exit::{self, Coded};

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// Why a checkpoint's weights cannot be used.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the messages say it
pub enum Error {
    #[error("{0} is not a folder")]
    NoFolder(PathBuf),
    #[error(
        "{0} holds neither {SINGLE} nor {INDEX}; to try its size and speed without them, give `train` or `identify` \
         --init random"
    )]
    NoWeights(PathBuf),
    #[error(
        "{0} is a pickle, which can run code when it is read, so moewarden does not read it. Convert it with: \
         python -c \"from transformers import AutoModelForCausalLM as M; \
         M.from_pretrained('FOLDER', dtype='auto').save_pretrained('NEW_FOLDER')\", \
         then copy the tokenizer files beside the result"
    )]
    Pickle(PathBuf),
    #[error("cannot read {path}")]
    Read { path: PathBuf, source: io::Error },
    #[error("{path}: {lie}")]
    Header { path: PathBuf, lie: HeaderError },
    #[error("{path}: {message}")]
    Index { path: PathBuf, message: String },
    #[error(
        "{index}: tensor `{tensor}` is said to be in {file:?}, which is not a plain file name ending in .safetensors"
    )]
    NotAFileName { index: PathBuf, tensor: String, file: String },
    #[error("{index}: the shard {file} does not exist; is the download complete?")]
    MissingShard { index: PathBuf, file: String },
    #[error("{shard}: tensor `{tensor}` is missing, though {INDEX} says that it is there")]
    NotInShard { shard: PathBuf, tensor: String },
    #[error("{shard}: {INDEX} does not name the tensor `{tensor}`")]
    NotInIndex { shard: PathBuf, tensor: String },
    #[error("tensor `{tensor}` is in both {first} and {second}")]
    InTwoShards { tensor: String, first: String, second: String },
    #[error("{path} is a link to {target}, outside the checkpoint and its cache; replace it by the file itself")]
    LinkOutside { path: PathBuf, target: PathBuf },
    #[error(
        "{path}: tensor `{tensor}` is stored as {dtype}; moewarden reads F32, F16 and BF16 (is the model quantised?)"
    )]
    NotFloat { path: PathBuf, tensor: String, dtype: StoredDtype },
}

impl Coded for Error {
    fn exit_code(&self) -> u8 {
        match self {
            Error::NoFolder(_) | Error::NoWeights(_) => exit::NO_INPUT,
            Error::Read { source, .. } if source.kind() == io::ErrorKind::NotFound => exit::NO_INPUT,
            Error::Read { .. } => exit::IO,
            _ => exit::DATA,
        }
    }
}

/// One safetensors file, mapped into memory.
pub struct Shard {
    /// Its name within the checkpoint's folder.
    pub file: String,
    /// What it holds.
    pub header: Header,
    bytes: SharedBytes,
}

impl Shard {
    /// Maps a file and checks its header.
    ///
    /// # Errors
    /// A file that cannot be read, or whose header lies.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let read = |source| Error::Read { path: path.into(), source };
        let file = File::open(path).map_err(read)?;
        // SAFETY: the bytes must not change while they are mapped. No Rust program can enforce that on other processes;
        // checkpoints are written aside and renamed, here as by the hub's tools, so a file once seen stays as it is.
        let map = unsafe { Mmap::map(&file) }.map_err(read)?;
        let header = Header::parse(&map).map_err(|lie| Error::Header { path: path.into(), lie })?;
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let len = map.len();
        Ok(Self { file: name, header, bytes: SharedBytes::new(Arc::new(map), 0..len) })
    }

    /// The whole file.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// A tensor's value, sharing the mapped file.
    ///
    /// # Errors
    /// A number format other than F32, F16, BF16.
    pub fn value(&self, tensor: &TensorInfo) -> Result<HostTensor, Error> {
        let dtype = tensor.dtype.float().ok_or_else(|| Error::NotFloat {
            path: self.file.clone().into(),
            tensor: tensor.name.clone(),
            dtype: tensor.dtype,
        })?;
        Ok(HostTensor::new(dtype, tensor.shape.clone(), self.bytes.slice(tensor.file_range.clone())))
    }
}

/// All weights of a model, as they lie on disk.
pub struct Checkpoint {
    dir: PathBuf,
    sharded: bool,
    shards: Vec<Shard>,
    places: HashMap<String, (usize, usize)>,
}

impl Checkpoint {
    /// Maps the weights of the model in this folder: `model.safetensors`, or else the shards that
    /// `model.safetensors.index.json` names.
    ///
    /// # Errors
    /// Weights that are missing, pickled, or contradict the format, the index or each other; links that leave the
    /// checkpoint. Every message names the file and the tensor.
    pub fn open(dir: &Path) -> Result<Self, Error> {
        if !dir.is_dir() {
            return Err(Error::NoFolder(dir.into()));
        }
        let index = dir.join(INDEX);
        let sharded = !dir.join(SINGLE).exists();
        let (files, claims) = match sharded {
            false => (vec![SINGLE.to_string()], None),
            true if index.exists() => {
                let claims = read_index(&safe_file(dir, INDEX)?)?;
                (files_of(&index, &claims)?, Some(claims))
            }
            true => return Err(no_weights(dir)),
        };

        let mut checkpoint = Self { dir: dir.into(), sharded, shards: Vec::new(), places: HashMap::new() };
        for file in files {
            if fs::symlink_metadata(dir.join(&file)).is_err() {
                return Err(Error::MissingShard { index, file });
            }
            let mut shard = Shard::open(&safe_file(dir, &file)?)?;
            shard.file = file; // a link's own name, not its target's
            checkpoint.add(shard)?;
        }
        if let Some(claims) = claims {
            checkpoint.check_index(&claims)?;
        }
        Ok(checkpoint)
    }

    /// The folder it was opened from.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The name of the index file, where there is one.
    pub fn index_file(&self) -> Option<&'static str> {
        self.sharded.then_some(INDEX)
    }

    /// The files, in the order of their names.
    pub fn shards(&self) -> &[Shard] {
        &self.shards
    }

    /// All tensors with their files: the files in order, each file's tensors in the order of its header.
    pub fn tensors(&self) -> impl Iterator<Item = (&Shard, &TensorInfo)> {
        self.shards.iter().flat_map(|shard| shard.header.tensors.iter().map(move |tensor| (shard, tensor)))
    }

    /// The tensor of this name and the file that holds it.
    pub fn get(&self, name: &str) -> Option<(&Shard, &TensorInfo)> {
        let &(shard, tensor) = self.places.get(name)?;
        let shard = &self.shards[shard];
        Some((shard, &shard.header.tensors[tensor]))
    }

    /// Which file holds the tensor of this name: its place in [`Self::shards`].
    pub fn shard_of(&self, name: &str) -> Option<usize> {
        self.places.get(name).map(|&(shard, _)| shard)
    }

    /// A hash of the structure: file names and headers, that is all names, shapes, formats and places, but no weight.
    pub fn layout_hash(&self) -> blake3::Hash {
        let mut hasher = blake3::Hasher::new();
        for shard in &self.shards {
            hasher.update(&(shard.file.len() as u64).to_le_bytes()).update(shard.file.as_bytes());
            hasher.update(&shard.bytes()[..shard.header.len]); // says its own length
        }
        hasher.finalize()
    }

    fn add(&mut self, shard: Shard) -> Result<(), Error> {
        for (place, tensor) in shard.header.tensors.iter().enumerate() {
            if let Some((other, _)) = self.places.insert(tensor.name.clone(), (self.shards.len(), place)) {
                let first = self.shards[other].file.clone();
                return Err(Error::InTwoShards { tensor: tensor.name.clone(), first, second: shard.file });
            }
        }
        self.shards.push(shard);
        Ok(())
    }

    /// The index and the shards say the same about every tensor.
    fn check_index(&self, claims: &[(String, String)]) -> Result<(), Error> {
        for (tensor, file) in claims {
            if self.get(tensor).is_none_or(|(shard, _)| shard.file != *file) {
                return Err(Error::NotInShard { shard: self.dir.join(file), tensor: tensor.clone() });
            }
        }
        if claims.len() < self.places.len() {
            let named: std::collections::HashSet<_> = claims.iter().map(|(tensor, _)| tensor.as_str()).collect();
            let extra = self.tensors().find(|(_, tensor)| !named.contains(tensor.name.as_str()));
            let (shard, tensor) = extra.expect("more tensors than names");
            return Err(Error::NotInIndex { shard: self.dir.join(&shard.file), tensor: tensor.name.clone() });
        }
        Ok(())
    }
}

/// The index's `weight_map`: tensor → file.
fn read_index(path: &Path) -> Result<Vec<(String, String)>, Error> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: Members<String>,
    }
    let text = fs::read(path).map_err(|source| Error::Read { path: path.into(), source })?;
    let index: Index = serde_json::from_slice(&text)
        .map_err(|e| Error::Index { path: path.into(), message: format!("is not an index of shards: {e}") })?;
    if index.weight_map.0.is_empty() {
        return Err(Error::Index { path: path.into(), message: "its weight_map is empty".into() });
    }
    Ok(index.weight_map.0)
}

/// The distinct file names of an index, sorted.
fn files_of(index: &Path, claims: &[(String, String)]) -> Result<Vec<String>, Error> {
    let mut files = std::collections::BTreeSet::new();
    for (tensor, file) in claims {
        if !files.contains(file) {
            // What the index says becomes part of a path, for reading and for export.
            if !is_plain_name(file) || !file.ends_with(".safetensors") {
                return Err(Error::NotAFileName { index: index.into(), tensor: tensor.clone(), file: file.clone() });
            }
            files.insert(file.clone());
        }
    }
    Ok(files.into_iter().collect())
}

/// One visible component of a path, on any system.
fn is_plain_name(file: &str) -> bool {
    !file.starts_with('.') && !file.is_empty() && !file.contains(['/', '\\', ':', '\0'])
}

/// The path of a file of the model in `dir`, links followed. A link may lead to a file in the folder itself or, as
/// the hub's cache is built (`snapshots/COMMIT/file` → `blobs/HASH`), to the `blobs` of the same model.
///
/// # Errors
/// A file that is not there, and a link that leads elsewhere.
pub fn safe_file(dir: &Path, file: impl AsRef<Path>) -> Result<PathBuf, Error> {
    let path = dir.join(file.as_ref());
    let real = |path: &Path| path.canonicalize().map_err(|source| Error::Read { path: path.into(), source });
    let (dir, target) = (real(dir)?, real(&path)?);
    let snapshots = dir.parent().filter(|parent| parent.ends_with("snapshots"));
    let blobs = snapshots.and_then(Path::parent).map(|model| model.join("blobs"));
    if target.starts_with(&dir) || blobs.is_some_and(|blobs| target.starts_with(blobs)) {
        Ok(target)
    } else {
        Err(Error::LinkOutside { path, target })
    }
}

/// What to say about a folder without safetensors.
fn no_weights(dir: &Path) -> Error {
    let names = fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path());
    let mut pickles: Vec<_> = names
        .filter(|path| path.extension().is_some_and(|e| ["bin", "pt", "pth", "ckpt"].iter().any(|pickle| e == *pickle)))
        .collect();
    pickles.sort();
    pickles.into_iter().next().map_or_else(|| Error::NoWeights(dir.into()), Error::Pickle)
}
