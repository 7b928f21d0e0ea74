//! A checkpoint's weights: memory-mapped safetensors files whose headers are validated before a tensor is read.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

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
#[allow(missing_docs)] // the messages are the documentation
pub enum Error {
    #[error("{0} is not a folder")]
    NoFolder(PathBuf),
    #[error(
        "{0} holds neither {SINGLE} nor {INDEX}; to measure memory and speed without weights, run `train` or `identify` \
         with --init random"
    )]
    NoWeights(PathBuf),
    #[error(
        "{0} is a pickle file, which can run code when it is loaded, so moewarden does not load it. Convert it with: \
         python -c \"from transformers import AutoModelForCausalLM as M; \
         M.from_pretrained('FOLDER', dtype='auto').save_pretrained('NEW_FOLDER')\", \
         then copy the tokenizer files into NEW_FOLDER"
    )]
    Pickle(PathBuf),
    #[error("cannot read {path}")]
    Read { path: PathBuf, source: io::Error },
    #[error("{path}: {reason}")]
    Header { path: PathBuf, reason: HeaderError },
    #[error("{path}: {message}")]
    Index { path: PathBuf, message: String },
    #[error(
        "{index}: the file of tensor `{tensor}` is {file:?}, which is not a plain file name ending in .safetensors"
    )]
    NotAFileName { index: PathBuf, tensor: String, file: String },
    #[error("{index}: the shard {file} does not exist; is the download complete?")]
    MissingShard { index: PathBuf, file: String },
    #[error("{shard}: tensor `{tensor}` is missing, but {INDEX} lists it in this file")]
    NotInShard { shard: PathBuf, tensor: String },
    #[error("{shard}: {INDEX} does not name the tensor `{tensor}`")]
    NotInIndex { shard: PathBuf, tensor: String },
    #[error("tensor `{tensor}` is in both {first} and {second}")]
    InTwoShards { tensor: String, first: String, second: String },
    #[error(
        "{path} is a symbolic link to {target}, outside the checkpoint and its cache; replace the link by the file"
    )]
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

/// One memory-mapped safetensors file.
pub struct Shard {
    /// File name in the checkpoint's folder.
    pub file: String,
    /// Its validated header.
    pub header: Header,
    bytes: SharedBytes,
}

impl Shard {
    /// Maps a file and validates its header.
    ///
    /// # Errors
    /// A file that cannot be read, or an invalid header.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let read = |source| Error::Read { path: path.into(), source };
        let file = File::open(path).map_err(read)?;
        // SAFETY: the bytes must not change while they are mapped. A program cannot enforce that on other processes, but
        // moewarden and the hub's tools write to a temporary file and rename it, so a visible file does not change.
        let map = unsafe { Mmap::map(&file) }.map_err(read)?;
        let header = Header::parse(&map).map_err(|reason| Error::Header { path: path.into(), reason })?;
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        Ok(Self { file: name, header, bytes: SharedBytes::mapped(map) })
    }

    /// The whole file.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// A tensor's value; it shares the mapped memory.
    ///
    /// # Errors
    /// A number format other than F32, F16 and BF16.
    pub fn value(&self, tensor: &TensorInfo) -> Result<HostTensor, Error> {
        let dtype = tensor.dtype.float().ok_or_else(|| Error::NotFloat {
            path: self.file.clone().into(),
            tensor: tensor.name.clone(),
            dtype: tensor.dtype,
        })?;
        Ok(HostTensor::new(dtype, tensor.shape.clone(), self.bytes.slice(tensor.file_range.clone())))
    }
}

/// All weights of a model as stored on disk.
pub struct Checkpoint {
    dir: PathBuf,
    sharded: bool,
    shards: Vec<Shard>,
    /// Tensor name → (shard, index in its header).
    index: HashMap<String, (usize, usize)>,
}

impl Checkpoint {
    /// Maps the weights of the model in this folder: `model.safetensors`, or else the shards that
    /// `model.safetensors.index.json` names.
    ///
    /// # Errors
    /// Weights that are missing or pickled, files that violate the format or contradict the index or each other, symbolic
    /// links out of the checkpoint. Each error names the file and the tensor.
    pub fn open(dir: &Path) -> Result<Self, Error> {
        if !dir.is_dir() {
            return Err(Error::NoFolder(dir.into()));
        }
        let index = dir.join(INDEX);
        let sharded = !dir.join(SINGLE).exists();
        let (files, weight_map) = match sharded {
            false => (vec![SINGLE.to_string()], None),
            true if index.exists() => {
                let weight_map = read_index(&safe_file(dir, INDEX)?)?;
                (files_of(&index, &weight_map)?, Some(weight_map))
            }
            true => return Err(no_weights(dir)),
        };

        let mut checkpoint = Self { dir: dir.into(), sharded, shards: Vec::new(), index: HashMap::new() };
        for file in files {
            if fs::symlink_metadata(dir.join(&file)).is_err() {
                return Err(Error::MissingShard { index, file });
            }
            let mut shard = Shard::open(&safe_file(dir, &file)?)?;
            shard.file = file; // the name of a symbolic link, not of its target
            checkpoint.add(shard)?;
        }
        if let Some(weight_map) = weight_map {
            checkpoint.check_index(&weight_map)?;
        }
        Ok(checkpoint)
    }

    /// The folder it was opened from.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Name of the index file, if the weights are sharded.
    pub fn index_file(&self) -> Option<&'static str> {
        self.sharded.then_some(INDEX)
    }

    /// The files, sorted by name.
    pub fn shards(&self) -> &[Shard] {
        &self.shards
    }

    /// All tensors with their files: files sorted by name, tensors in the order of the header.
    pub fn tensors(&self) -> impl Iterator<Item = (&Shard, &TensorInfo)> {
        self.shards.iter().flat_map(|shard| shard.header.tensors.iter().map(move |tensor| (shard, tensor)))
    }

    /// The tensor with this name and the file that holds it.
    pub fn get(&self, name: &str) -> Option<(&Shard, &TensorInfo)> {
        let &(shard, tensor) = self.index.get(name)?;
        let shard = &self.shards[shard];
        Some((shard, &shard.header.tensors[tensor]))
    }

    /// Index in [`Self::shards`] of the file that holds the tensor with this name.
    pub fn shard_of(&self, name: &str) -> Option<usize> {
        self.index.get(name).map(|&(shard, _)| shard)
    }

    /// Hash of file names and headers: all names, shapes, number formats and offsets, but no weights.
    pub fn layout_hash(&self) -> blake3::Hash {
        let mut hasher = blake3::Hasher::new();
        for shard in &self.shards {
            hasher.update(&(shard.file.len() as u64).to_le_bytes()).update(shard.file.as_bytes());
            hasher.update(&shard.bytes()[..shard.header.len]); // begins with its length
        }
        hasher.finalize()
    }

    fn add(&mut self, shard: Shard) -> Result<(), Error> {
        for (i, tensor) in shard.header.tensors.iter().enumerate() {
            if let Some((other, _)) = self.index.insert(tensor.name.clone(), (self.shards.len(), i)) {
                let first = self.shards[other].file.clone();
                return Err(Error::InTwoShards { tensor: tensor.name.clone(), first, second: shard.file });
            }
        }
        self.shards.push(shard);
        Ok(())
    }

    /// Checks that the index and the shards list the same tensors in the same files.
    fn check_index(&self, weight_map: &[(String, String)]) -> Result<(), Error> {
        for (tensor, file) in weight_map {
            if self.get(tensor).is_none_or(|(shard, _)| shard.file != *file) {
                return Err(Error::NotInShard { shard: self.dir.join(file), tensor: tensor.clone() });
            }
        }
        if weight_map.len() < self.index.len() {
            let named: std::collections::HashSet<_> = weight_map.iter().map(|(tensor, _)| tensor.as_str()).collect();
            let extra = self.tensors().find(|(_, tensor)| !named.contains(tensor.name.as_str()));
            let (shard, tensor) = extra.expect("more tensors than names");
            return Err(Error::NotInIndex { shard: self.dir.join(&shard.file), tensor: tensor.name.clone() });
        }
        Ok(())
    }
}

/// `weight_map` of the index file: tensor → file.
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
fn files_of(index: &Path, weight_map: &[(String, String)]) -> Result<Vec<String>, Error> {
    let mut files = std::collections::BTreeSet::new();
    for (tensor, file) in weight_map {
        if !files.contains(file) {
            // The name becomes part of a path, for reading and for export.
            if !is_plain_name(file) || !file.ends_with(".safetensors") {
                return Err(Error::NotAFileName { index: index.into(), tensor: tensor.clone(), file: file.clone() });
            }
            files.insert(file.clone());
        }
    }
    Ok(files.into_iter().collect())
}

/// Whether it is a single path component on any system, and not hidden.
fn is_plain_name(file: &str) -> bool {
    !file.starts_with('.') && !file.is_empty() && !file.contains(['/', '\\', ':', '\0'])
}

/// The path of a file of the model in `dir`, with symbolic links resolved. A link may point into the folder itself or, as in
/// the hub's cache (`snapshots/COMMIT/file` → `blobs/HASH`), to the `blobs` of the same model.
///
/// # Errors
/// A file that does not exist, and a link to any other target.
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

/// The error for a folder without safetensors: it names a pickle file, if there is one.
fn no_weights(dir: &Path) -> Error {
    let names = fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path());
    let mut pickles: Vec<_> = names
        .filter(|path| path.extension().is_some_and(|e| ["bin", "pt", "pth", "ckpt"].iter().any(|pickle| e == *pickle)))
        .collect();
    pickles.sort();
    pickles.into_iter().next().map_or_else(|| Error::NoWeights(dir.into()), Error::Pickle)
}
