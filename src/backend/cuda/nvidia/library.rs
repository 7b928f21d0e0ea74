//! Finds NVIDIA's libraries at run time. None of them is needed to build, test or start the program.
//!
//! cudarc searches for libraries by name only, without the name `libnccl.so.2`; it prefers an unversioned `.so` to the
//! one that fits the driver, and panics if a library or a function is missing. So NVRTC, cuBLAS and NCCL are opened
//! here, by path if the loader does not know them, and called through small function tables (`nvrtc.rs`, `cublas.rs`,
//! `collective::nccl`). Errors and the log name the files that are used. The driver is called through cudarc; it is
//! opened here first, and stays open, so that cudarc finds it loaded.

use std::error::Error as _;
use std::ffi::{CStr, OsStr, OsString, c_void};
use std::path::{Path, PathBuf};

use libloading::os::unix::{Library as Handle, RTLD_LOCAL, RTLD_NOW};

use super::Error;
pub use super::names::Library;

/// The environment variables that control the search.
#[derive(Debug, Clone, Default)]
pub struct Surroundings {
    /// `LD_LIBRARY_PATH`. The loader uses it; here it is only for messages.
    loader: OsString,
    /// `CUDA_HOME` and `CUDA_PATH`.
    toolkits: Vec<PathBuf>,
    /// `PATH`.
    path: Vec<PathBuf>,
    /// `VIRTUAL_ENV`, `CONDA_PREFIX` and `~/.local`: folders that may have `lib/python3.*`.
    prefixes: Vec<PathBuf>,
    /// `PYTHONPATH`: folders of Python packages.
    packages: Vec<PathBuf>,
}

impl Surroundings {
    /// Reads the variables.
    pub fn read(variable: impl Fn(&str) -> Option<OsString>) -> Self {
        let variable = |name: &str| variable(name).filter(|value| !value.is_empty());
        let list = |name| variable(name).map_or(Vec::new(), |value| std::env::split_paths(&value).collect());
        let folder = |name| variable(name).map(PathBuf::from);
        Self {
            loader: variable("LD_LIBRARY_PATH").unwrap_or_default(),
            toolkits: ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(folder).collect(),
            path: list("PATH"),
            prefixes: [folder("VIRTUAL_ENV"), folder("CONDA_PREFIX"), folder("HOME").map(|home| home.join(".local"))]
                .into_iter()
                .flatten()
                .collect(),
            packages: list("PYTHONPATH"),
        }
    }
}

/// The file system operations of the search.
trait Files {
    fn is_file(&self, path: &Path) -> bool;
    /// Names in a folder, sorted; empty if there is no such folder.
    fn names(&self, folder: &Path) -> Vec<OsString>;
}

struct Disk;

impl Files for Disk {
    fn is_file(&self, path: &Path) -> bool {
        path.is_file()
    }

    fn names(&self, folder: &Path) -> Vec<OsString> {
        let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
        let mut names: Vec<_> = entries.map(|entry| entry.file_name()).collect();
        names.sort();
        names
    }
}

/// The result of a search: the candidates to open, in order.
#[derive(Debug, PartialEq, Eq)]
struct Search {
    /// Names for the loader, which has its own search path, then paths of existing files.
    candidates: Vec<PathBuf>,
    /// The searched places, for the error message.
    looked_in: Vec<String>,
}

/// Searches the folders outside the loader's path: toolkits, then Python packages.
fn search(library: Library, major: u32, surroundings: &Surroundings, files: &dyn Files) -> Search {
    let names = library.names(major);
    let mut found = Search {
        candidates: names.iter().map(PathBuf::from).collect(),
        looked_in: vec![match surroundings.loader.to_string_lossy() {
            path if path.is_empty() => "the loader's folders (LD_LIBRARY_PATH is not set)".into(),
            path => format!("the loader's folders and LD_LIBRARY_PATH={path}"),
        }],
    };
    let mut look = |what: &str, folders: Vec<PathBuf>| {
        for folder in &folders {
            found.candidates.extend(names.iter().map(|name| folder.join(name)).filter(|path| files.is_file(path)));
        }
        let shown: Vec<_> = folders.iter().map(|folder| folder.display().to_string()).collect();
        found.looked_in.push(if shown.is_empty() { format!("{what}: none") } else { shown.join(", ") });
    };

    if library == Library::Driver {
        // The folders of WSL, NVIDIA's containers and NixOS.
        let folders = ["/usr/lib/wsl/lib", "/usr/local/nvidia/lib64", "/run/opengl-driver/lib"];
        look("", folders.map(PathBuf::from).into());
        return found;
    }

    let lib = |home: PathBuf| [home.join("lib64"), home.join("targets/x86_64-linux/lib")];
    look("CUDA_HOME and CUDA_PATH", surroundings.toolkits.iter().cloned().flat_map(lib).collect());
    // /usr/local/cuda, the administrator's choice, then the versions, newest first.
    let mut installed = listed(files, Path::new("/usr/local"), |name| name.starts_with("cuda"));
    installed.reverse();
    installed.sort_by_key(|home| home.file_name() != Some(OsStr::new("cuda")));
    look("/usr/local/cuda*", installed.into_iter().flat_map(lib).collect());

    // Libraries in wheels: PACKAGES/nvidia/cu13/lib, and PACKAGES/nvidia/LIBRARY/lib of CUDA 12 and of NCCL.
    let python = surroundings.path.iter().find(|folder| files.is_file(&folder.join("python3")));
    let python = python.and_then(|bin| bin.parent()).map(Path::to_owned);
    let prefixes: Vec<_> = surroundings.prefixes.iter().cloned().chain(python).collect();
    let mut packages = surroundings.packages.clone();
    for prefix in &prefixes {
        for version in listed(files, &prefix.join("lib"), |name| name.starts_with("python3")) {
            packages.extend(["site-packages", "dist-packages"].map(|kind| version.join(kind)));
        }
    }
    let wheels = packages.iter().flat_map(|folder| listed(files, &folder.join("nvidia"), |_| true));
    let wheels = wheels.map(|package| package.join("lib")).filter(|lib| !files.names(lib).is_empty()).collect();
    look(
        "Python packages nvidia/*/lib of the python3 on PATH, VIRTUAL_ENV, CONDA_PREFIX, ~/.local, PYTHONPATH",
        wheels,
    );
    // conda's CUDA packages.
    look("CONDA_PREFIX", prefixes.into_iter().map(|prefix| prefix.join("lib")).collect());
    found
}

fn listed(files: &dyn Files, folder: &Path, wanted: impl Fn(&str) -> bool) -> Vec<PathBuf> {
    let names = files.names(folder).into_iter().filter(|name| wanted(&name.to_string_lossy()));
    names.map(|name| folder.join(name)).collect()
}

/// An open library. It is never closed: CUDA's libraries do not support unloading well.
#[derive(Debug)]
pub struct Open {
    library: Library,
    handle: &'static Handle,
    /// The loaded file.
    pub path: PathBuf,
}

impl Open {
    /// The function of this name.
    ///
    /// # Safety
    /// `F` must be a function pointer of the function's C type.
    pub(super) unsafe fn function<F: Copy>(&self, name: &CStr) -> Result<F, Error> {
        // SAFETY: the caller's contract.
        let found = unsafe { self.handle.get::<F>(name.to_bytes_with_nul()) };
        found.map(|symbol| *symbol).map_err(|_| Error::Function {
            library: self.library,
            path: self.path.clone(),
            name: name.to_string_lossy().into_owned(),
        })
    }
}

/// Opens the first candidate of a library that can be opened. `major` is the CUDA version of the driver.
///
/// # Errors
/// [`Error::Missing`] with the searched places.
pub fn open(library: Library, major: u32, surroundings: &Surroundings) -> Result<Open, Error> {
    let Search { candidates, looked_in } = search(library, major, surroundings, &Disk);
    let mut refused = Vec::new();
    for candidate in candidates {
        match open_at(library, &candidate) {
            Ok(open) => return Ok(open),
            // A name that the loader does not find is the usual case; a file that cannot be loaded is reported.
            Err(why) => {
                let absent = format!("{}: cannot open shared object file", candidate.display());
                if candidate.is_absolute() || !why.starts_with(&absent) {
                    refused.push(why);
                }
            }
        }
    }
    let names = library.names(major).join(" or ");
    Err(Error::Missing { library, names, looked_in, refused, remedy: library.remedy(major) })
}

/// Opens this file, or the one that the loader finds by this name.
fn open_at(library: Library, path: &Path) -> Result<Open, String> {
    if let (Some(companion), Some(folder), true) = (library.companion(), path.parent(), path.is_absolute()) {
        for path in listed(&Disk, folder, |name| name.starts_with(companion)) {
            // It stays open, too. If it cannot be loaded, opening the library itself reports an error.
            _ = load(&path).map(Handle::into_raw);
        }
    }
    let handle = load(path)?;
    // SAFETY: it is not called; only its address is used.
    let probe = unsafe { handle.get::<*const c_void>(library.probe().to_bytes_with_nul()) };
    let probe = *probe.map_err(|_| format!("{} lacks {}", path.display(), library.probe().to_string_lossy()))?;
    Ok(Open { library, handle: Box::leak(Box::new(handle)), path: file_of(probe).unwrap_or_else(|| path.to_owned()) })
}

fn load(path: &Path) -> Result<Handle, String> {
    // SAFETY: NVIDIA's libraries may be loaded from any thread; their initializers only set up their own state.
    unsafe { Handle::open(Some(path), RTLD_NOW | RTLD_LOCAL) }.map_err(|e| {
        // The loader's message, with the path, is the source of the error.
        e.source().map_or_else(|| e.to_string(), ToString::to_string)
    })
}

/// The file that contains this address.
fn file_of(address: *const c_void) -> Option<PathBuf> {
    use std::os::unix::ffi::OsStrExt;
    // SAFETY: all zeros is a valid Dl_info, and dladdr takes any address.
    let mut info: libc::Dl_info = unsafe { std::mem::zeroed() };
    // SAFETY: dladdr takes any address, and `info` outlives the call.
    let known = unsafe { libc::dladdr(address, &mut info) } != 0 && !info.dli_fname.is_null();
    // SAFETY: the loader's string lives as long as the library, which is never closed.
    known.then(|| PathBuf::from(OsStr::from_bytes(unsafe { CStr::from_ptr(info.dli_fname) }.to_bytes())))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A file system with only these paths.
    struct Fake(Vec<&'static str>);

    impl Files for Fake {
        fn is_file(&self, path: &Path) -> bool {
            self.0.iter().any(|file| Path::new(file) == path)
        }

        fn names(&self, folder: &Path) -> Vec<OsString> {
            let below = self.0.iter().filter_map(|file| Path::new(file).strip_prefix(folder).ok());
            let mut names: Vec<_> = below.filter_map(|rest| Some(rest.iter().next()?.to_owned())).collect();
            names.sort();
            names.dedup();
            names
        }
    }

    fn surroundings(variables: &[(&str, &str)]) -> Surroundings {
        Surroundings::read(|name| Some(variables.iter().find(|(n, _)| *n == name)?.1.into()))
    }

    fn candidates(library: Library, major: u32, variables: &[(&str, &str)], files: &[&'static str]) -> Vec<String> {
        let found = search(library, major, &surroundings(variables), &Fake(files.to_vec()));
        found.candidates.iter().map(|path| path.display().to_string()).collect()
    }

    #[test]
    fn the_loader_is_asked_first_and_the_driver_limits_the_version() {
        assert_eq!(candidates(Library::Nvrtc, 13, &[], &[]), ["libnvrtc.so.13", "libnvrtc.so.12"]);
        assert_eq!(
            candidates(Library::Nvrtc, 12, &[], &["/usr/local/cuda-13.0/lib64/libnvrtc.so.13"]),
            ["libnvrtc.so.12"]
        );
        assert_eq!(candidates(Library::Cublas, 14, &[], &[]), ["libcublas.so.13", "libcublas.so.12"]);
        assert_eq!(candidates(Library::Nccl, 13, &[], &[]), ["libnccl.so.2"]);
        assert_eq!(
            candidates(Library::Driver, 13, &[], &["/usr/lib/wsl/lib/libcuda.so.1"]),
            ["libcuda.so.1", "/usr/lib/wsl/lib/libcuda.so.1"]
        );
    }

    #[test]
    fn toolkits_come_before_wheels_and_the_chosen_toolkit_before_others() {
        let files = [
            "/usr/local/cuda-12.4/lib64/libcublas.so.12",
            "/usr/local/cuda-13.0/lib64/libcublas.so.13",
            "/usr/local/cuda/lib64/libcublas.so.12",
            "/opt/cuda/lib64/libcublas.so.13",
            "/opt/cuda/lib64/libcublas.so.11",
            "/v/lib/python3.12/site-packages/nvidia/cublas/lib/libcublas.so.12",
        ];
        let found = candidates(Library::Cublas, 13, &[("CUDA_HOME", "/opt/cuda"), ("VIRTUAL_ENV", "/v")], &files);
        assert_eq!(
            found[2..],
            [
                "/opt/cuda/lib64/libcublas.so.13",
                "/usr/local/cuda/lib64/libcublas.so.12",
                "/usr/local/cuda-13.0/lib64/libcublas.so.13",
                "/usr/local/cuda-12.4/lib64/libcublas.so.12",
                "/v/lib/python3.12/site-packages/nvidia/cublas/lib/libcublas.so.12",
            ]
        );
    }

    #[test]
    fn wheels_are_found_through_the_first_python_and_environments() {
        let files = [
            "/a/bin/python3",
            "/a/lib/python3.11/site-packages/nvidia/nccl/lib/libnccl.so.2",
            "/b/bin/python3",
            "/b/lib/python3.11/site-packages/nvidia/nccl/lib/libnccl.so.2",
            "/conda/lib/libnccl.so.2",
            "/home/u/.local/lib/python3.9/site-packages/nvidia/nccl/lib/libnccl.so.2",
            "/target/nvidia/nccl/lib/libnccl.so.2",
            "/usr/lib/python3/dist-packages/nvidia/nccl/lib/libnccl.so.2",
        ];
        let variables = [
            ("PATH", "/nowhere:/a/bin:/b/bin"),
            ("HOME", "/home/u"),
            ("CONDA_PREFIX", "/conda"),
            ("PYTHONPATH", "/target"),
            ("VIRTUAL_ENV", ""),
        ];
        assert_eq!(
            candidates(Library::Nccl, 13, &variables, &files)[1..],
            [
                "/target/nvidia/nccl/lib/libnccl.so.2",
                "/home/u/.local/lib/python3.9/site-packages/nvidia/nccl/lib/libnccl.so.2",
                "/a/lib/python3.11/site-packages/nvidia/nccl/lib/libnccl.so.2",
                "/conda/lib/libnccl.so.2",
            ]
        );
        let system =
            candidates(Library::Nccl, 13, &[("PATH", "/usr/bin")], &[&files[..], &["/usr/bin/python3"]].concat());
        assert_eq!(system[1..], ["/usr/lib/python3/dist-packages/nvidia/nccl/lib/libnccl.so.2"]);
    }

    #[test]
    fn the_message_names_every_place() {
        let variables = [("LD_LIBRARY_PATH", "/x:/y"), ("CUDA_HOME", "/opt/cuda"), ("VIRTUAL_ENV", "/v")];
        let files = Fake(vec!["/v/lib/python3.12/site-packages/nvidia/cu13/lib/libother.so.1"]);
        let Search { looked_in, .. } = search(Library::Nvrtc, 13, &surroundings(&variables), &files);
        let error = Error::Missing {
            library: Library::Nvrtc,
            names: Library::Nvrtc.names(13).join(" or "),
            looked_in,
            refused: vec!["/z/libnvrtc.so.13: file too short".into()],
            remedy: Library::Nvrtc.remedy(13),
        };
        let message = error.to_string();
        for part in [
            "NVRTC",
            "libnvrtc.so.13 or libnvrtc.so.12",
            "LD_LIBRARY_PATH=/x:/y",
            "/opt/cuda/lib64",
            "/usr/local/cuda*: none",
            "/v/lib/python3.12/site-packages/nvidia/cu13/lib",
            "/z/libnvrtc.so.13: file too short",
            "pip install nvidia-cuda-nvrtc",
        ] {
            assert!(message.contains(part), "{part} is not in: {message}");
        }
    }

    #[test]
    fn what_is_not_a_library_is_refused_with_the_systems_words() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("libnccl.so.2");
        std::fs::write(&path, "nothing of the kind").unwrap();
        let why = open_at(Library::Nccl, &path).unwrap_err();
        assert!(why.contains("libnccl.so.2") && why.contains("too short"), "{why}");
        // A real library, but not the one its name suggests.
        let why = open_at(Library::Nccl, Path::new("libc.so.6")).unwrap_err();
        assert!(why.contains("ncclGetVersion"), "{why}");
    }
}
