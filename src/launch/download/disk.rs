//! The cache's disk: free space, and whether a file is what the hub says.

use std::ffi::CString;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use sha1::Sha1;
use sha2::{Digest, Sha256};

/// Bytes that are hashed between two reports.
const CHUNK: usize = 1 << 20;

/// The bytes that this user may still write to the disk of `path`. `None`: unknown.
pub fn free_space(path: &Path) -> Option<u64> {
    let path = CString::new(path.as_os_str().as_bytes()).ok()?;
    // SAFETY: all fields are integers, for which zero is a value.
    let mut disk: libc::statvfs = unsafe { std::mem::zeroed() };
    // SAFETY: `path` ends with a zero byte, and `disk` may be written.
    let failed = unsafe { libc::statvfs(path.as_ptr(), &raw mut disk) } != 0;
    (!failed).then(|| disk.f_bavail as u64 * disk.f_frsize as u64)
}

/// The hash by which the hub names a file's content: SHA-256 of large files (Git LFS, Xet), else Git's hash of a blob.
pub fn content_hash(path: &Path, sha256: bool, mut read: impl FnMut(usize)) -> io::Result<String> {
    let mut file = File::open(path)?;
    let mut chunk = vec![0; CHUNK];
    let mut each = |take: &mut dyn FnMut(&[u8])| -> io::Result<()> {
        loop {
            match file.read(&mut chunk)? {
                0 => return Ok(()),
                n => {
                    take(&chunk[..n]);
                    read(n);
                }
            }
        }
    };
    let hex = |digest: &[u8]| digest.iter().map(|byte| format!("{byte:02x}")).collect();
    if sha256 {
        let mut hasher = Sha256::new();
        each(&mut |bytes| hasher.update(bytes))?;
        return Ok(hex(&hasher.finalize()));
    }
    let mut hasher = Sha1::new();
    hasher.update(format!("blob {}\0", path.metadata()?.len()));
    each(&mut |bytes| hasher.update(bytes))?;
    Ok(hex(&hasher.finalize()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hashes_are_those_of_git_and_sha256sum() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "hello\n").unwrap();
        let hash = |sha256| content_hash(file.path(), sha256, |n| assert_eq!(n, 6)).unwrap();
        assert_eq!(hash(false), "ce013625030ba8dba906f756967f9e9ca394464a", "git hash-object");
        assert_eq!(hash(true), "5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03", "sha256sum");
    }

    #[test]
    fn a_disk_has_free_space() {
        assert!(free_space(&std::env::temp_dir()).unwrap() > 0);
        assert_eq!(free_space(Path::new("/no/such/folder")), None);
    }
}
